"""Greedy answers to 200 random prompts are transformers', whatever happens to them on the way.

The tie rule: where transformers' two largest logits lie within 1e-4, either id may come; what follows is judged after
the id that came.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gristmill.hub import SpecialIds, in_memory, write_published
from gristmill.inference import Engine, EngineConfig, Request, Sampling, Stream
from gristmill.model import Transformer

Tiny = Callable[..., Transformer]
DBRX = {"moe_num_experts": 8, "moe_top_k": 4, "n_heads": 8, "clip_qkv": 1.5}
QWEN = {"norm": "rms_norm", "qk_norm": True, "head_size": 16, "clip_qkv": None, "moe_num_experts": 16, "moe_top_k": 4}
NEW, TIE = 16, 1e-4
GREEDY = Sampling(temperature=0.0)


def ids(stream: Stream) -> list[int]:
    return [token.id for piece in stream for token in piece.tokens]


@pytest.mark.parametrize("changes", [DBRX, QWEN])
def test_greedy_text_of_100_prompts_is_transformers_alone_batched_preempted_chunked_and_after_prefix_hits(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model, chance = tiny(max_seq_len=256, **changes), random.Random(0)
    special = SpecialIds(eot_id=292, pad_id=297, im_end_id=299)
    write_published(tmp_path, model.cfg, in_memory(model.state_dict()), special)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True).eval()
    shared = [[chance.randrange(290) for _ in range(40)] for _ in range(5)]
    prompts = [
        (
            chance.choice(shared)[: chance.randrange(41)]
            + [chance.randrange(290) for _ in range(chance.randrange(1, 60))]
        )
        for _ in range(100)
    ]
    requests = [Request(prompt=prompt, max_tokens=NEW, sampling=GREEDY) for prompt in prompts]

    def made(cfg: EngineConfig) -> tuple[list[list[int]], Engine]:
        engine = Engine(model, cfg)
        streams = [engine.submit(request) for request in requests]
        return [ids(stream) for stream in streams], engine

    roomy = EngineConfig(cache_tokens=16384, prefix_cache=False)
    alone = Engine(model, roomy)
    answers = [ids(alone.submit(request)) for request in requests]
    assert made(roomy)[0] == answers
    assert made(replace(roomy, token_budget=8, max_running=5))[0] == answers  # in chunks, beside others' decoding
    tight = Engine(model, EngineConfig(cache_tokens=320, max_running=12, token_budget=32))
    streams = []
    for request in requests:  # each comes before those that are under way
        streams.append(tight.submit(replace(request, priority=100 - len(streams))))
        tight.step()
    assert [ids(stream) for stream in streams] == answers
    assert sum(stream.choices[0].job.num_preemptions for stream in streams) > 20
    again = Engine(model, EngineConfig(cache_tokens=16384))
    for _ in range(2):  # the second time, what the first one computed is found
        assert [ids(again.submit(request)) for request in requests] == answers

    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert bool((logits.amax(1) - chosen <= TIE).all())

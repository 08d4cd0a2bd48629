"""Experts on disk: the same answers in less memory, and a bound that is kept."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.errors import InputError
from gristmill.hub import SpecialIds, in_memory, write_published, write_weights
from gristmill.inference import Engine, EngineConfig, Request, Sampling, load_engine, memory
from gristmill.inference.disk import ExpertCache
from gristmill.inference.layers import NativeLayers
from gristmill.inference.memory import resident_bytes
from gristmill.inference.scheduler import CACHE_TOKENS
from gristmill.kernels import native
from gristmill.kernels.packed import pack_experts
from gristmill.model import Transformer

Tiny = Callable[..., Transformer]
pytestmark = pytest.mark.skipif(native.available() == ["torch"], reason="the native kernels were not built")
DBRX = {"moe_num_experts": 16, "moe_top_k": 4, "n_layers": 3}
QWEN = {"norm": "rms_norm", "qk_norm": True, "head_size": 6, "clip_qkv": None, "moe_num_experts": 16, "moe_top_k": 3}


def answers(engine: Engine) -> list[list[Any]]:
    chance = random.Random(0)
    streams = [
        engine.submit(
            Request(
                prompt=[chance.randrange(300) for _ in range(chance.randrange(1, 50))],
                max_tokens=14,
                sampling=Sampling(temperature=1.0, seed=number),
                logprobs=2,
            )
        )
        for number in range(6)
    ]
    return [[token for piece in stream for token in piece.tokens] for stream in streams]


@pytest.mark.parametrize("changes", [DBRX, QWEN])
def test_any_number_of_experts_in_memory_gives_the_same_bits(tiny: Tiny, changes: dict[str, Any]) -> None:
    model, cfg = tiny(**changes), EngineConfig(cache_tokens=1024, max_running=4, token_budget=32)
    weights, expert = in_memory(model.state_dict()), pack_experts(*(torch.zeros(24, 32) for _ in range(3)))
    wanted = answers(Engine(model, cfg))
    for slots in (16, 17, 25, 1000):
        layers = NativeLayers(model, weights, slots * expert.blocks.nbytes)
        assert answers(Engine(model, cfg, layers=layers)) == wanted
        assert layers.cache is not None
        assert layers.cache.hits > 0
        assert (layers.cache.misses > 16 * model.cfg.n_layers) == (slots < 1000)


def test_the_experts_used_most_stay() -> None:
    read: list[tuple[int, int]] = []

    def one(layer: int, expert: int) -> Any:
        read.append((layer, expert))
        return pack_experts(*(torch.full((8, 32), float(10 * layer + expert)) for _ in range(3)))

    size = one(0, 0).blocks.nbytes
    cache = ExpertCache(one, 2, 4, 5 * size)
    hot = torch.tensor([[1]])
    for expert in (0, 2, 3, 0, 2, 3, 0, 2):
        for ids in (hot, torch.tensor([[expert]])):
            made = cache.of(0, ids)
            assert float(made.blocks[made.slots[ids[0, 0]]].view(torch.float32).max()) == float(ids[0, 0])
        cache.of(1, torch.tensor([[expert]]))
    assert read.count((0, 1)) == 1
    cache.fetch(1, [1])
    cache.of(1, torch.tensor([[1]]))
    assert read.count((1, 1)) == 1


def test_too_little_memory_for_a_layer_is_refused_before_anything_runs(tiny: Tiny) -> None:
    with pytest.raises(InputError, match=r"4 of .* MiB each, .*; give 1 MiB more"):
        NativeLayers(tiny(), in_memory(tiny().state_dict()), 10_000)


def stored(model: Transformer, tokenizer_dir: Path, folder: Path) -> Path:
    shutil.copytree(tokenizer_dir, folder / "tokenizer")
    write_weights(folder, in_memory(model.state_dict()))
    (folder / "model.json").write_text(json.dumps(asdict(model.cfg)))
    return folder


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_a_bound_that_could_not_be_kept_is_refused(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path, ffn: str) -> None:
    folder = stored(tiny(ffn=ffn), tokenizer_dir, tmp_path)
    with pytest.raises(InputError, match=r"the memory has no room .* give .* MiB more"):
        load_engine(folder, memory_bytes=resident_bytes() + 2**20)


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_weights_come_first_and_the_cache_gets_the_rest_up_to_what_can_be_used(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, ffn: str
) -> None:
    model, cfg = tiny(ffn=ffn), EngineConfig(max_running=4)
    weights, token_bytes = in_memory(model.state_dict()), memory.cache_bytes_per_token(model)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)
    without_experts = memory._bytes_without_experts(model, weights, cfg)
    everything = without_experts + memory._expert_bytes(model, weights)
    for tokens in (64, 160, 256, 1000):  # a context has 64, and four of them 256
        bound = everything + tokens * token_bytes
        assert memory.divide(model, weights, cfg, bound) == (replace(cfg, cache_tokens=min(tokens, 256)), None)
        given = replace(cfg, cache_tokens=tokens // 16 * 16)
        assert memory.divide(model, weights, given, bound) == (given, None)
    too_small = everything + 63 * token_bytes
    if ffn == "dense":
        with pytest.raises(InputError, match=r"a cache of 64 tokens; give 1 MiB more"):
            memory.divide(model, weights, cfg, too_small)
    else:
        left = too_small - without_experts - 256 * token_bytes
        assert memory.divide(model, weights, cfg, too_small) == (replace(cfg, cache_tokens=256), left)


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_a_bound_changes_no_answer_and_the_cache_is_as_large_as_planned(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path, ffn: str
) -> None:
    model = tiny(ffn=ffn)
    folder = stored(model, tokenizer_dir, tmp_path)
    engine = load_engine(folder, EngineConfig(max_running=4), torch.float32, resident_bytes() + 2**30)
    assert engine.cfg.cache_tokens == 256
    assert engine.runner.paged.nbytes == 256 * memory.cache_bytes_per_token(engine.model)
    assert answers(engine) == answers(Engine(model, EngineConfig(cache_tokens=1024)))


def test_without_a_bound_the_cache_has_its_usual_size(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = stored(tiny(), tokenizer_dir, tmp_path)
    assert load_engine(folder).cfg.num_blocks * 16 == CACHE_TOKENS
    for bound in (None, resident_bytes() + 2**30):
        engine = load_engine(folder, EngineConfig(cache_tokens=4096), torch.float32, bound)
        assert engine.cfg.cache_tokens == 4096


CHILD = """
import resource, sys, torch
from pathlib import Path
from gristmill.inference import EngineConfig, Request, Sampling, load_engine
from gristmill.inference.memory import resident_bytes

MIB = 2**20
torch.randn(512, 512) @ torch.randn(512, 512)  # threads come with memory of their own
data = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data + 200 * MIB,) * 2)
try:
    torch.ones(210 * MIB // 4)
    sys.exit("the limit is not enforced here")
except RuntimeError:
    pass
cfg = EngineConfig(cache_tokens=1024, token_budget=64)
engine = load_engine(Path(sys.argv[1]), cfg, torch.float32, resident_bytes() + 150 * MIB)
stream = engine.submit(Request(prompt=list(range(40)), max_tokens=12, sampling=Sampling(temperature=0.0)))
print([token.id for piece in stream for token in piece.tokens])
"""


def test_a_model_larger_than_an_enforced_limit_answers_as_one_in_memory(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path
) -> None:
    shape = {"d_model": 256, "ffn_hidden_size": 512, "moe_num_experts": 16, "n_layers": 12, "initializer_range": 0.06}
    model = tiny(**shape)
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_dir, folder)
    special = SpecialIds(eot_id=262, pad_id=267, im_end_id=269)
    write_published(folder, model.cfg, in_memory(model.state_dict()), special)
    assert (folder / "model.safetensors").stat().st_size > 290 * 2**20
    child = subprocess.run([sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    request = Request(prompt=list(range(40)), max_tokens=12, sampling=Sampling(temperature=0.0))
    stream = Engine(model, EngineConfig(cache_tokens=1024)).submit(request)
    assert child.stdout.strip() == str([token.id for piece in stream for token in piece.tokens])

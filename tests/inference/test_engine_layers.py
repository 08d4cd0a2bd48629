"""What the engine computes with is the model: training's own bits, and its gradients."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill.inference import Engine, EngineConfig, Request, Sampling
from gristmill.inference.layers import NativeLayers
from gristmill.inference.recording import NotRecordable, Recording, Scratch
from gristmill.kernels import native
from gristmill.kernels.calls import Replay
from gristmill.model import Transformer
from gristmill.model.transformer import packed

Tiny = Callable[..., Transformer]
DBRX = {"moe_num_experts": 16, "moe_top_k": 4, "d_model": 64, "n_heads": 8, "kv_n_heads": 2}
QWEN = {"norm": "rms_norm", "qk_norm": True, "head_size": 6, "d_model": 25, "ffn_hidden_size": 33, "clip_qkv": None}

needs_kernels = pytest.mark.skipif(native.available() == ["torch"], reason="the native kernels were not built")


def hidden_states(model: Transformer, rows: Tensor) -> Tensor:
    """Training's forward pass."""
    positions = torch.arange(rows.shape[1]).expand_as(rows)
    hidden, _ = model(rows, positions, packed(torch.zeros_like(rows)))
    return hidden


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{**DBRX, "d_model": 256}, QWEN])
def test_one_thread_and_several_give_the_same_tokens_and_log_probabilities_bit_for_bit(
    tiny: Tiny, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    """Prompts long enough that PyTorch would share their rows among threads, then decoding in batches."""
    model = tiny(max_seq_len=512, vocab_size=1000, **changes)
    model.compute_dtype = dtype
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        engine, chance = Engine(model, EngineConfig(cache_tokens=8192, token_budget=700)), random.Random(0)
        prompts = [[chance.randrange(1000) for _ in range(length)] for length in (1, 3, 40, 250, 300)]
        streams = [engine.submit(Request(prompt=prompt, max_tokens=24, logprobs=3)) for prompt in prompts]
        made.append([[token for piece in stream for token in piece.tokens] for stream in streams])
    assert made[0] == made[1] == made[2]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [DBRX, QWEN])
def test_log_probabilities_of_50_sampled_sequences_are_those_of_trainings_forward_pass_bit_for_bit(
    tiny: Tiny, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    model, chance = tiny(max_seq_len=256, **changes), random.Random(0)
    model.compute_dtype = dtype
    engine = Engine(model, EngineConfig(cache_tokens=4096, token_budget=100))
    streams = [
        engine.submit(
            Request(
                prompt=[chance.randrange(300) for _ in range(chance.randrange(1, 100))],
                max_tokens=chance.randrange(1, 40),
                sampling=Sampling(temperature=1.0, seed=number),
                logprobs=0,
            )
        )
        for number in range(50)
    ]
    model.train()
    for stream in streams:
        made = [token for piece in stream for token in piece.tokens]
        prompt = list(stream.request.prompt)
        row = torch.tensor([prompt + [token.id for token in made]])
        layers = NativeLayers(model)
        hidden = hidden_states(layers.tree, row)
        logprobs = layers.logits(hidden[0].detach()).double().log_softmax(-1)
        wanted = [float(logprobs[len(prompt) - 1 + n, token.id]) for n, token in enumerate(made)]
        assert [token.logprob for token in made] == wanted


@needs_kernels
def test_gradients_through_the_engines_layers_are_the_models(tiny: Tiny) -> None:
    for changes in (DBRX, QWEN):
        model = tiny(**changes).requires_grad_(True).train()
        rows = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(0))

        def gradients(tree: Transformer, model: Transformer = model, rows: Tensor = rows) -> list[Tensor]:
            model.zero_grad()
            (hidden_states(tree, rows)[..., 0] * torch.arange(30)).sum().backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        wanted = gradients(model)
        given = gradients(NativeLayers(model).tree)
        assert len(given) == len(wanted) > 10
        for a, b in zip(given, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


DENSE = {"ffn": "dense", "ffn_hidden_size": 33}
BIASED = {"moe_router_bias": True, "moe_normalize_expert_weights": 2.0, "clip_qkv": 0.5}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [DBRX, QWEN, DENSE, BIASED, {**QWEN, "clip_qkv": 0.5}])
def test_steps_made_again_from_a_recording_have_the_bits_of_the_pass(
    tiny: Tiny, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    model, chance = tiny(max_seq_len=256, **changes), random.Random(0)
    model.compute_dtype = dtype
    requests = [
        Request(
            prompt=[chance.randrange(300) for _ in range(chance.randrange(1, 40))],
            max_tokens=chance.randrange(3, 60),
            sampling=Sampling(temperature=1.0, seed=number),
            logprobs=3,
        )
        for number in range(6)
    ]

    def answers(can_record: bool) -> list[list[Any]]:
        engine = Engine(model, EngineConfig(cache_tokens=256))
        engine.runner._can_record = can_record
        streams = [engine.submit(request) for request in requests]
        made = [[token for piece in stream for token in piece.tokens] for stream in streams]
        assert engine.runner._can_record is can_record
        assert (len(engine.runner._decoding) > 3) is can_record
        assert len(engine.runner.scratch._pieces) == can_record  # which all recordings share
        return made

    assert answers(True) == answers(False)


def test_what_cannot_be_made_again_in_place_is_not_recorded() -> None:
    x = torch.zeros(3)
    counts = torch.zeros(3)
    with pytest.raises(NotRecordable, match="cumsum"):
        Recording(lambda: x.cumsum(0), [x], Scratch())
    with pytest.raises(NotRecordable, match="scatter_add_"):
        Recording(lambda: counts.scatter_add_(0, x.long(), x), [x], Scratch())


@needs_kernels
def test_a_recording_makes_again_what_its_result_depends_on_and_no_more() -> None:
    x, fixed = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    made: list[torch.Tensor] = []

    def compute() -> tuple[Tensor, Tensor]:
        made.append(x * 7)  # nobody reads it
        turned = x.cos() * (fixed * 2)
        return turned, turned + x.sin()

    recording = Recording(compute, [x], Scratch())
    torches, replay = recording.calls[:3], recording.calls[3]
    assert [call.func for call in torches] == [torch.cos, torch.mul, torch.sin]
    assert isinstance(replay, Replay)  # the sum: a native call
    x.copy_(torch.tensor([5.0, -1.0]))
    recording.replay()
    assert torch.equal(recording.made[0], x.cos() * (fixed * 2))
    assert torch.equal(recording.made[1], x.cos() * (fixed * 2) + x.sin())

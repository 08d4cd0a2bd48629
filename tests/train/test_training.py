"""The training loop: a golden curve, bitwise resume, gradients that do not depend on micro-batches."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gristmill.errors import InputError
from gristmill.hub.tensors import open_weights
from gristmill.model import ModelConfig, Transformer
from gristmill.streaming import Batches, ShardsConfig, Stage, build_shards
from gristmill.train.checkpoint import Identity, checkpoint_path, latest_checkpoint, read_state
from gristmill.train.config import CheckpointConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from gristmill.train.loop import Figures, Saved, Started, Step, apply_recompute, gradients, train
from gristmill.train.optimizer import Optimizer, matrices_of, muon_matrices
from gristmill.train.schedule import learning_rate_scale

MODEL = ModelConfig(
    d_model=32, n_layers=2, n_heads=4, kv_n_heads=2, ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2,
    vocab_size=128, max_seq_len=64,
)  # fmt: skip
CFG = TrainConfig(
    steps=20, batch_tokens=512, seq_len=32, micro_batch=8, dtype="float32", threads=1, log_every=1,
    optimizer=OptimizerConfig(name="muon", lr=0.01), checkpoint=CheckpointConfig(every=5, keep=10),
)  # fmt: skip
CURRICULUM = (Stage(until=0.5, mix={"a": 1, "b": 1}), Stage(until=1.0, mix={"a": 1, "b": 3}))
IDENTITY = Identity("key", {}, {})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of arithmetic text; an id is a character's code."""
    rows = [
        (source, f"{source}{i}", f"{i} plus {k} is {i + k}; " * (1 + i % 7))
        for source in "ab"
        for i in range(40)
        for k in (i % 5,)
    ]
    columns = {
        "id": [id for _, id, _ in rows],
        "source": [source for source, _, _ in rows],
        "text": [text for _, _, text in rows],
        "num_bytes": pa.array([len(text) for _, _, text in rows], pa.int64()),
    }
    folder, out = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("shards")
    pq.write_table(pa.table(columns), folder / "documents-train.parquet")
    build_shards(ShardsConfig(block_tokens=64), folder, lambda texts: [list(t.encode()) for t in texts], 127, 128, out)
    return out


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder


def events(
    shards: Path, tokenizer: Path, folder: Path, cfg: TrainConfig = CFG, stop: threading.Event | None = None
) -> Iterator[Started | Step | Saved]:
    return train(cfg, MODEL, shards, tokenizer, None, folder, CURRICULUM, IDENTITY, stop or threading.Event())


def test_twenty_steps_follow_the_golden_curve(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    golden = json.loads(Path(__file__).with_name("golden_losses.json").read_text())
    cfg = replace(CFG, optimizer=OptimizerConfig(name="adamw", lr=0.01))  # Muon works in bf16, which differs by machine
    losses = [event.loss for event in events(shards, tokenizer, tmp_path, cfg) if isinstance(event, Step)]
    assert losses == pytest.approx(golden, rel=1e-3)
    assert losses[-1] < losses[0] - 1.5


def test_a_resumed_training_is_bitwise_the_unbroken_one(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    whole = [event for event in events(shards, tokenizer, tmp_path / "whole") if isinstance(event, Saved)]
    stop, broken = threading.Event(), tmp_path / "broken"
    for event in events(shards, tokenizer, broken, stop=stop):
        if isinstance(event, Step) and event.step == 7:
            stop.set()
    assert read_state(checkpoint_path(broken, 8)).step == 8
    resumed = list(events(shards, tokenizer, broken))
    assert isinstance(resumed[0], Started)
    assert resumed[0].step == 8
    last = resumed[-1]
    assert isinstance(last, Saved)
    assert last.artifact.content == whole[-1].artifact.content


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    whole = list(events(shards, tokenizer, tmp_path))
    file = checkpoint_path(tmp_path, 20) / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found, damage = latest_checkpoint(tmp_path, "key")
    assert found is not None
    assert read_state(found.path).step == 15
    assert [str(file) in line for line in damage] == [True]
    again = list(events(shards, tokenizer, tmp_path))
    assert again[-1].artifact.content == whole[-1].artifact.content  # type: ignore[union-attr]


def test_a_checkpoint_of_another_key_is_not_continued(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    list(events(shards, tokenizer, tmp_path))
    assert latest_checkpoint(tmp_path, "another")[0] is None


def test_only_the_last_checkpoints_are_kept(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    cfg = replace(CFG, checkpoint=CheckpointConfig(every=4, keep=2))
    list(events(shards, tokenizer, tmp_path, cfg))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000016", "step-00000020"]


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 16])
def test_gradients_do_not_depend_on_the_micro_batch(shards: Path, micro_batch: int) -> None:
    cfg = replace(CFG, micro_batch=micro_batch)
    shape = replace(MODEL, moe_loss_weight=0.0)  # MegaBlocks' balancing loss belongs to the micro-batch
    batches = Batches(shards, cfg.seq_len, cfg.sequences_per_batch, cfg.steps, CURRICULUM, 0)

    def run(micro: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = Transformer(shape)
        gradients(model, batches.batch(3), micro, Figures(cfg, shape, batches, 1.0))
        return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}

    whole, split = run(16), run(micro_batch)
    assert whole.keys() == split.keys()
    for name, grad in whole.items():
        assert torch.allclose(grad, split[name], rtol=1e-4, atol=1e-6), name


def test_figures_agree_with_the_batches(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    steps = [event for event in events(shards, tokenizer, tmp_path) if isinstance(event, Step)]
    assert [step.tokens for step in steps] == [512 * (i + 1) for i in range(20)]
    for step in steps:
        assert sum(step.source_tokens.values()) == step.tokens
        for layer in step.expert_load:
            assert sum(layer) == pytest.approx(1.0, abs=1e-3)
    assert [step.curriculum_stage for step in steps] == [0] * 10 + [1] * 10


def test_muon_sees_each_expert_and_each_of_q_k_v_as_a_matrix_of_its_own() -> None:
    model = Transformer(MODEL)
    split = muon_matrices(model)
    params = dict(model.named_parameters())
    shapes = [tuple(m.shape) for name in split for m in matrices_of(params[name], split[name])]
    per_layer = [(32, 32), (16, 32), (16, 32), (32, 32)] + [(16, 32)] * 12
    assert sorted(shapes) == sorted(per_layer * 2)
    assert not any("router" in name or "norm" in name or "wte" in name or "lm_head" in name for name in split)


def test_an_adamw_step_equals_torchs_plain_adamw() -> None:
    torch.manual_seed(0)
    model, reference = Transformer(MODEL), Transformer(MODEL)
    reference.load_state_dict(model.state_dict())
    cfg = OptimizerConfig(name="adamw", lr=0.01, clip_norm=1e9, weight_decay=0.1)
    ours = Optimizer(cfg, model)
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    for seed in range(3):
        for module in (model, reference):
            torch.manual_seed(seed)
            for param in module.parameters():
                param.grad = torch.randn_like(param)
        ours.step(0.01)
        theirs.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_an_optimizers_state_survives_saving_by_name() -> None:
    torch.manual_seed(0)
    model = Transformer(MODEL)
    optimizer = Optimizer(OptimizerConfig(name="muon", lr=0.01), model)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step(0.01)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    twin = Transformer(MODEL)
    twin.load_state_dict(model.state_dict())
    restored = Optimizer(OptimizerConfig(name="muon", lr=0.01), twin)
    restored.load(saved)
    for module, its in ((model, optimizer), (twin, restored)):
        torch.manual_seed(5)
        for param in module.parameters():
            param.grad = torch.randn_like(param)
        its.step(0.01)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_recomputed_blocks_give_the_same_gradients_bit_for_bit(shards: Path) -> None:
    cfg = replace(MODEL, moe_jitter_eps=0.1)
    batches = Batches(shards, CFG.seq_len, CFG.sequences_per_batch, CFG.steps, CURRICULUM, CFG.seed)
    found = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model = Transformer(cfg)
        if recompute:
            apply_recompute(model)
        gradients(model, batches.batch(0), CFG.micro_batch, Figures(CFG, cfg, batches, 1e12))
        found.append([param.grad for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_schedule_warms_up_holds_and_decays_to_zero() -> None:
    wsd = [learning_rate_scale(ScheduleConfig(name="wsd", warmup=0.1, decay=0.4), step, 100) for step in range(101)]
    assert wsd[0] == pytest.approx(1 / 11)
    assert wsd[10:60] == [1.0] * 50
    assert wsd[80] == pytest.approx(0.5)
    assert wsd[100] == 0.0
    cosine = [learning_rate_scale(ScheduleConfig(name="cosine", warmup=0.1, final=0.1), s, 100) for s in range(101)]
    assert cosine[10] == pytest.approx(1.0)
    assert cosine[55] == pytest.approx(0.55)
    assert cosine[100] == pytest.approx(0.1)


def test_resuming_with_kernels_that_are_not_here_is_refused() -> None:
    from gristmill.train.loop import apply_compute

    with pytest.raises(InputError, match="this training began with riscv kernels, and here are torch"):
        apply_compute({"device": "cpu", "dtype": "float32", "threads": 1, "kernels": "riscv"})


def test_a_saved_model_is_the_trained_one(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    for event in events(shards, tokenizer, tmp_path):
        if isinstance(event, Saved):
            saved = {name: weight.load() for name, weight in open_weights(event.artifact.path).items()}
            assert all(torch.equal(saved[name], tensor) for name, tensor in event.model.state_dict().items())

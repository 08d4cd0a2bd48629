"""The training loop: a golden curve, bitwise resume, gradients that do not depend on micro-batches."""

import errno
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gristmill.errors import Failure, InputError
from gristmill.hub.tensors import open_weights
from gristmill.kernels.experts import experts
from gristmill.model import ModelConfig, Transformer, init_weights, packed
from gristmill.parallel.apply import build_model
from gristmill.parallel.ranks import ALONE, Ranks
from gristmill.stop import Stop
from gristmill.streaming import Batch, Batches, MixPhase
from gristmill.train.balance import Balance
from gristmill.train.checkpoint import Identity, SaveFailed, checkpoint_path, latest_checkpoint, read_state
from gristmill.train.config import CheckpointConfig, GuardConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from gristmill.train.figures import Sums
from gristmill.train.gradients import Gradients
from gristmill.train.guard import Guard
from gristmill.train.loop import Event, Saved, Skipped, Started, Step, TrainingJob, ValidationDue, layout_of, train
from gristmill.train.machine import apply_compute
from gristmill.train.schedule import learning_rate_scale
from gristmill.train.storage import write_verified

MODEL = ModelConfig(
    d_model=32, n_layers=2, n_heads=4, kv_n_heads=2, ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2,
    vocab_size=128, max_seq_len=64,
)  # fmt: skip
CFG = TrainConfig(
    steps=20, batch_tokens=512, seq_len=32, micro_batch=8, dtype="float32", threads=1, log_every=1,
    optimizer=OptimizerConfig(name="muon", lr=0.01), checkpoint=CheckpointConfig(every=5, keep=10),
)  # fmt: skip
CURRICULUM = (MixPhase(until=0.5, mix={"a": 1, "b": 1}), MixPhase(until=1.0, mix={"a": 1, "b": 3}))
IDENTITY = Identity("key", {}, {})
JUDGE = Guard.judge
UNUSED = ord("x")  # a character that is not in the text


def job_of(
    shards: Path, tokenizer: Path, folder: Path, cfg: TrainConfig, model_cfg: ModelConfig = MODEL, ranks: Ranks = ALONE
) -> TrainingJob:
    return TrainingJob(
        cfg=cfg,
        model_cfg=model_cfg,
        layout=layout_of(cfg, model_cfg, ranks),
        shards=shards,
        tokenizer=tokenizer,
        folder=folder,
        curriculum=CURRICULUM,
        identity=IDENTITY,
    )


def events(
    shards: Path, tokenizer: Path, folder: Path, cfg: TrainConfig = CFG, stop: Stop | None = None
) -> Iterator[Event]:
    return train(job_of(shards, tokenizer, folder, cfg), stop or Stop())


@pytest.mark.parametrize("balance", ["global", "micro_batch"])
def test_twenty_steps_follow_the_golden_curve(balance: str, shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    golden = json.loads(Path(__file__).with_name("golden_losses.json").read_text())[balance]
    adamw = OptimizerConfig(name="adamw", lr=0.01)  # Muon works in bf16, which differs by machine
    cfg = replace(CFG, optimizer=adamw, balance=balance)  # type: ignore[arg-type]
    losses = [event.loss for event in events(shards, tokenizer, tmp_path, cfg) if isinstance(event, Step)]
    assert losses == pytest.approx(golden, rel=1e-3)
    assert losses[-1] < losses[0] - 1.5


def test_a_resumed_training_is_bitwise_the_unbroken_one(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    whole = [event for event in events(shards, tokenizer, tmp_path / "whole") if isinstance(event, Saved)]
    stop, broken = Stop(), tmp_path / "broken"
    for event in events(shards, tokenizer, broken, stop=stop):
        if isinstance(event, Step) and event.step == 7:
            stop.set()
    assert read_state(checkpoint_path(broken, 7)).step == 7
    resumed = list(events(shards, tokenizer, broken))
    assert isinstance(resumed[0], Started)
    assert resumed[0].step == 7
    last = resumed[-1]
    assert isinstance(last, Saved)
    assert last.artifact.content == whole[-1].artifact.content


def test_a_stop_before_the_first_figures_is_saved(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    stop = Stop()

    def judge(guard: Guard, *figures: float) -> str | None:
        seen.append(figures)
        if len(seen) == 3:
            stop.set()
        return JUDGE(guard, *figures)

    seen: list[tuple[float, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "judge", judge)
        got = list(events(shards, tokenizer, tmp_path, replace(CFG, log_every=10), stop))
    assert [(type(event), event.step) for event in got[1:]] == [(Step, 3), (Saved, 3)]
    assert next(events(shards, tokenizer, tmp_path)).step == 3


def test_nothing_is_removed_when_no_checkpoint_is_whole(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    list(events(shards, tokenizer, tmp_path, replace(CFG, checkpoint=CheckpointConfig(every=20, keep=1))))
    (checkpoint_path(tmp_path, 20) / "state.json").unlink()
    mine = tmp_path / "step-00000020-good"
    mine.mkdir()
    with pytest.raises(Failure, match=r"no checkpoint in .* is whole: .*state.json is missing; put a good copy there"):
        list(events(shards, tokenizer, tmp_path))
    assert (checkpoint_path(tmp_path, 20) / "model.safetensors").exists()
    assert mine.exists()


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


def leave_gradients(model: Transformer, batch: Batch, cfg: TrainConfig, micro_batch: int | None = None) -> Sums:
    gradients = Gradients(model, cfg, Balance(cfg, model), 2, Path("nowhere"))
    gradients.micro_batch = micro_batch or cfg.micro_batch
    sums = gradients.of(batch)
    return sums


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 16])
def test_any_micro_batch_leaves_the_gradient_of_the_mean_loss_over_all_tokens(shards: Path, micro_batch: int) -> None:
    """16 sequences by threes leave one for the last micro-batch, whose tokens weigh as much as all others."""
    shape = replace(MODEL, moe_loss_weight=0.0)  # the balancing loss depends on how a batch is cut
    batch = Batches(shards, CFG.seq_len, CFG.sequences_per_batch, CFG.steps, CURRICULUM, 0).batch(3)
    model, plain = init_weights(Transformer(shape), seed=0), Transformer(shape)
    plain.load_state_dict(model.state_dict())
    tokens, targets, positions, documents = (
        torch.from_numpy(array) for array in (batch.tokens, batch.targets, batch.positions, batch.document_ids)
    )
    hidden, _ = plain(tokens, positions, packed(documents))
    nll = F.cross_entropy(plain.logits(hidden).flatten(0, 1), targets.flatten(), reduction="none").view(16, 32)
    nll.mean().backward()
    sums = leave_gradients(model, batch, CFG, micro_batch)
    assert sums.loss(CFG.batch_tokens) == pytest.approx(nll.mean().item(), rel=1e-5)
    assert set(batch.sources.tolist()) == {0, 1}
    for source in (0, 1):
        assert float(sums.nll_N[source]) == pytest.approx(nll[batch.sources == source].sum().item(), rel=1e-5)
    for (name, param), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(param.grad, reference.grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("micro_batch", [3, 4])
@pytest.mark.parametrize("balance", ["micro_batch", "rank", "global"])
def test_a_micro_batchs_balancing_loss_weighs_as_much_as_its_sequences(
    shards: Path, balance: Any, micro_batch: int
) -> None:
    """Micro-batches of 3, 3, 3, 3, 3 and 1 sequences, or four of 4. `rank` and `global` use the shares of all
    assignments in the batch so far."""
    cfg = replace(CFG, balance=balance)
    batch = Batches(shards, CFG.seq_len, CFG.sequences_per_batch, CFG.steps, CURRICULUM, 0).batch(3)
    model = init_weights(Transformer(MODEL), seed=0)
    sums = leave_gradients(model, batch, cfg, micro_batch)
    expected, so_far_LE = 0.0, torch.zeros(MODEL.n_layers, MODEL.moe_num_experts)
    for start in range(0, 16, micro_batch):
        part = slice(start, start + micro_batch)
        tokens, positions, documents = (
            torch.from_numpy(array[part]) for array in (batch.tokens, batch.positions, batch.document_ids)
        )
        _, routing = model(tokens, positions, packed(documents))
        so_far_LE += routing.counts_LE
        counts_LE = routing.counts_LE if balance == "micro_batch" else so_far_LE
        shares_LE = counts_LE / counts_LE.sum(1, keepdim=True)
        loss = 4 * MODEL.moe_loss_weight * (shares_LE * routing.probs_LE).sum(1).mean()
        expected += loss.item() * len(tokens) / 16
    assert float(sums.balance) == pytest.approx(expected, rel=1e-5)


def test_a_bias_rises_for_experts_below_the_mean_and_nothing_else_moves_it() -> None:
    cfg = replace(CFG, balance="bias", bias_rate=0.01)
    model = init_weights(Transformer(replace(MODEL, moe_router_bias=True)), seed=0)
    Balance(cfg, model).after(torch.tensor([[8.0, 0.0, 4.0, 4.0], [1.0, 2.0, 3.0, 2.0]]))
    moved = [block.ffn.router_bias.tolist() for block in model.blocks]
    assert moved == [pytest.approx([-0.01, 0.01, 0.0, 0.0]), pytest.approx([0.01, 0.0, -0.01, 0.0])]
    for balance, shape in (("bias", MODEL), ("global", replace(MODEL, moe_router_bias=True))):
        with pytest.raises(InputError, match="set both balance=bias and moe_router_bias=true, or neither"):
            Balance(replace(CFG, balance=balance), Transformer(shape))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bias_rate=0\.01 belongs to balance=bias and global does not use it"):
        replace(CFG, bias_rate=0.01)


def test_figures_agree_with_the_batches(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    steps = [event for event in events(shards, tokenizer, tmp_path) if isinstance(event, Step)]
    assert [step.tokens for step in steps] == [512 * (i + 1) for i in range(20)]
    for step in steps:
        assert sum(step.source_tokens.values()) == step.tokens
        for layer in step.expert_load:
            assert sum(layer) == pytest.approx(1.0, abs=1e-3)
    assert [step.curriculum_stage for step in steps] == [0] * 10 + [1] * 10


def test_recomputed_blocks_give_the_same_gradients_bit_for_bit(shards: Path) -> None:
    cfg = replace(MODEL, moe_jitter_eps=0.1)
    batches = Batches(shards, CFG.seq_len, CFG.sequences_per_batch, CFG.steps, CURRICULUM, CFG.seed)
    found = []
    for recompute in ("none", "selective", "full"):
        model = init_weights(build_model(cfg, torch.float32, "cpu", recompute=recompute), seed=3)  # type: ignore[arg-type]
        torch.manual_seed(3)
        leave_gradients(model, batches.batch(0), CFG)
        found.append([param.grad for param in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("recompute", "expected"), [("none", {}), ("selective", {"experts": 2}), ("full", {"attention": 2, "experts": 2})]
)
def test_the_backward_pass_computes_again_what_the_forward_pass_did_not_keep(
    recompute: Any, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers: `selective` computes both layers' experts again and no attention, `full` both."""
    calls: Counter[str] = Counter()

    def counted(*tensors: torch.Tensor) -> torch.Tensor:
        calls["experts"] += 1
        return experts(*tensors)

    def attend(*arguments: Any) -> torch.Tensor:
        calls["attention"] += 1
        return attention(*arguments)

    monkeypatch.setattr("gristmill.model.transformer.experts", counted)
    attention = packed(torch.zeros(2, 16, dtype=torch.long))
    model = init_weights(build_model(MODEL, torch.float32, "cpu", recompute=recompute), seed=0)
    hidden, _ = model(torch.arange(32).view(2, 16), torch.arange(16).expand(2, -1), attend)
    assert calls == {"attention": 2, "experts": 2}
    calls.clear()
    hidden.sum().backward()
    assert calls == expected


def test_the_schedule_warms_up_holds_and_decays_to_zero() -> None:
    wsd = [learning_rate_scale(ScheduleConfig(name="wsd", warmup=0.1, decay=0.4), step, 100) for step in range(101)]
    assert wsd[0] == pytest.approx(1 / 11)
    assert wsd[10:60] == [1.0] * 50
    assert wsd[80] == pytest.approx(0.5)
    assert wsd[100] == 0.0
    low = [learning_rate_scale(ScheduleConfig(name="wsd", decay=0.4, final=0.2), step, 100) for step in (60, 80, 100)]
    assert low == pytest.approx([1.0, 0.6, 0.2])
    cosine = [learning_rate_scale(ScheduleConfig(name="cosine", warmup=0.1, final=0.1), s, 100) for s in range(101)]
    assert cosine[10] == pytest.approx(1.0)
    assert cosine[55] == pytest.approx(0.55)
    assert cosine[100] == pytest.approx(0.1)
    whole = [learning_rate_scale(ScheduleConfig(name="cosine", warmup=1.0), step, 100) for step in range(100)]
    assert whole == [(step + 1) / 101 for step in range(100)]  # no decay phase needs room


def test_resuming_with_kernels_that_are_not_here_is_refused() -> None:
    with pytest.raises(InputError, match="this training began with riscv kernels, and here are torch"):
        apply_compute({"device": "cpu", "dtype": "float32", "threads": 1, "kernels": "riscv"})


def test_validation_has_a_cadence_of_its_own_and_comes_again_only_where_training_resumes(
    shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """Checkpoints after 5, 10, 15 and 20 steps; validation after 6, 12, 18 and 20."""

    def due(stop: Stop | None = None) -> Iterator[tuple[int, int, bool]]:
        job = replace(job_of(shards, tokenizer, tmp_path, replace(CFG, log_every=20)), validate_every=6)
        for event in train(job, stop or Stop()):
            match event:
                case ValidationDue():
                    assert steps[-1] == event.step  # its metrics come first
                    yield event.step, event.tokens, event.resumed
                case Step():
                    steps.append(event.step)
                case Saved():
                    saved.add(event.step)

    steps, saved = list[int](), set[int]()
    stop, first = Stop(), []
    for found in due(stop):
        first.append(found)
        if found[0] == 12:
            stop.set()
    assert first == [(6, 6 * 512, False), (12, 12 * 512, False)]
    assert list(due()) == [(12, 12 * 512, True), (18, 18 * 512, False), (20, 20 * 512, False)]
    assert saved == {5, 10, 12, 15, 20}
    assert list(due()) == [(20, 20 * 512, True)]


def test_a_saved_model_is_the_one_that_was_looked_at(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}
    for event in events(shards, tokenizer, tmp_path):
        if isinstance(event, ValidationDue):  # training goes on while this is written
            seen[event.step] = {name: tensor.clone() for name, tensor in event.model.state_dict().items()}
        elif isinstance(event, Saved):
            saved = {name: weight.load() for name, weight in open_weights(event.artifact.path).items()}
            assert all(torch.equal(saved[name], tensor) for name, tensor in seen.pop(event.step).items())
    assert not seen


# ---- steps that are not sane ----


def poisoned(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """The gradient of these steps (from 0) is not a number."""

    whole = Gradients.of

    def poison(self: Gradients, batch: Batch | None) -> Sums:
        sums = whole(self, batch)
        if torch.initial_seed() - self.cfg.seed in steps:
            self.model.wte.weight.grad[3, 3] = torch.nan
        return sums

    patch.setattr(Gradients, "of", poison)


@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_a_step_that_is_not_a_number_is_left_out_and_counted(
    policy: str, shards: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 7, 12)
    cfg = replace(CFG, guard=GuardConfig(policy=policy))
    seen = list(events(shards, tokenizer, tmp_path / "whole", cfg))
    skipped = [event for event in seen if isinstance(event, Skipped)]
    assert [(event.step, event.back_to) for event in skipped] == (
        [(7, None), (12, None)] if policy == "skip" else [(7, 5), (12, 10)]
    )
    assert all(event.reason == "grad_norm is nan" for event in skipped)
    steps = [event for event in seen if isinstance(event, Step)]
    for step in steps:  # a step that is left out takes its place in the schedule
        assert step.lr == CFG.optimizer.lr * learning_rate_scale(CFG.schedule, step.step - 1, CFG.steps)
    last = steps[-1]
    assert (last.step, last.tokens, last.skipped_steps) == (20, 18 * 512, 2)
    assert sum(last.source_tokens.values()) == 18 * 512
    assert latest_checkpoint(tmp_path / "whole", "key")[0].metrics["skipped_steps"] == 2
    # both policies, and a training that is stopped in between, come to the same end
    monkeypatch.undo()
    poisoned(monkeypatch, 7, 12)
    stop = Stop()
    for event in events(shards, tokenizer, tmp_path / "broken", replace(CFG, guard=GuardConfig()), stop):
        if isinstance(event, Step) and event.step == 9:
            stop.set()
    again = list(events(shards, tokenizer, tmp_path / "broken", cfg))
    assert again[-1].artifact.content == seen[-1].artifact.content


def test_a_training_without_its_bad_batches_is_the_same_as_one_that_met_them(
    shards: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving a step out means that its batch, and nothing else, is gone."""
    poisoned(monkeypatch, 0)
    seen = list(events(shards, tokenizer, tmp_path))
    skipped = [event.step for event in seen if isinstance(event, Skipped)]
    assert skipped == [0]
    steps = [event for event in seen if isinstance(event, Step)]
    assert [event.step for event in steps] == list(range(2, 21))


def test_after_going_back_figures_count_each_step_once(
    shards: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 5 and 6 are trained, lost, and trained again when step 7 is left out."""
    poisoned(monkeypatch, 7)
    cfg = replace(CFG, guard=GuardConfig(policy="roll_back"))
    each = [event for event in events(shards, tokenizer, tmp_path / "each", cfg) if isinstance(event, Step)]
    by_step = {step.step: step.loss for step in each}  # the later one of two
    whole = replace(cfg, log_every=5)
    seen = [event for event in events(shards, tokenizer, tmp_path / "whole", whole) if isinstance(event, Step)]
    assert [step.step for step in seen] == [5, 10, 15, 20]
    losses = [by_step[step] for step in (6, 7, 9, 10)]
    assert seen[1].loss == pytest.approx(sum(losses) / 4, rel=1e-9)


def test_a_step_that_is_left_out_moves_no_bias(
    shards: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 0)
    cfg = replace(CFG, balance="bias", steps=2, micro_batch=16)
    model_cfg = replace(MODEL, moe_router_bias=True)
    found: list[torch.Tensor] = []
    for event in train(job_of(shards, tokenizer, tmp_path, cfg, model_cfg), Stop()):
        match event:
            case Started():
                biases = [block.ffn.router_bias for block in event.model.blocks]
            case Skipped() | Step():
                found.append(torch.stack([bias.clone() for bias in biases]))
    assert len(found) == 2
    assert not found[0].any()
    assert found[1].any()


@pytest.mark.parametrize("policy", ["skip", "roll_back", "stop"])
def test_a_training_that_diverges_ends_and_its_checkpoints_stand(
    policy: str, shards: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, *range(7, 20))
    cfg = replace(CFG, guard=GuardConfig(policy=policy, in_a_row=2))
    seen: list[Event] = []
    with pytest.raises(Failure, match=r"grad_norm is nan: training diverged; lower train.optimizer.lr \(now 0.01\)"):
        seen.extend(events(shards, tokenizer, tmp_path, cfg))
    assert [event.step for event in seen if isinstance(event, Skipped)] == ([] if policy == "stop" else [7])
    found, damage = latest_checkpoint(tmp_path, "key")
    assert found is not None
    assert (read_state(found.path).step, damage) == (5, [])


def test_weights_that_are_not_finite_are_never_saved(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    """A NaN in the embedding of a character that no text has: each loss and gradient norm stays finite."""
    seen: list[Event] = []

    def poison_after_step_7() -> None:
        for event in events(shards, tokenizer, tmp_path):
            seen.append(event)
            if isinstance(event, Step) and event.step == 7:
                assert isinstance(seen[0], Started)
                seen[0].model.wte.weight.data[UNUSED, 0] = torch.nan

    with pytest.raises(Failure, match=r"weights are not finite at step 10: training diverged; lower"):
        poison_after_step_7()
    assert not any(isinstance(event, Skipped) for event in seen)
    found, damage = latest_checkpoint(tmp_path, "key")
    assert found is not None
    assert (read_state(found.path).step, damage) == (5, [])
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000005"]


def test_a_spike_is_left_out_when_asked_for(
    shards: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Gradients.of

    def spiking(self: Gradients, batch: Batch | None) -> Sums:
        sums = whole(self, batch)
        if torch.initial_seed() - self.cfg.seed == 15:
            self.model.wte.weight.grad *= 1e4
        return sums

    monkeypatch.setattr(Gradients, "of", spiking)
    for sigmas, expected in ((None, []), (6.0, [15])):
        cfg = replace(CFG, guard=GuardConfig(sigmas=sigmas, window=8))
        seen = list(events(shards, tokenizer, tmp_path / str(sigmas), cfg))
        assert [event.step for event in seen if isinstance(event, Skipped)] == expected


def test_a_batch_that_the_processes_cannot_share_evenly_is_refused() -> None:
    with pytest.raises(InputError, match="is 16 sequences of 32, which 3 processes cannot share evenly"):
        layout_of(CFG, MODEL, Ranks(0, 3))


def test_a_checkpoint_that_cannot_be_written_stops_training_or_does_not(
    shards: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, tensors: Any) -> Any:
        if "step-00000010" in str(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return write_verified(file, tensors)

    monkeypatch.setattr("gristmill.train.checkpoint.write_verified", full)
    with pytest.raises(Failure, match=r"step 10 was not saved.*No space left.*older ones stand"):
        list(events(shards, tokenizer, tmp_path / "stops"))
    found, damage = latest_checkpoint(tmp_path / "stops", "key")
    assert found is not None
    assert (read_state(found.path).step, damage) == (5, [])
    cfg = replace(CFG, checkpoint=replace(CFG.checkpoint, on_error="go_on"))
    seen = list(events(shards, tokenizer, tmp_path / "goes on", cfg))
    assert [type(event) for event in seen if isinstance(event, Saved | SaveFailed)] == [Saved, SaveFailed, Saved, Saved]

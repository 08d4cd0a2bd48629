"""A plan against what it speaks of: the model's own tensors, torch's cutting, what autograd saves, sums by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.cli import app
from gristmill.cli.exits import exit_code
from gristmill.errors import InputError
from gristmill.kernels import native
from gristmill.model import ModelConfig, Transformer, init_weights, packed
from gristmill.model.counts import count_params, train_flops_per_token
from gristmill.parallel.apply import apply_recompute
from gristmill.parallel.config import Layout, ParallelConfig
from gristmill.plan.footprint import (
    RECOMPUTE,
    Footprint,
    Recompute,
    Training,
    Way,
    expert_load,
    local_shape,
    param_bytes,
    weights,
)
from gristmill.plan.hardware import GPUS, cpu
from gristmill.plan.search import LIBRARIES, Plan, default_batch_tokens, divisors, plan, problem_of, search
from gristmill.plan.traffic import LINK_SHARE, NETWORK_HOP_S, NODE_HOP_S, Clock, Group
from gristmill.recipe import load_shape
from gristmill.report.plan import (
    check_split,
    figures,
    loads_of_run,
    measured,
    parse_mesh,
    parse_tokens,
    plan_text,
    planned,
    seconds,
)
from gristmill.report.shape import short
from gristmill.train.optim import OPTIMIZERS

H100 = GPUS["h100"]
ADAMW, MUON = OPTIMIZERS["adamw"].cost, OPTIMIZERS["muon"].cost
TINY = ModelConfig(
    d_model=64, n_layers=2, n_heads=4, kv_n_heads=2, ffn_hidden_size=32, vocab_size=512, max_seq_len=256,
    moe_num_experts=4, moe_top_k=2,
)  # fmt: skip
ALONE = Layout(1, 1, 1, 1)
DBRX = load_shape("dbrx-132b").model


@st.composite
def trainings(draw: st.DrawFn) -> tuple[Training, Layout, int]:
    """(a small training, a layout that suits it, a micro-batch)."""
    experts = draw(st.sampled_from([1, 2, 4, 8]))
    cfg = ModelConfig(
        d_model=draw(st.sampled_from([8, 24, 64])),
        n_layers=draw(st.integers(1, 4)),
        n_heads=4,
        kv_n_heads=2,
        vocab_size=draw(st.integers(1, 700)),
        ffn=draw(st.sampled_from(["moe", "dense"])),
        ffn_hidden_size=draw(st.sampled_from([16, 48])),
        moe_num_experts=experts,
        moe_top_k=draw(st.integers(1, experts)),
        norm=draw(st.sampled_from(["layer_norm", "rms_norm"])),
        qk_norm=draw(st.booleans()),
        clip_qkv=draw(st.sampled_from([None, 8.0])),
        tie_word_embeddings=draw(st.booleans()),
    )
    layout = Layout(
        draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 8])), draw(st.sampled_from([1, 2])),
        draw(st.sampled_from([1, 2])),
    )  # fmt: skip
    micro_batch = draw(st.sampled_from([1, 2]))
    training = Training(
        model=cfg, seq_len=128, batch_tokens=128 * 2 * micro_batch * layout.data,
        optimizer=draw(st.sampled_from([ADAMW, MUON])), dtype=draw(st.sampled_from(["bfloat16", "float32"])),
    )  # fmt: skip
    if layout.split % layout.expert or problem_of(training, layout, micro_batch):
        layout, training = ALONE, replace(training, batch_tokens=128 * 2 * micro_batch)
    return training, layout, micro_batch


@given(trainings())
def test_the_weights_of_a_plan_are_those_of_the_model(case: tuple[Training, Layout, int]) -> None:
    cfg = case[0].model
    with torch.device("meta"):
        shapes = {name: tuple(param.shape) for name, param in Transformer(cfg).named_parameters()}
    said = {
        weight.name.replace("*", str(layer)): weight.shape for weight in weights(cfg) for layer in range(weight.copies)
    }
    assert said == shapes
    assert sum(weight.copies * weight.numel for weight in weights(cfg)) == count_params(cfg).total_params


@given(trainings())
def test_rank_0_stores_what_torch_cuts_for_it(case: tuple[Training, Layout, int]) -> None:
    training, layout, _ = case
    for weight in weights(training.model):
        whole = torch.empty(weight.shape, device="meta")
        if weight.room == "experts":
            cut = whole.chunk(layout.expert, 0)[0].chunk(layout.expert_split, 1)[0]
        else:
            cut = whole.chunk(layout.split, 0)[0]
        assert local_shape(weight, layout) == tuple(cut.shape), weight.name


def test_a_weight_that_divides_falls_by_the_size_of_the_shard() -> None:
    whole = param_bytes(DBRX, ALONE)
    assert whole == 4 * 131_596_523_520
    assert param_bytes(DBRX, Layout(1, 16, 1, 1)) == whole // 16
    assert param_bytes(DBRX, Layout(1, 16, 1, 16)) == whole // 16
    # 10 rows of a router over 4 ranks: rank 0 has 3 of them.
    odd = replace(TINY, moe_num_experts=10)
    router = next(weight for weight in weights(odd) if "router" in weight.name)
    assert local_shape(router, Layout(1, 4, 1, 1)) == (3, 64)


@given(trainings(), st.sampled_from([2, 3, 4]))
def test_more_gpus_in_a_shard_never_store_more_each(case: tuple[Training, Layout, int], times: int) -> None:
    training, layout, _ = case
    wider = replace(layout, shard=layout.shard * times)
    if problem_of(replace(training, batch_tokens=training.batch_tokens * times), wider) is None:
        assert param_bytes(training.model, wider) <= param_bytes(training.model, layout)


@given(trainings())
def test_less_is_kept_where_more_is_computed_again_and_more_where_more_is_done_at_once(
    case: tuple[Training, Layout, int],
) -> None:
    training, layout, micro_batch = case
    for hardware in (H100, cpu(1e12, 10**10)):
        way = Way(layout=layout, micro_batch=micro_batch, on_gpu=hardware.on_gpu)
        none, selective, full = (
            plan(training, hardware, replace(way, recompute=what)).moment.total for what in RECOMPUTE
        )
        assert full <= none
        if training.model.ffn == "moe" and training.model.n_layers > 1:  # one block alone is whole in either case
            assert full <= selective <= none
        double = replace(training, batch_tokens=training.batch_tokens * 2)
        bigger = plan(double, hardware, replace(way, micro_batch=2 * micro_batch))
        assert bigger.moment.total >= none


@given(trainings())
def test_a_plan_adds_up(case: tuple[Training, Layout, int]) -> None:
    training, layout, micro_batch = case
    one = plan(training, H100, Way(layout=layout, micro_batch=micro_batch))
    assert sum(one.moment.parts.values()) + one.reserve == one.needed_bytes
    assert one.moment.parts["weights"] == one.param_bytes
    assert one.days(2e12) == pytest.approx(2 * one.days(1e12))
    assert one.tokens_per_second * one.times.step == pytest.approx(training.batch_tokens)
    peak = one.tokens_per_second * train_flops_per_token(training.model, 128) / (layout.world_size * H100.flops)
    assert one.mfu == pytest.approx(peak)
    assert one.mfu < 1


def saved_bytes(cfg: ModelConfig, dtype: torch.dtype, batch: int, seq_len: int, recompute: Recompute) -> int:
    """What autograd keeps of a forward pass: each memory once, the weights' not."""
    model = init_weights(Transformer(cfg, dtype), seed=0)
    apply_recompute(model, recompute)
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held on to, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(cfg.vocab_size or 0, (batch, seq_len))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, torch.arange(seq_len).expand(batch, -1), packed(torch.zeros(batch, seq_len)))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.skipif(native.available()[-1] == "torch", reason="the plan is of the native kernels, which are not here")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "clip_qkv": None, "norm": "rms_norm"}, {"ffn": "dense"}])
def test_what_a_block_keeps_is_what_autograd_saves(dtype: str, changes: dict[str, object]) -> None:
    """The difference of two depths is a block's. Padding depends on the routing: hence some tolerance."""
    cfg = replace(TINY, n_layers=1, **changes)  # type: ignore[arg-type]
    seen = [saved_bytes(replace(cfg, n_layers=layers), getattr(torch, dtype), 8, 256, "none") for layers in (1, 3)]
    training = Training(optimizer=ADAMW, model=cfg, seq_len=256, batch_tokens=8 * 256, dtype=dtype)  # type: ignore[arg-type]
    said = Footprint(training, Way(layout=ALONE, micro_batch=8, on_gpu=False)).kept_by_block()
    assert said == pytest.approx((seen[1] - seen[0]) / 2, rel=0.03)


def test_a_blocks_bytes_by_hand() -> None:
    """16 tokens, width 64, 4 + 2 x 2 heads of 16, 4 experts choose 2 of width 32; fp32, one rank."""
    of = Footprint(
        Training(optimizer=ADAMW, model=TINY, seq_len=16, batch_tokens=16, dtype="float32"),
        Way(layout=ALONE, micro_batch=1, on_gpu=False),
    )
    assert of.block_input() == 16 * 64 * 4
    # norm_1's output and norm_2's input; q, k, v clipped and turned; the output; log-sum-exp of 4 heads, 4 statistics
    assert of.attention_kept() == 16 * 4 * (64 + 64 + 2 * 128 + 64 + 4 + 4)
    # norm_2's output; 4 probabilities, a weight and an index for each choice; 32 rows and half a tile of 16 an expert
    rows = 16 * 2 + 4 * 8
    assert of.padded == rows
    assert of.ffn_kept() == 16 * 4 * (64 + 4 + 2) + 16 * 2 * 8 + rows * (2 * 32 * 4 + 4 + 8) + 32 * 8
    assert of.moments_bytes == 2 * of.state == 8 * count_params(TINY).total_params


def test_a_ring_by_hand() -> None:
    """16 GPUs fill two nodes of 8: each sends 15 parts of 16 over the cards of 8; of 15 hops one is between nodes."""
    training = Training(optimizer=ADAMW, model=TINY, seq_len=16, batch_tokens=256)
    clock = Clock(Footprint(training, Way(layout=Layout(1, 16, 1, 1), micro_batch=1)), H100)
    sent, time = clock._ring(16e9, Group(16))
    assert sent == 15e9
    assert time == pytest.approx(15e9 / (8 * 50e9 * LINK_SHARE) + NETWORK_HOP_S + 14 * NODE_HOP_S)
    # Two that are 8 apart have one card each; eight neighbours have NVLink.
    assert clock._ring(16e9, Group(2, 8))[1] == pytest.approx(8e9 / (50e9 * LINK_SHARE) + NETWORK_HOP_S)
    assert clock._ring(16e9, Group(8))[1] == pytest.approx(14e9 / (450e9 * LINK_SHARE) + 7 * NODE_HOP_S)
    # All to all among 16: 8 of 16 parts leave the node through the own card.
    assert clock._all_to_all(16e9, Group(16))[1] == pytest.approx(8e9 / (50e9 * LINK_SHARE) + NETWORK_HOP_S)
    assert clock._ring(16e9, Group(1)) == (0.0, 0.0)


def followed(one: Plan, keys: dict[str, int | str]) -> Plan:
    """The plan after setting the keys that were advised."""
    way, training = one.way, one.training
    sizes = {key.removeprefix("train.parallel."): value for key, value in keys.items() if "parallel" in key}
    gpus = int(keys.get("gpus", way.layout.world_size))
    layout = replace(way.layout, **sizes)
    layout = replace(layout, replicate=gpus // layout.split)
    training = replace(training, seq_len=int(keys.get("seq_len", training.seq_len)),
                       batch_tokens=int(keys.get("batch_tokens", training.batch_tokens)))  # fmt: skip
    way = Way(layout=layout, micro_batch=int(keys.get("train.micro_batch", way.micro_batch)),
              recompute=keys.get("train.recompute", way.recompute))  # type: ignore[arg-type] # fmt: skip
    return plan(training, one.hardware, way)


@pytest.mark.parametrize(
    ("gpus", "mesh", "recompute"),
    [
        (64, ParallelConfig(shard=64), "none"),  # activations
        (64, ParallelConfig(shard=8), None),  # state
        (8, None, None),  # nothing on 8 GPUs
        (48, ParallelConfig(shard=48), "none"),
    ],
)
def test_advice_that_is_followed_makes_it_fit(
    gpus: int, mesh: ParallelConfig | None, recompute: Recompute | None
) -> None:
    training = Training(optimizer=ADAMW, model=DBRX, seq_len=8192, batch_tokens=default_batch_tokens(gpus, 8192))
    found = search(training, H100, gpus, mesh, recompute=recompute)
    assert not found.plan.fits
    assert found.changes
    for change in found.changes:
        then = followed(found.plan, change.keys)
        assert then.fits, change.keys
        assert then.needed_bytes == change.plan.needed_bytes


def test_a_search_takes_the_fastest_that_fits() -> None:
    training = Training(optimizer=ADAMW, model=load_shape("dbrx-9b").model, seq_len=4096, batch_tokens=2**20)
    found = search(training, H100, 16)
    assert found.plan.fits
    steps = [one.times.step for one in (found.plan, *found.others)]
    assert steps == sorted(steps)
    assert all(one.fits and one.way.layout.world_size == 16 for one in found.others)
    with_mesh = search(training, H100, 16, ParallelConfig(shard=16))
    assert with_mesh.plan.times.step >= found.plan.times.step


def test_the_page_says_what_the_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "dbrx-9b", "--gpus", "16", "--mesh", "shard=16,expert=16"]
    assert exit_code(lambda: app(arguments, standalone_mode=False)) == 0
    text = capsys.readouterr().out
    assert exit_code(lambda: app([*arguments, "--json"], standalone_mode=False)) == 0
    said = json.loads(capsys.readouterr().out)
    assert plan_text(said) == text.rstrip("\n")
    for number in (*said["memory"]["bytes"].values(), said["memory"]["needed_bytes"]):
        assert number == 0 or f"{number:,}" in text
    for row in said["traffic"]:
        assert f"{row['bytes_sent']:,}" in text
    assert seconds(said["seconds"]["step"]) in text
    assert short(said["tokens_per_second"]) in text
    assert "Never held against a GPU" in text


def test_exit_codes_and_errors_say_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    def code(*arguments: str) -> int:
        return exit_code(lambda: app(["plan", *arguments], standalone_mode=False))

    assert code("dbrx-132b", "--gpus", "8") == 1
    assert "does not fit" in capsys.readouterr().out
    for arguments, said in {
        ("dbrx-132b", "--gpus", "8", "--gpu", "h1000"): "valid: a100-80, h100",
        ("dbrx-132b", "--gpus", "0"): "--gpus 0 must be from 1 to 100,000",
        ("dbrx-132b", "--gpus", "5000000000"): "--gpus 5000000000 must be from 1 to 100,000",
        ("dbrx-132b", "--gpus", "8", "--seq", "0"): "--seq 0 must be from 1 to",
        ("dbrx-132b", "--gpus", "8", "--batch-tokens", "0"): "--batch-tokens 0 must be from 1 to",
        ("dbrx-132b", "--gpus", "8", "--batch-tokens", "-32768"): "--batch-tokens -32768 must be from 1 to",
        ("dbrx-132b", "--gpus", "8", "--batch-tokens", "9" * 30): "must be from 1 to 1,000,000,000,000",
        ("dbrx-132b", "--gpus", "8", "--mesh", ""): "must be shard=N",
        ("dbrx-132b", "--gpus", "8", "--tokens", ""): "such as 12T",
        ("dbrx-132b", "--gpus", "8", "--expert-load", "0.9"): "a number from 1 to moe_num_experts=16, or a run folder",
        ("dbrx-132b", "--gpus", "8", "--expert-load", "nan"): "a number from 1 to moe_num_experts=16, or a run folder",
        ("dbrx-132b", "--gpus", "8", "--expert-load", ""): "a number from 1 to moe_num_experts=16, or a run folder",
        ("dbrx-132b", "--gpus", "8", "--expert-load", "."): "has no figures of a training with 40 layers of 16 experts",
        ("dbrx-132b", "--gpus", "8", "--expert-load", "2", "--mesh", "shard=8"): "has no effect with expert=1",
        ("dbrx-132b", "--gpus", "8", "--expert-load", "2", "--set", "model.ffn=dense"): "model.ffn=dense has none",
        ("dbrx-132b", "--gpus", "8", "--mesh", "shards=8"): "must be shard=N, context=N or expert=N",
        ("dbrx-132b", "--gpus", "8", "--mesh", "shard=3"): "must divide the 8 processes",
        ("dbrx-132b", "--gpus", "16", "--mesh", "shard=16,expert=3"): "expert=3 must divide shard=16",
        ("dbrx-132b", "--gpus", "48", "--mesh", "shard=48,expert=3"): "must divide moe_num_experts=16",
        ("dbrx-132b", "--gpus", "11", "--mesh", "shard=11"): "ffn_hidden_size=10752 must be a multiple of the 11 ranks",
        ("dbrx-132b", "--gpus", "8", "--seq", "65536"): "from 1 to model.max_seq_len=32768",
        ("dbrx-132b", "--gpus", "8", "--tokens", "12Q"): "such as 12T",
        ("dbrx-132b", "--gpus", "8", "--batch-tokens", "40000"): "must be a multiple of seq_len=32768",
        ("dbrx-132b", "--gpus", "3072", "--batch-tokens", "32768", "--mesh", "shard=64"): "cannot share evenly",
    }.items():
        assert code(*arguments) == 2, arguments
        assert said in " ".join(capsys.readouterr().err.split()), arguments


def test_no_option_of_a_plan_takes_0_for_nothing_given() -> None:
    for option in ("seq_len", "batch_tokens", "micro_batch"):
        with pytest.raises(InputError, match="must "):
            planned(DBRX, None, 64, "h100", **{option: 0})  # type: ignore[arg-type]


def test_a_rank_with_few_experts_is_planned_for_twice_the_mean_and_one_with_more_for_less() -> None:
    """Of 16 experts one gets 3.6 times the mean, as one did in a training here, and 15 share the other 12.4."""
    training = Training(optimizer=ADAMW, model=DBRX, seq_len=4096, batch_tokens=2**22)
    loads = [expert_load(training, Layout(1, 16, 1, ranks)) for ranks in (1, 2, 4, 8, 16)]
    others = 12.4 / 15
    assert loads == pytest.approx([1.0, (3.6 + 7 * others) / 8, (3.6 + 3 * others) / 4, 2.0, 2.0])
    found = planned(DBRX, None, 64, "h100", "shard=64,expert=8", expert_load="1.5")
    assert found.plan.expert_load == 1.5
    assert planned(DBRX, None, 64, "h100", "shard=64,expert=2", expert_load="3").plan.expert_load == 2  # all tokens
    said = figures("dbrx", found, 1e12)
    assert said["assumptions"]["expert_load"] == 1.5
    assert "the busiest rank's experts get 1.5 times the mean" in plan_text(said)


@settings(max_examples=20)
@given(st.floats(1, 16), st.floats(1, 16), st.sampled_from([2, 4, 8, 16]))
def test_a_higher_expert_load_never_needs_less_memory_or_time(one: float, other: float, ranks: int) -> None:
    training = Training(optimizer=ADAMW, model=DBRX, seq_len=4096, batch_tokens=2**22)
    way = Way(layout=Layout(1, 64, 1, ranks), micro_batch=1, recompute="selective")
    low, high = (plan(replace(training, expert_loads={ranks: load}), H100, way) for load in sorted((one, other)))
    assert low.needed_bytes <= high.needed_bytes
    assert low.times.step <= high.times.step


def test_a_runs_figures_give_the_load_of_its_busiest_rank(tmp_path: Path) -> None:
    """Two layers of four experts; two ranks would have experts 0 and 1, and 2 and 3."""
    even = [0.25, 0.25, 0.25, 0.25]
    records = [[even, [0.4, 0.3, 0.2, 0.1]], [[0.1, 0.1, 0.3, 0.5], even]]
    lines = [json.dumps({"kind": "train", "step": 10, "expert_load": load}) for load in records]
    lines.insert(1, json.dumps({"kind": "validation", "step": 10}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert loads_of_run(TINY, tmp_path) == pytest.approx({1: 1.0, 2: 1.6, 4: 2.0})
    for source in ({"expert_load": str(tmp_path)}, {"run": tmp_path}):
        found = planned(TINY, None, 4, "h100", "shard=4,expert=2", batch_tokens=4096, **source)  # type: ignore[arg-type]
        assert found.plan.expert_load == pytest.approx(1.6)
    other = replace(TINY, moe_num_experts=8)
    assert planned(other, None, 4, "h100", "shard=4,expert=4", run=tmp_path).plan.expert_load == 2.0
    for broken in ('{"expert_load": [[1], [2, 3]]}', '{"expert_load": "much"}', '{"step": 1}', ""):
        (tmp_path / "metrics.jsonl").write_text(broken + "\n")
        assert loads_of_run(TINY, tmp_path) is None


def test_a_plan_leaves_a_tenth_of_the_memory_free_and_says_that_its_days_are_a_lower_bound() -> None:
    """The published DBRX on as many GPUs as it was trained on."""
    found = planned(DBRX, None, 3072, "h100", seq_len=4096)
    assert all(one.needed_bytes <= 0.9 * 80e9 for one in (found.plan, *found.others))
    said = figures("dbrx-132b", found, 12e12)
    text = plan_text(said)
    assert f"in at least {said['days']:,.1f} days" in text
    assert "the number of days is a lower bound" in text
    tight = replace(H100, memory_bytes=round(found.plan.needed_bytes / 0.9) - 10)
    assert not replace(found.plan, hardware=tight).fits
    assert replace(found.plan, hardware=replace(tight, memory_bytes=tight.memory_bytes + 20)).fits


def test_a_recipe_brings_its_own_settings() -> None:
    shape = load_shape("quickstart")
    found = planned(shape.model, shape.train, 1, "h100")
    assert found.plan.training.seq_len == 512
    assert found.plan.training.batch_tokens == 8192
    assert found.plan.training.optimizer.name == "muon"
    found = planned(shape.model, shape.train, 4, "h100", mesh="shard=2", micro_batch=2, recompute="full")
    assert found.plan.way == Way(layout=Layout(2, 2, 1, 1), micro_batch=2, recompute="full")


def test_a_batch_that_nobody_gave_can_be_shared() -> None:
    assert default_batch_tokens(3072, 4096) == 3072 * 4096
    assert default_batch_tokens(3072, 32768) == 384 * 32768
    assert default_batch_tokens(8, 4096) == 2**22
    for gpus in (1, 6, 7, 12, 100):
        sequences = default_batch_tokens(gpus, 4096) // 4096
        assert sequences % gpus == 0 or gpus % sequences == 0
    assert [n for n in range(1, 361) if 360 % n == 0] == divisors(360)


def test_the_errors_that_a_plan_prints_are_those_of_todays_plan() -> None:
    """benchmarks/plan.py measured; whoever changes the arithmetic runs it again (`benchmarks/plan.py none`)."""
    results = json.loads((Path(__file__).parents[2] / "benchmarks/results/plan.json").read_text())
    shown = {case["case"]: case for case in measured()["cases"]}
    assert shown.keys() == results.keys()
    for name, row in results.items():
        cfg = ModelConfig(
            d_model=row["d_model"], n_layers=row["n_layers"], n_heads=row["d_model"] // 64, kv_n_heads=2,
            ffn_hidden_size=row["ffn_hidden_size"], vocab_size=row["vocab_size"], max_seq_len=row["seq_len"],
        )  # fmt: skip
        tokens = row["seq_len"] * row["micro_batch"] * row["micro_batches"] * row["ranks"]
        training = Training(model=cfg, seq_len=row["seq_len"], batch_tokens=tokens,
                            optimizer=OPTIMIZERS[row["optimizer"]].cost, dtype=row["dtype"])  # fmt: skip
        way = Way(layout=Layout(1, row["ranks"], 1, 1), micro_batch=row["micro_batch"], recompute=row["recompute"],
                  on_gpu=False)  # fmt: skip
        said = plan(training, cpu(row["gemm_flops"], 10**12, row["copy_bytes_per_s"]), way)
        assert shown[name]["measured_bytes"] == row["measured_bytes"]
        assert shown[name]["planned_bytes"] == said.needed_bytes, name
        assert shown[name]["planned_allocated_bytes"] == said.moment.total + LIBRARIES, name
        assert shown[name]["planned_s"] in (None, pytest.approx(said.times.step)), name
        # what can be promised of a plan: what it says is allocated
        assert shown[name]["measured_allocated_bytes"] == pytest.approx(said.moment.total + LIBRARIES, rel=0.1), name


def test_sizes_are_read() -> None:
    assert parse_mesh("shard=64, expert=16") == ParallelConfig(shard=64, expert=16)
    assert parse_mesh("shard=all,context=2") == ParallelConfig(shard=None, context=2)
    assert (parse_tokens("12T"), parse_tokens("300B"), parse_tokens("1.5e12")) == (12e12, 300e9, 1.5e12)
    for bad in ("", "T", "-1B", "nan"):
        with pytest.raises(InputError, match="--tokens"):
            parse_tokens(bad)


def test_figures_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(optimizer=ADAMW, model=TINY, seq_len=128, batch_tokens=1024)
    said = figures("tiny", search(training, H100, 1), 1e9)
    assert json.loads(json.dumps(said)) == said


@pytest.mark.parametrize(
    ("name", "gpus", "mesh"),
    [
        ("dbrx-1b", 7, "shard=7"),
        ("dbrx-132b", 3072, "shard=64,expert=8,context=8"),
        ("qwen3-30b-a3b", 64, "shard=16,expert=8"),
    ],
)
def test_torch_gives_rank_0_the_weights_that_the_plan_says(name: str, gpus: int, mesh: str) -> None:
    found = planned(load_shape(name).model, None, gpus, "h100", mesh)
    said = figures(name, found, 1e12)
    check_split(said, found)
    assert said["memory"]["param_bytes_by_torch"] == said["memory"]["param_bytes"]

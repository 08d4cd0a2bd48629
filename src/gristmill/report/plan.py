"""`gristmill plan`: what a training will need, as aligned text and as the same figures in JSON."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from importlib import resources
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, TypeVar

import numpy as np

from gristmill.errors import Failure, InputError
from gristmill.model import ModelConfig, Recompute
from gristmill.parallel.config import ParallelConfig
from gristmill.plan import traffic
from gristmill.plan.footprint import FP32, Training
from gristmill.plan.hardware import GPUS, Hardware, cpu
from gristmill.plan.search import (
    DAY_S,
    FREE,
    MAX_BATCH_TOKENS,
    MAX_GPUS,
    RESERVE,
    Plan,
    SearchResult,
    default_batch_tokens,
    divisors,
    search,
)
from gristmill.report.shape import aligned, short
from gristmill.train.config import TrainConfig
from gristmill.train.log import METRICS, read_metrics
from gristmill.train.optim import OPTIMIZERS

T = TypeVar("T")

DEFAULT_TOKENS = 12e12  # what DBRX was trained on
OMITTED = ("model", "expert_loads")  # fields of a training that the figures leave out
UNITS = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def planned(
    model: ModelConfig,
    train: TrainConfig | None,
    gpus: int,
    gpu: str,
    mesh: str | None = None,
    seq_len: int | None = None,
    batch_tokens: int | None = None,
    micro_batch: int | None = None,
    recompute: Recompute | None = None,
    optimizer: str | None = None,
    expert_load: str | None = None,
    run: Path | None = None,
) -> SearchResult:
    """A shape's plan. An option that is None comes from the recipe where it has a `train` section: length, batch and
    optimizer, and mesh, micro-batch and recompute where they are not the defaults. The rest is searched for.

    expert_load: a number or a run folder. None: from `run` where that trained this shape, else the assumptions of
    `footprint.expert_load`.

    Raises InputError.
    """
    if not 1 <= gpus <= MAX_GPUS:
        raise InputError(f"--gpus {gpus} must be from 1 to {MAX_GPUS:,}")
    hardware = hardware_of(gpu)
    length = _first(seq_len, train.seq_len if train else model.max_seq_len)
    if not 1 <= length <= model.max_seq_len:
        raise InputError(f"--seq {length} must be from 1 to model.max_seq_len={model.max_seq_len}")
    batch = _first(batch_tokens, train.batch_tokens if train else default_batch_tokens(gpus, length))
    if not 1 <= batch <= MAX_BATCH_TOKENS:
        raise InputError(f"--batch-tokens {batch} must be from 1 to {MAX_BATCH_TOKENS:,}")
    training = Training(
        model=model,
        seq_len=length,
        batch_tokens=batch,
        optimizer=OPTIMIZERS[_first(optimizer, train.optimizer.name if train else "adamw")].cost,
        dtype=(train.dtype if train and train.dtype else _dtype(hardware)),
        expert_loads=_expert_loads(model, expert_load, run),
    )
    config = None if mesh is None else parse_mesh(mesh)
    if train:
        default = {field.name: field.default for field in fields(TrainConfig)}
        if config is None and train.parallel != ParallelConfig():
            config = train.parallel
        if recompute is None and train.recompute != default["recompute"]:
            recompute = train.recompute
        if micro_batch is None and train.micro_batch != default["micro_batch"]:
            micro_batch = train.micro_batch
    found = search(training, hardware, gpus, config, micro_batch, recompute)
    if expert_load is not None and config is not None and found.plan.way.layout.expert == 1:
        raise InputError(f"--expert-load {expert_load} has no effect with expert=1; set --mesh ...,expert=N")
    return found


def _first(given: T | None, default: T) -> T:
    """0 is given, and refused where it makes no sense."""
    return default if given is None else given


def _expert_loads(model: ModelConfig, given: str | None, run: Path | None) -> Mapping[int, float] | None:
    """Ranks that share the experts -> rows of the busiest rank's experts over the mean; None where nothing is known."""
    if given is None:
        return loads_of_run(model, run) if run and model.ffn == "moe" else None
    if model.ffn != "moe":
        raise InputError(f"--expert-load {given} needs experts, and model.ffn={model.ffn} has none; leave it out")
    experts = model.moe_num_experts
    if os.path.isdir(given):
        if found := loads_of_run(model, Path(given)):
            return found
        shape = f"{model.n_layers} layers of {experts} experts"
        raise InputError(f"--expert-load {given} has no figures of a training with {shape}; give a number instead")
    try:
        load = float(given)
    except ValueError:
        load = 0.0
    if not 1 <= load <= experts:
        raise InputError(f"--expert-load {given} must be a number from 1 to moe_num_experts={experts}, or a run folder")
    return {ranks: min(load, ranks) for ranks in divisors(experts)}


def loads_of_run(model: ModelConfig, run: Path) -> dict[int, float] | None:
    """The highest load that any logged interval of a run had in any layer; None where it trained no such shape."""
    if not os.path.isfile(run / METRICS):
        return None
    logged = [record["expert_load"] for record in read_metrics(run / METRICS) if "expert_load" in record]
    try:
        shares = np.array(logged, np.float64)  # [records, layers, experts]
    except (TypeError, ValueError):
        return None
    if not logged or shares.shape[1:] != (model.n_layers, model.moe_num_experts) or not np.isfinite(shares).all():
        return None
    return {  # neighbors share a rank
        ranks: float(shares.reshape(*shares.shape[:2], ranks, -1).sum(3).max() * ranks)
        for ranks in divisors(model.moe_num_experts)
    }


def hardware_of(gpu: str) -> Hardware:
    """A kind in the table, or this machine's CPU, measured."""
    if gpu == "cpu":
        from gristmill.train.machine import best_dtype, copy_rate, describe_machine, gemm_flops

        memory = round(describe_machine()["memory_gib"] * 2**30)
        return cpu(gemm_flops(best_dtype()), memory, copy_rate())
    if gpu not in GPUS:
        raise InputError(f"--gpu {gpu} is not known; valid: {', '.join([*GPUS, 'cpu'])}")
    return GPUS[gpu]


def _dtype(hardware: Hardware) -> Literal["bfloat16", "float32"]:
    if hardware.on_gpu:
        return "bfloat16"
    from gristmill.train.machine import best_dtype

    return "bfloat16" if str(best_dtype()) == "torch.bfloat16" else "float32"


def parse_mesh(text: str) -> ParallelConfig:
    """ "shard=64,expert=16,context=1": what is left out is as in a recipe; shard=all takes what context leaves."""
    sizes: dict[str, Any] = {}
    for pair in text.split(","):
        name, _, value = pair.strip().partition("=")
        if name not in ("shard", "context", "expert") or not (value.isdecimal() or (name, value) == ("shard", "all")):
            raise InputError(f"--mesh {text!r}: {pair.strip()!r} must be shard=N, context=N or expert=N")
        sizes[name] = None if value == "all" else int(value)
    try:
        return ParallelConfig(**sizes)
    except ValueError as problem:
        raise InputError(f"--mesh {text!r}: {problem}") from None


def parse_tokens(text: str) -> float:
    """ "12T", "300B", "1.5e12"."""
    number, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1.0)
    try:
        tokens = float(number) * unit
    except ValueError:
        tokens = 0.0
    if not 0 < tokens < 1e18:
        raise InputError(f"--tokens {text!r} must be a number of tokens, such as 12T, 300B or 1.5e12")
    return tokens


# ---- figures -------------------------------------------------------------------------------------------


def figures(name: str, found: SearchResult, tokens: float) -> dict[str, Any]:
    """All that the page says, in JSON's types."""
    best = found.plan
    return {
        "name": name,
        "hardware": asdict(best.hardware),
        "training": {key: value for key, value in asdict(best.training).items() if key not in OMITTED}
        | {"optimizer": best.training.optimizer.name},
        **_of(best, tokens),
        "micro_batches": best.micro_batches,
        "memory": {
            "highest": best.moment.name,
            "bytes": {**best.moment.parts, "allocator's reserve": best.reserve},
            "needed_bytes": best.needed_bytes,
            "usable_bytes": best.usable_bytes,
            "has_bytes": best.hardware.memory_bytes,
            "param_bytes": best.param_bytes,
        },
        "seconds": {**asdict(best.times), "step": best.times.step},
        "traffic": [asdict(row) for row in best.traffic],
        "runners_up": [_of(one, tokens) for one in found.others],
        "changes": [{"set": change.keys, **_of(change.plan, tokens)} for change in found.changes],
        "ways_tried": found.tried,
        "assumptions": assumptions(best),
        "measured": measured(),
    }


def check_split(said: dict[str, Any], found: SearchResult) -> None:
    """Have torch split the model over ranks that are not there, and add what rank 0 then has to the figures.

    Raises Failure when that is not what the plan says.
    """
    from gristmill.parallel.check import sharded_elements  # torch and FSDP: what the plan itself does without

    plan = found.plan
    num_bytes = FP32 * sharded_elements(plan.training.model, plan.way.layout)
    if num_bytes != plan.param_bytes:
        raise Failure(
            f"torch gives rank 0 {num_bytes:,} bytes of weights and the plan says {plan.param_bytes:,}: a bug"
        )
    said["memory"]["param_bytes_by_torch"] = num_bytes


def _of(one: Plan, tokens: float) -> dict[str, Any]:
    layout = one.way.layout
    return {
        "fits": one.fits,
        "gpus": layout.world_size,
        "mesh": {"shard": layout.shard, "context": layout.context, "expert": layout.expert},
        "repeats": layout.replicate,
        "micro_batch": one.way.micro_batch,
        "recompute": one.way.recompute,
        "needed_bytes": one.needed_bytes,
        "step_s": one.times.step,
        "mfu": one.mfu,
        "tokens_per_second": one.tokens_per_second,
        "tokens_per_day": one.tokens_per_second * DAY_S,
        "tokens": tokens,
        "days": one.days(tokens),
    }


def assumptions(best: Plan) -> dict[str, Any]:
    """The figures between a data sheet and a step."""
    hardware = best.hardware
    return {
        "dense_share": hardware.dense,
        "grouped_share": hardware.grouped,
        "attention_share": hardware.attention,
        "link_share": traffic.LINK_SHARE,
        "memory_share": traffic.MEMORY_SHARE,
        "reserve_share": RESERVE if hardware.on_gpu else None,
        "free_share": FREE,
        "expert_load": best.expert_load,
        "days": "a lower bound: traffic beside products is hidden as far as possible, and nothing fails",
    }


def measured() -> dict[str, Any]:
    """How far off plans were, where they were held against a training (benchmarks/plan.py)."""
    return json.loads(resources.files("gristmill.plan").joinpath("measured.json").read_text(encoding="utf-8"))


# ---- text ----------------------------------------------------------------------------------------------


def plan_text(of: dict[str, Any]) -> str:
    """The figures as a page."""
    blocks = [_head(of), _memory(of), _step(of)]
    if of["traffic"]:
        blocks.append(_traffic(of))
    if of["runners_up"]:
        blocks.append(["Runners-up, on other meshes", *aligned([HEADS, *map(_row, of["runners_up"])])])
    if not of["fits"]:
        blocks.append(list(_advice(of)))
    blocks.append(_foundation(of))
    return "\n\n".join("\n".join(block) for block in blocks)


HEADS = ["shard", "context", "expert", "repeats", "micro-batch", "recompute", "memory", "step", "MFU", "tokens/s"]


def _row(one: dict[str, Any]) -> list[str]:
    mesh = one["mesh"]
    return [
        *(f"{mesh[key]:,}" for key in ("shard", "context", "expert")),
        f"{one['repeats']:,}",
        f"{one['micro_batch']:,}",
        one["recompute"],
        short(one["needed_bytes"], "B"),
        seconds(one["step_s"]),
        f"{one['mfu']:.1%}",
        short(one["tokens_per_second"]),
    ]


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _one(of: dict[str, Any]) -> str:
    return "GPU" if of["hardware"]["on_gpu"] else "process"


def span(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else f"{days * 24:.1f} hours"


def _head(of: dict[str, Any]) -> list[str]:
    training, mesh = of["training"], of["mesh"]
    batch_tokens, seq_len = training["batch_tokens"], training["seq_len"]
    verdict = (
        f"{seconds(of['step_s'])} a step, {of['mfu']:.1%} of the peak (MFU), {short(of['tokens_per_second'])} "
        f"tokens/s, {short(of['tokens_per_day'])} a day: {short(of['tokens'])} tokens in at least {span(of['days'])}"
        if of["fits"]
        else f"does not fit: {short(of['needed_bytes'], 'B')} of the {short(of['memory']['usable_bytes'], 'B')} that "
        f"may be used of {short(of['memory']['has_bytes'], 'B')}"
    )
    return [
        f"{of['name']} on {of['gpus']:,} x {of['hardware']['name']}: {verdict}",
        "",
        f"  a step is {batch_tokens:,} tokens: {batch_tokens // seq_len:,} sequences of {seq_len:,}; "
        f"{training['optimizer']}, {training['dtype']}",
        f"  train.parallel: shard={mesh['shard']}, context={mesh['context']}, expert={mesh['expert']}; "
        f"{of['repeats']:,} x that ({of['ways_tried']:,} ways tried)",
        f"  train.micro_batch={of['micro_batch']}, {of['micro_batches']:,} a step; train.recompute={of['recompute']}",
    ]


def _memory(of: dict[str, Any]) -> list[str]:
    memory = of["memory"]
    rows = [[part, f"{size:,}", short(size, "B")] for part, size in memory["bytes"].items() if size]
    rows.append(["needed", f"{memory['needed_bytes']:,}", short(memory["needed_bytes"], "B")])
    rows.append(["may be used", f"{memory['usable_bytes']:,}", short(memory["usable_bytes"], "B")])
    rows.append(["there is", f"{memory['has_bytes']:,}", short(memory["has_bytes"], "B")])
    lines = [f"Memory of a {_one(of)} at its highest, {memory['highest']}", *aligned(rows)]
    if "param_bytes_by_torch" in memory:
        lines.append("  the weights are checked: torch split them over so many ranks, none of which was there")
    return lines


NAMES = {
    "forward": "blocks, forward",
    "backward": "blocks, backward",
    "loss": "loss",
    "gather_and_scatter": "FSDP, what products do not hide",
    "exchange": "all-to-all of tokens",
    "context": "keys and values of a sequence",
    "repeat": "all-reduce over repeats",
    "optimizer": "optimizer",
    "step": "step",
}


def _step(of: dict[str, Any]) -> list[str]:
    rows = [
        [NAMES[part], seconds(value), f"{value / of['step_s']:.1%}"] for part, value in of["seconds"].items() if value
    ]
    return ["Time of a step", *aligned(rows)]


def _traffic(of: dict[str, Any]) -> list[str]:
    rows = [["", "ranks", "over", "bytes", "", "time", ""]]
    for row in of["traffic"]:
        hidden = "beside products" if row["hidden"] else ""
        sizes = [f"{row['bytes_sent']:,}", short(row["bytes_sent"], "B")]
        rows.append([row["name"], f"{row['ranks']:,}", row["link"], *sizes, seconds(row["seconds"]), hidden])
    return [f"What a {_one(of)} sends in a step", *aligned(rows)]


def _advice(of: dict[str, Any]) -> Iterator[str]:
    largest = sorted(of["memory"]["bytes"].items(), key=lambda item: -item[1])[:3]
    yield "It does not fit. Most of it: " + ", ".join(f"{part} {short(size, 'B')}" for part, size in largest)
    if not of["changes"]:
        yield "  nothing that was tried makes it fit: take GPUs with more memory, or a smaller model"
    for change in of["changes"]:
        keys = " ".join(f"{key}={value}" for key, value in change["set"].items())
        yield (
            f"  set {keys}: {short(change['needed_bytes'], 'B')}, {seconds(change['step_s'])} a step, "
            f"{short(change['tokens'])} tokens in at least {span(change['days'])}"
        )


def _foundation(of: dict[str, Any]) -> list[str]:
    said, seen, hardware = of["assumptions"], of["measured"], of["hardware"]
    load = f"the busiest rank's experts get {said['expert_load']:.3g} times the mean"
    lines = [
        "What this is based on",
        "  step = micro-batches x (max(forward, gather) + max(backward, gather + scatter) + loss + all-to-all",
        "         + context) + first gather and last scatter + all-reduce over repeats + optimizer; a product takes",
        "         its operations over its share of the peak, other work its bytes over the memory's bandwidth",
        f"  shares of the peak: products {said['dense_share']:.0%}, experts' {said['grouped_share']:.0%}, attention "
        f"{said['attention_share']:.0%}; of links {said['link_share']:.0%}, of memory's bandwidth "
        f"{said['memory_share']:.0%};",
        f"  {load}; {said['free_share']:.0%} of the memory stays free: all of these are assumptions",
        f"  the number of days is {said['days']}",
        f"  {hardware['name']}: {short(hardware['flops'], 'FLOP/s')}, {short(hardware['memory_bytes'], 'B')} at "
        f"{short(hardware['memory_bandwidth'], 'B/s')}; in a node of {hardware['per_node']} "
        f"{short(hardware['nvlink'], 'B/s')} a GPU, beyond it {short(hardware['network'], 'B/s')}, one way",
        *wrap(hardware["source"], 116, initial_indent="  ", subsequent_indent="  "),
        f"  Never held against a GPU. Held against trainings on {seen['machine']},",
        "  each figure with how far the plan was off; a step in processor time over threads; `of 4 ranks` is a process",
        "  with FSDP's weights split in four, and nothing sent",
    ]
    rows = [["", "allocated", "plan", "resident", "plan", "step", "plan"]]
    for row in seen["cases"]:
        cells = [_beside(row, "allocated_bytes", _bytes), _beside(row, "bytes", _bytes), _beside(row, "s", seconds)]
        rows.append([row["case"], *(cell for pair in cells for cell in pair)])
    return lines + aligned(rows)


def _bytes(size: float) -> str:
    return short(size, "B")


def _beside(row: dict[str, Any], what: str, written: Callable[[float], str]) -> list[str]:
    """[what was measured, how far the plan was off]."""
    seen, said = row[f"measured_{what}"], row[f"planned_{what}"]
    return [written(seen), f"{said / seen - 1:+.0%}"] if seen and said else ["", ""]

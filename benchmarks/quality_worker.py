"""Trainings whose quality is compared: the process that runs one, and what the comparing scripts do with it.

    python benchmarks/quality_worker.py WORK OUT VARIANT time|SPLIT

VARIANT is JSON: the side (gristmill or transformers) and settings of the quickstart, whose corpus, tokenizer and shards
stand in WORK. `time` runs a step for each line on standard input and answers with its seconds. Otherwise the training
runs to its end, going on from where it was, and writes OUT/result.json: bits per byte of the split, all bytes of its
documents, by the function that the evaluation stage uses.

Minutes become steps by timing the variants' steps in turns, each in a process of its own, before anything is trained:
a busy machine then makes a training slower, and no worse.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from training import Side

from gristmill import artifact, pipeline
from gristmill.artifact import write_atomically
from gristmill.current import find_stages
from gristmill.evaluate.bits_per_byte import bits_per_byte
from gristmill.evaluate.documents import Split, read_documents
from gristmill.hub import assemble, in_memory, read_published, write_published
from gristmill.inference.scorer import ModelScorer
from gristmill.kernels import native
from gristmill.model import Transformer, init_weights
from gristmill.parallel.ranks import ALONE
from gristmill.recipe import load_recipe
from gristmill.stage import Recipe, keyed
from gristmill.stop import Stop
from gristmill.streaming.batches import Batch, Batches
from gristmill.tokenizer import Tokenizer
from gristmill.train.checkpoint import Identity
from gristmill.train.config import CheckpointConfig
from gristmill.train.curriculum import curriculum_of
from gristmill.train.loop import Started, Step, TrainingJob, layout_of, train
from gristmill.train.machine import best_dtype
from gristmill.train.schedule import learning_rate_scale

WARM_UP = 3
SAVE_EVERY = 50


@dataclass(frozen=True)
class Variant:
    side: str
    settings: tuple[str, ...] = ()

    def recipe(self) -> Recipe:
        return load_recipe("quickstart", self.settings)

    def having(self, *settings: str) -> "Variant":
        return replace(self, settings=(*self.settings, *settings))


# ---- what the comparing scripts do ---------------------------------------------------------------------


def prepare(work: Path) -> None:
    """The quickstart's corpus, tokenizer and shards, through their own stages; they stand afterwards."""
    pipeline.run(load_recipe("quickstart"), work, until="shards")


def calibrate(work: Path, variants: Mapping[str, Variant], rounds: int) -> dict[str, Any]:
    """Seconds of a step, and the first variant's over each one's; the variants' steps alternate. Measured once for
    these variants and kernels."""
    kept = work / "calibration.json"
    of = {
        "kernels": native.in_use(),
        "rounds": rounds,
        "variants": {name: asdict(its) for name, its in variants.items()},
    }
    of = json.loads(json.dumps(of))  # tuples become lists, as in the file
    if kept.exists() and (known := json.loads(kept.read_text())).get("of") == of:
        return dict(known)
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: Side(command(work, Path(folder) / name, its, "time")) for name, its in variants.items()}
        try:
            for round_ in range(WARM_UP + rounds):
                for side in sides.values():
                    side.step(round_)
        finally:
            for side in sides.values():
                side.close()
    seconds = {name: side.seconds[WARM_UP:] for name, side in sides.items()}
    first = next(iter(seconds.values()))
    figures = {
        "of": of,
        "step_seconds": {name: round(statistics.median(its), 4) for name, its in seconds.items()},
        "speed": {
            name: round(statistics.median(a / b for a, b in zip(first, its, strict=True)), 4)
            for name, its in seconds.items()
        },
        "load": [round(load, 1) for load in os.getloadavg()],
    }
    write_atomically(kept, json.dumps(figures, indent=2).encode())
    return figures


def trained(work: Path, name: str, variant: Variant, split: Split) -> dict[str, Any]:
    """A variant's result; what was finished before is read, what was begun goes on."""
    result = work / "runs" / name / "result.json"
    if not (result.exists() and json.loads(result.read_text())["key"] == key_of(work, variant, split)):
        print(f"{name}: {variant.recipe()['train'].steps} steps", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, *command(work, result.parent, variant, split)], check=True)
    figures = dict(json.loads(result.read_text()))
    print(f"{name:<16}{figures['bits_per_byte']:.4f} bits per byte after {figures['tokens']:,} tokens", flush=True)
    return figures


def command(work: Path, out: Path, variant: Variant, task: str) -> list[str]:
    return [__file__, str(work), str(out), json.dumps(asdict(variant)), task]


def key_of(work: Path, variant: Variant, split: Split) -> str:
    recipe = variant.recipe()
    config = {"side": variant.side, "model": keyed(recipe["model"]), "train": keyed(recipe["train"]), "split": split}
    return artifact.stage_key("quality", 1, config, {"shards": artifact.load(shards_of(work)).content})


# ---- a worker ------------------------------------------------------------------------------------------


def shards_of(work: Path) -> Path:
    """The current ones, should there be more: a changed environment has another corpus."""
    return find_stages(work, pipeline.names_of())["shards"]


def input_of(shards: Path, name: str) -> Path:
    return (shards / str(artifact.load(shards).manifest["inputs"][name]["path"])).resolve()


def ours(recipe: Recipe, shards: Path, out: Path, key: str) -> Iterator[Started | Step]:
    cfg = replace(recipe["train"], log_every=1, checkpoint=CheckpointConfig(every=SAVE_EVERY, keep=1))
    job = TrainingJob(
        cfg=cfg,
        model_cfg=recipe["model"],
        layout=layout_of(cfg, recipe["model"], ALONE),
        shards=shards,
        tokenizer=input_of(shards, "tokenizer"),
        folder=out,
        curriculum=curriculum_of(recipe["corpus"]),
        identity=Identity(key, {"train": keyed(recipe["train"]), "model": keyed(recipe["model"])}, {}),
    )
    return (event for event in train(job, Stop()) if isinstance(event, Started | Step))


class Theirs:
    """transformers' model in bf16 with torch's AdamW, from our initial weights; documents are kept apart there too."""

    def __init__(self, recipe: Recipe, shards: Path) -> None:
        from transformers import AutoModelForCausalLM

        cfg = self.cfg = recipe["train"]
        sizes = (cfg.seq_len, cfg.sequences_per_batch, cfg.steps)
        self.batches = Batches(shards, *sizes, curriculum_of(recipe["corpus"]), cfg.seed)
        with tempfile.TemporaryDirectory() as folder:
            model = init_weights(Transformer(recipe["model"]), cfg.seed)
            write_published(Path(folder), recipe["model"], in_memory(model.state_dict()), None)
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=best_dtype(), local_files_only=True).train()
        its = cfg.optimizer
        betas = (its.beta1, its.beta2)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=its.lr, betas=betas, weight_decay=its.weight_decay, fused=True
        )
        self.done = 0

    def step(self) -> float:
        batch: Batch = self.batches.batch(self.done)
        tokens, targets, positions = map(torch.from_numpy, (batch.tokens, batch.targets, batch.positions))
        out = self.model(
            input_ids=tokens,
            position_ids=positions,  # they begin anew with each document, from which the attention mask is made
            labels=targets,
            shift_labels=targets,
            use_cache=False,
            output_router_logits=True,  # adds the balancing loss
        )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.optimizer.clip_norm)
        scale = learning_rate_scale(self.cfg.schedule, self.done, self.cfg.steps)
        self.optimizer.param_groups[0]["lr"] = self.cfg.optimizer.lr * scale
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return float(out.loss.detach())

    def save(self, file: Path, key: str) -> None:
        tensors: dict[str, Tensor] = {f"model/{name}": param.detach() for name, param in self.model.named_parameters()}
        for name, param in self.model.named_parameters():
            tensors |= {f"{kind}/{name}": value for kind, value in self.optimizer.state[param].items()}
        save_file(tensors, file.with_suffix(".part"), {"key": key})
        file.with_suffix(".part").replace(file)

    def resume(self, file: Path, key: str) -> None:
        if not file.exists():
            return
        with safe_open(file, "pt") as saved:
            if saved.metadata()["key"] != key:
                return
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 (not a mapping)
        for name, param in self.model.named_parameters():
            param.data.copy_(tensors[f"model/{name}"])
            kinds = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[param] = {kind: tensors[f"{kind}/{name}"] for kind in kinds}
        self.done = int(tensors[f"step/{name}"])


def run_to_end(recipe: Recipe, variant: Variant, shards: Path, out: Path, key: str) -> Transformer:
    """The trained model, ready to be scored; both sides' arrive in the same form."""
    if variant.side == "gristmill":
        model: Transformer | None = None
        for event in ours(recipe, shards, out, key):
            model = event.model if isinstance(event, Started) else model
        assert model is not None
        return model
    theirs, state = Theirs(recipe, shards), out / "state.safetensors"
    theirs.resume(state, key)
    while theirs.done < recipe["train"].steps:
        theirs.step()
        if theirs.done % SAVE_EVERY == 0:
            theirs.save(state, key)
    theirs.model.save_pretrained(out / "published")
    return assemble(*read_published(out / "published"), best_dtype())


def answer(steps: Iterator[float]) -> None:
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = next(steps)
        seconds = time.perf_counter() - started
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_bytes": peak_bytes}), flush=True)


def main(work: str, folder: str, given: str, task: str) -> None:
    described = json.loads(given)
    variant = Variant(described["side"], tuple(described["settings"]))
    recipe, shards, out = variant.recipe(), shards_of(Path(work)), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    if task == "time":
        if variant.side == "gristmill":
            return answer(event.loss for event in ours(recipe, shards, out, "time") if isinstance(event, Step))
        theirs = Theirs(recipe, shards)
        return answer(iter(theirs.step, None))
    split: Split = "test" if task == "test" else "validation"
    key = key_of(Path(work), variant, split)
    model = run_to_end(recipe, variant, shards, out, key)
    documents = read_documents(input_of(shards, "corpus"), split)
    scorer = ModelScorer(model, recipe["train"].seq_len)
    bits = bits_per_byte(documents, scorer, Tokenizer.load(input_of(shards, "tokenizer")))
    tokens = recipe["train"].steps * recipe["train"].batch_tokens
    figures = {
        "key": key,
        "bits_per_byte": bits["all"],
        "steps": recipe["train"].steps,
        "tokens": tokens,
        "sources": bits,
    }
    write_atomically(out / "result.json", json.dumps(figures, indent=2).encode())
    for left in (*out.glob("step-*"), out / "published"):
        shutil.rmtree(left, ignore_errors=True)
    (out / "state.safetensors").unlink(missing_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

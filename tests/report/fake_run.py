"""A run folder as the pipeline leaves it, filled with plausible figures: what the report's tests read."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill import artifact
from gristmill.artifact import Artifact, Built

RECIPE: dict[str, Any] = {
    "name": "quickstart",
    "seed": 17,
    "corpus": {
        "sources": {"code": {"packages": ["torch", "numpy"]}, "prose": {"packages": ["torch"]}},
        "validation": 0.03,
        "test": 0.03,
    },
    "tokenizer": {"vocab_size": 4096},
    "shards": {"block_tokens": 32768},
    "model": {
        "d_model": 256,
        "n_layers": 8,
        "n_heads": 8,
        "kv_n_heads": 2,
        "max_seq_len": 512,
        "ffn": "moe",
        "ffn_hidden_size": 224,
        "moe_num_experts": 16,
        "moe_top_k": 4,
        "moe_loss_weight": 0.05,
        "clip_qkv": 8.0,
        "rope_theta": 500000.0,
    },
    "train": {
        "steps": 300,
        "batch_tokens": 8192,
        "optimizer": {"name": "muon", "lr": 0.004, "weight_decay": 0.1},
        "curriculum": [
            {"until": 0.7, "mix": {"code": 0.6, "prose": 0.4}},
            {"until": 1.0, "mix": {"code": 0.85, "prose": 0.15}},
        ],
    },
}
MACHINE: dict[str, Any] = {
    "cpu": "Intel(R) Xeon(R) Platinum 8488C",
    "cores": 2,
    "threads": 2,
    "memory_gib": 15.4,
    "gemm_tflops": 1.87,
    "dtype": "bfloat16",
    "kernels": "avx2",
    "load_at_start": 0.4,
}
SECONDS = {"corpus": 41.2, "tokenizer": 6.4, "shards": 9.8, "train": 391.5, "evaluate": 38.9, "export": 4.2}
ORDER = tuple(SECONDS)
LICENSES = {
    "code": {
        "BSD-3-Clause": 31_400_000,
        "Apache-2.0": 22_100_000,
        "PSF-2.0": 9_800_000,
        "MIT": 6_200_000,
        "ISC": 310_000,
    },
    "prose": {"Apache-2.0": 5_100_000, "BSD-3-Clause": 4_300_000, "PSF-2.0": 2_400_000, "MIT": 900_000},
}


CODE = (
    '''\
class RingBuffer:
    """Fixed-size buffer that overwrites its oldest item."""

    def __init__(self, size: int) -> None:
        self.items = [None] * size
        self.head = 0

    def append(self, item):
''',
    """\
        self.items.append(item)
        self.head += 1
        return self.items

    def get(self, name):
        if name in self.items:
            return self.items[name]
""",
    """\
        if not self.items:
            raise ValueError(f"{item} must be <= {self.head} & > 0")
        self._size[item] = item.size(0)
""",
    """\
        self.items[self.head % len(self.items)] = item
        self.head += 1

    def __len__(self):
        return min(self.head, len(self.items))
""",
)
PROSE = (
    "Returns the sum of all elements in the input tensor. If ``dim`` is given, the",
    " result is a tensor of the same shape as the input, with the given dimension. If ``dim`` is a list of dimensions, "
    "the result is the same as the input tensor.",
    " reduction runs over those of the axes that the array was padded with. See :func:`~numpy.pad` for the keyword.",
    " reduction is done over that dimension; a tuple of dimensions reduces over all of them. With ``keepdim`` the "
    "reduced dimensions stay, with size 1.",
)


@dataclass(frozen=True)
class FakeRun:
    path: Path
    stages: dict[str, Path]

    @property
    def arguments(self) -> dict[str, Any]:
        return {"order": ORDER, "stages": self.stages, "recipe": RECIPE, "machine": MACHINE, "seconds": SECONDS}


def fake_run(
    path: Path, *, until: str = "export", steps: int = 300, hostile: str = "", held_out: float = 1.621
) -> FakeRun:
    """`until`: the last stage that has run. `hostile`: a string put wherever a name or a text may come from outside."""
    made: dict[str, Artifact] = {}

    def stage(name: str, folder: str, built: Built, inputs: list[str], files: dict[str, Any]) -> bool:
        if ORDER.index(name) > ORDER.index(until):
            return False
        out = artifact.prepare(path / folder)
        for file, content in files.items():
            (out / file).write_bytes(artifact.canonical(content))
        key = artifact.stage_key(name, 1, RECIPE.get(name, {}), {i: made[i].content for i in inputs})
        made[name] = artifact.commit(
            out, kind=name, key=key, config=RECIPE.get(name, {}), inputs={i: made[i] for i in inputs}, built=built
        )
        return True

    corpus = Built(metrics=_corpus_metrics(), sources=_sources(hostile))
    stage("corpus", "corpus/ab12cd34", corpus, [], {"drops.json": _drops(hostile)})
    stage("tokenizer", "tokenizer/0f3e9a77", Built(metrics={"vocab_size": 4096}), ["corpus"], {"tokenizer.json": [1]})
    shards = {"code": {"documents": 6100, "tokens": 19_600_000, "blocks": 598, "bytes": 66_000_000}}
    shards["prose"] = {"documents": 7900, "tokens": 3_500_000, "blocks": 107, "bytes": 12_000_000}
    built = Built(metrics={"sources": shards, "bytes_per_token": 3.37})
    stage("shards", "shards/77aa0c1d", built, ["corpus", "tokenizer"], {"index.json": [2]})
    path.mkdir(exist_ok=True, parents=True)
    if until not in ("corpus", "tokenizer"):
        (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics(steps, hostile)))
    trained = {
        "total_params": 17_104_512,
        "active_params": 5_832_960,
        "flops_per_token": 38_214_000,
        "train_tokens": steps * 8192,
        "final_loss": 3.021,
    }
    stage(
        "train",
        f"train/5d2f81c0/step-{steps:08}",
        Built(metrics=trained),
        ["shards", "tokenizer"],
        {"state.json": steps},
    )
    evaluation = _evaluation(hostile, held_out)
    stage("evaluate", "evaluate/c0ffee12", Built(), ["corpus", "tokenizer", "train"], {"evaluation.json": evaluation})
    built = Built(metrics={"export_max_logit_diff": 3.11e-06})
    stage("export", "export/9b1ac455", built, ["tokenizer", "train"], {"config.json": {"model_type": "qwen3_moe"}})
    return FakeRun(path, {name: made[name].path for name in made})


def commit_run(run: FakeRun) -> None:
    """The run's own manifest, as the pipeline writes it at the end."""
    stages = {name: path.relative_to(run.path).as_posix() for name, path in run.stages.items()}
    built = Built(metrics={"stages": stages, "machine": MACHINE, "seconds": SECONDS})
    artifact.commit(run.path, kind="run", key="0" * 64, config=RECIPE, inputs={}, built=built)


def metrics(steps: int, hostile: str = "") -> list[dict[str, Any]]:
    """Records as training logs them, every second step; validation every 25 steps; one resume on the way."""
    rng = random.Random(3)
    taste = [[rng.gauss(0, 0.9) for _ in range(16)] for _ in range(8)]
    seen = {"code" + hostile: 0, "prose": 0}
    records: list[dict[str, Any]] = []
    for step in range(0, steps + 1, 2):
        done = step / steps
        stage = int(done > 0.7)
        tokens = step * 8192
        total = 2 * 8192 if step else 0
        seen["code" + hostile] += round(total * (0.85 if stage else 0.6))
        seen["prose"] = tokens - seen["code" + hostile]
        loss = 2.2 + 6.1 * math.exp(-14 * done) + 0.95 * math.exp(-2.2 * done) + rng.gauss(0, 0.035)
        loads = []
        for layer in taste:
            calm = 0.12 + 0.9 * math.exp(-9 * done)
            weights = [math.exp(calm * t + rng.gauss(0, 0.05)) for t in layer]
            loads.append([round(w / sum(weights), 5) for w in weights])
        loads[5] = _collapsed(loads[5], done)
        records.append(
            {
                "kind": "train",
                "step": step,
                "tokens": tokens,
                "seconds": 1.3 * step,
                "loss": loss,
                "balance_loss": 0.051,
                "lr": 0.004 * min(1.0, step / 20, (1 - done) / 0.3 + 0.02),
                "grad_norm": 0.8,
                "tokens_per_second": 6300 + rng.gauss(0, 90) - 2100 * (148 < step < 156),
                "gemm_tflops": 1.87,
                "mfu_measured": 0.128,
                "expert_load": loads,
                "load_max_over_mean": 16 * max(map(max, loads)),
                "source_tokens": dict(seen),
                "source_loss": {
                    "code" + hostile: loss - 0.16 + rng.gauss(0, 0.03),
                    "prose": loss + 0.52 + rng.gauss(0, 0.05),
                },
                "curriculum_stage": stage,
            }
        )
        if step % 26 == 0 and step:
            bpb = 1.52 + 2.1 * math.exp(-9 * done) + 0.42 * math.exp(-2.4 * done)
            bits = {"all": bpb, "code" + hostile: bpb - 0.06, "prose": bpb + 0.3}
            records.append({"kind": "validation", "step": step, "tokens": tokens, "bits_per_byte": bits})
        if step == 130:
            records.append({"kind": "resume", "step": 130, "seconds": 4.2})
    return records


def _collapsed(loads: list[float], done: float) -> list[float]:
    """A layer whose first two experts take ever more and whose last one dies: what the heat map is there to show."""
    loads = [*loads]
    loads[0] *= 1 + 1.6 * done
    loads[9] *= 1 + 0.9 * done
    loads[15] *= max(0.0, 1 - 1.4 * done)
    return [load / sum(loads) for load in loads]


def _sources(hostile: str) -> dict[str, Any]:
    packages = {"torch": "2.13.0", "numpy": "2.4.1", "transformers": "5.23.0", "rich": "14.2.0"}
    sizes = {"code": (6_480, 69_810_000), "prose": (8_410, 12_700_000)}
    return {
        name + (hostile if name == "code" else ""): {
            "documents": sizes[name][0],
            "bytes": sizes[name][1],
            "licenses": {k + hostile: v for k, v in held.items()},
            "fingerprint": f"{name}9c1e44d07b",
            "packages": packages,
        }
        for name, held in LICENSES.items()
    }


def _corpus_metrics() -> dict[str, Any]:
    return {
        "documents": 14_890,
        "bytes": 82_510_000,
        "dropped": {"license_not_allowed": 2210, "near_duplicate": 1432, "too_short": 903},
        "splits": {
            "train": {"documents": 14_000, "bytes": 77_900_000, "groups": 71},
            "validation": {"documents": 430, "bytes": 2_300_000, "groups": 6},
            "test": {"documents": 460, "bytes": 2_310_000, "groups": 7},
        },
    }


def _drops(hostile: str) -> dict[str, Any]:
    counts = {
        "license_not_allowed": (2210, 19_400_000),
        "near_duplicate": (1432, 24_100_000),
        "too_short": (903, 84_000),
        "generated_table": (118, 9_900_000),
        "exact_duplicate": (611, 2_200_000),
        "long_lines": (57, 3_100_000),
        "invalid_utf8": (4, 51_000),
    }
    example = {"id": f"torch/_tables{hostile}.py", "source": "code", "excerpt": f"DATA = [0x1f, 0x2e, 0x3d]{hostile}\n"}
    return {reason: {"count": n, "bytes": b, "examples": [example]} for reason, (n, b) in counts.items()}


def _evaluation(hostile: str, held_out: float) -> dict[str, Any]:
    def by_source(value: float) -> dict[str, float]:
        return {"all": value, "code" + hostile: round(value - 0.07, 4), "prose": round(value + 0.31, 4)}

    outside = ("code" + hostile, CODE[0], CODE[1] + hostile, CODE[2], CODE[3])
    names = ("source", "prompt", "greedy", "sampled", "truth")
    samples = [dict(zip(names, told, strict=True)) for told in (outside, ("prose", *PROSE))]
    return {
        "validation": {"bits_per_byte": by_source(1.598)},
        "test": {"bits_per_byte": by_source(held_out), "documents": 460, "bytes": 2_310_000},
        "baselines": {"xz_document": by_source(2.124), "xz": by_source(1.702), "trigram": by_source(1.958)},
        "samples": samples,
        "parse_share": {"greedy": 0.8125, "sampled": 0.5625, "functions": 64},
    }

"""The paths of the README and of docs/, walked as a new user would: every documented command, on tiny shapes.

Commands come from the pages, in their order. Only sizes change: `quickstart` becomes a tiny recipe based on it,
training takes a few steps, and the hub runs on loopback.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pytest
import torch
import yaml
from documented import blocks, commands
from gguf import GGUFReader
from hub_server import Client, Repository, running_hub
from texts import write_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gristmill import artifact, cli
from gristmill.hub.folder import open_model
from gristmill.inference import find_model, load_model
from gristmill.model import Transformer, packed

pytestmark = pytest.mark.timeout(300)
SMALL = {"steps": 4, "batch_tokens": 256, "seq_len": 64, "micro_batch": 2, "dtype": "float32", "threads": 1}
QUICKSTART = {
    "base": "quickstart",
    "corpus": {"sources": {"texts": {"path": "texts", "license": "MIT"}}},
    "tokenizer": {"vocab_size": 384},
    "shards": {"block_tokens": 256},
    "model": {"d_model": 64, "n_layers": 1, "n_heads": 2, "kv_n_heads": 1, "ffn_hidden_size": 64, "max_seq_len": 256}
    | {"moe_num_experts": 4, "moe_top_k": 2},
    "train": SMALL | {"checkpoint": {"every": 2}, "tracking": {"enabled": False}},
    "evaluate": {"samples": 1, "functions": 1, "sample_tokens": 4, "prompt_tokens": 8},
    "export": {"checked_sequences": 1, "checked_greedy": 1},
}
# How a documented word reads on tiny shapes.
TINY = {
    "quickstart": "quickstart.yaml",
    "train.steps=1000": "train.steps=6",
    "--nproc-per-node=8": "--nproc-per-node=2",
}


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Walk = Callable[..., Said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's folder, which is also their home: notes of their own, data, and the quickstart's recipe."""
    folder = tmp_path_factory.mktemp("user")
    write_texts(folder / "texts", 1)
    write_texts(folder / "notes", 2, num_files=8)
    (folder / "data").mkdir()
    rows = [
        {"text": file.read_text(), "license": ("MIT", "GPL-3.0")[number % 8 == 0], "repository": f"r{number % 7}"}
        for number, file in enumerate(sorted((folder / "texts").iterdir()))
    ]
    for name, half in (("a", rows[:15]), ("b", rows[15:])):
        packed = "".join(json.dumps(row) + "\n" for row in half).encode()
        (folder / f"data/{name}.jsonl.zst").write_bytes(pa.compress(packed, codec="zstd", asbytes=True))
    (folder / "quickstart.yaml").write_text(yaml.safe_dump(QUICKSTART))
    return folder


@pytest.fixture
def walk(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Walk:
    """Gives a command line to the CLI, in the user's folder; it must end with 0 unless `code` says otherwise."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    for name in ("GRISTMILL_DATABASE", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def walk(*words: str, code: int = 0) -> Said:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["gristmill", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = Said(int(stop.value.code or 0), *capsys.readouterr())
        assert said.code == code, (words, said)
        assert "Traceback" not in said.err
        assert " 0.0 MB" not in said.out + said.err
        assert code == 0 or (said.err.startswith("error: ") and said.err.count("\n") == 1), said.err
        return said

    return walk


@pytest.fixture
def quickstart(walk: Walk, folder: Path) -> Path:
    """A finished run of the quickstart; stages that exist are not run again."""
    assert "The report: runs/quickstart/report.html" in walk("run", "quickstart.yaml").err
    return Path("runs/quickstart")


def tiny(words: list[str]) -> list[str]:
    return [TINY.get(word, word) for word in words]


def report(run: str) -> dict[str, Any]:
    return json.loads(Path(run, "report.json").read_text())


def check_every_verb(walk: Walk, words: list[str]) -> None:
    """Run a documented command and check its output against the files that it reads or writes."""
    said = walk(*words)
    match words:
        case ["generate", _, "--chat", prompt]:
            assert said.out.strip()
            assert not said.out.startswith(prompt)
        case ["generate", _, prompt]:
            assert said.out.startswith(prompt)
        case ["run" | "train", *_]:
            assert "The report: " in said.err or words[0] == "train"
        case ["lineage", *_]:
            assert "CC0-1.0" in said.out or "MIT" in said.out
        case ["verify", *_]:
            assert "every byte is as it was written" in said.out
        case ["recipe", *_]:
            assert yaml.safe_load(said.out)["model"]["d_model"] == 64
        case ["count", model]:
            cfg = open_model(Path(model)).cfg
            num = sum(p.numel() for p in Transformer(cfg).parameters())
            assert f"{num:,}" in said.out
        case ["export", _, out] if out.endswith(".gguf"):
            assert said.out == f"{out}\n"
            fields = GGUFReader(out).fields
            assert fields["general.architecture"].contents() in ("dbrx", "qwen3moe")
        case ["export", _, out]:
            assert said.out == f"{out}\n"
            AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
        case ["quantize", _, out, *_]:
            assert said.out == f"{out}\n"
            assert ("not measured" in Path(out, "README.md").read_text()) == words[1].startswith("models/")
        case ["import", _, out]:
            assert said.out == f"{out}\n"
        case ["plan", *_, "--json"]:
            assert json.loads(said.out)
        case ["plan", *_]:
            assert "step" in said.out
        case _:
            raise AssertionError(f"the walk does not know `gristmill {shlex.join(words)}`")


def test_the_readme_from_quickstart_to_own_notes(walk: Walk, quickstart: Path) -> None:
    first = [words for words in commands("README.md") if "quickstart" in shlex.join(words)]
    assert len(first) == 7
    for words in first:
        if words[0] != "serve":
            check_every_verb(walk, tiny(words))
    assert report("runs/quickstart")["train_tokens"] == 6 * SMALL["batch_tokens"]
    notes = report("runs/notes")
    assert list(notes["corpus"]["licenses"]) == ["CC0-1.0"]
    assert sum(split["documents"] for split in notes["corpus"]["splits"].values()) == 8
    for figure in ("held_out_bits_per_byte", "xz_bits_per_byte", "trigram_bits_per_byte"):
        assert 0 < notes[figure] < 20


def pull(folder: Path, published: Path, name: str) -> None:
    """`gristmill pull NAME` from a hub on loopback, which has this directory under that name."""
    files = {file.name: file.read_bytes() for file in published.iterdir() if file.name != "manifest.json"}
    with running_hub() as hub, Client(hub.endpoint, folder) as client:
        hub.repositories[name] = Repository(files=files, large=tuple(n for n in files if n.endswith(".safetensors")))
        (made,) = client.pull((name, None, None))
    assert made.code == 0, made.said
    assert (folder / "models" / name.replace("/", "--") / "config.json").is_file()


def test_the_readme_from_a_published_model_to_its_exports(walk: Walk, quickstart: Path, folder: Path) -> None:
    second = [words for words in commands("README.md") if "quickstart" not in shlex.join(words)]
    assert [words[0] for words in second] == ["pull", "import", "count", "plan", "export", "export", "quantize"]
    published = quickstart / artifact.load(quickstart).metrics["stages"]["export"]
    pull(folder, published, second[0][1])
    for words in second[1:]:
        check_every_verb(walk, words)
    for made in ("models/mine", "out/mine", "out/small"):
        walk("verify", made)
        assert walk("generate", made, "kam", "--temperature", "0", "--max-tokens", "4").out.startswith("kam")
    logits = [find_logits(path) for path in (published, Path("models/mine"), Path("out/mine"))]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert 0 < (find_logits(Path("out/small")) - logits[0]).abs().max() < 0.5 * logits[0].abs().max()


@torch.no_grad()
def find_logits(path: Path) -> torch.Tensor:
    model = load_model(path)[0]
    tokens = torch.arange(24)[None]
    hidden, _ = model(tokens, tokens, packed(torch.zeros_like(tokens)))
    return model.logits(hidden)


def publish_qwen(folder: Path, tokenizer: Path) -> Path:
    """A random Qwen3-MoE as transformers saves it, with a license."""
    torch.manual_seed(3)
    out = folder / "published"
    config = Qwen3MoeConfig(
        **{"vocab_size": 384, "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
        **{"max_position_embeddings": 256, "initializer_range": 0.2, "norm_topk_prob": True, "dtype": "bfloat16"},
    )
    names = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    config.eos_token_id = names.eos_token_id
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    names.save_pretrained(out)
    (out / "LICENSE").write_text("terms")
    (out / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return out


def test_the_guide_to_published_models_from_pull_to_quantized(walk: Walk, quickstart: Path, folder: Path) -> None:
    published = publish_qwen(folder, quickstart / artifact.load(quickstart).metrics["stages"]["export"])
    first, *others = commands("docs/checkpoints.md")
    pull(folder, published, first[1])
    (recipe,) = blocks("docs/checkpoints.md", "yaml")
    (folder / "continue.yaml").write_text(recipe)
    shutil.rmtree(folder / "out", ignore_errors=True)
    for words in others:
        check_every_verb(walk, [*words, *small()] if words[0] == "run" else words)
    origin = walk("lineage", "runs/continue").out
    assert "source notes" in origin
    assert f"source {first[1]}" in origin
    assert "apache-2.0" in origin
    assert (folder / "out/continued/LICENSE").read_text() == "terms"
    exec(blocks("docs/checkpoints.md", "python")[0], {})  # transformers loads it as the page says
    loss = artifact.load(Path("out/small")).metrics["test_bits_per_byte"]
    assert 0 < loss["before"] < 20
    assert 0 < loss["after"] < 20


def small() -> list[str]:
    """What makes a recipe of the pages tiny."""
    sizes = {f"train.{key}": value for key, value in SMALL.items()}
    sizes |= {f"evaluate.{key}": value for key, value in QUICKSTART["evaluate"].items()}
    sizes |= {"shards.block_tokens": 256, "train.tracking.enabled": "false", "export.checked_greedy": 1}
    return [f"--set={key}={value}" for key, value in sizes.items()]


# ---- data and models of one's own ----------------------------------------------------------------------------


def test_a_recipe_with_notes_and_jsonl_of_ones_own(walk: Walk, folder: Path) -> None:
    (recipe,) = blocks("README.md", "yaml")
    (folder / "mine.yaml").write_text(recipe.replace("base: quickstart", "base: quickstart.yaml"))
    walk("run", "mine.yaml")
    found = report("runs/mine")
    assert set(found["held_out_by_source"]) == {"notes", "code"}
    assert found["corpus"]["licenses"].keys() == {"CC0-1.0", "MIT"}
    assert sum(found["corpus"]["dropped"].values()) == 4, "the four rows under GPL-3.0"


@pytest.mark.parametrize("kind", ["run", "checkpoint", "export"])
def test_ones_own_model_trains_further(walk: Walk, quickstart: Path, folder: Path, kind: str) -> None:
    stages = artifact.load(quickstart).metrics["stages"]
    start = {"run": quickstart, "checkpoint": find_model(quickstart), "export": quickstart / stages["export"]}[kind]
    recipe = {"base": "quickstart.yaml", "name": f"from-{kind}", "start": str(start)}
    recipe["corpus"] = {"sources": {"notes": {"path": "notes", "license": "CC0-1.0"}}}
    Path("further.yaml").write_text(yaml.safe_dump(recipe))
    walk("run", "further.yaml")
    assert 0 < report(f"runs/from-{kind}")["held_out_bits_per_byte"] < 20
    origin = walk("lineage", f"runs/from-{kind}").out
    assert "source notes" in origin
    assert "source texts" in origin


def test_a_chain_of_three_runs_names_all_its_data(walk: Walk, quickstart: Path) -> None:
    for name, before, source in (("second", "runs/quickstart", "notes"), ("third", "runs/second", "data/*.jsonl.zst")):
        sources = f"corpus.sources={{{name}: {{path: '{source}', license: MIT}}}}"
        walk("run", "quickstart.yaml", "--out", f"runs/{name}", "--set", f"start={before}", "--set", sources)
        assert report(f"runs/{name}")["finished"]
    origin = walk("lineage", "runs/third").out
    for source in ("texts", "second", "third"):
        assert f"source {source}" in origin
    assert walk("verify", "runs/third").out
    walk("report", "runs/third")
    walk("generate", "runs/third", "kam", "--max-tokens", "4")


@pytest.mark.parametrize("bits", ["8", "4"])
def test_a_quantized_model_answers_is_counted_and_trains_further(
    walk: Walk, quickstart: Path, folder: Path, bits: str
) -> None:
    small = f"small-{bits}"
    walk("quantize", str(quickstart), small, "--bits", bits, "--group", "32", "--documents", "data/a.jsonl.zst")
    measured = artifact.load(Path(small)).metrics["documents_bits_per_byte"]
    assert measured["documents"] == 15
    assert abs(measured["loss"]) < 0.1
    assert walk("generate", small, "kam", "--temperature", "0", "--max-tokens", "4").out.startswith("kam")
    sizes = [walk("count", model).out.splitlines()[0].split(": ")[1] for model in (small, str(quickstart))]
    assert sizes[0] == sizes[1]
    walk("verify", small)
    assert "source texts" in walk("lineage", small).out
    walk("run", "quickstart.yaml", "--out", f"runs/{small}", "--set", f"start={small}")
    assert report(f"runs/{small}")["finished"]
    walk("quantize", small, "smaller", code=2)


def test_the_readmes_python_is_the_same_run(walk: Walk, quickstart: Path) -> None:
    (code,) = (text for text in blocks("README.md", "python") if "load_recipe" in text)
    names: dict[str, Any] = {}
    exec(code.replace('"quickstart"', '"quickstart.yaml"').replace("steps=200", "steps=4"), names)
    assert names["folder"].samefile(quickstart)


def test_shards_built_once_are_trained_on_from_a_store(walk: Walk, quickstart: Path, folder: Path) -> None:
    built = quickstart / artifact.load(quickstart).metrics["stages"]["shards"]
    shutil.copytree(built, "bucket/mine")
    (text,) = (text for text in blocks("docs/reliability.md", "yaml") if "remote:" in text)
    recipe = {"base": "quickstart.yaml", "name": "remote", **yaml.safe_load(text)}
    recipe["shards"] |= {"remote": f"file://{folder}/bucket/mine", "cache": "cache"}
    Path("remote.yaml").write_text(yaml.safe_dump(recipe))
    walk("run", "remote.yaml")
    assert report("runs/remote")["final_loss"] == report("runs/quickstart")["final_loss"]
    shown = [walk("shards", "show", run, "--step", "3").out for run in ("runs/remote", "runs/quickstart")]
    assert shown[0] == shown[1]
    assert "sequence 3: texts" in shown[0]


def test_plans_of_the_page_on_scale(walk: Walk, quickstart: Path) -> None:
    (Path("mine.yaml")).write_text("base: quickstart.yaml\nname: mine\n")
    plans = [words for words in commands("docs/scale.md") if words[0] == "plan"]
    assert len(plans) == 4
    for words in plans[1:]:  # the README's walk has the first
        check_every_verb(walk, tiny(words))


# ---- several processes, and a server ---------------------------------------------------------------------------


def started(folder: Path, *words: str, **settings: Any) -> "subprocess.Popen[str]":
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    return subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, **settings)


def test_two_processes_train_one_model(walk: Walk, folder: Path) -> None:
    lines = [line for text in blocks("docs/scale.md", "") for line in text.splitlines()]
    torchrun = next(line for line in lines if line.startswith("torchrun"))
    (folder / "mine.yaml").write_text("base: quickstart.yaml\nname: two\n")
    words = [TINY.get(word, word) for word in shlex.split(torchrun, comments=True)]
    process = started(folder, sys.executable, "-m", "torch.distributed.run", *words[1:], stderr=subprocess.STDOUT)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert walk("report", "runs/two").out == "runs/two/report.html\n"
    found = report("runs/two")
    assert found["train_tokens"] == SMALL["steps"] * SMALL["batch_tokens"]
    assert artifact.load(find_model(folder / "runs/two")).manifest["config"]
    walk("run", "mine.yaml")  # one process ends what several have trained
    assert report("runs/two")["finished"]


def test_a_server_answers_as_its_guide_says_and_ends_with_0(walk: Walk, quickstart: Path, folder: Path) -> None:
    python = f"{sys.executable} -m gristmill.cli".split()
    server = started(folder, *python, "serve", str(quickstart), "--port", "0")
    assert server.stdout is not None
    try:
        url = next(line.split()[3] for line in server.stdout if line.startswith("serving quickstart on "))
        (curl,) = (text for text in blocks("docs/serving.md", "") if text.startswith("curl"))
        body = json.loads(shlex.split(curl.replace("\\\n", " "))[-1])
        assert body["stream"]
        streamed = httpx2.post(f"{url}/v1/completions", json=body, timeout=60)
        assert streamed.status_code == 200
        assert streamed.text.endswith("data: [DONE]\n\n")
        (client,) = blocks("docs/serving.md", "python")
        answer = subprocess.run(
            [sys.executable, "-c", client.replace("http://127.0.0.1:8000", url)], capture_output=True, text=True
        )
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.strip()
        for route in ("/", "/health", "/ready", "/metrics", "/v1/models", "/v1/load", "/openapi.json"):
            assert httpx2.get(url + route).status_code == 200, route
        server.send_signal(signal.SIGTERM)
        rest, _ = server.communicate(timeout=60)
        assert server.returncode == 0, rest
    finally:
        server.kill()


def test_keys_are_made_listed_and_revoked_as_the_guide_says(walk: Walk) -> None:
    made = [words for words in commands("docs/serving.md") if words[0] == "keys"]
    assert [words[1] for words in made[:4]] == ["create", "list", "usage", "revoke"]
    key = walk(*made[0]).out.split()[-1]
    assert key.startswith("gm-")
    for words in made[1:]:
        said = walk(*words).out
        assert said
        assert key not in said

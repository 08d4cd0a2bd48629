"""Imports point downward only: a room may use rooms of lower layers, never of its own or a higher one."""

import ast
import subprocess
import sys
from pathlib import Path

import gristmill

LAYERS = [
    [
        *("errors", "background", "cpus", "home", "strict_yaml", "locks", "stop"),
        *("artifact", "current", "progress", "session", "stage"),
    ],
    ["kernels", "tokenizer", "streaming"],
    ["model", "corpus", "evaluate"],
    ["parallel", "plan", "hub"],
    ["inference"],
    ["train"],
    ["finetune", "serve", "report"],
    ["recipe", "pipeline", "cli"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
SAME_LAYER = {
    *(("locks", "errors"), ("artifact", "locks"), ("session", "locks")),
    *(("current", "artifact"), ("current", "errors"), ("artifact", "errors"), ("home", "errors")),
    *(("session", "artifact"), ("session", "errors"), ("session", "progress"), ("session", "stop")),
    ("background", "stop"),
    ("plan", "parallel"),  # uses the layout of a training
    *(("stage", "artifact"), ("stage", "errors"), ("stage", "session")),
    *(("recipe", "pipeline"), ("cli", "pipeline"), ("cli", "recipe")),
}
ROOT = Path(gristmill.__file__).parent


def imports_of(file: Path) -> set[str]:
    """Rooms that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"gristmill.{alias.name}" for alias in node.names if node.module == "gristmill"}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("gristmill.")}


def room_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_point_downward() -> None:
    upward = []
    for file in sorted(ROOT.rglob("*.py")):
        room = room_of(file)
        if room in ("__init__", "recipes"):
            continue
        for other in imports_of(file) - {room}:
            if LEVEL[other] >= LEVEL[room] and (room, other) not in SAME_LAYER:
                upward.append(f"{file.relative_to(ROOT)} imports {other}")
    assert not upward


def test_the_model_and_the_kernels_know_torch_alone() -> None:
    for room, allowed in (("kernels", {"torch"}), ("model", {"torch"})):
        for file in (ROOT / room).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                outside = {name.split(".")[0] for name in names} - allowed - {"gristmill"} - STANDARD
                assert not outside, f"{file.name} imports {outside}"


def test_training_runs_with_torch_alone() -> None:
    """A bare GPU machine has no MLflow, no recipe library and no web framework."""
    absent = ["mlflow", "pydantic", "yaml", "typer", "transformers", "tokenizers", "tiktoken", "gguf",
              "huggingface_hub", "jinja2", "rensa"]  # fmt: skip
    script = f"import sys; sys.modules.update(dict.fromkeys({absent})); import gristmill.train.loop"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_training_stage_needs_no_tracking_no_database_and_no_web_framework() -> None:
    """So a bare GPU machine can run the whole stage, with held-out loss and metrics.jsonl."""
    absent = ["mlflow", "duckdb", "pydantic", "yaml", "typer", "fastapi", "starlette", "uvicorn", "sqlalchemy",
              "transformers"]  # fmt: skip
    script = f"import sys; sys.modules.update(dict.fromkeys({absent})); import gristmill.train.stage"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


STANDARD = {
    "collections",
    "contextlib",
    "ctypes",
    "dataclasses",
    "fnmatch",
    "functools",
    "hashlib",
    "importlib",
    "itertools",
    "math",
    "operator",
    "os",
    "pathlib",
    "re",
    "struct",
    "sys",
    "threading",
    "typing",
}

"""The command line as a person meets it: exit codes, messages without tracebacks, nothing lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import gristmill
from safetensors.torch import load_file

from gristmill.hub.export import dtype_names, format_names
from gristmill.kernels.quantized import WIDTHS

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CXX": "none", "COLUMNS": "200"}


def from_nothing(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """As a shell starts it: `gristmill` below is forked from a process that has imported it."""
    command = [sys.executable, "-m", "gristmill.cli", *map(str, arguments)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=100)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gristmill.cli", *arguments]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_bad_input_exits_with_2_and_one_message() -> None:
    assert from_nothing("verify", "no-such-folder").returncode == 2
    for arguments in (
        ("run", "quickstart", "--set", "model.moe_topk=1"),
        ("run", "no-such-recipe"),
        ("verify", "no-such-folder"),
        ("generate", "no-such-model", "hello"),
        ("run",),
        ("no-such-verb",),
    ):
        result = gristmill(*arguments)
        assert result.returncode == 2, arguments
        assert "Traceback" not in result.stderr
        assert result.stderr.strip()


def test_help_teaches_every_verb() -> None:
    overview = from_nothing("--help").stdout
    for verb in ("run", "corpus", "tokenizer", "shards", "train", "generate", "report", "verify", "lineage", "recipe"):
        assert f" {verb} " in overview
    assert "gristmill run quickstart" in overview
    assert "goes on where it was" in from_nothing("run", "--help").stdout


def test_the_help_does_not_import_torch() -> None:
    script = (
        "import sys; from gristmill.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "assert not {'torch', 'numpy', 'gristmill.pipeline'} & set(sys.modules)"
    )
    for arguments in (["--help"], ["serve", "--help"], ["shards", "--help"]):
        result = subprocess.run([sys.executable, "-c", script, *arguments], env=ENV, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_help_and_errors_list_the_published_layouts_and_the_widths(tiny_run: Path, tmp_path: Path) -> None:
    export, quantize = gristmill("export", "--help").stdout, gristmill("quantize", "--help").stdout
    assert all(name in export for name in (*format_names(), *dtype_names()))
    assert all(str(width.bits) in quantize for width in WIDTHS)
    for option, known in (("--format", format_names()), ("--dtype", dtype_names())):
        wrong = gristmill("export", tiny_run, tmp_path / "new", option, "x\ny")
        assert (wrong.returncode, wrong.stderr) == (2, f"error: {option} 'x\\ny' is not one of {', '.join(known)}\n")


def test_generate_streams_the_same_text_for_the_same_seed(tiny_run: Path) -> None:
    first = gristmill("generate", tiny_run, "kam", "--max-tokens", "12", "--seed", "3")
    second = gristmill("generate", tiny_run, "kam", "--max-tokens", "12", "--seed", "3")
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("kam")


def test_generate_asked_for_a_billion_tokens_gives_what_the_context_has_room_for(tiny_run: Path) -> None:
    stop = ("--seed", "1", "--temperature", "0")
    most = gristmill("generate", tiny_run, "kam", "--max-tokens", "1000000000", *stop)
    assert most.returncode == 0, most.stderr
    assert most.stdout == gristmill("generate", tiny_run, "kam", "--max-tokens", "100000", *stop).stdout
    assert most.stdout.startswith(gristmill("generate", tiny_run, "kam", "--max-tokens", "9", *stop).stdout[:-1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("kam\udcff",), "PROMPT='kam\\udcff' is not UTF-8"),
        (("kam", "--chat", "--system", "\udcc3("), "--system='\\udcc3(' is not UTF-8"),
        (("kam", "--system", "mill"), "--system only applies to chat"),
        (("kam", "--top-p", "0"), "top_p=0.0 must be above 0 and at most 1"),
        (("kam", "--top-p", "1.01"), "top_p=1.01 must be above 0 and at most 1"),
        (("kam", "--top-p", "nan"), "top_p=nan must be above 0 and at most 1"),
        (("kam", "--min-p", "-0.1"), "min_p=-0.1 must be from 0"),
        (("kam", "--temperature", "1e-9"), "temperature=1e-09 must be 0"),
        (("kam", "--temperature", "-1"), "temperature=-1.0 must be 0"),
        (("kam", "--top-k", "-1"), "--top-k"),
        (("kam", "--seed", "-1"), "seed=-1 must be from 0"),
        (("kam " * 300,), "context is 128 tokens"),
    ],
)
def test_generate_refuses_what_it_cannot_do_with_one_message_and_prints_no_text(
    tiny_run: Path, arguments: tuple[str, ...], says: str
) -> None:
    result = gristmill("generate", tiny_run, *arguments)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout


def test_generate_keeps_to_a_schema(tiny_run: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"ripe": {"type": "boolean"}}, "required": ["ripe"], '
        '"additionalProperties": false}'
    )
    result = gristmill("generate", tiny_run, "kam", "--max-tokens", "100", "--json-schema", schema)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.removeprefix("kam"))["ripe"] in (True, False)


def test_the_cards_three_lines_print_what_generate_prints(tiny_run: Path, tmp_path: Path) -> None:
    made = from_nothing("export", tiny_run, tmp_path / "export")
    assert made.returncode == 0, made.stderr
    code = re.search(r"```python\n(.*?)```", (tmp_path / "export" / "README.md").read_text(), re.DOTALL)
    assert code is not None
    theirs = subprocess.run([sys.executable, "-c", code[1]], cwd=tmp_path / "export", capture_output=True, text=True)
    ours = from_nothing("generate", tmp_path / "export", "def fibonacci(", "--max-tokens", "64", "--temperature", "0")
    assert theirs.stdout == ours.stdout, theirs.stderr


def test_a_model_goes_out_and_in_and_what_is_wrong_exits_with_its_code(tiny_run: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    assert gristmill("export", tiny_run, out, "--format", "dbrx", "--dtype", "bfloat16").stdout == f"{out}\n"
    assert gristmill("import", out, back).stdout == f"{back}\n"
    for code, command in (
        (2, ("import", out, back)),
        (2, ("import", tmp_path / "nowhere", tmp_path / "new")),
        (2, ("export", tiny_run, tmp_path / "new", "--format", "qwen3_moe")),
        (2, ("pull", "not a name")),
    ):
        result = gristmill(*command)
        assert (result.returncode, result.stderr.count("\n")) == (code, 1), result.stderr
        assert result.stderr.startswith("error: ")
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    damaged = gristmill("import", out, tmp_path / "new")
    assert damaged.returncode == 1
    assert f"{out / 'model.safetensors'} is damaged" in damaged.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out"]


def test_count_prints_the_published_numbers() -> None:
    said = gristmill("count", "dbrx-132b").stdout
    assert "131.60B" in said
    assert "36.47B" in said


def test_count_of_a_directory_adds_the_bytes_of_its_weights_as_they_are_stored(tiny_run: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    made = gristmill("quantize", tiny_run, small, "--bits", "4", "--group", "32")
    assert made.returncode == 0, made.stderr
    said = gristmill("count", small).stdout
    stored = sum(tensor.nbytes for tensor in load_file(small / "model.safetensors").values())
    _, _, last = said.partition("Stored here\n")
    assert "4-bit codes and scales" in last
    assert f"total  {stored:,}" in re.sub(" +", "  ", last)


def test_verify_names_the_damaged_file_and_exits_with_1(tiny_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy, symlinks=True)
    assert gristmill("verify", copy).returncode == 0
    file = next(copy.glob("export/*/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    result = gristmill("verify", copy)
    assert result.returncode == 1
    assert str(file) in result.stderr


def test_lineage_prints_sources_and_licenses(tiny_run: Path) -> None:
    said = gristmill("lineage", tiny_run).stdout
    for word in ("export", "train", "corpus", "source notes", "CC0-1.0", "source verse", "MIT"):
        assert word in said


def test_a_report_is_rewritten_and_still_verifies(tiny_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy, symlinks=True)
    assert gristmill("report", copy).returncode == 0
    assert gristmill("verify", copy).returncode == 0


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_in_training_saves_and_the_same_command_goes_on(
    signum: int, code: int, tiny_yaml: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = [
        "run",
        str(tiny_yaml),
        "--out",
        str(out),
        "--set",
        "train.steps=2000",
        "--set",
        "train.checkpoint.every=5000",
    ]
    child = start(arguments)
    while child.poll() is None and not any('"train"' in file.read_text() for file in out.glob("train/*/metrics.jsonl")):
        time.sleep(0.01)
    child.send_signal(signum)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == code, said
    assert "Traceback" not in said
    (saved,) = out.glob("train/*/step-*")
    again = start(arguments)
    assert again.stdout is not None
    going_on = next(line for line in again.stdout if "going on" in line)
    again.kill()
    again.communicate()
    assert f"going on at step {int(saved.name.removeprefix('step-')):,};" in going_on


def small_disk_available() -> bool:
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.skipif(not small_disk_available(), reason="not run: no user namespaces for a small tmpfs here")
def test_a_full_disk_is_one_message_and_what_stands_is_kept(tiny_yaml: Path) -> None:
    run = f"{sys.executable} -m gristmill.cli run {tiny_yaml} --out /mnt/run"
    script = (
        "mount -t tmpfs -o size=900k none /mnt && "
        f"{run}; code=$?; ls /mnt/run; mount -o remount,size=50m /mnt; {run} && exit $code"
    )
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=ENV, capture_output=True, text=True, timeout=100
    )
    assert "Traceback" not in result.stderr
    assert result.returncode == 1, result.stderr
    assert "free some room" in result.stderr
    assert "corpus    stands" in result.stderr


@pytest.mark.skipif(not small_disk_available(), reason="not run: no user namespaces for a read-only mount here")
def test_a_folder_without_write_permission_is_one_message(tiny_yaml: Path) -> None:
    script = f"mount -t tmpfs -o ro none /mnt && {sys.executable} -m gristmill.cli run {tiny_yaml} --out /mnt/run"
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=ENV, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "choose --out" in result.stderr


def test_a_malformed_hub_endpoint_is_one_line() -> None:
    command = [sys.executable, "-m", "gristmill.cli", "pull", "org/name"]
    ended = subprocess.run(command, env={**os.environ, "HF_ENDPOINT": "http://["}, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "HF_ENDPOINT='http://[' is not a URL" in ended.stderr

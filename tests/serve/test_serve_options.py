"""The options of `gristmill serve`: each field of the configurations has one, and wrong values are one line."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from documented import ROOT, find_command

from gristmill import cli
from gristmill.inference import EngineConfig
from gristmill.serve import start
from gristmill.serve.config import ServeConfig

WITHOUT_OPTION = {
    "block_tokens": "16 is right for every model here",
    "priority_steps": "the server gives all requests the same priority",
    "prefix_cache": "it is always on, and costs nothing",
}
RENAMED = {"request_s": "timeout_s"}


def missing_options(names: Sequence[str]) -> list[str]:
    """Which fields of a configuration have no option of `serve`, or none that its page describes."""
    options = {found.name: found for found in find_command(["serve"])[0].params}
    page = (ROOT / "docs" / "serving.md").read_text()
    missing = []
    for name in names:
        option = options.get(RENAMED.get(name, name))
        if option is None:
            missing.append(f"src/gristmill/cli/inference.py: `serve` has no option for {name}")
        elif f"`{option.opts[0]}" not in page:
            missing.append(f"docs/serving.md: {option.opts[0]} is not described")
    return missing


def test_every_field_of_the_configurations_has_an_option() -> None:
    names = [field.name for cls in (EngineConfig, ServeConfig) for field in fields(cls)]
    assert set(WITHOUT_OPTION) <= set(names)
    assert missing_options([name for name in names if name not in WITHOUT_OPTION]) == []
    assert missing_options(["draft_tokens"]) == [
        "src/gristmill/cli/inference.py: `serve` has no option for draft_tokens"
    ]


def test_the_defaults_of_the_options_are_those_of_the_configurations() -> None:
    options = {found.name: found for found in find_command(["serve"])[0].params}
    for cls in (EngineConfig, ServeConfig):
        for field in fields(cls):
            if field.name not in {*WITHOUT_OPTION, "name"}:
                assert options[RENAMED.get(field.name, field.name)].default == field.default, field.name


@pytest.fixture
def served_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The arguments that `gristmill serve` passes on, and its exit code."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(start, "serve", lambda *given: calls.append(given) or 0)

    def run(*options: str) -> tuple[int, tuple[Any, ...]]:
        monkeypatch.setattr(sys, "argv", ["gristmill", "serve", str(tmp_path), *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), calls.pop() if calls else ()

    return run


def test_options_reach_the_configurations(served_with: Any) -> None:
    code, (_, cfg, engine, dtype, memory_bytes, *_) = served_with(
        *("--cache-tokens", "4096", "--max-running", "8", "--max-waiting", "9", "--token-budget", "128"),
        *("--dtype", "bfloat16", "--memory", "2GiB", "--max-requests", "7", "--name", "mine"),
    )
    assert code == 0
    assert engine == EngineConfig(cache_tokens=4096, max_running=8, max_waiting=9, token_budget=128)
    assert (dtype, memory_bytes, cfg.max_requests, cfg.name) == ("bfloat16", 2 * 2**30, 7, "mine")
    assert served_with()[1][1].max_requests == ServeConfig().max_requests
    assert served_with()[1][2] == EngineConfig()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--cache-tokens", "3"), "cache_tokens=3 must be at least block_tokens=16"),
        (("--max-running", "0"), "max_running=0 must be at least 1"),
        (("--max-running", "513"), "token_budget=512 must be at least max_running=513"),
        (("--max-waiting", "-1"), "max_waiting=-1 must be at least 1"),
        (("--max-requests", "0"), "max_requests=0 must be at least 1"),
        (("--timeout", "nan"), "timeout=nan must be a positive number"),
        (("--drain", "inf"), "drain=inf must be a number of seconds"),
        (("--memory", "16"), "'16' is no amount of memory; write it like 16GiB"),
        (("--dtype", "float8"), "invalid value for '--dtype'"),
        (("--name", ""), "name='' must be printable and not empty"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(
    served_with: Any, capsys: pytest.CaptureFixture[str], options: tuple[str, str], problem: str
) -> None:
    assert served_with(*options) == (2, ())
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("words", [("serve", "."), ("keys", "list"), ("keys", "usage"), ("keys", "create", "ada")])
def test_an_empty_database_is_refused(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gristmill", *words, "--database", ""])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "database is empty; give a file or a URL, or leave the option out" in capsys.readouterr().err

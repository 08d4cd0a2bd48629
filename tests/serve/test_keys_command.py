"""`gristmill keys` as a person types it."""

import sys
from decimal import Decimal
from pathlib import Path

import pytest

from gristmill import cli
from gristmill.serve import keys
from gristmill.serve.database import Database
from gristmill.serve.usage import Prices, Usage


class Shell:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["gristmill", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = self.capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err


@pytest.fixture
def gristmill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Shell:
    monkeypatch.setenv("GRISTMILL_DATABASE", str(tmp_path / "state" / "serve.sqlite"))
    monkeypatch.setenv("COLUMNS", "200")
    return Shell(monkeypatch, capsys)


def test_a_key_is_made_shown_once_listed_and_revoked(gristmill: Shell, tmp_path: Path) -> None:
    assert gristmill("keys", "list") == (0, "no keys yet; `gristmill keys create NAME` makes one\n", "")
    code, out, _ = gristmill(
        *("keys", "create", "alice", "--input-tokens-per-minute", "10000", "--output-tokens-per-minute", "2000"),
        *("--requests-per-hour", "600", "--parallel-requests", "4"),
    )
    assert code == 0
    key = out.split()[-1]
    assert out.endswith(f"\n{key}\n")
    found = keys.find(Database(str(tmp_path / "state" / "serve.sqlite")), key)
    assert found is not None
    assert list(found.limits.given().values()) == [10000, 2000, 600, 4]
    assert gristmill("keys", "create", "alice")[0] == 2
    code, out, _ = gristmill("keys", "list")
    assert "alice" in out
    assert "10,000 input tokens per minute, 2,000 output tokens per minute, 600 requests per hour" in out
    assert key[:11] in out
    assert key not in out
    assert gristmill("keys", "revoke", "alice")[:2] == (0, f"revoked alice, {key[:11]}…\n")
    assert "revoked" in gristmill("keys", "list")[1]
    code, out, err = gristmill("keys", "revoke", "alice")
    assert (code, out) == (2, "")
    assert err.startswith("error: no key named 'alice' is in use")


def test_looking_creates_nothing(gristmill: Shell, tmp_path: Path) -> None:
    for where in ((), ("--database", str(tmp_path / "a" / "b" / "keys.sqlite"))):
        assert gristmill("keys", "list", *where)[:2] == (0, "no keys yet; `gristmill keys create NAME` makes one\n")
        assert gristmill("keys", "usage", *where)[:2] == (0, "nothing used yet\n")
        code, out, err = gristmill("keys", "revoke", "alice", *where)
        assert (code, out) == (2, "")
        assert err.startswith("error: no key named 'alice' is in use")
    assert list(tmp_path.iterdir()) == []
    assert gristmill("keys", "create", "alice")[0] == 0
    gristmill("keys", "list")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["serve.sqlite"]


def test_an_operators_key_is_shown_as_such(gristmill: Shell, tmp_path: Path) -> None:
    key = gristmill("keys", "create", "scraper", "--scope", "operator")[1].split()[-1]
    gristmill("keys", "create", "alice", "--scope", "user")
    found = keys.find(Database(), key)
    assert found is not None
    assert found.is_operator
    shown = {line.split()[0]: line.split()[-1] for line in gristmill("keys", "list")[1].splitlines()}
    assert shown == {"scraper": "operator", "alice": "limits"}
    assert gristmill("keys", "create", "bob", "--scope", "root")[0] == 2


def test_usage_is_a_table_or_comma_separated(gristmill: Shell, tmp_path: Path) -> None:
    assert gristmill("keys", "usage")[1] == "nothing used yet\n"
    key = gristmill("keys", "create", "alice")[1].split()[-1]
    usage = Usage(Database(), Prices(input=Decimal(3)))
    usage.record(key[3:11], "my-model", "2026-01-31", 2_000_000, 1)
    usage.close()
    assert gristmill("keys", "usage")[1].splitlines()[1].split() == [
        *("2026-01-31", "alice", "my-model", "1", "2,000,000", "1", "6")
    ]
    assert gristmill("keys", "usage", "--csv")[1] == (
        "day,key,model,requests,input_tokens,output_tokens,cost\n2026-01-31,alice,my-model,1,2000000,1,6\n"
    )
    assert gristmill("keys", "usage", "--database", str(tmp_path / "other.sqlite"))[1] == "nothing used yet\n"


def test_bad_input_exits_with_2_and_a_database_that_cannot_be_with_1(gristmill: Shell) -> None:
    for code, arguments in (
        (2, ("create",)),
        (2, ("create", "two words")),
        (2, ("create", "a", "--parallel-requests", "0")),
        (2, ("create", "a", "--parallel-requests", "many")),
        (2, ("list", "--database", "nosuch://host/name")),
        (1, ("list", "--database", "/dev/null/file")),
    ):
        result = gristmill("keys", *arguments)
        assert result[0] == code, arguments
        assert result[2].strip()


def test_help_teaches_every_verb(gristmill: Shell) -> None:
    overview = gristmill("keys", "--help")[1]
    for verb in ("create", "list", "revoke", "usage"):
        assert f" {verb} " in overview
    told = " ".join(gristmill("keys", "create", "--help")[1].replace("│", " ").split())
    assert "as the last word" in told
    assert "A request takes its max_tokens; what it does not use comes back" in told

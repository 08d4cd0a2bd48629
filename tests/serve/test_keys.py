"""Keys: what opens, what does not, and what of a key is anywhere but in its owner's hands."""

import errno
import hashlib
import hmac
import logging
import os
import sqlite3
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Timer

import pytest
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.schema import CreateTable

from gristmill.errors import Failure, InputError
from gristmill.serve import keys
from gristmill.serve.database import Database, default_database, metadata
from gristmill.serve.limits import Limits


def test_a_key_opens_what_it_was_made_for_and_no_other_text_does(database: Database) -> None:
    limits = Limits(output_tokens_per_minute=500, parallel_requests=2)
    made = keys.create(database, "alice", limits)
    other = keys.create(database, "bob", Limits())
    found = keys.find(database, made)
    assert found is not None
    assert (found.name, found.limits, found.revoked) == ("alice", limits, None)
    for wrong in (
        *("", "gm-", "Bearer", made[:-1], made + "0", made.upper(), " " + made, made + "\n", "gm-" + "0" * 72),
        made[:11] + other[11:],  # another key's secret
        other[:11] + made[11:],
        *(made[:i] + ("0" if made[i] != "0" else "1") + made[i + 1 :] for i in range(len(made))),
    ):
        assert keys.find(database, wrong) is None


def test_the_secret_is_nowhere_but_in_what_create_returned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "sqlalchemy.engine"):  # which writes every statement with its values
        database = Database(str(tmp_path / "serve.sqlite"))
        made = keys.create(database, "alice", Limits())
        found = keys.find(database, made)
    secret = made[11:]
    assert bytes.fromhex(secret)
    assert len(secret) == 64  # 256 bits
    assert "INSERT INTO gristmill_keys" in caplog.text
    assert secret not in caplog.text + repr(found) + "".join(keys.keys_text(keys.all_keys(database)))
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret.encode() not in files
    assert bytes.fromhex(secret) not in files
    assert hashlib.sha256(secret.encode()).hexdigest().encode() in files


def test_comparing_takes_the_same_time_whatever_the_key(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    made = keys.create(database, "alice", Limits())
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    for key in (made, made[:11] + "0" * 64, "gm-00000000" + "0" * 64):  # right, wrong, of nobody
        keys.find(database, key)
    assert [(len(a), len(b)) for a, b in compared] == [(64, 64)] * 3


def test_a_revoked_key_is_known_as_such_and_its_name_is_free(database: Database) -> None:
    first = keys.create(database, "alice", Limits())
    with pytest.raises(InputError, match="there is a key named alice already"):
        keys.create(database, "alice", Limits())
    assert keys.revoke(database, "alice").label == first[:11] + "…"
    with pytest.raises(InputError, match="no key named 'alice' is in use"):
        keys.revoke(database, "alice")
    second = keys.create(database, "alice", Limits(requests_per_hour=5))
    old, new = keys.find(database, first), keys.find(database, second)
    assert old is not None
    assert old.revoked is not None
    assert new is not None
    assert new.revoked is None
    told = keys.keys_text(keys.all_keys(database))
    assert sorted("revoked" in line for line in told) == [False, True]
    assert any(line.endswith("5 requests per hour") for line in told)


@pytest.mark.parametrize("name", ["", "-a", "a b", "=1+1", "a\n", "a" * 65, "é"])
def test_a_name_that_would_not_stay_one_word_is_refused(database: Database, name: str) -> None:
    with pytest.raises(InputError, match="name"):
        keys.create(database, name, Limits())


def test_the_file_is_its_owners_alone_and_stands_in_the_state_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRISTMILL_DATABASE", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    database = Database()
    keys.create(database, "alice", Limits())
    for file in (tmp_path / "gristmill").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "gristmill").stat().st_mode) == 0o700
    monkeypatch.setenv("GRISTMILL_DATABASE", "postgresql+psycopg://host/name")
    assert default_database() == "postgresql+psycopg://host/name"


def test_a_path_with_a_urls_signs_is_a_path(tmp_path: Path) -> None:
    keys.create(Database(str(tmp_path / "50%?a=b#c.sqlite")), "alice", Limits())
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".sqlite"] == ["50%?a=b#c.sqlite"]


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "new.sqlite"
    with sqlite3.connect(file) as theirs:
        theirs.execute("CREATE TABLE gristmill_version (version INTEGER PRIMARY KEY)")
        theirs.execute("INSERT INTO gristmill_version VALUES (7)")
    with pytest.raises(InputError, match="version 7, made by a newer Gristmill"):
        Database(str(file))
    tables = sqlite3.connect(file).execute("SELECT name FROM sqlite_master").fetchall()
    assert tables == [("gristmill_version",)]


def test_many_that_open_a_new_database_at_once_all_can(tmp_path: Path) -> None:
    def make(number: int) -> str:
        return keys.create(Database(str(tmp_path / "new.sqlite")), f"key-{number}", Limits())

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, range(8)))
    database = Database(str(tmp_path / "new.sqlite"))
    assert [key.name for made_one in made if (key := keys.find(database, made_one))] == [f"key-{n}" for n in range(8)]


@pytest.mark.parametrize("lock", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE", "BEGIN; SELECT * FROM sqlite_master"])
def test_a_database_that_another_process_is_creating_is_waited_for(tmp_path: Path, lock: str) -> None:
    file = tmp_path / "new.sqlite"
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    for statement in lock.split(";"):
        other.execute(statement).fetchall()
    Timer(0.3, lambda: other.execute("ROLLBACK")).start()
    started = time.monotonic()
    keys.create(Database(str(file)), "alice", Limits())  # not "database is locked"
    assert time.monotonic() - started >= 0.2
    other.close()


OPENING = """
import sys, time
from pathlib import Path
from gristmill.serve.database import Database
folder, go = Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
while not go.exists():
    pass
for number in range(5):
    Database(str(folder / f"{number}.sqlite")).close()
"""


def test_processes_that_open_new_databases_at_once_all_can(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPENING, str(tmp_path), str(tmp_path / "go")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    (tmp_path / "go").touch()
    assert [(process.communicate()[1], process.returncode) for process in processes] == [(b"", 0)] * 4


def test_looking_creates_no_folder_file_or_table(tmp_path: Path) -> None:
    assert Database.existing(str(tmp_path / "state" / "serve.sqlite")) is None
    (tmp_path / "empty.sqlite").touch()
    assert Database.existing(str(tmp_path / "empty.sqlite")) is None
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == {"empty.sqlite": 0}
    with closing(sqlite3.connect(tmp_path / "theirs.sqlite")) as theirs:
        theirs.execute("CREATE TABLE notes (text)")
    before = (tmp_path / "theirs.sqlite").read_bytes()
    assert Database.existing(str(tmp_path / "theirs.sqlite")) is None
    assert (tmp_path / "theirs.sqlite").read_bytes() == before
    with closing(Database(str(tmp_path / "ours.sqlite"))) as database:
        keys.create(database, "alice", Limits())
    found = Database.existing(str(tmp_path / "ours.sqlite"))
    assert found is not None
    assert [key.name for key in keys.all_keys(found)] == ["alice"]
    found.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.sqlite", "ours.sqlite", "theirs.sqlite"]


def test_a_database_without_scopes_is_brought_up_to_date_by_many_at_once(tmp_path: Path) -> None:
    file = str(tmp_path / "old.sqlite")
    with closing(Database(file)) as database:
        made = keys.create(database, "alice", Limits(requests_per_hour=5))
    with closing(sqlite3.connect(file)) as old:  # as version 1 was
        old.execute("ALTER TABLE gristmill_keys DROP COLUMN scope")
        old.execute("UPDATE gristmill_version SET version = 1")
        old.commit()
    with ThreadPoolExecutor(8) as pool:
        databases = list(pool.map(lambda _: Database(file), range(8)))
    found = keys.find(databases[0], made)
    assert found is not None
    assert (found.name, found.limits, found.is_operator) == ("alice", Limits(requests_per_hour=5), False)
    operator = keys.find(databases[1], keys.create(databases[2], "bob", Limits(), is_operator=True))
    assert operator is not None
    assert operator.is_operator
    assert {key.name: key.is_operator for key in keys.all_keys(databases[3])} == {"alice": False, "bob": True}


def test_without_a_home_folder_the_error_names_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GRISTMILL_DATABASE", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", classmethod(lambda _: (_ for _ in ()).throw(RuntimeError("no home"))))
    monkeypatch.setattr(Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home")))
    for where in (None, "~/keys.sqlite"):
        with pytest.raises(InputError, match="set HOME"):
            Database(where)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_database() == str(tmp_path / "gristmill" / "serve.sqlite")


def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(Failure, match="No space left on device; give a file that can be written"):
        Database(str(tmp_path / "serve.sqlite"))


@pytest.mark.parametrize(
    ("where", "error", "says"),
    [
        ("nosuch://host/name", InputError, "give a file, or a URL"),
        ("sqlite://", InputError, "in memory is lost"),
        ("postgresql+nosuch://me:hidden@host/name", InputError, "give a file, or a URL"),
        ("/dev/null/file", Failure, "give a file that can be written"),
    ],
)
def test_a_database_that_cannot_be_is_explained(where: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        Database(where)
    assert "hidden" not in str(caught.value)


def test_a_file_that_is_no_database_is_a_failure_and_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("not a database, but long enough to look at " * 100)
    with pytest.raises(Failure, match="file is not a database"):
        Database(str(file))
    assert file.read_text().startswith("not a database")
    assert os.listdir(tmp_path) == ["text"]


@pytest.mark.parametrize("dialect", [postgresql.dialect(), mysql.dialect()])
def test_the_tables_can_be_written_for_other_databases(dialect: object) -> None:
    for table in metadata.sorted_tables:
        assert "gristmill_" in str(CreateTable(table).compile(dialect=dialect))  # type: ignore[arg-type]

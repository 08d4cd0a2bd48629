"""The tables of keys and usage, in SQLite by default and in any database that SQLAlchemy knows by its URL.

Plain types and statements alone, so that they mean the same everywhere. The names begin with `gristmill_`: the
database may have other tables too.

A commit is on the disk when it returns (SQLite: write-ahead log, synchronous=FULL). That is 4 ms on a plain disk, for
one row or for sixty-four; synchronous=NORMAL takes 0.02 ms, survives the process as well, and loses the last seconds
with the machine's power. As one commit serves all requests that end together (usage.py), we pay the 4 ms.
"""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    Connection,
    DateTime,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from gristmill.errors import Failure, InputError
from gristmill.home import expand, home

VERSION = 2  # 1 had no scopes
BUSY_TIMEOUT_S = 10  # for SQLite's one writer at a time, among all processes

metadata = MetaData()
versions = Table("gristmill_version", metadata, Column("version", Integer, primary_key=True, autoincrement=False))
keys = Table(
    "gristmill_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("live_name", String(64), unique=True),  # the name until it is revoked, then null: a name can come again
    Column("secret_sha256", String(64), nullable=False),
    Column("created", DateTime, nullable=False),  # UTC, as all times here
    Column("revoked", DateTime),
    Column("input_tokens_per_minute", BigInteger),
    Column("output_tokens_per_minute", BigInteger),
    Column("requests_per_hour", BigInteger),
    Column("parallel_requests", BigInteger),
    Column("scope", String(16)),  # null: the key may use the model and read its own usage
)
usage = Table(
    "gristmill_usage",
    metadata,
    Column("key_id", String(32), primary_key=True),
    Column("model", String(255), primary_key=True),
    Column("day", String(10), primary_key=True),  # 2026-01-31, UTC
    Column("requests", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cost_e10", BigInteger, nullable=False),  # in 1e-10 of whatever the prices are in: whole numbers add exactly
)
groups = Table("gristmill_groups", metadata, Column("id", String(32), primary_key=True))  # see usage.py


def default_database() -> str:
    """$GRISTMILL_DATABASE, or else a file in the user's state folder."""
    if named := os.environ.get("GRISTMILL_DATABASE"):
        return named
    state = Path(os.environ.get("XDG_STATE_HOME") or home("GRISTMILL_DATABASE") / ".local" / "state")
    return str(state / "gristmill" / "serve.sqlite")


class _Missing(Exception):
    """There is no database, and none was to be created."""


class Database:
    """where: a URL such as postgresql+psycopg://user@host/name, or an SQLite file, which is made where there is none.
    [default: $GRISTMILL_DATABASE, else a file in the user's state folder]

    Any thread may use it. Raises InputError for a URL that cannot be and for tables of a newer Gristmill, Failure when
    the database does not answer, and when an SQLite file was moved, deleted or replaced while it is open: SQLite would
    go on with the file that it has open, which nobody would find again.
    """

    def __init__(self, where: str | None = None, *, creates: bool = True) -> None:
        """creates: False raises _Missing where there are no tables yet; see `existing`."""
        where = default_database() if where is None else where
        if not where:
            raise InputError("database is empty; give a file or a URL, or leave the option out")
        self._file: Path | None = None  # of SQLite
        self._creates = creates
        try:
            url = make_url(where) if "://" in where else URL.create("sqlite", database=str(expand(where)))
            is_sqlite = url.get_backend_name() == "sqlite"
            if is_sqlite and url.database in (None, "", ":memory:"):
                raise InputError("database: an SQLite database in memory is lost at the end; give a file")
            if is_sqlite and "uri" not in url.query:
                self._file, self._identity = _opened(Path(str(url.database)), creates)
                url = url.set(database=str(self._file))
            self.name = url.render_as_string(hide_password=True)
            self._engine = create_engine(url, pool_pre_ping=not is_sqlite)
        except (ArgumentError, NoSuchModuleError) as bad:
            raise InputError(f"database: {bad}; give a file, or a URL such as postgresql+psycopg://host/name") from None
        except ModuleNotFoundError as missing:
            raise InputError(f"database {self.name} needs the package {missing.name}; install it with pip") from None
        if is_sqlite:
            event.listen(self._engine, "connect", _settle_sqlite if creates else _be_patient)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    @classmethod
    def existing(cls, where: str | None = None) -> "Database | None":
        """Open a database that is there already; None where there is none. Creates no folder, file or table."""
        try:
            return cls(where, creates=False)
        except _Missing:
            return None

    @property
    def is_in_place(self) -> bool:
        """Whether an SQLite file is still where it was opened."""
        if self._file is None:
            return True
        try:
            return _identity(self._file.stat()) == self._identity
        except OSError:
            return False

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """One transaction: committed at the end, rolled back by an exception. Raises Failure for the database's own."""
        if not self.is_in_place:
            raise Failure(
                f"database {self.name} was moved, deleted or replaced while it is open; put it back, or restart the "
                "server to use what is there now"
            )
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as problem:
            raise self._failure(problem) from problem

    def close(self) -> None:
        self._engine.dispose()

    def _prepare(self) -> None:
        """Create the tables where they are missing, all or none, and bring those of an older version up to date."""
        try:
            found = None
            if inspect(self._engine).has_table(versions.name):
                with self._engine.begin() as connection:
                    found = connection.execute(select(versions.c.version)).scalar()
            if found is None and not self._creates:
                raise _Missing
            if found is None:
                try:
                    self._create()
                except DBAPIError:  # another process was creating them, and has by now
                    self._create()
            elif found < VERSION:
                self._upgrade()
        except SQLAlchemyError as problem:
            raise self._failure(problem) from problem
        if found is not None and found > VERSION:
            raise InputError(
                f"database {self.name} has tables of version {found}, made by a newer Gristmill; this one knows "
                f"{VERSION}: update it, or give another database"
            )

    @contextmanager
    def _changing(self) -> Iterator[Connection]:
        """A transaction in which tables are created or changed."""
        with self._engine.begin() as connection:
            if connection.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")  # its driver begins no transaction for tables
            yield connection

    def _upgrade(self) -> None:
        with self._changing() as connection:
            found = connection.execute(select(versions.c.version).with_for_update()).scalar()
            if found == 1:  # else another process was faster
                connection.execute(text(f"ALTER TABLE {keys.name} ADD COLUMN {keys.c.scope.name} VARCHAR(16)"))
                connection.execute(update(versions).values(version=VERSION))

    def _create(self) -> None:
        with self._changing() as connection:
            metadata.create_all(connection)
            if connection.execute(select(versions.c.version)).first() is None:
                connection.execute(insert(versions).values(version=VERSION))

    def _failure(self, problem: SQLAlchemyError) -> Failure:
        why = getattr(problem, "orig", None) or problem
        return Failure(f"database {self.name}: {why}; see that it is there and can be written")


def _opened(file: Path, creates: bool) -> tuple[Path, tuple[int, int]]:
    """An SQLite file's path and identity. A new one only its owner may read; SQLite's own files beside it follow.

    Raises _Missing where there is none and `creates` is False, Failure for one that cannot be opened.
    """
    try:
        if creates:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        return file.resolve(), _identity(file.stat())
    except FileNotFoundError as missing:
        if not creates:
            raise _Missing from None
        raise Failure(f"database {file}: {missing.strerror}; give a file that can be written") from missing
    except OSError as problem:
        raise Failure(f"database {file}: {problem.strerror}; give a file that can be written") from problem


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _be_patient(connection: Any, _record: Any) -> None:
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}")


def _settle_sqlite(connection: Any, record: Any) -> None:
    _be_patient(connection, record)
    _use_write_ahead_log(connection)
    connection.execute("PRAGMA synchronous = FULL")


def _use_write_ahead_log(connection: Any) -> None:
    """Switching does not wait for the busy timeout while another process creates the database or switches it too."""
    give_up = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as problem:
            if problem.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
            time.sleep(0.005)

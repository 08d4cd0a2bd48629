"""Keys of the endpoint: `gm-`, an id that is no secret, and 256 random bits.

The database has a SHA-256 of the secret and never the secret. One round of it is right here, unlike for passwords: slow
hashes protect what people choose, of which one can try all likely ones; among 2^256 there is nothing to try, and a slow
hash would be paid for by each request. The id finds the row, so that the secret itself is compared in constant time.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row, insert, select, update

from gristmill.errors import InputError
from gristmill.serve.database import Database, keys
from gristmill.serve.limits import Limits

PREFIX = "gm-"
OPERATOR = "operator"  # the scope of keys that may read the figures of the whole server
_FORM = re.compile(r"gm-([0-9a-f]{8})([0-9a-f]{64})", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Key:
    """What is known of a key; neither its secret nor that one's hash is."""

    id: str
    name: str
    limits: Limits
    created: datetime
    revoked: datetime | None = None
    is_operator: bool = False

    @property
    def label(self) -> str:
        """What of the key may be shown: it tells which one it is, and opens nothing."""
        return f"{PREFIX}{self.id}…"


def create(database: Database, name: str, limits: Limits, is_operator: bool = False) -> str:
    """The new key, which nobody can read again. Raises InputError for a name that is taken or cannot be one.

    is_operator: whether it may also read the figures of the whole server, which tell of all keys together.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"name {name!r:.80} must be of letters, digits, '.', '_', '@' and '-', begin with a letter or digit, "
            "and have at most 64 of them"
        )
    id, secret = secrets.token_hex(4), secrets.token_hex(32)
    row = {"id": id, "name": name, "live_name": name, "secret_sha256": _hashed(secret), "created": _now()}
    row["scope"] = OPERATOR if is_operator else None
    with database.begin() as connection:
        taken = connection.execute(select(keys.c.id).where(keys.c.live_name == name)).first()
        if taken is None:
            connection.execute(insert(keys).values(**row, **limits.given()))
    if taken is not None:
        raise InputError(f"there is a key named {name} already; revoke it first, or choose another name")
    return f"{PREFIX}{id}{secret}"


def revoke(database: Database, name: str) -> Key:
    """From now on it opens nothing; its usage stays. Raises InputError when no living key has this name."""
    with database.begin() as connection:
        found = connection.execute(select(keys).where(keys.c.live_name == name)).first()
        if found is None:
            raise no_such_key(name)
        connection.execute(update(keys).where(keys.c.id == found.id).values(live_name=None, revoked=_now()))
    return _key(found)


def no_such_key(name: str) -> InputError:
    return InputError(f"no key named {name!r:.80} is in use; `gristmill keys list` shows them")


def all_keys(database: Database) -> list[Key]:
    """In the order of their creation, revoked ones too."""
    with database.begin() as connection:
        return [_key(row) for row in connection.execute(select(keys).order_by(keys.c.created, keys.c.id))]


def find(database: Database, key: str) -> Key | None:
    """Whose key this is, revoked or not; None when it is nobody's."""
    form = _FORM.fullmatch(key)
    if form is None:
        return None
    with database.begin() as connection:
        row = connection.execute(select(keys).where(keys.c.id == form[1])).first()
    expected = row.secret_sha256 if row else "0" * 64
    is_same = hmac.compare_digest(_hashed(form[2]), expected)
    return _key(row) if row and is_same else None


def keys_text(found: Sequence[Key]) -> list[str]:
    """A line for each key."""
    if not found:
        return ["no keys yet; `gristmill keys create NAME` makes one"]
    width = max(len(key.name) for key in found)
    return [
        f"{key.name:<{width}}  {key.label}  since {key.created:%Y-%m-%d}  "
        + (f"revoked {key.revoked:%Y-%m-%d}" if key.revoked else str(key.limits))
        + ("  operator" if key.is_operator else "")
        for key in found
    ]


def _key(row: Row[Any]) -> Key:
    limits = Limits(**{field.name: row._mapping[field.name] for field in fields(Limits)})
    is_operator = row.scope == OPERATOR
    return Key(
        id=row.id, name=row.name, limits=limits, created=row.created, revoked=row.revoked, is_operator=is_operator
    )


def _hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None, microsecond=0)

"""Shards on an object store: the bytes of one file, patiently, and the small artifact that stands for them here.

The one file that imports fsspec, which knows s3, gs, az, hf, https, file and more, and finds credentials in the
environment. Whatever arrives is checked against a hash that the remote artifact's sealed manifest vouches for.
"""

import http
import io
import itertools
import queue
import random
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, urlsplit

from gristmill.artifact import MANIFEST, Artifact, Built, canonical, parse_manifest
from gristmill.background import Answer
from gristmill.errors import Failure, InputError
from gristmill.progress import console
from gristmill.streaming.config import ShardsConfig
from gristmill.streaming.index import INDEX, read_index, stored

REMOTE = "remote.json"  # in a shards artifact whose shard files lie elsewhere: whose they are
READ_BYTES = 4 << 20  # asked for at a time: some ten milliseconds of a fast link, little in memory
STALL_S = 30.0  # without a byte: a store that is only busy answers sooner, and a connection that died never does
# Between attempts, each 0.5 to 1.5 times that long by chance, so that a cluster's nodes do not come back together:
# nine attempts in about two minutes, which outlasts a store that sheds load or a router that restarts.
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
# From the first attempt on; none begins that a stall would bring beyond it. Other ranks wait for this one as long as
# train.rank_timeout_s says, 300 s unless told otherwise: it is to say before that which file could not be had.
PATIENCE_S = 210.0
LASTING_TRIES = 2  # where the answer will hardly change (missing, forbidden); the second for stores that lag behind
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
PASSING = (408, 425, 429)  # HTTP statuses below 500 that mean: later
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface-hub",
}
T = TypeVar("T")


# ---- one file ------------------------------------------------------------------------------------------


class Broken(Exception):
    """How one attempt ended; a sentence about the file ("it ..."). `lasting`: another one will hardly help."""

    def __init__(self, what: str, lasting: bool = False) -> None:
        super().__init__(what)
        self.lasting = lasting


def require(setting: str, url: str) -> None:
    """Raises InputError that names what to install when this machine cannot reach such URLs. setting: whose it is."""
    protocol = urlsplit(url).scheme
    try:
        import fsspec

        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise InputError(
            f"{setting}={url}: fsspec knows no protocol {protocol!r}; use one such as s3, gs, az, hf, https or file"
        ) from None
    except ImportError as problem:
        package = PACKAGES.get(protocol)
        more = "" if problem.name == "fsspec" or package is None else f" {package}"
        raise InputError(
            f"{setting}={url} needs packages that are not here ({problem}): `pip install 'gristmill[remote]'{more}`"
        ) from None


def filesystem(setting: str, url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Raises InputError as `require`."""
    require(setting, url)
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    return system, path.rstrip("/")


def join(url: str, *names: str) -> str:
    """The URL of a file below a directory."""
    if url.startswith(("http://", "https://")):
        names = tuple(map(quote, names))
    return "/".join([url.rstrip("/"), *names])


def download(
    url: str, sink: BinaryIO, num_bytes: int | None, damage: Callable[[], str | None], patient: bool = True
) -> None:
    """Fill `sink` with the file at `url`, trying again as often as WAITS_S and PATIENCE_S say (not when not `patient`).

    damage: what is wrong with `sink` once it is full ("its ... "), or None. Raises Failure when all attempts went
    wrong, OSError when `sink` cannot be written.
    """
    started = time.monotonic()
    for tried in itertools.count(1):
        try:
            _attempt(url, sink, num_bytes)
            if what := damage():
                raise Broken(what)
            return
        except Broken as broken:
            tries = (LASTING_TRIES if broken.lasting else len(WAITS_S) + 1) if patient else 1
            wait_s = WAITS_S[tried - 1] * random.uniform(0.5, 1.5) if tried < tries else 0.0
            if tried >= tries or time.monotonic() - started + wait_s + STALL_S > PATIENCE_S:
                times = "once" if tried == 1 else f"{tried} times"
                fix = "look at what lies there" if broken.lasting else "run the same command when the store is well"
                raise Failure(f"{url} could not be read: {broken} (tried {times}); {fix}") from None
            again = f"trying again in {wait_s:.1f} s ({tried + 1} of {tries})"
            console.print(f"  {url}: {broken}; {again}", markup=False)
        time.sleep(wait_s)


def _attempt(url: str, sink: BinaryIO, num_bytes: int | None) -> None:
    sink.seek(0)
    arrived = 0
    file = _within_stall(lambda: _open(url))
    try:
        while block := _within_stall(lambda: file.read(READ_BYTES)):
            arrived += len(block)
            if num_bytes is not None and arrived > num_bytes:
                raise Broken(f"it has more than the {num_bytes:,} bytes that it should have")
            sink.write(block)
    finally:
        Answer(file.close)  # nobody waits: after a stall another thread is still in there
    if num_bytes is not None and arrived < num_bytes:
        raise Broken(f"it ended after {arrived:,} of {num_bytes:,} bytes")
    sink.truncate()
    sink.flush()


def _open(url: str) -> BinaryIO:
    import fsspec

    options = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # Its own would end a download after five minutes; a socket is let go some time after we gave it up.
        options["timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=2 * STALL_S)
    system, path = fsspec.core.url_to_fs(url, **options)
    return system.open(path, "rb", block_size=0)  # 0: one stream where a protocol has that, or else plain reads


def _within_stall(call: Callable[[], T]) -> T:
    """What `call` returns, if that takes less than STALL_S. Raises Broken for everything that it raises."""
    try:
        value, problem = Answer(call).within(STALL_S)
    except queue.Empty:
        raise Broken(f"it sent nothing for {STALL_S:g} s") from None
    if problem is not None:
        raise Broken(*_explained(problem)) from problem
    return value


def _explained(problem: Exception) -> tuple[str, bool]:
    """What happened, and whether it will last. fsspec's http says FileNotFoundError for any failure to connect; the
    exception below it is the true one."""
    chain = list(_causes(problem))
    status = next((found for link in chain if (found := _status(link)) is not None), None)
    if status is not None:
        phrase = http.HTTPStatus(status).phrase if status in set(http.HTTPStatus) else ""
        return f"it answered {status} {phrase}".rstrip(), 400 <= status < 500 and status not in PASSING
    root = chain[-1]
    if isinstance(root, FileNotFoundError):
        return "it is missing", True
    said = " ".join(str(root).split())[:200]
    return f"{type(root).__name__}: {said}".removesuffix(": "), isinstance(root, LASTING)


def _causes(problem: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = problem
    while link is not None:
        yield link
        link = link.__cause__


def _status(problem: BaseException) -> int | None:
    """The HTTP status that an exception of aiohttp, Azure's, the hub's or AWS's client carries."""
    response = getattr(problem, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = (getattr(problem, "status", None), getattr(problem, "status_code", None))
    return next((value for value in (*found, getattr(response, "status_code", None)) if isinstance(value, int)), None)


# ---- the artifact --------------------------------------------------------------------------------------


def read_manifest(url: str) -> dict[str, Any]:
    """The manifest of the shards artifact at `url`; its seal is checked.

    Raises InputError when it is of another kind or this machine cannot read such URLs, Failure when it cannot be read.
    """
    require("shards.remote", url)
    manifest: dict[str, Any] = {}

    def damage(data: bytes) -> str | None:
        try:
            manifest.update(parse_manifest(data, "it"))
        except Failure as problem:
            return str(problem)
        return None

    _read(join(url, MANIFEST), None, damage)
    if manifest["kind"] != "shards":
        raise InputError(f"shards.remote={url} is an artifact of kind {manifest['kind']!r}; name one of shards")
    return manifest


def build_remote(
    cfg: ShardsConfig, manifest: dict[str, Any], corpus: Artifact, tokenizer: Artifact, out: Path
) -> Built:
    """Write the index of each source of the artifact at `cfg.remote` below `out`, and `remote.json`: whose they are.

    manifest: of `read_manifest`. Raises InputError when the shards were made from another corpus or tokenizer than
    these, or in other blocks; Failure when an index cannot be read or does not match the manifest.
    """
    assert cfg.remote
    given = f"shards.remote={cfg.remote}"
    for name, ours, why in (
        ("tokenizer", tokenizer, "its ids mean other text"),
        ("corpus", corpus, "text that is held out here may be training text there, and every figure would flatter"),
    ):
        theirs = manifest["inputs"][name]["content"]
        if theirs != ours.content:
            raise InputError(
                f"{given} was made from another {name} ({theirs[:12]}, this run has {ours.content[:12]}): {why}; "
                "give the recipe and data that made it, or leave shards.remote out"
            )
    if (theirs := manifest["config"]["block_tokens"]) != cfg.block_tokens:
        raise InputError(f"shards.block_tokens={cfg.block_tokens}, but {given} has {theirs}: set it to that")
    files = manifest["files"]
    for name in sorted(name for name in files if name.endswith(f"/{INDEX}")):
        source = name.removesuffix(f"/{INDEX}")
        if Path(source).name != source or source == "..":
            raise Failure(f"{given}: its manifest names {name!r}, which no source's index can be")
        data = _read(join(cfg.remote, source, INDEX), files[name]["bytes"], _unlike(files[name]["sha256"]))
        _check_covered(f"{given}, source {source}", source, read_index(data, join(cfg.remote, source, INDEX)), files)
        (out / source).mkdir()
        (out / source / INDEX).write_bytes(data)
    (out / REMOTE).write_bytes(canonical({"content": manifest["content"]}))
    figures = {name: value for name, value in manifest["metrics"].items() if name != "seconds"}
    return Built(metrics={**figures, "remote": cfg.remote})


def _check_covered(given: str, source: str, shards: list[dict[str, Any]], files: dict[str, Any]) -> None:
    """Each shard file lies in the artifact itself, and the index has the hash that its download is checked by."""
    for shard in shards:
        info = stored(shard)
        covered = files.get(f"{source}/{info['basename']}")
        if covered is None or covered["bytes"] != info["bytes"] or not info["hashes"]:
            raise Failure(f"{given}: {info['basename']} is not one of its files with that size and a hash")


def _unlike(expected: str) -> Callable[[bytes], str | None]:
    return lambda data: None if sha256(data).hexdigest() == expected else "its sha256 does not match the manifest"


def _read(url: str, num_bytes: int | None, damage: Callable[[bytes], str | None]) -> bytes:
    sink = io.BytesIO()
    download(url, sink, num_bytes, lambda: damage(sink.getvalue()))
    return sink.getvalue()

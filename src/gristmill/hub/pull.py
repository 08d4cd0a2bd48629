"""Pull a published model from the hub: what an import reads and the license, resumed at the byte, each file hashed.

huggingface_hub finds the repository, signs in, and speaks both transfers: Xet, where the hub keeps a file there, and
HTTP. The files are written here, because the client (2.4) begins an interrupted file again and compares sizes alone.
Beside them lies the client's own record, `.cache/huggingface/download/NAME.metadata` (commit, ETag, time), so that
`hf download --local-dir` and an import know each file; a fourth line of ours says which file was hashed (`_stamp`).
Nothing is executed: no Python file and no pickle is fetched.
"""

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from gristmill.artifact import canonical, sync, write_atomically
from gristmill.errors import Failure, InputError
from gristmill.hub.folder import CARD, LICENSES, PULLED
from gristmill.hub.importing import READ
from gristmill.hub.layouts import LAYOUTS
from gristmill.hub.published import CONFIG_JSON
from gristmill.hub.settings import read_json
from gristmill.hub.tensors import INDEX, PICKLES, SINGLE
from gristmill.locks import lock
from gristmill.progress import bar, console

try:  # parts of it are not public, and each minor version moves some
    from huggingface_hub import HfApi, constants, errors, get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub import utils as client
    from huggingface_hub.hf_api import RepoSibling
    from huggingface_hub.utils import _xet as xet
    from huggingface_hub.utils._runtime import is_xet_available
except ImportError as problem:
    raise InputError(
        f"pull works with huggingface-hub 2.4, and what is installed differs ({problem}); "
        "pip install 'huggingface-hub>=2.4,<2.5'"
    ) from None

PAPER_SUFFIX = re.compile(r"^[^.]*$|\.(txt|md|rst|pdf)$", re.IGNORECASE)  # no LICENSE.py
WORKERS = 4  # files at a time; Xet fetches many pieces of each at once by itself
CHUNK_BYTES = 1 << 20
WAITS_S = (1.0, 2.0, 4.0, 8.0, 8.0)  # before trying again; the first of them again once bytes have arrived
LONGEST_WAIT_S = 300.0  # the hub counts its rate limit over five minutes
TRANSIENT = (408, 429, 500, 502, 503, 504)
_say = partial(console.print, markup=False)  # names come from the hub: their brackets are no markup
SHA256 = 64  # digits


@dataclass(frozen=True, kw_only=True)
class _File:
    """`etag`: SHA-256 of a file in large-file storage, else git's blob id (SHA-1)."""

    name: str
    num_bytes: int
    etag: str


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A repository at one commit. `files`: of its root, by name."""

    name: str
    sha: str
    license: str | None
    files: dict[str, _File]


def pull(repository: str, revision: str | None = None, out: Path | None = None) -> Path:
    """Fetch ORG/NAME at one commit into `out` (models/ORG--NAME) and record name, commit and license in `pulled.json`.

    What an interrupted pull left is continued; what stands is not fetched again. The endpoint and the token are
    huggingface_hub's: HF_ENDPOINT, HF_TOKEN or `hf auth login`. Raises InputError where the name, the revision or the
    kind of repository is wrong, Failure where the hub, the network, the room or the right to read is in the way, and
    OSError where the disk is; what has arrived is kept.
    """
    if revision is not None and (not revision or not revision.isprintable()):
        raise InputError(
            f"--revision {revision!r} must be the name of a branch or tag, or a commit; leave it out for main"
        )
    if not (get_token() or "").isascii():
        raise InputError("the token of the hub (HF_TOKEN) has characters other than ASCII; copy it again, or unset it")
    with _explained(repository, revision or "main"):
        client.validate_repo_id(repository if "/" in repository else "")
        model = _look_up(repository, revision)
        source = _Source(model)
        files = _needed(model, source)
        out = out or Path("models") / model.name.replace("/", "--")
        with _locked(out):
            owner = (read_json(out / PULLED) or {}).get("repository", model.name)
            if owner != model.name:
                raise InputError(f"{out} holds {owner}; choose another --out for {model.name}")
            wanted = [file for file in files if not _stands(out, file, model)]
            num_bytes = sum(file.num_bytes - _arrived(out, file) for file in wanted)
            origin = f"{model.name} at {model.sha[:12]} (license: {model.license or 'none named'})"
            _say(f"{origin}: {len(files)} files, {_gb(num_bytes)} to fetch into {out}")
            if num_bytes > (free := shutil.disk_usage(out).free):
                lack = f"{model.name} needs {_gb(num_bytes)} more, {out} has {_gb(free)} free"
                raise Failure(f"{lack}; free some room or choose --out on a larger disk")
            if wanted:
                (out / PULLED).unlink(missing_ok=True)  # without it the directory is not complete
            source.fetch(wanted, out, num_bytes)
            record = {"repository": model.name, "revision": revision or "main", "commit": model.sha}
            write_atomically(out / PULLED, canonical(record | {"license": model.license}))
    return out


# ---- what to fetch -------------------------------------------------------------------------------------


def _look_up(repository: str, revision: str | None) -> _Model:
    """The commit, license and files; all that follows is asked of that commit. A renamed repository is followed."""
    ask = partial(HfApi(library_name="gristmill").model_info, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    try:
        info = _patiently(lambda: ask(repository, revision=revision, files_metadata=True))
        files = {entry.rfilename: _file(entry) for entry in info.siblings or () if "/" not in entry.rfilename}
        if info.sha is None:
            raise KeyError("sha")
    except (json.JSONDecodeError, KeyError, TypeError):
        raise Failure(f"{constants.ENDPOINT} does not answer as a hub does; check HF_ENDPOINT and the proxy") from None
    if info.id.lower() != repository.lower():
        _say(f"{repository} has been renamed to {info.id}: pulling that; use the new name from now on")
    card: Any = info.card_data or {}
    license = card.get("license")
    if license == "other":
        license = card.get("license_name", license)
    if license is not None:
        license = ", ".join(map(str, license)) if isinstance(license, list) else str(license)
    return _Model(name=info.id, sha=info.sha, license=license, files=files)


def _file(entry: RepoSibling) -> _File:
    """Raises KeyError where the hub does not say size and hash; the hash becomes part of a path."""
    num_bytes, etag = (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, entry.blob_id)
    if num_bytes is None or etag is None or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
        raise KeyError(entry.rfilename)
    return _File(name=entry.rfilename, num_bytes=num_bytes, etag=etag)


def _needed(model: _Model, source: "_Source") -> list[_File]:
    """The files to have, small ones first. Refuses what an import cannot read before any weight is fetched."""
    if CONFIG_JSON not in model.files:
        raise InputError(f"{model.name} holds no {CONFIG_JSON}: it is not a model in the transformers layout")
    kind = source.read_json(model.files[CONFIG_JSON]).get("model_type")
    known = [layout.model_type for layout in LAYOUTS]
    if kind not in known:
        what = f"{model.name} is of model_type {kind!r}, an import reads {' and '.join(known)}"
        raise InputError(f"{what}; choose such a model (no weights were fetched)")
    weights = _weights(model, source)
    papers = {name for name in model.files if re.fullmatch(LICENSES, name) and PAPER_SUFFIX.search(name)}
    small = sorted(papers | {CARD, *READ} & model.files.keys())
    return [model.files[name] for name in (*small, *weights)]


def _weights(model: _Model, source: "_Source") -> list[str]:
    if INDEX in model.files:
        shards = source.read_json(model.files[INDEX]).get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        absent = [name for name in names if name not in model.files or not name.endswith(".safetensors")]
        if absent or not names:
            what = f"names {absent[0]}, which is not there" if absent else "names no weights"
            raise InputError(f"{INDEX} of {model.name} {what}; choose another revision or copy")
        return names
    if SINGLE in model.files:
        return [SINGLE]
    pickle = next((name for name in sorted(model.files) if name.endswith(PICKLES)), None)
    if pickle:
        what = f"{model.name} keeps its weights in pickles ({pickle}), which can execute code when they are read"
        raise InputError(f"{what}; choose a revision or copy with safetensors")
    raise InputError(f"{model.name} holds no weights: neither {SINGLE} nor {INDEX}; choose a repository that does")


# ---- the directory -------------------------------------------------------------------------------------


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Refuse a second pull into one directory. The lock goes with the process, however it ends."""
    try:
        _cache(out).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--out {out} is or lies below a file; name a directory") from None
    with (_cache(out) / "pull.lock").open("w") as file:
        try:
            lock(file, _cache(out) / "pull.lock")
        except BlockingIOError:
            raise Failure(f"another pull is writing to {out}; wait for it or choose another --out") from None
        yield


def _cache(out: Path) -> Path:
    return out / ".cache" / "huggingface" / "download"


def _incomplete(out: Path, file: _File) -> Path:
    return _cache(out) / f"{file.name}.{file.etag[:16]}.incomplete"


def _arrived(out: Path, file: _File) -> int:
    path = _incomplete(out, file)
    return min(path.stat().st_size, file.num_bytes) if path.exists() else 0


def _stands(out: Path, file: _File, model: _Model) -> bool:
    """Is the file here as the hub has it? By its hash, which is not taken again of the very file that was hashed.

    Raises InputError for one that did not come from here, or was edited since: it is not ours to replace. Weights
    that have changed are damaged and are fetched again.
    """
    path = out / file.name
    if not path.exists():
        return False
    note = _cache(out) / f"{file.name}.metadata"
    lines = note.read_text(errors="replace").splitlines() if note.exists() else []
    known, known_stamp = [*lines, *[""] * 4][1:4:2]
    here, stamp = {known}, _stamp(path)
    if stamp != known_stamp:
        lengths = {len(file.etag), len(known or file.etag)} if path.is_file() else ()
        here = {_etag_of(path, length) for length in lengths}
    if file.etag in here:
        _record(out, file, model, stamp)
        return True
    if known not in here:
        if not (known and file.name.endswith(".safetensors")):
            what = f"{path} is not the file of {model.name}, or was edited here, and would be replaced"
            raise InputError(f"{what}; move it away or choose another --out")
        _say(f"{path} has changed since it was pulled: fetching it again")
    return False


def _record(out: Path, file: _File, model: _Model, stamp: str) -> None:
    note = f"{model.sha}\n{file.etag}\n{time.time()}\n{stamp}\n"
    write_atomically(_cache(out) / f"{file.name}.metadata", note.encode())


def _stamp(path: Path) -> str:
    """Changes with the file: the time of an inode's last change cannot be set back as mtime can."""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _etag_of(path: Path, length: int) -> str:
    num_bytes = path.stat().st_size
    digest = _new_digest(length, num_bytes)
    with path.open("rb") as data, bar(f"check {path.name}", num_bytes) as advance:
        while chunk := data.read(CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _new_digest(length: int, num_bytes: int) -> "hashlib._Hash":
    """For an ETag of so many digits."""
    return hashlib.sha256() if length == SHA256 else hashlib.sha1(b"blob %d\0" % num_bytes, usedforsecurity=False)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 5e7 else f"{num_bytes / 1e6:,.1f} MB"


# ---- the transfer --------------------------------------------------------------------------------------


class _Source:
    """The files of one commit, as bytes from any offset."""

    def __init__(self, model: _Model) -> None:
        self.model = model
        self.headers = client.build_hf_headers(library_name="gristmill") | {"Accept-Encoding": "identity"}
        self.use_xet = is_xet_available()
        self.stop = threading.Event()

    def read_json(self, file: _File) -> dict[str, Any]:
        data = _patiently(lambda: b"".join(self._http(file, 0)))
        try:
            return dict(json.loads(data))
        except (ValueError, TypeError):
            raise InputError(f"{file.name} of {self.model.name} is no JSON object; choose another revision") from None

    def fetch(self, files: list[_File], out: Path, num_bytes: int) -> None:
        """`num_bytes`: what is still to come, for the bar."""
        with bar(f"pull {self.model.name}", num_bytes) as count, ThreadPoolExecutor(WORKERS) as pool:

            def advance(amount: float) -> None:
                if self.stop.is_set():
                    raise CancelledError
                count(amount)

            jobs = [pool.submit(self._fetch, file, out, advance) for file in files]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                xet.abort_xet_session()  # else its threads go on trying
                raise

    def _fetch(self, file: _File, out: Path, advance: Callable[[float], None]) -> None:
        path = _incomplete(out, file)
        with path.open("a+b") as sink:
            if sink.tell() > file.num_bytes:
                sink.truncate(0)
            digest = self._append(file, sink, advance)
        if digest != file.etag:
            path.unlink()
            kind = "SHA-256" if len(file.etag) == SHA256 else "hash"
            what = f"{file.name} of {self.model.name} arrived damaged: its {kind} is not what the hub says"
            raise Failure(f"{what}; run the same command: it alone is fetched again")
        sync(path)
        path.replace(out / file.name)
        _record(out, file, self.model, _stamp(out / file.name))
        for left_over in _cache(out).glob(f"{file.name}.*.incomplete"):
            left_over.unlink()  # of another commit

    def _append(self, file: _File, sink: BinaryIO, advance: Callable[[float], None]) -> str:
        """Bring the file to its full size; returns the hash of all of it."""
        digest, arrived = _new_digest(len(file.etag), file.num_bytes), sink.tell()
        sink.seek(0)
        while sink.tell() < arrived:
            digest.update(sink.read(CHUNK_BYTES))
            advance(0)
        waits = list(WAITS_S)
        while arrived < file.num_bytes:
            try:
                for chunk in self._chunks(file, arrived):
                    sink.write(chunk)
                    digest.update(chunk)
                    arrived += len(chunk)
                    advance(len(chunk))
                    waits = list(WAITS_S)
                    if arrived > file.num_bytes:
                        break  # its hash will say so
                if arrived < file.num_bytes:
                    raise client.httpx.ReadError(f"{file.name} ended at {arrived:,} of {file.num_bytes:,} bytes")
            except (errors.HfHubHTTPError, client.httpx.TransportError) as problem:
                _wait(problem, waits, self.stop)
        return digest.hexdigest()

    def _chunks(self, file: _File, start: int) -> Iterator[bytes]:
        if len(file.etag) == SHA256 and self.use_xet:
            url = hf_hub_url(self.model.name, file.name, revision=self.model.sha)
            known = get_hf_file_metadata(url, headers=self.headers, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            if known.xet_file_data is not None:
                return self._xet(file, known.xet_file_data, start)
        return self._http(file, start)

    def _http(self, file: _File, start: int) -> Iterator[bytes]:
        """Always from the hub's own address, which redirects to a storage address that expires."""
        url = hf_hub_url(self.model.name, file.name, revision=self.model.sha)
        headers = self.headers | ({"Range": f"bytes={start}-"} if start else {})
        with client.get_session().stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
        ) as response:
            client.hf_raise_for_status(response)
            skip = start if response.status_code != 206 else 0  # it sends the file from its beginning
            for chunk in response.iter_bytes(CHUNK_BYTES):
                yield chunk[skip:]
                skip -= min(skip, len(chunk))

    def _xet(self, file: _File, known: xet.XetFileData, start: int) -> Iterator[bytes]:
        """As xet_get of the client asks for it, but as a stream, which can begin at an offset."""
        from hf_xet import XetFileInfo  # type: ignore[import-untyped, unused-ignore]

        arrived = start
        try:
            access = xet.refresh_xet_connection_info(file_data=known, headers=self.headers)
            with xet.get_xet_session().new_download_stream_group(
                endpoint=access.endpoint,
                token=access.access_token,
                token_expiry_unix_secs=access.expiration_unix_epoch,
                token_refresh_url=known.refresh_route,
                token_refresh_headers=self.headers,
                custom_headers=xet.xet_headers_without_auth(self.headers),
            ) as group:
                for chunk in group.download_stream(XetFileInfo(known.file_hash, file.num_bytes), start=start or None):
                    arrived += len(chunk)
                    yield chunk
            if arrived < file.num_bytes:  # as hf_xet ends where its storage cannot be reached
                raise ConnectionError("the stream ended early")
        except Exception as problem:  # of any class: ConnectionError, RuntimeError, ValueError
            if self.use_xet and not self.stop.is_set():
                _say(f"  Xet storage fails ({_reason(problem)}): going on over plain HTTP")
            self.use_xet = False
            raise client.httpx.ReadError(_reason(problem)) from None


def _wait(problem: Exception, waits: list[float], stop: threading.Event) -> None:
    """Before another try, or raise the problem itself where that is of no use. The hub's own wish goes first."""
    asked = _asked_wait_s(problem)
    passing = not isinstance(problem, errors.HfHubHTTPError) or problem.response.status_code in TRANSIENT
    if not passing or not waits or (asked or 0) > LONGEST_WAIT_S:
        raise problem
    backoff_s = waits.pop(0)
    wait_s = backoff_s if asked is None else asked + 1
    if wait_s >= 5:
        _say(f"  {_reason(problem)}; trying again in {wait_s:.0f} s")
    if stop.wait(wait_s):
        raise CancelledError


def _patiently(ask: Callable[[], Any]) -> Any:
    """For single questions: a busy hub is asked again, an unreachable one is not."""
    waits = list(WAITS_S)
    while True:
        try:
            return ask()
        except errors.HfHubHTTPError as problem:
            _wait(problem, waits, threading.Event())


def _asked_wait_s(problem: Exception) -> float | None:
    """What a busy hub asks for: `RateLimit: "api";r=0;t=55` or `Retry-After: 55`."""
    if not isinstance(problem, errors.HfHubHTTPError) or problem.response.status_code not in (429, 503):
        return None
    limit = client.parse_ratelimit_headers(problem.response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    retry_after = problem.response.headers.get("Retry-After", "").strip()
    return float(retry_after) if retry_after.isdigit() else None


# ---- messages ------------------------------------------------------------------------------------------


@contextmanager
def _explained(repository: str, revision: str) -> Iterator[None]:
    """One line for each way in which the hub, the network and the right to read can fail."""
    try:
        yield
    except errors.HFValidationError:
        given = f"{repository!r} is no repository"
        raise InputError(f"{given}: give ORG/NAME, the two parts after {constants.ENDPOINT}/") from None
    except errors.OfflineModeIsEnabled:
        given = f"HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so {repository} cannot be pulled"
        raise Failure(f"{given}; unset it, or import a directory that is already here") from None
    except errors.HfHubHTTPError as problem:
        raise _refused(problem, repository, revision) from None
    except (client.httpx.TransportError, client.httpx.InvalidURL, client.httpx.TooManyRedirects) as problem:
        fix = "check the network, the proxy and HF_ENDPOINT and run the same command: what has arrived is kept"
        raise Failure(f"no connection to {constants.ENDPOINT} ({_reason(problem)}); {fix}") from None


def _refused(problem: errors.HfHubHTTPError, repository: str, revision: str) -> InputError | Failure:
    page = f"{constants.ENDPOINT}/{repository}"
    log_in = "log in again with the right account or token" if get_token() else "log in"
    log_in += " (`hf auth login`, or HF_TOKEN)"
    status = problem.response.status_code
    match problem:
        case errors.GatedRepoError():
            return Failure(f"{repository} is gated: accept its terms at {page}, {log_in}, then run the same command")
        case errors.RevisionNotFoundError():
            return InputError(f"{repository} has no revision {revision!r}; choose one of {page}/commits")
    if status == 401 and "invalid credentials" in (problem.server_message or "").lower():
        return Failure("the hub does not accept the token; correct or unset HF_TOKEN, or run `hf auth login`")
    if status in (401, 404):
        what = f"{repository} is missing or private, which the hub does not tell apart; check the name at {page}, "
        hint = ", or import a copy or a local directory: the published DBRX weights were withdrawn"
        hint = hint if repository.lower().startswith("databricks/dbrx") else ""
        return InputError(f"{what}and if it is private {log_in}{hint}")
    if status == 403:
        return Failure(f"the hub does not let you read {repository} ({_reason(problem)}); choose a copy or {log_in}")
    if status == 429:
        wait_s = _asked_wait_s(problem)
        when = "later" if wait_s is None else f"in {wait_s:.0f} s"
        more = "" if get_token() else f"; to be allowed more, {log_in}"
        return Failure(f"the hub's rate limit is reached; run the same command {when}: what has arrived is kept{more}")
    return Failure(f"the hub fails ({_reason(problem)}); run the same command later: what has arrived is kept")


def _reason(problem: Exception) -> str:
    """Short, on one line."""
    said = str(problem)
    if isinstance(problem, errors.HfHubHTTPError):
        said = f"{problem.response.status_code} {problem.server_message or problem.response.reason_phrase}"
    return " ".join(said.split())[:200] or type(problem).__name__

"""`pull` with the real client, in processes of its own, against a small hub on loopback."""

import fcntl
import importlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hub_server import (
    MB,
    SHARD,
    TOKEN,
    WANTED,
    Client,
    Fault,
    Hub,
    Outcome,
    Repository,
    environment,
    model,
    python,
    random_bytes,
    running_hub,
)
from rich.console import Console

from gristmill import progress
from gristmill.errors import InputError
from gristmill.hub.folder import PULLED


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub: Hub, home: Path) -> Iterator[Client]:
    with Client(hub.endpoint, home) as client:
        yield client


def holds(out: Path, repository: Repository, wanted: set[str] = WANTED) -> bool:
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and ".cache" not in path.parts}
    return found == wanted | {PULLED} and all((out / name).read_bytes() == repository.files[name] for name in wanted)


def partial(out: Path, repository: Repository, name: str = SHARD) -> Path:
    return out / ".cache/huggingface/download" / f"{name}.{repository.etag(name)[:16]}.incomplete"


# ---- what arrives --------------------------------------------------------------------------------------


def test_what_an_import_reads_and_the_license_arrive_all_of_one_commit(hub: Hub, home: Path, client: Client) -> None:
    repository = hub.repositories["org/plain"] = model()
    first, second = client.pull(("org/plain", "v1", None), ("org/plain", "v1", None))
    out = home / "models/org--plain"
    assert (first.code, second.code) == (0, 0), first.said
    assert holds(out, repository)
    record = {"repository": "org/plain", "revision": "v1", "commit": repository.sha, "license": "apache-2.0"}
    assert json.loads((out / PULLED).read_text()) == record
    assert f"org/plain at {repository.sha[:12]} (license: apache-2.0): 10 files, 6.3 MB to fetch" in first.said
    assert len(hub.asked("/storage/org/plain/")) == 3  # the second pull fetched none of them again
    assert not [request for request in hub.asked("org/plain/resolve/") if repository.sha not in request.path]
    assert not list(out.rglob("*.incomplete"))


def test_the_client_takes_the_directory_for_its_own_and_pull_takes_the_clients(
    hub: Hub, home: Path, client: Client
) -> None:
    repository = hub.repositories["org/shared"] = model(seed=20)
    ours, theirs = home / "ours", home / "theirs"
    script = (
        "import sys, huggingface_hub as h\n"
        "for name in sys.argv[3:]: h.hf_hub_download('org/shared', name, revision=sys.argv[1], local_dir=sys.argv[2])"
    )
    env = environment(hub.endpoint, home)
    client.pull(("org/shared", None, ours))
    fetched = len(hub.requests)
    python(script, repository.sha, str(ours), *sorted(WANTED), env=env)
    assert len(hub.requests) == fetched
    python(script, repository.sha, str(theirs), *sorted(WANTED), env=env)
    fetched = len(hub.asked("/storage/org/shared/"))
    assert client.pull(("org/shared", None, theirs))[0].code == 0
    assert holds(theirs, repository)
    assert len(hub.asked("/storage/org/shared/")) == fetched


def test_a_repository_with_one_weight_file_and_a_license_of_its_own_name(hub: Hub, home: Path, client: Client) -> None:
    files = {
        "config.json": b'{"model_type": "dbrx"}',
        "model.safetensors": random_bytes(5, 1000),
        "model-7.safetensors": b"x",
    }
    card = {"license": "other", "license_name": "databricks-open-model-license"}
    repository = hub.repositories["org/single"] = Repository(files=files, large=("model.safetensors",), card=card)
    (outcome,) = client.pull(("org/single", None, home / "single"))
    assert outcome.code == 0, outcome.said
    assert holds(home / "single", repository, {"config.json", "model.safetensors"})
    assert json.loads((home / "single" / PULLED).read_text())["license"] == "databricks-open-model-license"


def test_the_token_goes_to_the_hub_alone_and_is_never_printed(hub: Hub, home: Path) -> None:
    hub.repositories["org/private"] = model(seed=30)
    jobs = [("org/private", None, home / "private"), ("org/absent", None, None)]
    with Client(hub.endpoint, home, HF_TOKEN=TOKEN) as client:
        first, second = client.pull(*jobs)  # which also looks for it in all that was said
    assert first.code == 0, first.said
    assert second.code == 2
    assert "if it is private log in again with the right account or token" in second.error
    assert {request.headers.get("authorization") for request in hub.asked("org/private/resolve")} == {f"Bearer {TOKEN}"}
    stored = hub.asked("/storage/org/private")
    assert stored
    assert not [request for request in stored if "authorization" in request.headers]


# ---- interruptions -------------------------------------------------------------------------------------


def test_a_cut_connection_is_continued_within_one_pull_and_by_the_next(hub: Hub, home: Path, client: Client) -> None:
    repository = hub.repositories["org/cut"] = model(seed=40)
    wall = Fault(cut=2 * MB + 100, times=6)
    repository.faults = {SHARD: [Fault(cut=MB + 50), wall]}
    first, second = client.pull(("org/cut", None, home / "cut"), ("org/cut", None, home / "cut"))
    assert first.code == 1
    assert "what has arrived is kept" in first.error
    assert second.code == 0, second.said
    assert holds(home / "cut", repository)
    ranges = [request.headers.get("range") for request in hub.asked(f"/storage/org/cut/{SHARD}")]
    assert ranges == [None, f"bytes={MB}-", *[f"bytes={2 * MB}-"] * 6]
    assert len(hub.asked("/storage/org/cut/model-00001")) == 1


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_pull_goes_on_where_it_was(hub: Hub, home: Path, client: Client, sent: signal.Signals) -> None:
    name, out = f"org/{sent.name.lower()}", home / sent.name
    repository = hub.repositories[name] = model(seed=50)
    repository.faults = {SHARD: [Fault(hold=2 * MB + 100)]}
    pulling = Client(hub.endpoint, home)
    pulling.send([(name, None, out)])
    wait_for(lambda: partial(out, repository).exists() and partial(out, repository).stat().st_size == 2 * MB)
    pulling.kill(sent)
    if sent == signal.SIGINT:
        assert pulling.receive()[0].code == 130
    else:
        with pytest.raises(EOFError):
            pulling.receive()
    assert not (out / PULLED).exists()
    (again,) = client.pull((name, None, out))
    assert again.code == 0, again.said
    assert holds(out, repository)
    assert hub.asked(f"/storage/{name}/{SHARD}")[-1].headers["range"] == f"bytes={2 * MB}-"


def wait_for(true: Any) -> None:
    until = time.monotonic() + 15
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_server_that_ignores_ranges_and_a_damaged_file_do_not_spoil_the_model(
    hub: Hub, home: Path, client: Client
) -> None:
    repository = hub.repositories["org/odd"] = model(seed=60)
    repository.faults = {"tokenizer.json": [Fault(flip=True)]}
    first, second = client.pull(("org/odd", None, home / "odd"), ("org/odd", None, home / "odd"))
    assert (first.code, second.code) == (1, 0), first.said + second.said
    assert first.error == (
        "error: tokenizer.json of org/odd arrived damaged: its SHA-256 is not what the hub says; "
        "run the same command: it alone is fetched again"
    )
    (home / "odd" / SHARD).unlink()
    repository.faults = {SHARD: [Fault(cut=MB + 1), Fault(ignore_range=True)]}
    (third,) = client.pull(("org/odd", None, home / "odd"))
    assert third.code == 0, third.said
    assert holds(home / "odd", repository)
    assert len(hub.asked("/storage/org/odd/tokenizer.json")) == 2


def test_a_file_that_changed_on_disk_is_fetched_again_and_a_new_commit_replaces_what_differs(
    hub: Hub, home: Path, client: Client
) -> None:
    repository, out = model(seed=70), home / "moving"
    hub.repositories["org/moving"] = repository
    assert client.pull(("org/moving", None, out))[0].code == 0
    (out / SHARD).write_bytes(b"cut")
    repository.files = repository.files | {"LICENSE": b"You may not."}
    assert client.pull(("org/moving", None, out))[0].code == 0
    assert holds(out, repository)
    assert json.loads((out / PULLED).read_text())["commit"] == repository.sha
    assert len(hub.asked("/storage/org/moving/model-00001")) == 1
    assert len(hub.asked(f"/storage/org/moving/{SHARD}")) == 2


def test_a_changed_bit_is_found_though_size_and_time_are_kept_and_what_was_hashed_is_not_read_again(
    hub: Hub, home: Path, client: Client
) -> None:
    repository, out = model(seed=71), home / "flipped"
    hub.repositories["org/flipped"] = repository
    assert client.pull(("org/flipped", None, out))[0].code == 0
    path, before = out / SHARD, (out / SHARD).stat()
    path.write_bytes(bytes([repository.files[SHARD][0] ^ 1]) + repository.files[SHARD][1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    (mended,) = client.pull(("org/flipped", None, out))
    assert mended.code == 0, mended.said
    assert f"{path} has changed since it was pulled: fetching it again" in mended.said
    assert holds(out, repository)
    note = out / ".cache/huggingface/download" / f"{SHARD}.metadata"
    assert note.read_text().splitlines()[:2] == [repository.sha, sha256(repository.files[SHARD]).hexdigest()]
    note.write_text(note.read_text().replace(repository.etag(SHARD), "0" * 64))  # believed if the file is not read
    (believed,) = client.pull(("org/flipped", None, out))
    assert believed.code == 0, believed.said
    assert "has changed" not in believed.said
    assert len(hub.asked(f"/storage/org/flipped/{SHARD}")) == 3
    assert len(hub.asked("/storage/org/flipped/model-00001")) == 1


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json"])
def test_a_file_that_was_edited_by_hand_is_not_replaced(hub: Hub, home: Path, client: Client, name: str) -> None:
    repository, out = model(seed=72), home / f"edited-{name}"
    hub.repositories["org/edited"] = repository
    assert client.pull(("org/edited", None, out))[0].code == 0
    (out / name).write_bytes(b'{"top_p": 0.5}')
    (refused,) = client.pull(("org/edited", None, out))
    assert refused.code == 2
    assert refused.error == (
        f"error: {out / name} is not the file of org/edited, or was edited here, and would be replaced; "
        "move it away or choose another --out"
    )
    assert (out / name).read_bytes() == b'{"top_p": 0.5}'
    (out / name).rename(home / f"mine-{name}")
    assert client.pull(("org/edited", None, out))[0].code == 0
    assert holds(out, repository)


def test_brackets_in_names_and_licenses_are_no_markup(hub: Hub, home: Path, client: Client) -> None:
    hub.repositories["org/evil"] = model(seed=73)
    hub.repositories["org/evil"].card = {"license": "x[/evil]"}
    hub.repositories["org/two"] = model(seed=74)
    hub.repositories["org/two"].card = {"license": ["mit", "apache-2.0"]}
    evil, two = client.pull(("org/evil", None, home / "models/[v1]"), ("org/two", None, home / "two"))
    assert (evil.code, two.code) == (0, 0), evil.said + two.said
    assert "(license: x[/evil])" in evil.said
    assert f"to fetch into {home}/models/[v1]" in evil.said
    assert json.loads((home / "two" / PULLED).read_text())["license"] == "mit, apache-2.0"


def test_brackets_in_a_files_name_stand_in_the_bar_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(progress, "console", terminal)
    with progress.bar("check a[/x].safetensors", 2) as advance:
        advance(1)
    assert "check a[/x].safetensors" in terminal.file.getvalue()  # type: ignore[attr-defined]


def test_a_busy_hub_is_asked_again(hub: Hub, home: Path, client: Client) -> None:
    repository = hub.repositories["org/busy"] = model(seed=80)
    limit = {"RateLimit": '"api";r=0;t=0'}
    repository.faults = {
        "api": [Fault(status=503), Fault(status=429, headers=limit)],
        "config.json": [Fault(status=500)],
        SHARD: [Fault(status=502, times=2)],
    }
    (outcome,) = client.pull(("org/busy", None, home / "busy"))
    assert outcome.code == 0, outcome.said
    assert holds(home / "busy", repository)


# ---- Xet -----------------------------------------------------------------------------------------------


def test_xet_is_used_where_the_hub_offers_it_and_continues_at_the_byte(hub: Hub, home: Path, client: Client) -> None:
    """The store is hf_xet's own local one; an altered beginning that spoils the hash shows that it was built upon."""
    repository = hub.repositories["org/xet"] = model(seed=90)
    hub.cas = f"local://{home / 'cas'}"
    (home / "shard").write_bytes(repository.files[SHARD])
    upload = (
        "import sys, hf_xet\n"
        "with hf_xet.XetSession().new_upload_commit(endpoint=sys.argv[1]) as commit:\n"
        "    started = commit.start_upload_file(sys.argv[2])\n"
        "print(started.result().xet_info.hash)"
    )
    env = environment(hub.endpoint, home)
    repository.xet = {SHARD: python(upload, hub.cas, str(home / "shard"), env=env).strip()}
    begun, spoilt = home / "begun", home / "spoilt"
    for out, flip in ((begun, 0), (spoilt, 1)):
        partial(out, repository).parent.mkdir(parents=True)
        partial(out, repository).write_bytes(bytes([repository.files[SHARD][0] ^ flip]) + repository.files[SHARD][1:MB])
    jobs = [("org/xet", None, begun), ("org/xet", None, spoilt), ("org/xet", None, spoilt)]
    first, second, third = client.pull(*jobs)
    assert (first.code, second.code, third.code) == (0, 1, 0), first.said + second.said + third.said
    assert "5.2 MB to fetch" in first.said
    assert f"{SHARD} of org/xet arrived damaged" in second.error
    assert holds(begun, repository)
    assert holds(spoilt, repository)
    assert not hub.asked(f"/storage/org/xet/{SHARD}")
    hub.cas = "http://127.0.0.1:9"
    with Client(hub.endpoint, home, HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1") as client:
        (fallen,) = client.pull(("org/xet", None, home / "fallen"))
    assert fallen.code == 0, fallen.said
    assert holds(home / "fallen", repository)
    assert "Xet storage fails" in fallen.said


# ---- messages ------------------------------------------------------------------------------------------

GATED = Fault(status=403, headers={"X-Error-Code": "GatedRepo"}, body='{"error": "Access to model is restricted"}')
LOG_IN = "log in (`hf auth login`, or HF_TOKEN)"
KEPT = "what has arrived is kept"
ALLOWED = f"{KEPT}; to be allowed more, {LOG_IN}"
NETWORK = "check the network, the proxy and HF_ENDPOINT and run the same command: " + KEPT
PRIVATE = "is missing or private, which the hub does not tell apart; check the name at {hub}"
NO_HUB = "{hub} does not answer as a hub does; check HF_ENDPOINT and the proxy"
INDEX = "model.safetensors.index.json"
NAMES = {"no-org": "bert", "address": "https://hub/a/b", "dbrx": "databricks/dbrx-base"}
GOOD = ("revision", "occupied", "another", "in-use", "a-file")  # where org/good is not to blame
CASES = {  # name: exit code, message
    "no-org": (2, "'bert' is no repository: give ORG/NAME, the two parts after {hub}/"),
    "address": (2, "'https://hub/a/b' is no repository: give ORG/NAME, the two parts after {hub}/"),
    "missing": (2, f"org/missing {PRIVATE}/org/missing, and if it is private {LOG_IN}"),
    "dbrx": (
        2,
        f"databricks/dbrx-base {PRIVATE}/databricks/dbrx-base, and if it is private {LOG_IN}, or import a copy or a "
        "local directory: the published DBRX weights were withdrawn",
    ),
    "revision": (2, "org/good has no revision 'v9'; choose one of {hub}/org/good/commits"),
    "gated": (1, f"org/gated is gated: accept its terms at {{hub}}/org/gated, {LOG_IN}, then run the same command"),
    "forbidden": (1, f"the hub does not let you read org/forbidden (403 Not for you.); choose a copy or {LOG_IN}"),
    "token": (1, "the hub does not accept the token; correct or unset HF_TOKEN, or run `hf auth login`"),
    "limited": (1, f"the hub's rate limit is reached; run the same command in 3600 s: {ALLOWED}"),
    "limited-long": (1, f"the hub's rate limit is reached; run the same command later: {ALLOWED}"),
    "fails": (1, f"the hub fails (500 Internal Server Error); run the same command later: {KEPT}"),
    "silent": (1, f"no connection to {{hub}} (timed out); {NETWORK}"),
    "bad-hash": (1, NO_HUB),
    "no-hub": (1, NO_HUB),
    "llama": (
        2,
        "org/llama is of model_type 'llama', an import reads dbrx and qwen3_moe; choose such a model "
        "(no weights were fetched)",
    ),
    "no-config": (2, "org/no-config holds no config.json: it is not a model in the transformers layout"),
    "bad-config": (2, "config.json of org/bad-config is no JSON object; choose another revision"),
    "pickles": (
        2,
        "org/pickles keeps its weights in pickles (pytorch_model.bin), which can execute code when they are read; "
        "choose a revision or copy with safetensors",
    ),
    "no-weights": (
        2,
        f"org/no-weights holds no weights: neither model.safetensors nor {INDEX}; choose a repository that does",
    ),
    "half": (2, f"{INDEX} of org/half names {SHARD}, which is not there; choose another revision or copy"),
    "empty-index": (2, f"{INDEX} of org/empty-index names no weights; choose another revision or copy"),
    "huge": (
        1,
        "org/huge needs 9,000,000.0 GB more, {home}/huge has {free} GB free; "
        "free some room or choose --out on a larger disk",
    ),
    "full": (1, "No space left on device; free some room, then run the same command: finished stages are kept"),
    "occupied": (
        2,
        "{home}/occupied/README.md is not the file of org/good, or was edited here, and would be replaced; "
        "move it away or choose another --out",
    ),
    "another": (2, "{home}/another holds org/other; choose another --out for org/good"),
    "in-use": (1, "another pull is writing to {home}/in-use; wait for it or choose another --out"),
    "a-file": (2, "--out {home}/a-file is or lies below a file; name a directory"),
}


@pytest.fixture(scope="module")
def failures(hub: Hub, home: Path, client: Client) -> dict[str, Outcome]:
    """Each case pulled into a directory of its own name, all by one process."""
    healthy = "good gated forbidden token limited limited-long fails silent bad-hash no-hub full"
    for name in healthy.split():
        hub.repositories[f"org/{name}"] = model()
    api = {
        "forbidden": Fault(
            status=403, body='{"error": "Not for\\nyou."}', headers={"Content-Type": "application/json"}
        ),
        "token": Fault(status=401, body='{"error": "Invalid credentials in Authorization header"}'),
        "limited": Fault(status=429, headers={"Retry-After": "3600"}),
        "limited-long": Fault(status=429, times=6),
        "fails": Fault(status=500, times=6),
        "silent": Fault(silent_s=1.3),
        "bad-hash": Fault(
            body='{"id": "org/bad-hash", "sha": "0", "siblings": [{"rfilename": "README.md", "size": 1,'
            ' "blobId": "/../../../README.md"}]}'
        ),
        "no-hub": Fault(status=200, body="<html>", headers={"Content-Type": "text/html"}),
    }
    for name, fault in api.items():
        hub.repositories[f"org/{name}"].faults = {"api": [fault]}
    hub.repositories["org/gated"].faults = {"config.json": [GATED]}
    good = b'{"model_type": "dbrx"}'
    others = {
        "llama": {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"},
        "no-config": {"model.safetensors": b"x"},
        "bad-config": {"config.json": b"[1]", "model.safetensors": b"x"},
        "pickles": {"config.json": good, "pytorch_model.bin": b"x", "training_args.bin": b"x"},
        "no-weights": {"config.json": good, "model.gguf": b"x"},
        "half": {name: data for name, data in model().files.items() if name != SHARD},
        "empty-index": {"config.json": good, INDEX: b'{"weight_map": {}}'},
        "huge": {"config.json": good, "model.safetensors": b"x"},
    }
    for name, files in others.items():
        hub.repositories[f"org/{name}"] = Repository(files=files, large=("model.safetensors",))
    hub.repositories["org/huge"].claimed_bytes = {"model.safetensors": 9 * 10**15}
    full = partial(home / "full", hub.repositories["org/full"])
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")  # the kernel's own full disk
    (home / "occupied").mkdir()
    (home / "occupied/README.md").write_text("my own notes")
    (home / "another").mkdir()
    (home / "another" / PULLED).write_text('{"repository": "org/other"}')
    (home / "a-file").write_text("")
    lock = home / "in-use/.cache/huggingface/download/pull.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        names = {case: NAMES.get(case, "org/good" if case in GOOD else f"org/{case}") for case in CASES}
        jobs = [(names[case], "v9" if case == "revision" else None, home / case) for case in CASES]
        return dict(zip(CASES, client.pull(*jobs), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_each_failure_says_one_line_with_the_step_to_take(
    hub: Hub, home: Path, failures: dict[str, Outcome], case: str
) -> None:
    code, message = CASES[case]
    outcome = failures[case]
    free = outcome.error.partition(" has ")[2].partition(" GB free")[0]
    assert outcome.error == "error: " + message.format(hub=hub.endpoint, home=home, free=free), outcome.said
    assert outcome.code == code
    assert not (home / case / SHARD).exists() or case == "full"


def test_a_renamed_repository_is_followed_under_its_new_name(hub: Hub, home: Path, client: Client) -> None:
    repository = hub.repositories["neworg/new"] = model(seed=99)
    hub.moved = {"org/old": "neworg/new"}
    (outcome,) = client.pull(("org/old", "v1", None))
    assert outcome.code == 0, outcome.said
    assert "org/old has been renamed to neworg/new: pulling that; use the new name from now on" in outcome.said
    assert holds(home / "models/neworg--new", repository)


def test_without_a_network_it_says_so(hub: Hub, home: Path) -> None:
    with Client(hub.endpoint, home, HF_HUB_OFFLINE="1") as client:
        (offline,) = client.pull(("org/good", None, None))
    assert offline.code == 1
    assert offline.error == (
        "error: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so org/good cannot be pulled; unset it, "
        "or import a directory that is already here"
    )
    with Client("http://127.0.0.1:9", home) as client:
        (refused,) = client.pull(("org/good", None, None))
    assert refused.code == 1
    assert refused.error == (
        "error: no connection to http://127.0.0.1:9 ([Errno 111] Connection refused); check the network, the proxy and "
        "HF_ENDPOINT and run the same command: what has arrived is kept"
    )


def test_another_client_than_the_tested_one_is_one_line_of_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gristmill.hub.pull", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils._runtime", None)
    with pytest.raises(InputError, match=r"^pull works with huggingface-hub 2\.4, .*pip install") as caught:
        importlib.import_module("gristmill.hub.pull")
    assert "\n" not in str(caught.value)

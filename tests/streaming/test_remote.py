"""Claims about shards on an object store that misbehaves, read through a cache by processes that share it and die."""

import fcntl
import io
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from object_store import (
    STEPS,
    Fault,
    Store,
    closed_port,
    open_batches,
    reader_of,
    running_store,
    same_samples,
    start_reader,
)

from gristmill import artifact
from gristmill.artifact import Artifact, Built
from gristmill.errors import Failure, InputError
from gristmill.pipeline import run
from gristmill.report.batch import batch_text
from gristmill.stage import Recipe
from gristmill.streaming import Batch, MDSReader, Remote, ShardsConfig, build_shards, remote
from gristmill.streaming.cache import LOCK, Cache
from gristmill.streaming.remote import build_remote, read_manifest
from gristmill.train.config import TrainConfig

NUM_KILLS = int(os.environ.get("GRISTMILL_KILLS", "6"))
BLOCK = 48
SHARD = "code/shard.00001.mds"
FIELDS = ("tokens", "targets", "positions", "document_ids", "sources")


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS_S", (0.0,) * 8)


@pytest.fixture
def store(shards: Path) -> Iterator[Store]:
    with running_store(shards) as store:
        yield store


@pytest.fixture
def where(store: Store, tmp_path: Path) -> Remote:
    return Remote(url=store.url, cache=str(tmp_path / "cache"))


@pytest.fixture
def indexes(shards: Path, tmp_path: Path) -> Path:
    """What the artifact of remote shards holds: no shard."""
    for index in shards.glob("*/index.json"):
        (tmp_path / "indexes" / index.parent.name).mkdir(parents=True)
        shutil.copy(index, tmp_path / "indexes" / index.parent.name)
    return tmp_path / "indexes"


def equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


def files_of(where: Remote, kind: str = "") -> list[Path]:
    return [file for file in where.directory.rglob(f"*{kind}") if file.is_file()]


def num_bytes(where: Remote) -> int:
    """While nobody makes or takes room. A file that is renamed meanwhile is seen once."""
    lock = where.directory / LOCK
    if not lock.exists():
        return 0
    sizes: dict[int, int] = {}
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for file in (*files_of(where, ".shard"), *files_of(where, ".partial")):
            with suppress(FileNotFoundError):
                stat = file.stat()
                sizes[stat.st_ino] = stat.st_size
    return sum(sizes.values())


def first_of(reader: MDSReader, shard: int) -> int:
    """A sample of a shard."""
    return next(i for i in range(len(reader)) if reader.shard_of(np.array([i]))[0] == shard)


# ---- faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [10_000_000, 4_500])
def test_every_batch_is_the_local_one_whatever_the_store_does(
    shards: Path, indexes: Path, store: Store, tmp_path: Path, cache_bytes: int
) -> None:
    chance = random.Random(cache_bytes)
    faults = [Fault(status=500), Fault(status=429), Fault(short=100), Fault(cut=100), Fault(flip=True)]
    faults += [Fault(extra=True), Fault(reset=True), Fault(cut=0)]
    store.chance = lambda: chance.choice(faults) if chance.random() < 0.3 else None
    where = Remote(url=store.url, cache=str(tmp_path / "cache"), cache_bytes=cache_bytes)
    local, batches = open_batches(shards, None), open_batches(indexes, where)
    for step in range(0, STEPS, 1 if cache_bytes > 10_000 else 4):
        assert equal(batches.batch(step), local.batch(step))
        assert num_bytes(where) <= cache_bytes
    assert sum(store.asked.values()) > len(store.asked)


@pytest.mark.parametrize(
    ("fault", "tries", "what"),
    [
        (Fault(status=404), 2, "it is missing"),
        (Fault(status=403), 2, "it answered 403 Forbidden"),
        (Fault(status=429), 9, "it answered 429 Too Many Requests"),
        (Fault(status=500), 9, "it answered 500 Internal Server Error"),
        (Fault(status=503), 9, "it answered 503 Service Unavailable"),
        (Fault(short=100), 9, r"it ended after 100 of [\d,]+ bytes"),
        (Fault(extra=True), 9, r"it has more than the [\d,]+ bytes"),
        (Fault(flip=True), 9, "its sha256 does not match the index"),
        (Fault(cut=100), 9, "(ClientPayloadError|ContentLengthError): "),
        (Fault(reset=True), 9, "(ConnectionResetError|ServerDisconnectedError): "),
    ],
)
def test_each_fault_is_tried_as_often_as_it_may_pass_and_then_named(
    indexes: Path, store: Store, where: Remote, capsys: pytest.CaptureFixture[str], fault: Fault, tries: int, what: str
) -> None:
    store.faults[SHARD] = [fault]
    reader = reader_of(indexes, where)
    times = f"{store.url}/{SHARD} could not be read: .*{what}.*tried {tries} times"
    with pytest.raises(Failure, match=times):
        reader[first_of(reader, 1)]
    assert store.asked[SHARD] == tries or fault.reset  # which aiohttp answers with another request of its own
    said = capsys.readouterr().err.splitlines()
    assert len(said) == tries - 1
    assert all(f"{store.url}/{SHARD}" in line and "trying again" in line for line in said)
    assert files_of(where, ".partial") == files_of(where, ".shard") == []


@pytest.mark.parametrize(
    "fault", [Fault(status=500), Fault(short=7), Fault(cut=7), Fault(flip=True), Fault(extra=True), Fault(reset=True)]
)
def test_what_passes_is_waited_for(shards: Path, indexes: Path, store: Store, where: Remote, fault: Fault) -> None:
    fault.times = 8
    store.faults[SHARD] = [fault]
    reader = reader_of(indexes, where)
    assert same_samples(reader, MDSReader(shards / "code"), first_of(reader, 1))
    assert store.asked[SHARD] == 9


def test_a_stalled_attempt_is_given_up_and_a_slow_one_is_not(
    shards: Path, indexes: Path, store: Store, where: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STALL_S", 1.0)
    size = (shards / SHARD).stat().st_size
    store.faults[SHARD] = [Fault(hold=size - 1, times=1), Fault(hold=0, times=1), Fault(pause_s=0.6)]
    assert 0.6 * -(-size // 1000) > 1.0
    reader, expected = reader_of(indexes, where), MDSReader(shards / "code")
    assert same_samples(reader, expected, first_of(reader, 1))
    assert store.asked[SHARD] == 3
    monkeypatch.setattr(remote, "WAITS_S", (0.0,))
    monkeypatch.setattr(remote, "STALL_S", 0.2)
    store.faults["code/shard.00002.mds"] = [Fault(hold=10)]
    with pytest.raises(Failure, match=r"it sent nothing for 0\.2 s \(tried 2 times\)"):
        reader[first_of(reader, 2)]
    store.release.set()  # bytes that come now reach nobody
    assert same_samples(reader, expected, first_of(reader, 1))


def test_a_silent_store_is_named_as_one(
    indexes: Path, store: Store, where: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STALL_S", "PATIENCE_S"):
        monkeypatch.setattr(remote, name, getattr(remote, name) / 100)
    reader = reader_of(indexes, where)
    store.faults[SHARD] = [Fault(hold=10)]
    with pytest.raises(Failure, match=r"it sent nothing for 0\.3 s \(tried \d times\)"):
        reader[first_of(reader, 1)]


@pytest.mark.parametrize("seed", range(50))
def test_a_silent_store_is_given_up_before_other_ranks_lose_patience(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only stalls and pauses move."""
    clock = [0.0]

    def stall(*_: object) -> None:
        clock[0] += remote.STALL_S
        raise remote.Broken("it sent nothing")

    def pause(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(remote, "_attempt", stall)
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=pause))
    random.seed(seed)
    with pytest.raises(Failure, match=r"it sent nothing \(tried [67] times\)"):
        remote.download("https://example.org/shard", io.BytesIO(), None, lambda: None)
    assert clock[0] <= remote.PATIENCE_S + remote.STALL_S < TrainConfig(steps=1).rank_timeout_s


def test_a_store_that_is_down_is_named_with_the_reason(indexes: Path, tmp_path: Path) -> None:
    where = Remote(url=f"http://127.0.0.1:{closed_port()}/x", cache=str(tmp_path / "cache"))
    with pytest.raises(Failure, match=r"/x/code/shard.00000.mds could not be read: ConnectionRefusedError: .* 9 times"):
        reader_of(indexes, where)[0]


# ---- the cache -----------------------------------------------------------------------------------------


def test_a_flipped_byte_and_a_cut_file_in_the_cache_are_fetched_again(
    shards: Path, indexes: Path, store: Store, where: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = MDSReader(shards / "code")
    assert same_samples(reader_of(indexes, where), expected, 0)
    (file,) = files_of(where, ".shard")
    good = file.read_bytes()
    for damaged in (good[:50] + bytes([good[50] ^ 4]) + good[51:], good[:-1], b""):
        file.write_bytes(damaged)
        asked = sum(store.asked.values())
        assert same_samples(reader_of(indexes, where), expected, 0)
        assert f"{file} is damaged" in capsys.readouterr().err
        assert sum(store.asked.values()) == asked + 1
        assert file.read_bytes() == good


@pytest.mark.parametrize("num_readers", [2, 4])
def test_processes_that_share_a_cache_fetch_each_shard_once(
    shards: Path, store: Store, where: Remote, num_readers: int
) -> None:
    store.chance = lambda: Fault(pause_s=0.002)  # so that they meet
    started = [start_reader(shards, where, seed, 2) for seed in range(num_readers)]
    for process, wrong in started:
        process.join(60)
        assert (process.exitcode, wrong.value) == (0, 0)
    shard_files = {f"code/{file.name}" for file in (shards / "code").glob("*.mds")}
    assert store.asked == dict.fromkeys(shard_files, 1)
    assert files_of(where, ".partial") == []


def test_the_limit_holds_at_every_moment_while_processes_read_at_random(
    shards: Path, store: Store, tmp_path: Path
) -> None:
    largest = max(file.stat().st_size for file in (shards / "code").glob("*.mds"))
    where = Remote(url=store.url, cache=str(tmp_path / "cache"), cache_bytes=int(2.5 * largest))
    started = [start_reader(shards, where, seed, 1) for seed in range(2)]
    looks = []
    while any(process.is_alive() for process, _ in started):
        looks.append(num_bytes(where))
        time.sleep(0.0005)
    assert [(process.exitcode, wrong.value) for process, wrong in started] == [(0, 0)] * 2
    assert largest < max(looks) <= where.cache_bytes


def test_a_limit_of_one_shard_works_and_a_smaller_one_names_the_least(
    shards: Path, indexes: Path, store: Store, tmp_path: Path
) -> None:
    largest = max(file.stat().st_size for file in shards.glob("*/*.mds"))
    tight = Remote(url=store.url, cache=str(tmp_path / "cache"), cache_bytes=largest)
    local, batches = open_batches(shards, None), open_batches(indexes, tight)
    assert all(equal(batches.batch(step), local.batch(step)) for step in range(0, STEPS, 5))
    with pytest.raises(InputError, match=rf"cache_bytes={largest - 1} .* at least {largest}"):
        open_batches(indexes, Remote(url=store.url, cache=tight.cache, cache_bytes=largest - 1))


def test_the_least_recently_used_file_goes_first(shards: Path, indexes: Path, store: Store, tmp_path: Path) -> None:
    sizes = [file.stat().st_size for file in sorted((shards / "code").glob("*.mds"))]
    where = Remote(url=store.url, cache=str(tmp_path / "cache"), cache_bytes=3 * max(sizes))
    used = reader_of(indexes, where)
    for shard in (0, 1, 2, 0, 3, 0, 4):  # 0 stays open, and is used again
        used[first_of(used, shard)]
    here = {int(file.name.split(".")[1]) for file in files_of(where, ".shard")}
    assert here == {0, 3, 4}


def test_files_of_others_are_never_removed(shards: Path, indexes: Path, store: Store, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    with pytest.raises(InputError, match="holds files of others"):
        Cache(Remote(url=store.url, cache=str(taken)))
    with pytest.raises(InputError, match="is or lies below a file"):
        Cache(Remote(url=store.url, cache=str(taken / "mine")))
    for cache in (shards, shards / "cache", shards.parent):
        with pytest.raises(InputError, match="overlaps the shards"):
            Cache(Remote(url=f"file://{shards}", cache=str(cache)))
    where = Remote(url=store.url, cache=str(tmp_path / "cache"), cache_bytes=4_500)
    reader = reader_of(indexes, where)
    reader[0]
    (own,) = {file.parent for file in files_of(where, ".shard")}
    other = where.directory / "0123456789abcdef"
    other.mkdir()
    for folder in (own, other, where.directory):
        (folder / "mine").write_bytes(bytes(10_000))
    for name in ("url", "a.shard", "b.partial"):
        (other / name).write_bytes(b"\xffmine")
    mine = [file for file in files_of(where) if file.name == "mine" or file.parent == other]
    assert all(same_samples(reader, MDSReader(shards / "code"), i) for i in range(len(reader)))
    assert all(file.exists() for file in mine)


@pytest.mark.timeout(120 + 10 * NUM_KILLS)
def test_readers_that_are_killed_again_and_again_leave_nothing_that_misleads_the_next(
    shards: Path, store: Store, tmp_path: Path
) -> None:
    chance = random.Random(0)
    largest = max(file.stat().st_size for file in (shards / "code").glob("*.mds"))
    where = Remote(url=store.url, cache=str(tmp_path / "cache"), cache_bytes=4 * largest)
    store.chance = lambda: Fault(pause_s=0.003)
    expected, inside = MDSReader(shards / "code"), 0
    for kill in range(NUM_KILLS):
        started = [start_reader(shards, where, chance.randrange(1000), float("inf")) for _ in range(2)]
        asked, deadline = sum(store.asked.values()), chance.uniform(0.0, 0.3)
        while sum(store.asked.values()) < asked + 3:  # they are at work
            assert all(process.is_alive() for process, _ in started)
            time.sleep(0.001)
        moment = time.monotonic() + deadline
        while time.monotonic() < moment or (kill % 2 == 0 and not files_of(where, ".partial")):
            time.sleep(0.001)
        for process, _ in started:
            process.kill()
        for process, wrong in started:
            process.join()
            assert wrong.value == 0
        inside += any(file.stat().st_size for file in files_of(where, ".partial"))
        reader = reader_of(shards, where)
        assert all(same_samples(reader, expected, i) for i in range(len(reader)))
        assert files_of(where, ".partial") == []
        assert num_bytes(where) <= where.cache_bytes
    assert inside > 0, "no kill fell inside a download"


# ---- ahead ---------------------------------------------------------------------------------------------


def test_what_the_next_steps_need_is_there_before_they_ask(
    shards: Path, indexes: Path, store: Store, where: Remote
) -> None:
    local, batches = open_batches(shards, None), open_batches(indexes, where)
    assert equal(batches.batch(0), local.batch(0))
    needed = {need for step in range(STEPS) for need in batches._shards_of(step, 0, 1)}
    deadline = time.monotonic() + 60
    while len(files_of(where, ".shard")) < len(needed):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    store.chance = lambda: Fault(status=500)  # from now on there is no store
    assert all(equal(batches.batch(step), local.batch(step)) for step in range(STEPS))
    assert max(store.asked.values()) == 1


def test_an_error_ahead_is_kept_until_its_step_asks(
    indexes: Path, store: Store, where: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = open_batches(indexes, where)
    needs = [set(batches._shards_of(step, 0, 1)) for step in range(STEPS)]
    step = next(step for step in range(1, STEPS) if needs[step] - set.union(*needs[:step]) - {(0, 0), (1, 0), (2, 0)})
    source, shard = min(needs[step] - set.union(*needs[:step]) - {(0, 0), (1, 0), (2, 0)})
    bad = f"{batches.source_names[source]}/shard.{shard:05}.mds"
    store.faults[bad] = [Fault(status=500)]
    for before in range(step):
        batches.batch(before)
    deadline = time.monotonic() + 60
    while not store.asked[bad]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert capsys.readouterr().err == ""
    with pytest.raises(Failure, match=bad):
        batches.batch(step)


# ---- the artifact --------------------------------------------------------------------------------------

Committed = dict[str, Artifact]


@pytest.fixture
def committed(corpus: Path, tmp_path: Path) -> Committed:
    """Shards, as a run commits them, and what they were made from."""
    parents = {}
    for name in ("corpus", "tokenizer"):
        path = artifact.prepare(tmp_path / name)
        (path / "file").write_text(name)
        parents[name] = artifact.commit(path, kind=name, key=name, config={}, inputs={}, built=Built())
    path, cfg = artifact.prepare(tmp_path / "store" / "shards"), ShardsConfig(block_tokens=BLOCK, size_limit=2000)
    built = build_shards(cfg, corpus, lambda texts: [list(text.encode()) for text in texts], 256, 257, path)
    config = {"block_tokens": BLOCK}
    return parents | {
        "shards": artifact.commit(path, kind="shards", key="k", config=config, inputs=parents, built=built)
    }


def build(committed: Committed, out: Path, url: str, **changes: Any) -> Built:
    cfg = ShardsConfig(block_tokens=BLOCK, remote=url)
    given = {name: committed[name] for name in ("corpus", "tokenizer")} | changes
    out.mkdir()
    return build_remote(cfg, read_manifest(url), given["corpus"], given["tokenizer"], out)


def test_the_remote_artifact_is_fetched_as_indexes_alone_and_says_whose_they_are(
    committed: Committed, tmp_path: Path
) -> None:
    with running_store(tmp_path / "store") as store:
        built = build(committed, tmp_path / "out", f"{store.url}/shards")
        assert set(store.asked) == {f"shards/{n}" for n in ("manifest.json", *(f"{s}/index.json" for s in SOURCES))}
    theirs = committed["shards"]
    assert built.metrics == {**theirs.metrics, "remote": f"{store.url}/shards"}
    assert json.loads((tmp_path / "out" / "remote.json").read_text()) == {"content": theirs.content}
    for source in SOURCES:
        index = Path(source) / "index.json"
        assert (tmp_path / "out" / index).read_bytes() == (theirs.path / index).read_bytes()
    with pytest.raises(InputError, match=r"shards lie elsewhere; say where \(shards\.remote\)"):
        open_batches(tmp_path / "out", None)


SOURCES = ("code", "prose", "tiny")


def test_shards_of_another_tokenizer_corpus_or_block_are_refused_with_the_reason(
    committed: Committed, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/store/shards"
    with pytest.raises(InputError, match=r"another tokenizer .*: its ids mean other text"):
        build(committed, tmp_path / "a", url, tokenizer=committed["corpus"])
    with pytest.raises(InputError, match=r"another corpus .*: text that is held out here may be training text there"):
        build(committed, tmp_path / "b", url, corpus=committed["tokenizer"])
    with pytest.raises(InputError, match=r"shards\.block_tokens=32768, but .* has 48: set it to that"):
        build_remote(
            ShardsConfig(remote=url), read_manifest(url), committed["corpus"], committed["tokenizer"], tmp_path
        )
    with pytest.raises(InputError, match="artifact of kind 'corpus'"):
        read_manifest(f"file://{tmp_path}/corpus")


@pytest.mark.parametrize("name", ["manifest.json", "code/index.json"])
def test_damage_of_the_manifest_and_of_an_index_is_found(committed: Committed, tmp_path: Path, name: str) -> None:
    with running_store(tmp_path / "store") as store:
        store.faults[f"shards/{name}"] = [Fault(flip=True, times=8)]
        build(committed, tmp_path / "good", f"{store.url}/shards")
        store.faults[f"shards/{name}"] = [Fault(flip=True)]
        with pytest.raises(Failure, match=rf"{store.url}/shards/{name} could not be read: .*tried 9 times"):
            build(committed, tmp_path / "bad", f"{store.url}/shards")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/mnt/shards", "must be a URL such as"),
        ("simplecache::s3://bucket", "must be a URL such as"),
        ("s3://key:secret@bucket/shards", "must hold no password"),
        ("https://host/shards?sig=secret", "must hold no password"),
        ("nowhere://bucket", "knows no protocol 'nowhere'"),
    ],
)
def test_urls_that_cannot_be_read_or_hold_secrets_are_refused(
    url: str, message: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"shards.remote.*{message}") as caught:
        Cache(Remote(url=tiny_recipe(f"shards.remote={url}")["shards"].remote or "", cache=str(tmp_path / "cache")))
    assert "secret@" not in str(caught.value)
    assert "sig=" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def absent(protocol: str) -> None:
        raise ImportError(f"Install something to access {protocol}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    for protocol, package in (("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs")):
        with pytest.raises(InputError, match=rf"pip install 'gristmill\[remote\]' {package}`"):
            remote.require("shards.remote", f"{protocol}://bucket/shards")
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(InputError, match=r"`pip install 'gristmill\[remote\]'`"):
        remote.require("shards.remote", "file:///mnt/shards")


def test_a_run_on_remote_shards_trains_the_same_model_and_a_moved_bucket_changes_nothing(
    tiny_run: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = artifact.load(tiny_run).manifest["metrics"]["stages"]
    bucket = Path(shutil.copytree(tiny_run / stages["shards"], tmp_path / "bucket"))
    folder = tmp_path / "run"
    for name in ("corpus", "tokenizer"):
        shutil.copytree(tiny_run / stages[name], folder / stages[name])

    def train(url: Path) -> str:
        run(tiny_recipe(f"shards.remote=file://{url}", f"shards.cache={tmp_path}/cache"), folder, until="train")
        return capsys.readouterr().err

    assert train(bucket).count("stands") == 2
    (indexes,) = (folder / "shards").iterdir()
    assert {file.name for file in indexes.rglob("*") if file.is_file()} == {
        "index.json",
        "remote.json",
        "manifest.json",
    }
    ours = artifact.load(folder / "train" / next((folder / "train").iterdir()).name / "step-00000008")
    assert ours.content == artifact.load(tiny_run / stages["train"]).content
    assert artifact.verify(folder).problems == []
    bucket.rename(tmp_path / "moved")
    assert train(tmp_path / "moved").count("stands") == 4


def test_a_step_is_shown_from_where_training_read_it_and_no_other_shard_is_fetched(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "default"))
    small = "shards.size_limit=1024"
    local = run(tiny_recipe(small), tmp_path / "local", until="train")
    (built,) = (local / "shards").iterdir()
    first, second = (Path(shutil.copytree(built, tmp_path / name)) for name in ("first", "second"))
    folder = tmp_path / "run"
    for name in ("corpus", "tokenizer"):
        shutil.copytree(local / name, folder / name)

    run(tiny_recipe(f"shards.remote=file://{first}", f"shards.cache={tmp_path}/used", small), folder, until="train")
    shutil.rmtree(first)
    shutil.rmtree(tmp_path / "used")
    with pytest.raises(Failure, match=r"could not be read: it is missing .* say where with --remote URL"):
        batch_text(folder, 5)
    expected = "\n".join(batch_text(local, 5, full=True))
    assert "\n".join(batch_text(folder, 5, full=True, remote=f"file://{second}")) == expected
    fetched = len(list((tmp_path / "used").rglob("*.shard")))
    assert 2 <= fetched <= 2 + 4 < len(list(second.rglob("*.mds")))  # a batch of four sequences, and a first of each
    assert not (tmp_path / "default").exists()
    (checkpoint,) = (path.parent for path in folder.glob("train/*/step-00000008/manifest.json"))
    state = json.loads((checkpoint / "state.json").read_text())
    state["guard"]["skipped"] = [5]
    (checkpoint / "state.json").write_text(json.dumps(state))
    said = list(batch_text(folder, 5, remote=f"file://{second}"))
    assert said[1] == "left out by the guard: nothing was learned from it"
    assert len(list(batch_text(folder, 6, remote=f"file://{second}"))) > 4
    with pytest.raises(InputError, match="leave --remote and --cache out"):
        batch_text(local, 5, cache=str(tmp_path))

"""Copies elsewhere: made after the commit, fetched when the machine is lost, good or absent as on disk."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from test_checkpoint import KEY, flip, in_folder, is_of, saved, steps_in

from gristmill import artifact
from gristmill.artifact import MANIFEST
from gristmill.errors import Failure, InputError
from gristmill.train.checkpoint import Saved, SaveFailed, latest_checkpoint
from gristmill.train.config import CheckpointConfig
from gristmill.train.remote import Remote, fetch_latest


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A folder that stands for an object store, where the copies of steps 1 to 5 are kept by the rule."""
    store = tmp_path / "store"
    events = saved(
        in_folder(tmp_path / "lost", CheckpointConfig(keep=2, keep_every=2, copy_to=url(store))), *range(1, 6)
    )
    assert [type(event) for event in events] == [Saved] * 5
    return store


def url(folder: Path) -> str:
    return folder.as_uri()


def copies(store: Path) -> Path:
    return store / KEY[:8]


def test_a_lost_machine_loses_nothing(there: Path, tmp_path: Path) -> None:
    lost = artifact.load(tmp_path / "lost" / "step-00000005")
    assert steps_in(copies(there)) == steps_in(tmp_path / "lost") == [2, 4, 5]
    shutil.rmtree(tmp_path / "lost")
    fetched, damage = fetch_latest(url(there), tmp_path / "new", KEY)
    assert fetched is not None
    assert (fetched.content, damage) == (lost.content, [])
    assert is_of(fetched.path, 5)
    found, damage = latest_checkpoint(tmp_path / "new", KEY)
    assert (found, damage) == (fetched, [])


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer/tokenizer.json", MANIFEST])
@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_damaged_copy_is_named_and_the_one_before_is_fetched(
    there: Path, tmp_path: Path, file: str, damage: object
) -> None:
    damage(copies(there) / "step-00000005" / file)  # type: ignore[operator]
    fetched, said = fetch_latest(url(there), tmp_path / "new", KEY)
    assert fetched is not None
    assert is_of(fetched.path, 4)
    if (file, damage) == (MANIFEST, Path.unlink):  # it was never finished: that is no damage
        assert said == []
    else:
        assert len(said) == 1
        assert "step-00000005" in said[0]
        assert file in said[0]
    assert latest_checkpoint(tmp_path / "new", KEY) == (fetched, [])


def test_a_copy_that_fails_is_reported_and_the_local_checkpoint_stands(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cfg = CheckpointConfig(copy_to=url(tmp_path / "file" / "below"))
    good, failed = saved(in_folder(tmp_path / "here", cfg), 1)
    assert isinstance(good, Saved)
    assert isinstance(failed, SaveFailed)
    assert failed.stands
    assert "has no copy of it" in failed.reason
    assert is_of(good.artifact.path, 1)


def test_a_copy_that_was_interrupted_does_not_count_and_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    checkpoints = in_folder(tmp_path / "here", CheckpointConfig(copy_to=url(store)))
    saved(checkpoints, 1)
    fs = Remote(url(store), KEY).fs
    put, sent = type(fs).put_file, []

    def cut_off(self: object, local: str, remote: str, **options: object) -> None:
        sent.append(remote)
        if len(sent) == 4:
            raise ConnectionError("the network is down")
        put(self, local, remote, **options)

    monkeypatch.setattr(type(fs), "put_file", cut_off)
    _, failed = saved(checkpoints, 2)
    assert isinstance(failed, SaveFailed)
    assert "the network is down" in failed.reason
    fetched, said = fetch_latest(url(store), tmp_path / "new", KEY)
    assert fetched is not None
    assert is_of(fetched.path, 1)
    assert said == []
    monkeypatch.undo()
    assert [type(event) for event in saved(checkpoints, 3)] == [Saved]
    assert steps_in(copies(store)) == [1, 3]


def test_another_training_at_the_same_url_is_left_alone(there: Path, tmp_path: Path) -> None:
    assert fetch_latest(url(there), tmp_path / "new", "f" * 64) == (None, [])
    assert fetch_latest(url(there), tmp_path / "new", KEY[:8] + "f" * 56)[0] is None
    assert not steps_in(tmp_path / "new")


def test_a_manifest_cannot_have_a_file_written_elsewhere(there: Path, tmp_path: Path) -> None:
    for path in copies(there).glob("step-*"):
        manifest = artifact.load(path).manifest
        manifest["files"] = {"../../stolen": manifest["files"]["state.json"]}
        artifact.write_manifest(path, manifest)
    found, said = fetch_latest(url(there), tmp_path / "new", KEY)
    assert found is None
    assert ["which lies elsewhere" in line for line in said] == [True] * 3
    assert latest_checkpoint(tmp_path / "new", KEY) == (None, [])


def test_a_url_that_cannot_be_opened_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="copy_to=gopher://x: fsspec knows no protocol 'gopher'"):
        in_folder(tmp_path, CheckpointConfig(copy_to="gopher://x"))


def test_training_does_not_begin_anew_because_the_network_is_down(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object, **__: object) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(Remote(url(there), KEY).fs), "ls", down)
    with pytest.raises(Failure, match="could not be read: no answer"):
        fetch_latest(url(there), tmp_path / "new", KEY)


def test_a_disk_that_is_full_here_is_not_taken_for_a_store_that_cannot_be_read(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(Remote(url(there), KEY).fs), "get_file", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        fetch_latest(url(there), tmp_path / "new", KEY)
    assert Path(raised.value.filename).is_relative_to(tmp_path / "new" / "step-00000005")

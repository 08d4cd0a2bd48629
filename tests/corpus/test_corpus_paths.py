"""Which files a path names, and that each listed file is found or counted as a loss."""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gristmill.corpus.paths import Loss, find_files, open_file
from gristmill.errors import InputError


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own can only be reached by its owner."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


@contextlib.contextmanager
def plain_user() -> Iterator[None]:
    """Permissions do not hold for root."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


# ---- losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.txt", "/*/*.txt"])
def test_unreadable_folders_and_files_are_losses_and_the_others_are_found(shared, pattern):
    root = tree(shared / "tree", *(f"{folder}/{number}.txt" for folder in "abcd" for number in range(3)))
    (root / "b").chmod(0)
    (root / "c").chmod(0o444)  # its names can be listed, and nothing in it can be opened
    with plain_user():
        found = find_files(f"{root}{pattern}", "path")
    assert set(found.files) == {f"{folder}/{number}.txt" for folder in "ad" for number in range(3)}
    assert set(found.losses) == {"b", *(f"c/{number}.txt" for number in range(3))}
    assert {loss.reason for loss in found.losses.values()} == {"unreadable"}
    assert "Permission denied" in found.losses["b"].detail


@pytest.mark.parametrize("pattern", ["", "/*.txt"])
def test_a_root_without_permission_is_refused_with_the_right_advice(shared, pattern):
    root = tree(shared / "tree", "a.txt")
    root.chmod(0)
    with plain_user(), pytest.raises(InputError, match=r"^path: .*tree cannot be read \(Permission denied\); change"):
        find_files(f"{root}{pattern}", "path")
    with plain_user(), pytest.raises(InputError, match=r"^path: .*a\.txt cannot be read \(Permission denied\)"):
        find_files(f"{root}/a.txt", "path")


def test_a_path_of_which_nothing_can_be_read_names_a_loss(tmp_path):
    root = tree(tmp_path / "tree", ".hidden")
    (root / "note.md").symlink_to("nowhere")
    with pytest.raises(
        InputError, match=r"holds no files .*; note\.md cannot be read: No such file or directory \(a link"
    ):
        find_files(str(root), "path")


def test_dangling_and_circular_links_are_losses(tmp_path):
    root = tree(tmp_path / "tree", "a.txt")
    (root / "dangling.txt").symlink_to("nowhere")
    (root / "circle.txt").symlink_to("circle.txt")
    (root / "linked.txt").symlink_to("a.txt")
    for path in (root, root / "*.txt", root / "**"):
        found = find_files(str(path), "path")
        assert set(found.files) == {"a.txt", "linked.txt"}
        assert set(found.losses) == {"dangling.txt", "circle.txt"}


def test_a_tree_deeper_than_a_path_may_be_long_is_read_to_its_end(tmp_path, monkeypatch):
    root = tmp_path / "tree"
    root.mkdir()
    monkeypatch.chdir(root)
    for number in range(30):
        Path("note.txt").write_text(f"note {number}")
        Path("d" * 200).mkdir()
        os.chdir("d" * 200)
    os.chdir(root)
    for path in (str(root), f"{root}/**/note.txt"):
        found = find_files(path, "path")
        assert max(len(str(file)) for file in found.files.values()) > os.pathconf("/", "PC_PATH_MAX")
        assert found.losses == {}
        texts = set()
        for path in found.files.values():
            with open_file(path) as file:
                texts.add(file.read().decode())
        assert texts == {f"note {number}" for number in range(30)}


# ---- links ---------------------------------------------------------------------------------------------


def test_links_back_into_the_tree_are_no_loops_and_no_losses(tmp_path):
    root = tree(tmp_path / "tree", "1.txt", "sub/2.txt")
    for name, target in (("a", "."), ("b", "."), ("sub/up", ".."), ("sub/above", "../..")):
        (root / name).symlink_to(target)
    for path in (root, root / "**", root / "**/*.txt", root / "**/**/*.txt"):
        found = find_files(str(path), "path")
        assert (set(found.files), found.losses) == ({"1.txt", "sub/2.txt"}, {})


def test_a_link_to_a_folder_elsewhere_is_a_loss_unless_the_pattern_names_its_level(tmp_path):
    root = tree(tmp_path / "tree", "a.txt", ".hidden/b.txt")
    tree(tmp_path / "other", "c.txt")
    (root / "out").symlink_to("../other")
    (root / "in").symlink_to(".hidden")
    loss = Loss("linked_folder", "links to other folders are not followed")
    for path in (root, root / "**/*.txt"):
        found = find_files(str(path), "path")
        assert (set(found.files), found.losses) == ({"a.txt"}, {"out": loss, "in": loss})
    assert find_files(str(root / "*/*.txt"), "path").files.keys() == {"out/c.txt", "in/b.txt"}
    assert find_files(str(root / "out"), "path").files.keys() == {"c.txt"}
    assert find_files(str(root / "out/*"), "path").files.keys() == {"c.txt"}


def test_pipes_hidden_files_and_devices_are_skipped_without_waiting_for_them(tmp_path):
    root = tree(tmp_path / "tree", "a.txt", ".b.txt", ".c/d.txt")
    os.mkfifo(root / "pipe.txt")
    (root / "zero.txt").symlink_to("/dev/zero")
    for path in (root, root / "*.txt"):
        found = find_files(str(path), "path")
        assert (set(found.files), found.losses) == ({"a.txt"}, {})
    assert find_files(str(root / ".*.txt"), "path").files.keys() == {".b.txt"}
    for special in (root / "pipe.txt", "/dev/null"):
        with pytest.raises(InputError, match="is neither a file nor a folder"):
            find_files(str(special), "path")


# ---- patterns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "*", "*.txt", "**", "**/*", "**/*.txt", "**/b/*.txt", "*/*", "a/**/*.txt", "a/*/**", "**/a/**/b/*",
        "**/?.md", "[ab]/*.txt", "*/b/2.txt", "**/.h/*", "a**/*.txt", "[!a]*", "**/**", "a/**/b/**/*.md",
    ],
)  # fmt: skip
def test_a_pattern_names_the_files_that_python_names(tmp_path, monkeypatch, pattern):
    tree(
        tmp_path,
        "1.txt", "a/1.txt", "a/b/2.txt", "a/b/3.md", "a/a/b/4.txt", "b/b/b/5.md", ".h/6.txt", "a/.h/7.txt", "b/c.md",
        "a/b/.8.txt", "ab/9.txt",
    )  # fmt: skip
    expected = {os.path.realpath(file) for file in glob.glob(f"{tmp_path}/{pattern}", recursive=True)}
    expected = {file for file in expected if os.path.isfile(file)}
    monkeypatch.chdir(tmp_path)
    for path in (f"{tmp_path}/{pattern}", pattern, f"./{pattern}"):
        if expected:
            assert {os.path.realpath(file) for file in find_files(path, "path").files.values()} == expected
        else:
            with pytest.raises(InputError, match="holds no files"):
                find_files(path, "path")


@pytest.mark.parametrize(
    "path", ["no\0where", "no\0where/*", "/nowhere/*.txt", "~nobody-at-all/x", "/n" * 3000, "x" * 300]
)
def test_a_path_that_cannot_be_is_an_input_error_of_one_line(path):
    with pytest.raises(InputError, match=r"^where: ") as error:
        find_files(path, "where")
    assert "\n" not in str(error.value)


def test_an_unknown_home_directory_is_an_input_error(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(InputError, match=r"^where: '~/notes': the home directory is unknown; set HOME"):
        find_files("~/notes", "where")

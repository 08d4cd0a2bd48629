"""Documents from installed packages: a made-up distribution, and the standard library itself."""

import ast
import inspect
import sys
import zlib
from pathlib import Path

import pytest

from gristmill.corpus.config import PERMISSIVE, SourceConfig
from gristmill.corpus.documents import Document, Dropped
from gristmill.corpus.packages import PackagesSource, docstrings, module_name

MODULE = '''"""A module that says at some length what it is for."""

import sys
import zlib

if sys.platform:
    class Wheel:
        """Turns when water falls on it, and stands when it does not."""

        def turn(self):
            """Turn once.

            Further lines keep their
                inner indentation.
            """

        def stop(self):
            """Too short."""
'''


METADATA = "Metadata-Version: 2.1\nName: Water_Mill\nVersion: 1.2\nLicense: MIT\n\nThe long description.\n"


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A site-packages folder with the distribution "Water_Mill" in it."""
    files = {
        "mill/__init__.py": MODULE,
        "mill/wheel.py": "x = 1\n",
        "mill/broken.py": "def (:\n",
        "mill/tests/helpers.py": "x = 2\n",
        "mill/test_wheel.py": "x = 3\n",
        "mill/_vendor/other.py": "x = 4\n",
        "mill/copied/code.py": "x = 5\n",
        "mill/copied/LICENSE.txt": "Somebody else's.",
        "mill/README.md": "# Mill\n\nHow to build one.",
        "mill/LICENSE": "All about rights.",
        "water_mill-1.2.dist-info/METADATA": METADATA,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    record = "".join(f"{name},sha256={zlib.crc32(text.encode())},{len(text)}\n" for name, text in files.items())
    (tmp_path / "water_mill-1.2.dist-info/RECORD").write_text(
        record + "../../../bin/mill,sha256=abc,10\nmill/gone.py,,\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def read(take: str, *packages: str, allowed: tuple[str, ...] = PERMISSIVE) -> tuple[list[Document], dict[str, str]]:
    source = PackagesSource("s", SourceConfig(packages=packages, take=take), allowed)
    advanced: list[float] = []
    items = list(source.documents(advanced.append))
    assert sum(advanced) == source.num_bytes()
    dropped = {item.id: item.reason for item in items if isinstance(item, Dropped)}
    return [item for item in items if isinstance(item, Document)], dropped


LEFT_OUT = {
    "water-mill/mill/tests/helpers.py": "test",
    "water-mill/mill/test_wheel.py": "test",
    "water-mill/mill/_vendor/other.py": "vendored",
    "water-mill/mill/copied/code.py": "vendored",
    "water-mill/mill/gone.py": "unreadable",
}


def test_code_is_the_modules_without_tests_and_copies_of_other_works(site):
    documents, dropped = read("code", "water-mill")
    assert {document.id for document in documents} == {
        f"water-mill/mill/{name}.py" for name in ("__init__", "wheel", "broken")
    }
    assert {(document.group, document.license) for document in documents} == {("water-mill", "MIT")}
    assert dropped == LEFT_OUT


def test_prose_is_docstrings_under_qualified_names_texts_and_the_description(site):
    documents, dropped = read("prose", "Water.Mill")
    found = {document.id.removeprefix("water-mill/"): document.data.decode() for document in documents}
    assert found == {
        "mill/__init__.py:docstrings": (
            "# mill\n\nA module that says at some length what it is for.\n\n"
            "# Wheel\n\nTurns when water falls on it, and stands when it does not.\n\n"
            "# Wheel.turn\n\nTurn once.\n\nFurther lines keep their\n    inner indentation.\n"
        ),
        "mill/README.md": "# Mill\n\nHow to build one.",
        "description": "The long description.",
    }
    assert dropped == LEFT_OUT | {"water-mill/mill/broken.py": "not_python"}


def test_a_license_that_is_not_allowed_drops_each_file_by_name(site):
    documents, dropped = read("prose", "water-mill", allowed=("ISC",))
    assert documents == []
    assert dropped["water-mill/mill/wheel.py"] == dropped["water-mill/mill/README.md"] == "license:MIT"


def test_the_fingerprint_follows_the_record_and_not_where_the_package_lies(site, tmp_path, monkeypatch):
    def now() -> str:
        return PackagesSource("s", SourceConfig(packages=("water-mill",), take="code"), PERMISSIVE).fingerprint()

    first = now()
    record = site / "water_mill-1.2.dist-info/RECORD"
    record.write_text(record.read_text().replace("bin/mill,sha256=abc", "bin/mill,sha256=def"))
    assert now() == first  # scripts name the environment's place
    record.write_text(record.read_text().replace("mill/wheel.py,sha256=", "mill/wheel.py,sha256=0"))
    assert now() != first


def test_the_standard_library_is_many_works_without_tests_and_without_site_packages():
    source = PackagesSource("s", SourceConfig(packages=("stdlib",), take="code"), PERMISSIVE)
    groups = {work.group for work in source.works}
    assert {"json", "asyncio", "textwrap"} <= groups
    assert groups <= sys.stdlib_module_names
    assert "site-packages" not in groups
    assert all("site-packages" not in name for work in source.works for name in work.files)
    assert {work.license for work in source.works} == {"Python-2.0"}


def test_docstrings_are_those_that_inspect_cleans():
    import textwrap

    source = Path(str(textwrap.__file__)).read_bytes()
    text = docstrings(source, "textwrap")
    assert f"# dedent\n\n{inspect.getdoc(textwrap.dedent)}".rstrip() in text
    documented = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
    ]
    assert text.count("\n# ") >= sum(len(ast.get_docstring(node)) >= 40 for node in documented)


def test_module_names():
    assert module_name("networkx/networkx/algorithms/__init__.py") == "networkx.algorithms"
    assert module_name("stdlib/textwrap.py") == "textwrap"

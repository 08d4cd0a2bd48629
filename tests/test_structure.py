"""The structure of the package's code: imports, sizes, and the page that describes it."""

import ast
import re
import runpy
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gristmill

ROOT = Path(gristmill.__file__).parent
DOCS = Path(__file__).parents[1] / "docs"
MAX_FILE_LINES, MAX_CLI_LINES, MAX_FUNCTION_LINES = 500, 200, 80


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, modules: set[str]) -> set[str]:
    """Return the package's modules that a file imports at module level, those for type checkers included."""
    found = set()
    for node in ast.walk(without_functions(file)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import; use absolute imports"
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else str(node.module) for name in named}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def without_functions(file: Path) -> ast.Module:
    """Parse a file and remove the bodies of its functions."""

    class Remover(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    tree = Remover().visit(ast.parse(file.read_text()))
    assert isinstance(tree, ast.Module)
    return tree


def check_cycles(root: Path) -> None:
    """Raise CycleError, which lists the modules of a cycle, if modules of a package import each other in a circle."""
    by_name = {module_name(file, root): file for file in sorted(root.rglob("*.py"))}
    graph = {name: imports(file, set(by_name)) - {name} for name, file in by_name.items()}
    TopologicalSorter(graph).prepare()


def test_no_module_imports_itself_through_others() -> None:
    check_cycles(ROOT)


def test_a_cycle_is_found_even_if_it_is_for_type_checkers(tmp_path: Path) -> None:
    package = tmp_path / "gristmill"
    package.mkdir()
    (package / "one.py").write_text("from gristmill import two\n")
    (package / "two.py").write_text("if True:\n    from gristmill.one import name\n")
    (package / "three.py").write_text(
        "def f():\n    from gristmill.three import f\n    from gristmill.one import name\n"
    )
    with pytest.raises(CycleError) as error:
        check_cycles(package)
    assert set(error.value.args[1]) == {"gristmill.one", "gristmill.two"}


def test_files_are_short() -> None:
    files = {file.relative_to(ROOT): len(file.read_text().splitlines()) for file in ROOT.rglob("*.py")}
    limit = {file: MAX_CLI_LINES if file.parts[0] == "cli" else MAX_FILE_LINES for file in files}
    assert not {str(file): lines for file, lines in files.items() if lines > limit[file]}


def test_functions_are_short() -> None:
    lines = {
        f"{file.relative_to(ROOT)} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for file in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES}


def test_the_page_on_the_architecture_names_existing_files_and_every_room() -> None:
    page = (DOCS / "architecture.md").read_text()
    assert len(page.splitlines()) <= 200
    root = DOCS.parent
    named = set(re.findall(r"`([a-z_/]+(?:\.py|/))`", page))
    assert len(named) > 50
    assert not {path for path in named if not any((folder / path).exists() for folder in (ROOT, root))}
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert {f"{room}/" for room in rooms} <= named


def test_the_picture_of_the_architecture_is_up_to_date() -> None:
    drawn = runpy.run_path(str(DOCS / "architecture.py"))["picture"]()
    assert (DOCS / "architecture.svg").read_text() == drawn, "run `python docs/architecture.py`"

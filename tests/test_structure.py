"""The structure of the package's code: what imports what."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gristmill

ROOT = Path(gristmill.__file__).parent


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

"""No module is changed from outside by replacing its method: the model's seams are attributes and arguments."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gristmill

ROOT = Path(gristmill.__file__).parent


def assignments_to_forward(source: str) -> Iterator[int]:
    """The lines that set or delete an object's `forward`: by name, by `setattr`, or in its dictionary."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr="forward", ctx=ast.Store() | ast.Del()):
                yield node.lineno
            case ast.Subscript(slice=ast.Constant(value="forward"), ctx=ast.Store() | ast.Del()):
                yield node.lineno
            case ast.Call(func=ast.Name(id="setattr" | "delattr"), args=[_, ast.Constant(value="forward"), *_]):
                yield node.lineno


@pytest.mark.parametrize(
    "source",
    [
        "module.forward = other",
        "a.b.forward: object = other",
        "module.x, module.forward = 1, other",
        "setattr(module, 'forward', other)",
        "vars(module)['forward'] = other",
        "module.__dict__['forward'] = other",
        "del module.forward",
    ],
)
def test_each_way_to_assign_to_forward_is_found(source: str) -> None:
    assert list(assignments_to_forward(source)) == [1]


def test_nobody_assigns_to_forward() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted(ROOT.rglob("*.py"))
        for line in assignments_to_forward(file.read_text())
    ]
    assert not found

import ast
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.evaluate.samples import _functions, cut_function, parses

MODULE = '''
import os

def plain(a, b):
    c = a + b
    return c

def documented(
    a: int,
) -> int:
    """Says

    what it does.
    """
    # a comment
    return a

def only_docstring():
    """Nothing more."""

def one_line(): return 1

class Box:
    @property
    def inside(self):
        """Méthode."""
        @staticmethod
        def nested():
            return 2
        return nested()

    async def wait(self):
        await self.inside

def text():
    return """
at the margin
"""
'''


def test_heads_are_signature_and_docstring_at_the_margin_and_the_rest_completes_them() -> None:
    found = {
        ast.parse(head + body).body[0].name: (documented, head, body) for documented, head, body in _functions(MODULE)
    }
    assert set(found) == {"plain", "documented", "inside", "nested", "wait", "text"}
    assert found["plain"] == (False, "def plain(a, b):\n", "    c = a + b\n    return c\n")
    assert found["documented"][0]
    assert found["documented"][1].endswith('    what it does.\n    """\n    # a comment\n')
    assert found["inside"][1] == 'def inside(self):\n    """Méthode."""\n'
    for _, head, body in found.values():
        assert parses(head, body)
        assert head.startswith(("def ", "async def "))


@pytest.mark.parametrize("text", ["def broken(:\n    x\n", "\0", "(" * 5000, "# only words", ""])
def test_text_that_is_not_python_has_no_functions(text: str) -> None:
    assert list(_functions(text)) == []


def test_a_completion_is_cut_where_the_function_ends() -> None:
    assert cut_function("    return 1\n\ndef next():\n    pa", ended=False) == "    return 1\n\n"
    assert cut_function("    return 1\n    x = (", ended=False) == "    return 1\n"
    assert cut_function("    return 1", ended=True) == "    return 1"
    assert cut_function("", ended=True) == ""


def test_only_one_function_with_a_statement_counts_as_parsing() -> None:
    head = 'def f(x):\n    """Double x."""\n'
    assert parses(head, "    return 2 * x\n")
    assert not parses(head, "")
    assert not parses(head, "    return (2 * x\n")
    assert not parses(head, "return 2 * x\n")
    assert not parses(head, "    return 1\nprint(2)\n")
    assert parses("def f(x):\n", "    return '\\d'\n")  # an invalid escape warns, and is still Python


@given(st.text(alphabet="ab(=:\n \t'\"#\\", max_size=40))
def test_no_completion_makes_the_judge_fail(body: str) -> None:
    parses("def f(x):\n", cut_function(body, ended=False))


def test_nothing_is_executed(tmp_path) -> None:  # type: ignore[no-untyped-def]
    trap = tmp_path / "trap"
    body = textwrap.indent(f"open({str(trap)!r}, 'w').close()\n", "    ")
    assert parses("def f(x=1):\n", body)
    assert not trap.exists()


@pytest.mark.parametrize("odd", ["\x0c", "\x0b", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_heads_and_cuts_follow_the_lines_of_python_whatever_else_the_text_holds(odd: str) -> None:
    source = f'''note = """one{odd}two{odd}three"""
{odd if odd == chr(12) else ""}
def first(a):
    """Says {odd} this."""
    return "{odd}" + a
'''
    (_, head, body), *rest = _functions(source)
    assert not rest
    assert head == f'def first(a):\n    """Says {odd} this."""\n'
    assert body == f'    return "{odd}" + a\n'
    completion = f'    x = "{odd}a"\n    return x\n'
    assert cut_function(f"{completion}def next():\n    pass\n", ended=True) == completion
    assert cut_function(f"{completion}\x0cdef next():\n", ended=True) == completion

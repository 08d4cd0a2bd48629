"""License expressions and what packages declare."""

from email.message import Message
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.corpus import licenses

NAMES = ("MIT", "Apache-2.0", "GPL-3.0", "MPL-2.0")


def expressions() -> st.SearchStrategy[tuple[str, object]]:
    """An expression as SPDX writes it, and as a tree for the independent evaluation."""
    leaves = st.sampled_from(NAMES).map(lambda name: (name, name))
    return st.recursive(
        leaves,
        lambda inner: st.tuples(inner, st.sampled_from(("AND", "OR")), inner).map(
            lambda parts: (f"({parts[0][0]}) {parts[1]} ({parts[2][0]})", (parts[1], parts[0][1], parts[2][1]))
        ),
        max_leaves=6,
    )


def holds(tree: object, allowed: set[str]) -> bool:
    match tree:
        case ("AND", left, right):
            return holds(left, allowed) and holds(right, allowed)
        case ("OR", left, right):
            return holds(left, allowed) or holds(right, allowed)
        case _:
            return tree in allowed


@given(expressions(), st.sets(st.sampled_from(NAMES)))
def test_an_expression_is_allowed_exactly_when_its_truth_table_says_so(expression, allowed):
    text, tree = expression
    assert licenses.is_allowed(text, allowed) == holds(tree, allowed)


def test_and_binds_tighter_than_or():
    for a, b, c in product((True, False), repeat=3):
        allowed = [name for name, on in zip(("A-1", "B-1", "C-1"), (a, b, c), strict=True) if on]
        assert licenses.is_allowed("A-1 OR B-1 AND C-1", allowed) == (a or (b and c))


def test_an_exception_only_adds_permissions():
    assert licenses.is_allowed("Apache-2.0 WITH LLVM-exception AND mit", ["apache-2.0", "MIT"])
    assert not licenses.is_allowed("GPL-2.0 WITH Classpath-exception-2.0", ["MIT", "Classpath-exception-2.0"])


@pytest.mark.parametrize(
    "broken", ["", "MIT OR", "AND MIT", "(MIT", "MIT)", "MIT Apache-2.0", "see LICENSE file", "()"]
)
def test_what_is_not_an_expression_is_never_allowed(broken):
    assert not licenses.is_expression(broken)
    assert not licenses.is_allowed(broken, ["MIT", "Apache-2.0", "see", "LICENSE", "file"])


def declared(**fields: str | list[str]) -> str:
    message = Message()
    for name, values in fields.items():
        for value in values if isinstance(values, list) else [values]:
            message[name.replace("_", "-")] = value
    return licenses.of_package(message, lambda: [])


BSD = "License :: OSI Approved :: BSD License"
MIT_TEXT = "Copyright (c) 2022 Somebody\n\nPermission is hereby granted, free of charge, to any person obtaining a copy"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"License_Expression": "MIT OR GPL-3.0", "License": "BSD"}, "MIT OR GPL-3.0"),
        ({"License": "Apache 2.0 License"}, "Apache-2.0"),
        ({"License": "3-Clause BSD License"}, "BSD-3-Clause"),
        ({"License": "MPL-2.0 AND MIT"}, "MPL-2.0 AND MIT"),
        ({"License": MIT_TEXT}, "MIT"),
        ({"License": "see LICENSE", "Classifier": "License :: OSI Approved :: ISC License (ISCL)"}, "ISC"),
        ({"Classifier": ["License :: OSI Approved", "License :: OSI Approved :: MIT License"]}, "MIT"),
        ({"Classifier": ["License :: OSI Approved :: MIT License", "License :: OSI Approved :: GNU GPL"]}, "unknown"),
        ({"Classifier": BSD}, "unknown"),  # which of them? no file says
        ({"License": "GPL", "Classifier": []}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_metadata_becomes_spdx(fields, expected):
    assert declared(**fields) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Redistribution and use in source and binary forms ...\n Neither the name of the authors ...", "BSD-3-Clause"),
        ("Redistribution and use in source\nand binary forms, with or without modification", "BSD-2-Clause"),
        ("All rights reserved.", "unknown"),
    ],
)
def test_the_license_file_says_which_bsd(text, expected):
    message = Message()
    message["Classifier"] = BSD
    assert licenses.of_package(message, lambda: [text]) == expected

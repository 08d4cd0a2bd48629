"""Each sampling parameter of the table is in every place that needs it; a missing place is named."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from documented import ROOT, find_command

from gristmill.inference.parameters import Bounds, Parameter
from gristmill.inference.sampler import PARAMETERS, Sampling
from gristmill.inference.settings import API_DEFAULTS, GENERATE_DEFAULTS, NOT_APPLIED, Published
from gristmill.serve.page import form_fields
from gristmill.serve.schema import ChatBody, CompletionBody, parse


def in_generate(name: str, parameter: Parameter) -> list[str]:
    """What the command `generate` lacks of a parameter."""
    place = "src/gristmill/cli/inference.py: `generate`"
    option = next((found for found in find_command(["generate"])[0].params if found.name == name), None)
    if not parameter.in_generate:
        return [] if option is None else [f"{place} has --{name}, and the table says in_generate=False"]
    if option is None:
        return [f"{place} has no option for {name}"]
    default = f"{parameter.generate_default:g}"
    wanted = f"{parameter.help} [default: as published, else {default}]" if parameter.is_published else parameter.help
    found = [] if option.help == wanted else [f"{place}: the help of {name} is {option.help!r}, not {wanted!r}"]
    if option.default != (None if parameter.is_published else parameter.generate_default):
        found.append(f"{place}: the default of {name} is {option.default}")
    return found


def missing_places(parameters: dict[str, Parameter]) -> list[str]:
    """Where the package and its documentation lack a parameter, or say something else about it."""
    missing = []
    documented = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", serving_page(), re.MULTILINE)))
    form = form_fields()
    for name, parameter in parameters.items():
        missing += in_generate(name, parameter)
        missing += [f"serve/schema.py: {kind.__name__} lacks {name}" for kind in (CompletionBody, ChatBody)
                    if name not in kind.model_fields]  # fmt: skip
        missing += [] if f'id="{name}"' in form else [f"serve/page.py: the form lacks {name}"]
        missing += [] if name in documented else [f"docs/serving.md: the table of parameters lacks {name}"]
        missing += [f"inference/settings.py: NOT_APPLIED has {name}"] if name in NOT_APPLIED else []
    return missing


def serving_page() -> str:
    return (ROOT / "docs" / "serving.md").read_text()


def test_every_parameter_is_in_every_place() -> None:
    assert missing_places(PARAMETERS) == []


def test_a_missing_place_is_named() -> None:
    new = Parameter(help="Penalize degeneration.", default=0.0, bounds=Bounds(low=0, high=1), is_published=True)
    found = "\n".join(missing_places({"penalty_alpha": new}))
    for place in ("cli/inference.py", "CompletionBody", "ChatBody", "page.py", "docs/serving.md", "NOT_APPLIED"):
        assert place in found
    other = missing_places({"top_p": replace(PARAMETERS["top_p"], help="Other.")})
    assert len(other) == 1
    assert "the help of top_p" in other[0]


def test_every_number_of_sampling_is_in_the_table() -> None:
    assert set(vars(Sampling())) - set(PARAMETERS) == {"logit_bias"}


def edges(bounds: Bounds) -> list[tuple[Any, bool]]:
    """Values at and beyond the bounds, and whether they are allowed."""
    far = bounds.high if bounds.high < 2**62 else None
    return [
        (bounds.low, not bounds.excludes_low),
        (bounds.low - 1, False),
        *([] if far is None else [(far, True), (far + 1, False)]),
    ]


@pytest.mark.parametrize("name", sorted(set(PARAMETERS) - {"seed"}))
def test_the_schema_has_the_bounds_of_the_table(name: str) -> None:
    parameter = PARAMETERS[name]
    for kind, body in ((CompletionBody, '"prompt": "a"'), (ChatBody, '"messages": [{"role": "user", "content": "a"}]')):
        for value, is_allowed in edges(parameter.api_bounds):
            given = f'{{"model": "tiny", {body}, "{name}": {value}}}'.encode()
            if is_allowed:
                assert getattr(parse(kind, given), name) == value
            else:
                with pytest.raises(Exception, match=name):
                    parse(kind, given)


def test_a_request_precedes_the_model_and_the_model_precedes_the_default() -> None:
    published = Published(values={"temperature": 0.5, "top_k": 9})
    for defaults, top_p in ((GENERATE_DEFAULTS, 0.95), (API_DEFAULTS | {"seed": 0}, 1.0)):
        chosen = published.sampling({"temperature": 0.25, "min_p": None}, defaults)
        assert chosen == Sampling(temperature=0.25, top_k=9, top_p=top_p)


def test_the_page_in_the_package_has_a_place_for_the_form() -> None:
    import gristmill.serve.page as page

    assert "<!-- sampling parameters -->" in (Path(page.WEB) / "index.html").read_text()

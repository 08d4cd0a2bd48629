"""Reads what a published chat template says, without running it: a template is somebody else's program."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import nodes

# The names that published templates give to the text of the system turn.
VARIABLES = ("system_message", "default_system_message", "system_prompt", "default_system_prompt")


def published_system_prompt(template: str) -> str | None:
    """The system prompt that a Jinja chat template falls back to, or None if it has none or cannot be parsed.

    It is the first text that the template assigns to one of `VARIABLES`; blanks around it are dropped, as DBRX's
    template does. The template is parsed and looked through, never rendered.
    """
    import jinja2
    from jinja2 import nodes

    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        assignments = list(tree.find_all(nodes.Assign))
    except (jinja2.TemplateError, RecursionError):
        return None
    for assignment in assignments:
        target = assignment.target
        if isinstance(target, nodes.Name | nodes.NSRef):
            name = target.name if isinstance(target, nodes.Name) else target.attr
            text = _text(assignment.node) if name in VARIABLES else None
            if text is not None and text.strip():
                return text.strip()
    return None


def writes_bos(template: str) -> bool:
    """Whether a Jinja chat template writes `bos_token`, which those that name it do before the first turn.

    The template is parsed, never rendered.
    """
    if "bos_token" not in template:
        return False
    import jinja2
    from jinja2 import nodes

    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        return any(name.name == "bos_token" for name in tree.find_all(nodes.Name))
    except (jinja2.TemplateError, RecursionError):
        return False


def _text(node: "nodes.Node") -> str | None:
    """The text of an expression that is a string, or strings joined by `+` or `~`."""
    from jinja2 import nodes

    match node:
        case nodes.Const(value=str(text)):
            return text
        case nodes.Add(left=left, right=right):
            pieces = [left, right]
        case nodes.Concat(nodes=several):
            pieces = list(several)
        case _:
            return None
    texts = [_text(piece) for piece in pieces]
    return None if None in texts else "".join(text for text in texts if text is not None)

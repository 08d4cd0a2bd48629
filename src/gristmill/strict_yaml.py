"""Reads and writes YAML by the core schema of version 1.2, where `no` is text and `0100` is one hundred.

PyYAML parses the syntax, but by itself it follows version 1.1: octal and sexagesimal numbers, `yes` and `off` as
booleans, dates, and the last of two equal keys wins in silence.
"""

import re
from typing import Any

import yaml

MAX_VALUES = 100_000  # of one text; aliases of aliases would otherwise multiply without end
TAG = "tag:yaml.org,2002:"
PLAIN = {  # core schema, https://yaml.org/spec/1.2.2/#1032-tag-resolution
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML folds the line breaks of version 1.1 into spaces unless double quotes let it escape them.
        style = '"' if any(character in data for character in "\x85\u2028\u2029") else None
        return self.represent_scalar(TAG + "str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


for _kind, _pattern in PLAIN.items():
    _Loader.add_implicit_resolver(TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), None)
    _Dumper.add_implicit_resolver(TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), None)


def load_yaml(text: str) -> Any:
    """Parse one document into None, bool, int, float, str, list and dict.

    Raises:
        ValueError: invalid YAML, a key that appears twice, an integer of more than 64 bits, a tag outside of the core
            schema, a merge key or a second document. The message is one line and names the line of the text.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _Builder().value(node)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(where + ", ".join(part for part in (problem.context, problem.problem) if part)) from None
    except yaml.YAMLError as problem:  # characters that YAML does not allow
        raise ValueError(" ".join(str(problem).split())) from None
    except OverflowError:  # "\UFFFFFFFF"
        raise ValueError("an escape names a character that does not exist") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dump_yaml(value: Any) -> str:
    """Write a value so that `load_yaml` gives it back; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


class _Builder:
    """Turns the nodes of one text into values."""

    def __init__(self) -> None:
        self.num_values = 0

    def value(self, node: yaml.Node) -> Any:
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values, counting each use of an alias")
        kind = node.tag.removeprefix(TAG)
        match node:
            case yaml.MappingNode() if kind == "map":
                return self._mapping(node)
            case yaml.SequenceNode() if kind == "seq":
                return [self.value(item) for item in node.value]
            case yaml.ScalarNode() if kind == "str":
                if any("\ud800" <= character <= "\udfff" for character in node.value):
                    raise ValueError(f"line {_line(node)}: text must not hold half of a surrogate pair")
                return node.value
            case yaml.ScalarNode() if kind in PLAIN and re.fullmatch(PLAIN[kind], node.value):
                return _scalar(kind, node)
        raise ValueError(
            f"line {_line(node)}: the tag {node.tag} does not fit here; write plain text, numbers, lists and mappings"
        )

    def _mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            line = _line(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"line {line}: a key must be text or a number, not a list or a mapping")
            if key_node.value == "<<" and key_node.style is None:
                raise ValueError(f"line {line}: merge keys (<<) are not supported; write the keys out, or use `base:`")
            key = self.value(key_node)
            if key in lines:
                raise ValueError(
                    f"the key {key!r:.80} appears twice, in lines {lines[key]} and {line}; join the two or remove one"
                )
            mapping[key], lines[key] = self.value(value_node), line
        return mapping


def _scalar(kind: str, node: yaml.ScalarNode) -> Any:
    text = node.value
    match kind:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "float":
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    digits, base = (text[2:], {"0o": 8, "0x": 16}[text[:2]]) if text[:2] in ("0o", "0x") else (text, 10)
    number = int(digits, base) if len(digits) < 1000 else None
    if number is None or not -(2**63) <= number < 2**63:
        raise ValueError(f"line {_line(node)}: {text:.40} is too large: an integer must fit in 64 bits")
    return number


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1

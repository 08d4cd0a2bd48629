"""Rewrites JSON schemas as their generators write them into those that llguidance knows. Pure.

What the specification says changes nothing is dropped: unknown formats, `uniqueItems: false`, `then` without `if`. Some
keywords are rewritten: `propertyNames`, `oneOf` whose branches exclude each other. A branch of `anyOf` that cannot be
kept to is left out while another remains, as each text of the others is valid too. All else is refused by name:
nothing is ignored that would let an invalid text through.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from gristmill.errors import InputError

Json = dict[str, Any]

MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
SINGLE = (
    *("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then", "else"),
    *("unevaluatedItems", "unevaluatedProperties"),
)
DEFINITIONS = ("$defs", "definitions")
# That llguidance keeps to. For the specification any other is an annotation.
FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"}
# All others are annotations. llguidance takes them for a part of a schema, and refuses a circular reference beside one.
KEYWORDS = {
    *MAPS, *LISTS, *SINGLE, "type", "enum", "const", "required", "format", "pattern", "minLength", "maxLength",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "uniqueItems",
    "minContains", "maxContains", "minProperties", "maxProperties", "dependentRequired", "dependencies", "id",
}  # fmt: skip
# Keyword: what to write instead.
REFUSED = {
    "not": "list what is allowed, with enum or anyOf",
    "if": "write the cases as anyOf",
    "contains": "describe all elements with items",
    "dependentRequired": "list the keys in required",
    "dependentSchemas": "write the cases as anyOf",
    "dependencies": "write the cases as anyOf",
    "unevaluatedItems": "use items",
    "unevaluatedProperties": "use additionalProperties",
}
# Keywords that say nothing without another one.
NEEDS = {"then": "if", "else": "if", "minContains": "contains", "maxContains": "contains"}
ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "$comment", "format"}
ROUNDS = 8  # in which definitions are found that use others which cannot be kept to


class Inexpressible(InputError):
    """A keyword that cannot be kept to, where it is, and the fix."""

    def __init__(self, keyword: str, where: str, fix: str) -> None:
        super().__init__(f"schema has {keyword} at {where}, which is not supported: {fix}")


def subschemas(schema: Any) -> Iterator[Json]:
    """A schema and all schemas in it, but not the values of const, enum, default and examples."""
    if not isinstance(schema, dict):
        return
    yield schema
    for _, below in _parts(schema):
        yield from subschemas(below)


def prepared(schema: Json) -> Json:
    """The same schema in llguidance's words, or a narrower one. Raises InputError for what cannot be kept to."""
    return _Rewriting(schema).run()


class _Rewriting:
    def __init__(self, root: Json) -> None:
        self.root = root
        self.bad: dict[str, Inexpressible] = {}  # references to definitions that cannot be kept to
        # Less in a part must be less in the whole; and a reference must not point into what is rewritten.
        self.can_narrow = all(
            not {"not", "if"} & one.keys() and self._is_plain(one.get("$ref")) and self._excludes(one.get("oneOf"))
            for one in subschemas(root)
        )

    def run(self) -> Json:
        for _ in range(ROUNDS):
            known = len(self.bad)
            for key in DEFINITIONS:
                for name, schema in _mapping(self.root.get(key)).items():
                    try:
                        self._schema(schema, f"#/{key}/{name}")
                    except Inexpressible as problem:
                        self.bad[f"#/{key}/{name}"] = problem
            if len(self.bad) == known:
                break
        made = self._schema({k: v for k, v in self.root.items() if k not in DEFINITIONS}, "#")
        for key in DEFINITIONS:
            if key in self.root:
                definitions = _mapping(self.root[key]).items()
                kept = {n: s for n, s in definitions if f"#/{key}/{n}" not in self.bad}
                made[key] = {name: self._schema(s, f"#/{key}/{name}") for name, s in kept.items()}
        return dict(made)

    def _schema(self, schema: Any, where: str) -> Any:
        if not isinstance(schema, dict):
            return schema
        if (problem := self.bad.get(str(schema.get("$ref")))) is not None:
            raise problem
        made = {key: value for key, value in schema.items() if not self._says_nothing(schema, key, value)}
        for keyword in REFUSED.keys() & made.keys():
            raise Inexpressible(keyword, where, REFUSED[keyword])
        if "uniqueItems" in made:
            fix = "leave it out and remove repeated elements yourself, or set maxItems to 1"
            raise Inexpressible("uniqueItems", where, fix)
        if isinstance(made.get("pattern"), str):
            _check_pattern(made["pattern"], f"{where}/pattern")
        for name in _mapping(made.get("patternProperties")):
            _check_pattern(name, f"{where}/patternProperties")
        if "propertyNames" in made:
            made = self._named(made, where)
        if self.can_narrow and "oneOf" in made and "anyOf" not in made and self._excludes(made["oneOf"]):
            made = {"anyOf" if key == "oneOf" else key: value for key, value in made.items()}
        if isinstance(branches := made.get("anyOf"), list):
            made["anyOf"] = self._branches(branches, where)
        for key, value in made.items():
            if key in MAPS and isinstance(value, dict):
                made[key] = {name: self._schema(s, f"{where}/{key}/{name}") for name, s in value.items()}
            elif key in LISTS and key != "anyOf" and isinstance(value, list):
                made[key] = [self._schema(s, f"{where}/{key}/{n}") for n, s in enumerate(value)]
            elif key in SINGLE:
                made[key] = self._schema(value, f"{where}/{key}")
        return made

    def _says_nothing(self, schema: Json, key: str, value: Any) -> bool:
        if key not in KEYWORDS and not key.startswith("$") and self.can_narrow:
            return True
        types = schema.get("type")
        match key:
            case "format":
                return isinstance(value, str) and value not in FORMATS
            case "uniqueItems":
                return value is False or not _may_be("array", types) or _number(schema.get("maxItems"), 2) <= 1
            case "contains" if schema.get("minContains") == 0 and "maxContains" not in schema:
                return True
            case "contains" | "unevaluatedItems" if not _may_be("array", types):
                return True
            case "propertyNames" | "unevaluatedProperties" if not _may_be("object", types):
                return True
            case "unevaluatedItems" | "unevaluatedProperties":
                return value is True or value == {}
            case "if":
                return "then" not in schema and "else" not in schema
            case "dependentRequired" | "dependentSchemas" | "dependencies":
                return value == {} or not _may_be("object", types)
            case "pattern":
                return not _may_be("string", types)
        return key in NEEDS and (NEEDS[key] not in schema or self._says_nothing(schema, NEEDS[key], schema[NEEDS[key]]))

    def _branches(self, branches: list[Any], where: str) -> list[Any]:
        """Those that can be kept to."""
        kept, problems = [], []
        for number, branch in enumerate(branches):
            try:
                kept.append(self._schema(branch, f"{where}/anyOf/{number}"))
            except Inexpressible as problem:
                problems.append(problem)
        if problems and (not kept or not self.can_narrow):
            raise problems[0]
        return kept

    def _named(self, schema: Json, where: str) -> Json:
        """`propertyNames` as `properties` or `patternProperties`, which say the same of an object without either."""
        rest = {key: value for key, value in schema.items() if key != "propertyNames"}
        names, values = self._resolved(schema["propertyNames"]), schema.get("additionalProperties", {})
        if isinstance(names, dict):
            names = {k: v for k, v in names.items() if k not in ANNOTATIONS and (k, v) != ("type", "string")}
        if names is True or names == {}:
            return rest
        problem = Inexpressible("propertyNames", where, "use a pattern, an enum or lengths in it, and no properties")
        if schema.get("properties") or schema.get("patternProperties") or not isinstance(names, dict):
            raise problem
        listed = _values(names)
        if listed is not None and names.keys() <= {"enum", "const"}:
            known = {name: values for name in listed if isinstance(name, str)}
            return rest | {"properties": known, "additionalProperties": False}
        if names.keys() <= {"minLength", "maxLength"}:
            pattern = f"^[\\s\\S]{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
        elif names.keys() == {"pattern"} and isinstance(names["pattern"], str):
            pattern = names["pattern"]
            _check_pattern(pattern, f"{where}/propertyNames/pattern")
        else:
            raise problem
        return rest | {"patternProperties": {pattern: values}, "additionalProperties": False}

    def _resolved(self, schema: Any) -> Any:
        """What a schema that is a reference to a definition alone refers to."""
        for _ in range(ROUNDS):
            if not (isinstance(schema, dict) and schema.keys() - ANNOTATIONS == {"$ref"}):
                break
            if not self._is_plain(schema["$ref"]) or schema["$ref"] == "#":
                break
            _, key, name = schema["$ref"].split("/")
            schema = _mapping(self.root.get(key)).get(name)
        return schema

    def _is_plain(self, reference: Any) -> bool:
        """Whether it is none, or to the whole schema or one of its definitions."""
        parts = str(reference).split("/")
        return reference in (None, "#") or (len(parts) == 3 and parts[0] == "#" and parts[1] in DEFINITIONS)

    def _excludes(self, branches: Any) -> bool:
        """Whether no value is valid for two of these branches: then oneOf is anyOf. True of none."""
        schemas = [self._resolved(branch) for branch in branches] if isinstance(branches, list) else []
        return all(_are_disjoint(a, b) for a, b in itertools.combinations(schemas, 2))


def _are_disjoint(a: Any, b: Any) -> bool:
    """Whether clearly no value is valid for both: by types, by listed values, or by those of a required key."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return False
    types = [_types(one.get("type")) for one in (a, b)]
    if all(types) and not types[0] & types[1]:
        return True
    mine, theirs = _values(a), _values(b)
    if mine is not None and theirs is not None and _differ(mine, theirs):
        return True
    if not types[0] == types[1] == {"object"}:
        return False
    required = [set(map(str, one["required"])) if isinstance(one.get("required"), list) else set() for one in (a, b)]
    for key in required[0] & required[1]:
        found = [_values(_mapping(one.get("properties")).get(key)) for one in (a, b)]
        if found[0] is not None and found[1] is not None and _differ(found[0], found[1]):
            return True
    return False


def _differ(a: list[Any], b: list[Any]) -> bool:
    """Of texts only: equality of numbers is another matter."""
    return all(isinstance(one, str) for one in (*a, *b)) and not set(a) & set(b)


def _values(schema: Any) -> list[Any] | None:
    """The only values that are valid, where they are listed."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _types(given: Any) -> set[str]:
    """Empty where any type may be; an integer is a number."""
    names = {given} if isinstance(given, str) else {str(name) for name in given} if isinstance(given, list) else set()
    return names | {"integer"} if "number" in names else names


def _may_be(name: str, types: Any) -> bool:
    known = _types(types)
    return not known or name in known


def _check_pattern(pattern: str, where: str) -> None:
    """Raises Inexpressible for what no finite automaton can match. All else is llguidance's to judge."""
    in_class, at = False, 0
    while at < len(pattern):
        if pattern[at] == "\\":
            if not in_class and pattern[at + 1 : at + 2] in tuple("123456789k"):
                raise Inexpressible("a back-reference", where, f"write {pattern!r:.80} without it")
            if not in_class and pattern[at + 1 : at + 2] in ("b", "B"):
                raise Inexpressible("a word boundary (look-around)", where, f"write {pattern!r:.80} without it")
            at += 1
        elif in_class:
            in_class = pattern[at] != "]"
        elif pattern[at] == "[":
            in_class = True
        elif pattern.startswith(("(?=", "(?!", "(?<=", "(?<!"), at):
            raise Inexpressible("look-around", where, f"write {pattern!r:.80} without (?=, (?!, (?<= and (?<!")
        at += 1


def _parts(schema: Json) -> Iterator[tuple[str, Any]]:
    """The schemas directly in a schema, each with its keyword."""
    for key, value in schema.items():
        if key in MAPS and isinstance(value, dict):
            yield from ((key, below) for below in value.values())
        elif key in LISTS and isinstance(value, list):
            yield from ((key, below) for below in value)
        elif key in SINGLE:
            yield key, value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any, default: float) -> float:
    return value if isinstance(value, int | float) else default

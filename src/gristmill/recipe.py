"""Turns recipes, which are YAML files, into the stages' frozen configuration classes. Unknown keys are errors.

A recipe may name one parent (`base: quickstart`), a shipped recipe or a file. `--set a.b=c` changes one key; the value
is YAML. A section's keys are merged into the parent's; the value of a key (a list, the table of sources) is replaced.
Relative paths in a recipe file start from the file's folder, relative paths in `--set` from the working directory.
"""

import difflib
import glob
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass, replace
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gristmill.corpus.config import CorpusConfig
from gristmill.errors import InputError
from gristmill.evaluate.config import EvaluateConfig
from gristmill.home import expand
from gristmill.hub.folder import open_model
from gristmill.inference.load import find_model
from gristmill.inference.sampler import Sampling
from gristmill.model import ModelConfig
from gristmill.pipeline import STAGES
from gristmill.stage import Recipe, Stage, plain
from gristmill.streaming.order import Order
from gristmill.strict_yaml import dump_yaml, load_yaml
from gristmill.tokenizer import TokenizerConfig
from gristmill.train.balance import check_balance
from gristmill.train.config import TrainConfig
from gristmill.train.curriculum import curriculum_of

CHANGEABLE = ("max_seq_len", "rope_theta", "clip_qkv", "moe_loss_weight", "moe_jitter_eps")  # of a model to go on from
VOCAB_MULTIPLE = 128  # a round number of columns for the output matrix
MAX_FLOAT = 3e38  # kernels compute in fp32


def schema(stages: Sequence[Stage[Any]] = STAGES) -> type:
    """A dataclass with every key that a recipe may have: its name, its start, and the sections of the stages."""
    keys: list[Any] = [("name", str), ("start", str | None, field(default=None))]
    for stage in stages:
        for name, cls in stage.sections.items():
            keys.append((name, cls) if _required(cls) else (name, cls, field(default_factory=cls)))
    return make_dataclass("RecipeKeys", keys, frozen=True, kw_only=True)


def _required(cls: Any) -> list[str]:
    """The keys of a configuration class that have no default."""
    return [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The part of a recipe that says how large its model is. It needs no text and no steps: `dbrx-9b` is only this."""

    name: str
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig | None = None

    @property
    def context(self) -> int:
        """Tokens of a sequence: as trained, or else as many as the model takes."""
        return self.train.seq_len if self.train else self.model.max_seq_len


def load_recipe(name: str, overrides: Sequence[str] = (), stages: Sequence[Stage[Any]] = STAGES) -> Recipe:
    """Read a shipped recipe or a file, apply `a.b=c` overrides, and derive the settings that follow from others.

    Raises InputError that names the key's path, what was given, the rule and the nearest valid name.
    """
    keys = schema(stages)
    tree = _tree(name, overrides, keys)
    if missing := [section for section in _required(keys) if section != "name" and section not in tree]:
        start = f"write a recipe that begins with `base: {name}` and adds" if name in shipped_recipes() else "add"
        raise InputError(
            f"recipe {name} has no {' and no '.join(missing)} section: it can be counted, not run; {start} "
            f"{' and '.join(missing)}, as `gristmill recipe quickstart` shows"
        )
    valid = _validated(keys, tree)
    sections = {f.name: getattr(valid, f.name) for f in fields(keys) if f.name not in ("name", "start")}
    return _resolve(Recipe(name=valid.name, start=valid.start, sections=sections))


def load_shape(name: str, overrides: Sequence[str] = ()) -> Shape:
    """The same for the part that `count` needs, from any recipe, even one without a corpus."""
    tree = _tree(name, overrides, schema())
    shape = _validated(Shape, {key: tree[key] for key in typing.get_type_hints(Shape) if key in tree})
    return replace(shape, model=_with_vocabulary(shape.model, shape.tokenizer))


def _tree(name: str, overrides: Sequence[str], keys: type) -> dict[str, Any]:
    changes = [_parsed(override) for override in overrides]
    tree = _inherited(_read(name, keys), dict(changes))
    for path, value in changes:
        tree = _with(tree, path.split("."), value, path)
    _check(keys, tree, "")
    if tree.get("start"):
        return _from_start(tree)
    if isinstance(tree.get("tokenizer"), dict) and tree["tokenizer"].get("kind") == "start":
        raise InputError("tokenizer.kind=start: there is no model to take it from; set start, or another kind")
    return tree


def _validated(cls: Any, tree: dict[str, Any]) -> Any:
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        raise InputError(_explain(error)) from None


def shipped_recipes() -> list[str]:
    folder = resources.files("gristmill.recipes")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def to_yaml(recipe: Recipe) -> str:
    return dump_yaml(recipe.to_dict())


# ---- reading -------------------------------------------------------------------------------------------


def _read(name: str, keys: type, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    file = expand(name)
    is_file = file.suffix in (".yaml", ".yml")
    if is_file:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as problem:
            raise InputError(f"recipe {name} is not UTF-8 ({problem.reason} at byte {problem.start})") from None
        except (OSError, ValueError) as problem:  # ValueError: a null character
            raise InputError(f"recipe {name} cannot be read: {getattr(problem, 'strerror', problem)}") from None
    elif name in shipped_recipes():
        text = resources.files("gristmill.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise InputError(
            f"no recipe named {name!r}; {_nearest(name, shipped_recipes())}, or give a path that ends in .yaml"
        )
    try:
        tree = load_yaml(text)
    except ValueError as problem:
        raise InputError(f"recipe {name} is not valid: {problem}") from None
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"is a {type(tree).__name__}"
        raise InputError(f"recipe {name} {found}; it must be a mapping of sections, such as `base: quickstart`")
    if is_file:
        _anchor(tree, file.parent)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise InputError(f"recipe {name}: base={base!r:.80} must be the name of a shipped recipe or a .yaml file")
    if base.endswith((".yaml", ".yml")):
        base = _start_from(file.parent, base)
    children = (*children, file.resolve())
    if expand(base).resolve() in children:
        raise InputError(f"recipe {name}: base: {base} leads back to itself; name a parent that does not")
    return _merge(keys, _inherited(_read(base, keys, children), tree), tree)


def _anchor(tree: dict[str, Any], folder: Path) -> None:
    """Have each relative path in a recipe file start from the file's folder."""
    corpus = tree.get("corpus")
    sources = corpus.get("sources") if isinstance(corpus, dict) else None
    places = [(tree, "start"), (tree.get("tokenizer"), "table"), (tree.get("shards"), "cache")]
    for source in sources.values() if isinstance(sources, dict) else ():
        places += [(source, "path"), (source, "dataset")]
    for section, key in places:
        if isinstance(section, dict) and isinstance(section.get(key), str):
            path = _start_from(folder, section[key])
            if key != "dataset" or Path(path).exists():  # else it is a name on the hub
                section[key] = path


def _start_from(folder: Path, path: str) -> str:
    if path.startswith("~") or folder == Path() or not path:
        return path
    joined = folder / path
    if glob.has_magic(path) and not joined.exists():
        joined = Path(glob.escape(str(folder)), path)  # only what the user wrote is a pattern
    return str(joined)


def _inherited(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The tree that is about to get `changes`: without its model and tokenizer when they add a `start`, which brings
    its own."""
    had, has = tree.get("start"), changes.get("start", tree.get("start"))
    if had and not has:
        raise InputError(f"start=null: the recipe takes its model from start={had}; change a recipe that has none")
    return {key: value for key, value in tree.items() if had or not has or key not in ("tokenizer", "model")}


def _merge(cls: Any, base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    hints = typing.get_type_hints(cls)
    for key, value in changes.items():
        group = hints.get(key)
        if is_dataclass(group) and isinstance(merged.get(key), dict) and isinstance(value, dict):
            merged[key] = _merge(group, merged[key], value)
        else:
            merged[key] = value
    return merged


def _parsed(override: str) -> tuple[str, Any]:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise InputError(f"--set {override!r:.200} must look like train.steps=100")
    try:
        value = load_yaml(text)
    except ValueError as problem:
        raise InputError(f"--set {override!r:.200}: the value is not valid: {problem}") from None
    return path, value


def _with(tree: Any, keys: list[str], value: Any, path: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise InputError(f"{path}: {keys[0]!r} lies below a plain value, which has no keys")
    below = tree.get(keys[0])
    rest = _with({} if below is None else below, keys[1:], value, path) if keys[1:] else value
    return {**tree, keys[0]: rest}


# ---- checking ------------------------------------------------------------------------------------------


def _check(hint: Any, value: Any, path: str) -> None:
    """Refuse whatever pydantic would ignore or convert in silence: unknown keys, text or booleans for numbers, numbers
    that are not finite or too large, and numbers for booleans."""
    kinds = set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, UnionType) else {hint}
    takes_text = str in kinds or any(typing.get_origin(kind) is typing.Literal for kind in kinds)
    takes_number = not kinds.isdisjoint({int, float})
    match value:
        case dict():
            for key, item in value.items():
                name = str(key) if str(key).isprintable() else repr(key)
                for key_kind, item_kind in _inside(kinds, key, path, name):
                    _check(key_kind, key, f"{path}{name}")
                    _check(item_kind, item, f"{path}{name}.")
        case list():
            for number, item in enumerate(value):
                for kind in kinds:
                    if typing.get_origin(kind) is tuple:
                        _check(typing.get_args(kind)[0], item, f"{path}{number}.")
        case bool() if bool not in kinds:
            needed = "text is needed, not true or false; put it in quotes" if takes_text else ""
            needed = needed or "a number or text is needed, not true or false"
            raise InputError(f"{_name(path)}={str(value).lower()}: {needed}")
        case bool():
            pass
        case int() | float():
            if not math.isfinite(value):
                raise InputError(f"{_name(path)}={value}: a finite number is needed")
            if takes_number and abs(value) > (MAX_FLOAT if float in kinds else 2**63 - 1):
                raise InputError(f"{_name(path)}={value:g} is too large for a number of this kind")
            if takes_text and not takes_number:
                raise InputError(f"{_name(path)}={value}: text is needed; put it in quotes")
            if bool in kinds and not takes_number:
                raise InputError(f"{_name(path)}={value}: true or false is needed")
        case str() if not takes_text and (takes_number or bool in kinds):
            raise InputError(f"{_name(path)}={value!r:.80}: {_not_text(value, kinds)}")


def _inside(kinds: set[Any], key: Any, path: str, name: str) -> list[tuple[Any, Any]]:
    """The types of a mapping's key and of its value. Raises InputError for a key that a section does not have."""
    found = []
    for kind in kinds:
        if is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            if key not in hints:
                raise InputError(f"{path}{name}: unknown key; {_nearest(name, list(hints))}")
            found.append((str, hints[key]))
        elif typing.get_origin(kind) is dict:
            found.append(typing.get_args(kind))
    return found


def _not_text(value: str, kinds: set[Any]) -> str:
    try:
        if not math.isfinite(float(value)):
            return "a finite number is needed"
    except ValueError:
        pass
    kind = "boolean: true or false" if bool in kinds else "integer" if float not in kinds else "number"
    return f"input should be a valid {kind}, not text"


def _name(path: str) -> str:
    return path.removesuffix(".") or "the recipe"


def _nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return (f"did you mean {close[0]!r}? " if close else "") + f"valid: {', '.join(valid)}"


def _explain(error: ValidationError) -> str:
    """pydantic's first complaint as one line: path, what was given, the rule."""
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":  # from a configuration's own check: it begins with the field's name
        return f"{path}.{first['ctx']['error']}" if path else str(first["ctx"]["error"])
    if first["type"].startswith("missing"):
        return f"{path}: this key is required"
    return f"{path}={first['input']!r:.80}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _from_start(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the shape of the model to train further."""
    path = expand(str(tree["start"]), "start")
    tokenizer = tree.get("tokenizer") or {"kind": "start"}
    if not isinstance(tokenizer, dict) or tokenizer.get("kind") != "start":
        raise InputError(f"tokenizer: start={path} brings its own; leave this section out, or set it to null")
    try:
        model = open_model(find_model(path))
    except InputError as problem:
        raise InputError(f"start={path}: {problem}") from None
    if model.tokenizer is None:
        raise InputError(
            f"start={path} has no tokenizer; put the one there that it was trained with, or `gristmill import` it, "
            "which makes the one of DBRX"
        )
    theirs, given = plain(model.cfg), tree.get("model") or {}
    if not isinstance(given, dict):
        raise InputError(f"model={given!r} must be a section with keys")
    for key, value in given.items():
        if theirs[key] != value and key not in CHANGEABLE:
            raise InputError(
                f"model.{key}={value!r}: start={path} has {theirs[key]!r}; only {', '.join(CHANGEABLE)} can change"
            )
    return {**tree, "start": str(path), "model": {**theirs, **given}, "tokenizer": tokenizer}


def _resolve(recipe: Recipe) -> Recipe:
    """Fill in what follows from something else, and check what concerns two sections."""
    corpus: CorpusConfig = recipe["corpus"]
    train: TrainConfig = recipe["train"]
    model = _with_vocabulary(recipe["model"], recipe["tokenizer"])
    if (block_tokens := recipe["shards"].block_tokens) % train.seq_len:
        raise InputError(f"train.seq_len={train.seq_len} must divide shards.block_tokens={block_tokens}; change one")
    if train.seq_len > model.max_seq_len:
        raise InputError(f"train.seq_len={train.seq_len} must not exceed model.max_seq_len={model.max_seq_len}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", recipe.name):
        raise InputError(f"name={recipe.name!r} names a folder: use letters, digits, '.', '_' and '-'")
    try:
        Order(curriculum_of(corpus), sorted(corpus.sources), train.steps, train.sequences_per_batch, 0)
    except ValueError as problem:
        raise InputError(f"corpus.sources: their weights make no curriculum: {problem}") from None
    check_balance(train, model)
    evaluate: EvaluateConfig = recipe["evaluate"]
    try:
        Sampling(temperature=evaluate.temperature, top_p=evaluate.top_p, seed=evaluate.seed)
    except InputError as problem:
        raise InputError(f"evaluate.{problem}") from None
    if evaluate.prompt_tokens + evaluate.sample_tokens >= model.max_seq_len:
        raise InputError(
            f"evaluate.prompt_tokens={evaluate.prompt_tokens} and sample_tokens={evaluate.sample_tokens} must be "
            f"together below model.max_seq_len={model.max_seq_len}"
        )
    if evaluate.context_length is None:
        if train.seq_len < 2:
            raise InputError("train.seq_len=1 is too short to evaluate with; set evaluate.context_length to at least 2")
        evaluate = replace(evaluate, context_length=train.seq_len)
    elif evaluate.context_length > model.max_seq_len:
        raise InputError(
            f"evaluate.context_length={evaluate.context_length} must not exceed model.max_seq_len={model.max_seq_len}"
        )
    return replace(recipe, sections={**recipe.sections, "model": model, "evaluate": evaluate})


def _with_vocabulary(model: ModelConfig, tokenizer: TokenizerConfig) -> ModelConfig:
    num_ids = tokenizer.num_ids
    if num_ids is None:
        return model
    vocab_size = model.vocab_size or -(-num_ids // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if vocab_size < num_ids:
        raise InputError(
            f"model.vocab_size={vocab_size} must be at least tokenizer.vocab_size={num_ids}; "
            "leave it out to have it derived"
        )
    return replace(model, vocab_size=vocab_size)

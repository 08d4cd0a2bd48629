"""The graph has one node for each artifact, and no circle whatever contents are equal."""

from pathlib import Path

from gristmill import artifact
from gristmill.artifact import Artifact, Built
from gristmill.report.lineage import Node, draw, graph


def make(path: Path, kind: str, text: str, sources: dict[str, dict] | None = None, **inputs: Artifact) -> Artifact:
    artifact.prepare(path)
    (path / "data").write_text(text)
    key = artifact.stage_key(kind, 1, {}, {name: parent.content for name, parent in inputs.items()})
    return artifact.commit(path, kind=kind, key=key, config={}, inputs=inputs, built=Built(sources=sources or {}))


def train(folder: Path, notes: str, start: Artifact | None = None) -> dict[str, Artifact]:
    """A run's stages; the tokenizer of a `start` is taken over byte by byte."""
    first = {"start": start} if start else {}
    source = {"notes": {"licenses": {"MIT": 9}, "documents": 3, "bytes": 9, "fingerprint": notes}}
    corpus = make(folder / "corpus", "corpus", notes, source)
    tokenizer = make(folder / "tokenizer", "tokenizer", "the same ids", corpus=corpus, **first)
    shards = make(folder / "shards", "shards", notes, corpus=corpus, tokenizer=tokenizer)
    model = make(folder / "train", "checkpoint", str(folder), shards=shards, tokenizer=tokenizer, **first)
    return {"corpus": corpus, "tokenizer": tokenizer, "shards": shards, "train": model}


def ancestors(nodes: list[Node], node: Node, seen: frozenset[str] = frozenset()) -> set[str]:
    """By walking, with a check at each step that the walk does not return."""
    assert node.id not in seen
    by_id = {n.id: n for n in nodes}
    above = set(node.parents)
    for parent in node.parents:
        above |= ancestors(nodes, by_id[parent], seen | {node.id})
    return above


def named(nodes: list[Node], name: str) -> Node:
    (found,) = (node for node in nodes if node.name == name)
    return found


def test_a_chain_of_runs_is_one_graph_that_reaches_the_first_model(tmp_path: Path) -> None:
    first = train(tmp_path / "1", "old notes")
    second = train(tmp_path / "2", "new notes", first["train"])
    third = train(tmp_path / "3", "new notes", second["train"])
    nodes = graph(third, {})
    above = ancestors(nodes, named(nodes, "train"))
    keys = {node.name for node in nodes if node.id in above}
    assert {f"checkpoint {stages['train'].key[:8]}" for stages in (first, second)} <= keys
    # Tokenizers with the same bytes are three artifacts; corpora of the same bytes and sources are one.
    assert len([node for node in nodes if node.name.startswith("tokenizer")]) == 3
    assert len([node for node in nodes if node.name.startswith("corpus")]) == 2
    assert len([node for node in nodes if node.name == "source notes"]) == 2
    for upright in (True, False):
        assert "train from" in draw(nodes, id="l", upright=upright)


def test_an_export_that_is_imported_and_exported_again_makes_no_circle(tmp_path: Path) -> None:
    """Contents and keys repeat with a period of two."""
    model = train(tmp_path / "run", "notes")["train"]
    for turn in range(3):
        exported = make(tmp_path / f"export{turn}", "export", "published", model=model)
        model = make(tmp_path / f"import{turn}", "model", "ours", export=exported)
    assert model.content == artifact.load(tmp_path / "import0").content
    stages = train(tmp_path / "again", "notes", model)
    nodes = graph(stages, {})
    ancestors(nodes, named(nodes, "train"))
    kinds = [node.name.split()[0] for node in nodes]
    assert (kinds.count("export"), kinds.count("model")) == (3, 3)


def test_the_command_shows_ancestors_of_equal_bytes_each_with_its_own(tmp_path: Path) -> None:
    first = train(tmp_path / "1", "old notes")
    second = train(tmp_path / "2", "new notes", first["train"])
    root = artifact.lineage(second["train"].path)
    found: dict[str, artifact.Origin] = {}

    def visit(node: artifact.Origin) -> None:
        found[node.id] = node
        for parent in node.inputs:
            visit(parent)

    visit(root)
    tokenizers = [node for node in found.values() if node.kind == "tokenizer"]
    assert len(tokenizers) == 2
    assert len({node.content for node in tokenizers}) == 1

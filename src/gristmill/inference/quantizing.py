"""`gristmill quantize`: a model's matrices become codes, tensor by tensor, and what that costs is measured."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gristmill import artifact
from gristmill.artifact import Artifact, Built
from gristmill.corpus import tables
from gristmill.current import find_ancestor
from gristmill.errors import InputError
from gristmill.evaluate import Document, EvaluateConfig, bits_per_byte, read_documents
from gristmill.hub import assemble
from gristmill.hub.card import model_card
from gristmill.hub.export import license_of, write_directory
from gristmill.hub.folder import ModelFolder, name_of, open_model
from gristmill.hub.importing import check_files, describe_source, finite, known_hashes
from gristmill.hub.layouts import published_layout
from gristmill.hub.mapping import as_one_expert
from gristmill.hub.quantized import HEAD_BITS, QuantizeConfig, QuantizedWeight
from gristmill.hub.tensors import MAX_SHARD_BYTES
from gristmill.inference.load import find_model
from gristmill.inference.scorer import ModelScorer
from gristmill.progress import bar, console
from gristmill.tokenizer import Tokenizer

FORMAT = 1
MAX_WINDOW = 2048  # tokens that the model sees at once while it is measured


def quantize_model(src: Path, out: Path, how: QuantizeConfig, documents: Path | None = None) -> Artifact:
    """Write the model in `src` (a run folder, or whatever `open_model` takes) as the new directory `out`.

    documents: a file of texts to measure the loss on; without it they are the test documents of the corpus that the
    model was trained on, and where there are none, nothing is measured. Metrics: weight_bytes; documents_bits_per_byte
    (of that file) or test_bits_per_byte with before, after, loss (a share), documents, bytes and window, or null. One
    tensor is in memory at a time, except while the loss is measured: then the model is.

    Raises InputError for what cannot be quantized, or when `out` holds something.
    """
    metric = "documents_bits_per_byte" if documents else "test_bits_per_byte"
    path = find_model(src)
    texts = read_texts(documents) if documents else test_documents(path)
    model = open_model(path)
    if any(isinstance(weight, QuantizedWeight) for weight in model.weights.values()):
        raise InputError(f"{path} is quantized already; give the model that it was made from")
    if texts and model.tokenizer is None:
        raise InputError(f"{path} has no tokenizer, which the loss is measured with; put it there")
    published_layout(model.cfg)
    num_bytes = how.num_bytes(*as_one_expert(model.cfg, model.weights))
    hashes = check_files(path, known_hashes(path))
    ours = artifact.load_ours(path)
    origin = artifact.lineage(path) if ours else None
    with artifact.building(out, num_bytes) as folder:
        with bar("quantizing", num_bytes) as advance:
            write_directory(folder, replace(model, weights=finite(model.weights)), None, MAX_SHARD_BYTES, advance, how)
        loss = measure(model, open_model(folder), texts) if texts else None
        said = describe(how, loss, "the given documents" if documents else "the test documents")
        card = model_card(name_of(out), license_of(path, origin), model, ours, origin, None, said)
        (folder / "README.md").write_text(card, encoding="utf-8")
        console.print(f"  {said}", markup=False)
        config = {"bits": how.bits, "group": how.group}
        source = describe_source(path, hashes)
        artifact.commit(
            folder,
            kind="quantized",
            key=artifact.stage_key("quantized", FORMAT, config, {"source": source["fingerprint"]}),
            config=config,
            inputs={"model": ours} if ours else {},
            built=Built(
                metrics={"weight_bytes": num_bytes, metric: loss},
                sources={} if ours else {source["name"]: source},
            ),
        )
    return artifact.load(out)


def describe(how: QuantizeConfig, loss: dict[str, Any] | None, texts: str) -> str:
    """One paragraph, for the console and for the card. texts: what the loss was measured on."""
    output = "" if how.bits == HEAD_BITS else f" (an output matrix of its own has {HEAD_BITS})"
    matrices = f"matrices of {how.bits} bits{output}, a scale for each {how.group} inputs; "
    if loss is None:
        return matrices + "what that costs was not measured (give --documents)"
    before, after = loss["before"], loss["after"]
    return matrices + f"bits per byte of {texts} {before:.3f} -> {after:.3f} ({loss['loss']:+.2%})"


def measure(before: ModelFolder, after: ModelFolder, texts: Sequence[Document]) -> dict[str, Any]:
    """Bits per byte of both on the same documents, in fp32; one model is in memory at a time."""
    assert before.tokenizer is not None
    tokenizer = Tokenizer.load(before.tokenizer)
    window, num_bytes = min(before.cfg.max_seq_len, MAX_WINDOW), sum(document.num_bytes for document in texts)
    figures = []
    for model, name in ((before, "before"), (after, "after")):
        with bar(f"measuring {name}", num_bytes) as advance:
            scorer = ModelScorer(assemble(model.cfg, model.weights), window)
            figures.append(bits_per_byte(texts, scorer, tokenizer, advance)["all"])
    return {
        "before": figures[0],
        "after": figures[1],
        "loss": figures[1] / figures[0] - 1,
        "documents": len(texts),
        "bytes": num_bytes,
        "window": window,
    }


# ---- held-out text -------------------------------------------------------------------------------------


def test_documents(model: Path) -> list[Document]:
    """The test split of the corpus that a model was trained on; none where that corpus is not in its place."""
    made = artifact.load_ours(model)
    corpus = find_ancestor(made, "corpus") if made else None
    try:
        return read_documents(corpus.path, "test", EvaluateConfig.test_bytes) if corpus else []
    except InputError:  # a corpus without a test split
        return []


def read_texts(file: Path) -> list[Document]:
    """The documents of a file, read as those of a corpus: JSONL (also compressed), Parquet, or one text.

    Raises InputError when the file cannot be read or holds no text.
    """
    texts, drops = tables.read_texts(file, "--documents")
    if drops.reasons:
        console.print(f"  left out of {file.name}: {drops.summary()}", style="yellow", markup=False)
    return [Document(str(n), file.name, text, len(text.encode())) for n, text in enumerate(texts)]

import json
import lzma
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import InputError
from gristmill.evaluate import Document, EvaluateConfig, bits_per_byte, build_evaluation, read_documents, windows
from gristmill.evaluate.baselines import xz_bytes, xz_each, xz_whole
from gristmill.evaluate.samples import choose, sample
from gristmill.tokenizer import Tokenizer

MakeCorpus = Callable[[list[tuple[str, str, str]]], Path]


class Uniform:
    """A scorer whose every token has probability 1/num_tokens, and which completes with the same ids each time."""

    def __init__(self, num_tokens: int, completion: Sequence[int] = ()) -> None:
        self.num_tokens, self.completion = num_tokens, list(completion)

    def loglikelihood(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        return [-(len(sequence) - 1) * math.log(self.num_tokens) for sequence in sequences]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        return [self.completion[:max_tokens] for _ in prompts]


@given(st.integers(0, 300), st.integers(2, 40))
def test_windows_count_each_target_once_with_half_a_window_of_context(num_inputs: int, length: int) -> None:
    counted = []
    for start, end, first in windows(num_inputs, length):
        assert 0 < end - start <= length
        for target in range(first, end):
            counted.append(target)
            assert start == 0 or target - start >= length // 2
    assert counted == list(range(num_inputs))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_figures_that_are_not_finite_are_left_out_and_named(
    value: float, corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Uniform, "loglikelihood", lambda self, sequences: [value for _ in sequences])
    built = build_evaluation(EvaluateConfig(samples=1, functions=1), corpus, tokenizer, Uniform(4, [65]), tmp_path)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    names = [f"{split}.bits_per_byte.{name}" for split in ("validation", "test") for name in ("all", "code", "prose")]
    assert sorted(written["not_finite"]) == sorted(names) == sorted(built.metrics["not_finite"])
    assert written["test"]["bits_per_byte"] == {}
    assert written["baselines"]["trigram"].keys() == {"all", "code", "prose"}
    assert len(written["samples"]) == 2


def test_a_prompt_that_was_cut_inside_a_character_is_no_longer_than_allowed(
    make_corpus: MakeCorpus, tokenizer: Tokenizer
) -> None:
    documents = read_documents(make_corpus([("a", "prose", "🌾" * 40)]), "test")
    longest = 0

    class Longest(Uniform):
        def generate(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
            nonlocal longest
            longest = max(map(len, prompts))
            return [[] for _ in prompts]

    sample(documents, Longest(4), tokenizer, EvaluateConfig(prompt_tokens=5))
    assert longest == 1 + 5


def test_bits_per_byte_is_total_bits_over_total_bytes_of_all_and_of_each_source(
    corpus: Path, tokenizer: Tokenizer
) -> None:
    documents = read_documents(corpus, "test")
    figures = bits_per_byte(documents, Uniform(8), tokenizer)
    for name in ("all", "code", "prose"):
        texts = [d.text for d in documents if name in ("all", d.source)]
        tokens, size = sum(len(tokenizer.encode(text)) for text in texts), len("".join(texts).encode())
        assert figures[name] == pytest.approx(3 * tokens / size, rel=1e-12)


def test_a_capped_split_is_a_fixed_subset_with_each_source_in_its_share(corpus: Path) -> None:
    everything = read_documents(corpus, "test")
    total = sum(d.num_bytes for d in everything)
    some = read_documents(corpus, "test", total // 2)
    assert some == read_documents(corpus, "test", total // 2)
    assert set(some) < set(everything)
    for source in ("code", "prose"):
        of_source = [d.num_bytes for d in everything if d.source == source]
        taken = sum(d.num_bytes for d in some if d.source == source)
        assert sum(of_source) // 2 <= taken <= sum(of_source) // 2 + max(of_source)
    assert read_documents(corpus, "test", total) == everything


def test_a_split_without_documents_is_an_input_error_that_names_it(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no test documents"):
        read_documents(make_corpus([]), "test")
    with pytest.raises(InputError, match="not a corpus"):
        read_documents(tmp_path / "elsewhere", "test")


@pytest.mark.parametrize("data", [b"", b"x", b"def f(): pass\n" * 40, bytes(range(256)) * 300, b"a" * 5000])
def test_xz_with_a_short_dictionary_makes_the_size_of_xz_9e(data: bytes) -> None:
    assert xz_bytes(data) == len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))


def test_xz_figures_are_compressed_bits_over_bytes() -> None:
    texts = {"code": ["def f():\n    return 1\n" * 9, "x = 1\n" * 30], "prose": ["Ünder the mill. " * 20]}
    documents = [
        Document(str(i), source, text, len(text.encode()))
        for source, some in texts.items()
        for i, text in enumerate(some)
    ]
    each, whole = xz_each(documents), xz_whole(documents)

    def size(text: str) -> int:
        return len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))

    everything = [text for of_source in texts.values() for text in of_source]
    for name, some in [*texts.items(), ("all", everything)]:
        num_bytes = len("".join(some).encode())
        assert each[name] == pytest.approx(8 * sum(map(size, some)) / num_bytes)
        assert whole[name] == pytest.approx(8 * size("".join(some)) / num_bytes)


def test_the_stage_writes_every_figure_and_repeats_byte_for_byte(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cfg = EvaluateConfig(samples=2, functions=3, prompt_tokens=64, sample_tokens=24, validation_bytes=500)
    scorer = Uniform(4, tokenizer.encode("    return first\n\n\nprint("))
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        built = build_evaluation(cfg, corpus, tokenizer, scorer, tmp_path / name)
        written.append((tmp_path / name / "evaluation.json").read_bytes())
    assert written[0] == written[1]
    figures = json.loads(written[0])
    test = read_documents(corpus, "test")
    assert figures["test"]["documents"] == len(test)
    assert figures["test"]["bytes"] == sum(d.num_bytes for d in test)
    assert figures["validation"]["bytes"] < sum(d.num_bytes for d in read_documents(corpus, "validation"))
    for group in (figures["test"]["bits_per_byte"], *figures["baselines"].values()):
        assert set(group) == {"all", "code", "prose"}
        assert all(value > 0 for value in group.values())
    assert set(figures["baselines"]) == {"xz_document", "xz", "trigram"}
    assert [sample["source"] for sample in figures["samples"]] == ["code"] * 2 + ["prose"] * 2
    assert figures["parse_share"] == {"greedy": 1.0, "sampled": 1.0, "functions": 3}
    assert built.metrics == {name: value for name, value in figures.items() if name != "samples"}


def test_a_corpus_without_python_has_samples_and_no_parse_share(
    make_corpus: MakeCorpus, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    corpus = make_corpus([(f"n{i}", "notes", f"{i}. note\n\nWater and stone, day {i}.\n") for i in range(3)])
    out = tmp_path / "out"
    out.mkdir()
    build_evaluation(EvaluateConfig(samples=2, prompt_tokens=4), corpus, tokenizer, Uniform(4, [65]), out)
    figures = json.loads((out / "evaluation.json").read_text())
    assert "parse_share" not in figures
    notes = {d.text for d in read_documents(corpus, "test")}
    assert len(figures["samples"]) == 2
    assert all(any(text.startswith(s["prompt"] + s["truth"]) for text in notes) for s in figures["samples"])


def test_prompts_are_unlike_and_documented_functions_come_first(make_corpus: MakeCorpus, tokenizer: Tokenizer) -> None:
    plain = "def f(x):\n    y = x\n    return y\n"
    told = 'def g(x):\n    """Give x."""\n    return x\n'
    corpus = make_corpus([(f"m{i}", "code", text) for i, text in enumerate([plain, plain, plain + "z = 1\n", told])])
    prompts = choose(read_documents(corpus, "test"), tokenizer, EvaluateConfig())
    assert [prompt.prompt for prompt in prompts] == ['def g(x):\n    """Give x."""\n', "def f(x):\n"]
    assert [prompt.truth for prompt in prompts] == ["    return x\n", "    y = x\n    return y\n"]


@pytest.mark.parametrize("wrong", ["samples", "functions", "prompt_tokens", "validation_bytes", "context_length"])
def test_impossible_settings_are_named(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"^{wrong}=0 must"):
        EvaluateConfig(**{wrong: 0})

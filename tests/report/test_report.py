"""The page and report.json of whole, broken-off, hostile and losing runs."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from fake_run import LICENSES, ORDER, commit_run, fake_run, metrics

from gristmill.errors import Failure, InputError
from gristmill.report import collect, collect_run, figures, to_html, to_json, write
from gristmill.report.pictures import curriculum, smooth, verdict
from gristmill.report.text import duration, scientific, short, size, visible
from gristmill.train.log import read_metrics

VOID = {"meta", "br", "img", "input", "link", "hr"}
FIGURES = (
    "total_params", "active_params", "train_tokens", "train_seconds", "tokens_per_second", "validation_bits_per_byte",
    "held_out_bits_per_byte", "xz_document_bits_per_byte", "xz_bits_per_byte", "trigram_bits_per_byte",
    "export_max_logit_diff",
)  # fmt: skip


class Page(HTMLParser):
    """Collects what the tests ask for, and holds that every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.figures: dict[str, str] = {}
        self.words = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {name: value or "" for name, value in attrs}
        self.tags.append((tag, said))
        if "data-figure" in said:
            self.figures[said["data-figure"]] = said["value"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [said for name, said in self.tags if name == tag]


def page_of(path: Path, **settings: object) -> tuple[Page, dict[str, object]]:
    run = fake_run(path, **settings)  # type: ignore[arg-type]
    report = collect(run.path, **run.arguments)
    write(report)
    return Page((path / "report.html").read_text()), json.loads((path / "report.json").read_text())


def test_the_page_is_one_file_that_asks_nothing_of_the_outside(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path / "quickstart")
    for tag, said in page.tags:
        assert not {"src", "href", "srcset", "action", "poster", "xlink:href"} & set(said), tag
        assert "url(" not in said.get("style", "")
    html = (tmp_path / "quickstart/report.html").read_text()
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    assert "@import" not in html
    assert "://" not in html
    assert len(page.all("script")) == 1
    assert "default-src 'none'" in page.all("meta")[1]["content"]


def test_headings_go_down_one_level_at_a_time_and_pictures_have_titles_and_ids_are_unique(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path / "quickstart")
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = [said["id"] for _, said in page.tags if "id" in said]
    assert len(ids) == len(set(ids))
    for said in [*page.all("svg"), *page.all("section")]:
        assert set(said["aria-labelledby"].split()) <= set(ids)
    assert len(page.all("caption")) == len(page.all("table"))


def test_report_json_has_every_figure_and_the_page_shows_the_same(tmp_path: Path) -> None:
    page, said = page_of(tmp_path / "quickstart")
    assert {name: said[name] for name in FIGURES} == pytest.approx({
        "total_params": 17_104_512, "active_params": 5_832_960, "train_tokens": 300 * 8192, "train_seconds": 300 * 1.3,
        "tokens_per_second": 8192 / 1.3, "validation_bits_per_byte": 1.598, "held_out_bits_per_byte": 1.621,
        "xz_document_bits_per_byte": 2.124, "xz_bits_per_byte": 1.702, "trigram_bits_per_byte": 1.958,
        "export_max_logit_diff": 3.11e-06,
    })  # fmt: skip
    top = {name: value for name, value in said.items() if isinstance(value, float | int) and name != "finished"}
    by_source = {f"held_out_bits_per_byte:{name}": value for name, value in said["held_out_by_source"].items()}  # type: ignore[attr-defined]
    for name, values in said["baselines_by_source"].items():  # type: ignore[attr-defined]
        by_source |= {f"{name}_bits_per_byte:{source}": value for source, value in values.items()}
    shown = {name.removesuffix(":all"): float(value) for name, value in page.figures.items()}
    assert shown == top | by_source


def test_a_figure_added_to_the_table_is_in_report_json_and_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = figures.Figure(key="last_grad_norm", read=lambda r: r.train[-1]["grad_norm"], label="Last gradient norm")
    monkeypatch.setattr(figures, "FIGURES", (*figures.FIGURES, added))
    page, said = page_of(tmp_path / "quickstart")
    assert said["last_grad_norm"] == float(page.figures["last_grad_norm"]) == 0.8
    assert "Last gradient norm" in page.words


def test_the_lineage_names_the_layout_of_the_export(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path / "quickstart")
    assert "qwen3_moe layout" in page.words


def test_licenses_are_summed_over_the_sources(tmp_path: Path) -> None:
    _, said = page_of(tmp_path / "quickstart")
    both = LICENSES["code"]["Apache-2.0"] + LICENSES["prose"]["Apache-2.0"]
    assert said["corpus"]["licenses"]["Apache-2.0"] == both  # type: ignore[index]


HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e\x00\ud800"


def test_hostile_texts_and_names_stay_text(tmp_path: Path) -> None:
    safe = HOSTILE.replace("\ud800", "")  # no file that JSON was read from in UTF-8 can hold it under a name
    run = fake_run(tmp_path / "bad", hostile=safe)
    report = collect(run.path, **run.arguments)
    assert report.evaluation is not None
    report.evaluation["samples"][1]["greedy"] = HOSTILE
    html = to_html(report)
    page = Page(html)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not any(name.startswith("on") for _, said in page.tags for name in said)
    assert "\x00" not in html
    assert "\u202e" not in html
    assert "<script>alert(1)" in page.words  # shown as what it is
    html.encode()


@pytest.mark.parametrize("until", ["corpus", "tokenizer", "shards", "train", "evaluate"])
def test_an_unfinished_run_shows_what_there_is(tmp_path: Path, until: str) -> None:
    page, said = page_of(tmp_path / "part", until=until)
    assert "not finished" in page.words
    assert said["finished"] is False
    assert "export" in said["missing_stages"]
    assert (said["held_out_bits_per_byte"] is not None) == (until == "evaluate")
    assert (said["train_tokens"] == 300 * 8192) == (until not in ("corpus", "tokenizer"))
    assert set(said["stages"]) == set(ORDER[: ORDER.index(until) + 1])


def test_a_run_of_which_nothing_stands_yet_still_has_a_page(tmp_path: Path) -> None:
    Page(to_html(collect(tmp_path, order=ORDER, stages={}, recipe={}, machine={}, seconds={})))


def test_a_live_log_cut_in_its_last_line_is_read_and_a_damaged_one_named(tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in metrics(10)]
    log = tmp_path / "metrics.jsonl"
    log.write_text("\n".join([*lines, lines[0][:30]]))
    assert read_metrics(log) == [json.loads(line) for line in lines]
    log.write_text("\n".join([lines[0], "{broken", *lines[1:]]) + "\n")
    with pytest.raises(Failure, match="line 2 is damaged"):
        read_metrics(log)


def test_a_loss_that_is_not_finite_is_said_not_hidden(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "nan", until="shards", steps=40)
    log = run.path / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records[7]["loss"] = math.nan
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = Page(to_html(collect(run.path, **run.arguments)))
    assert "the loss was not finite" in page.words


def test_the_same_run_gives_the_same_bytes_and_the_manifest_leads_to_the_same_report(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "quickstart")
    explicit = collect(run.path, **run.arguments)
    assert to_html(explicit) == to_html(collect(run.path, **run.arguments))
    assert to_json(collect_run(run.path, ORDER))["stages"].keys() == run.stages.keys()  # before there is a manifest
    write(explicit)
    commit_run(run)
    assert to_json(collect_run(run.path, ORDER)) == to_json(explicit)
    with pytest.raises(InputError, match="run folder above it"):
        collect_run(run.stages["corpus"], ORDER)
    with pytest.raises(InputError, match="is not a run folder"):
        collect_run(tmp_path / "nowhere", ORDER)


def test_a_model_that_loses_is_said_to_lose(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path / "poor", held_out=1.99)
    assert "6\u202f% fewer than xz over each document alone" in page.words
    assert (
        "the token trigram needs 2\u202f% fewer and xz over all of the text at once needs 14\u202f% fewer" in page.words
    )
    assert verdict(3.0, {"xz, per document": 2.0}).startswith("Lower is better. The model beats none")
    names = re.findall(r"This model|Token trigram|xz, all at once|xz, per document", page.words)
    assert names[:4] == ["xz, all at once", "Token trigram", "This model", "xz, per document"]  # bars: best first


def test_lineage_arrows_reach_every_stage_and_skip_what_is_implied(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path / "quickstart")
    told = re.search(r"corpus from [^.]*", page.words)
    assert told is not None
    assert told[0].startswith(
        "corpus from source code, source prose; tokenizer from corpus; shards from tokenizer; train from shards; "
        "evaluate from train; export from train"
    )


def test_curriculum_shares_are_those_of_the_tokens_seen(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "quickstart", until="shards")
    (first, early), (second, late) = curriculum(collect(run.path, **run.arguments))
    assert [early["code"], late["code"]] == pytest.approx([0.6, 0.85], abs=1e-3)
    assert (first.start, first.end, second.end) == (0, second.start, 300 * 8192)


def test_smoothing_keeps_a_constant_and_gaps() -> None:
    assert smooth([3.0] * 5, 4) == pytest.approx([3.0] * 5)
    assert math.isnan(smooth([1.0, math.nan, 1.0], 4)[1])


def test_numbers_are_written_as_people_read_them() -> None:
    told = [
        short(17_104_512),
        short(999_999),
        short(0.5),
        duration(59.6),
        duration(391.5),
        duration(7_260),
        duration(3.1),
    ]
    assert [text.replace("\u202f", " ") for text in told] == [
        "17.1 M", "1.00 M", "0.50", "1 min 00 s", "6 min 32 s", "2 h 01 min", "3.1 s",
    ]  # fmt: skip
    assert (size(82_510_000), scientific(3.11e-6)) == ("82.5\u202fMB", "3.1\u202f\N{MULTIPLICATION SIGN}\u202f10⁻⁶")
    assert visible("a\r\n\tb\x1b\u2066") == "a\n\tb\u241b\ufffd"


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_has_the_contrast_of_wcag_aa_in_both_themes() -> None:
    style = (Path(collect.__code__.co_filename).parent / "page.css").read_text()
    for theme in re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]:
        colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", theme))
        for ground in ("paper", "raised"):
            for text in ("ink", "muted", "grain", "s1", "s2", "s3", "s4", "s5", "s6"):
                pair = sorted([luminance(colors[ground]), luminance(colors[text])])
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (text, ground)

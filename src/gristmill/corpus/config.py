"""What a corpus is made of and how it is cleaned. Plain frozen dataclasses: imports nothing of the room."""

from dataclasses import dataclass, field
from typing import Literal

from gristmill.stage import OPERATIONAL

PERMISSIVE = (
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC-BY-4.0", "CC0-1.0", "HPND", "ISC",
    "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source: installed Python `packages`, a `path`, or a Hugging Face `dataset`; exactly one of the three.

    packages: names of distributions as pip lists them; "stdlib" is Python's own library. `take` says what of them:
        "code" (the modules, without tests) or "prose" (docstrings, READMEs, long descriptions, pydoc's topics).
        Licenses come from the packages' metadata.
    path: a file, a folder or a glob; `~` is expanded. A relative path in a recipe file starts from the file's folder,
        one in `--set` from the working directory. Read by extension: .parquet and .jsonl (also with .gz, .bz2, .xz or
        .zst behind it) hold one document a row; any other file is one text.
    dataset: a name on the Hugging Face hub or a local folder, found like a path, that the `datasets` library reads.
    license: SPDX expression of a path or a dataset; or `license_field` names the column that holds each row's.
    group_field: the column by which documents are kept on one side of the split (a repository, a domain, an author).
        Without it each row is a group; a folder's groups are its sub-folders (see `paths.groups_of`).
    weight: share of the source in training, relative to the others; a mapping gives the weight from that fraction of
        training on, e.g. {0.0: 3, 0.8: 1}. A pair is a ramp up to the next change: {0.0: 3, 0.8: [3, 1]}.
    """

    packages: tuple[str, ...] | None = None
    take: Literal["code", "prose"] | None = None
    path: str | None = field(default=None, metadata={"key": None})
    dataset: str | None = field(default=None, metadata={"key": None})
    dataset_config: str | None = None
    dataset_split: str = "train"
    license: str | None = None
    license_field: str | None = None
    text_field: str = "text"
    group_field: str | None = None
    # Not part of the key: what is read and kept does not depend on how often training draws it.
    weight: float | dict[float, float | tuple[float, float]] = field(default=1.0, metadata=OPERATIONAL)

    def __post_init__(self) -> None:
        given = [name for name in ("packages", "path", "dataset") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'packages'}: give exactly one of packages, path and dataset")
        if self.packages is not None and (not self.packages or self.take is None):
            raise ValueError("packages: name at least one, and set take to code or prose")
        if self.packages is not None and (self.license or self.license_field):
            raise ValueError("license: a package's license is read from its metadata; leave it out")
        if self.packages is None and self.take is not None:
            raise ValueError(f"take={self.take} belongs to packages; leave it out")
        if self.license is not None and self.license_field is not None:
            raise ValueError("license_field: give either one license for all or the column that holds each row's")
        steps = self.weight if isinstance(self.weight, dict) else {0.0: self.weight}
        if 0.0 not in steps or not all(0 <= start < 1 for start in steps):
            raise ValueError(f"weight={self.weight} must start at 0.0 and change at fractions below 1 of training")
        given_weights = [w for weight in steps.values() for w in (weight if isinstance(weight, tuple) else (weight,))]
        if not all(0 <= weight < float("inf") for weight in given_weights):
            raise ValueError(f"weight={self.weight} must not be negative or infinite")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Limits that a document must keep; `steps.judge` says what each measures and why.

    The line limits are generous, because a paragraph of prose is often one line and a novel has many of them;
    minified code and encoded data are caught by `max_long_word_share`, tables by the digits.
    """

    min_bytes: int = 64
    max_bytes: int = 10_000_000
    max_line_bytes: int = 50_000
    max_mean_line_bytes: int = 5_000
    min_letter_share: float = 0.4
    max_digit_share: float = 0.18
    max_long_word_share: float = 0.25
    max_repeated_share: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.min_bytes <= self.max_bytes <= 2**30:
            raise ValueError(
                f"min_bytes={self.min_bytes} and max_bytes={self.max_bytes} must satisfy 1 <= min <= max <= 2^30"
            )
        for name in ("max_line_bytes", "max_mean_line_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("min_letter_share", "max_digit_share", "max_long_word_share", "max_repeated_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class NearDuplicateConfig:
    """Documents whose sets of `shingle_words` consecutive words have a Jaccard similarity of `threshold` are one.

    `threshold` 1.0 leaves near-duplicates in (exact ones always go).
    """

    threshold: float = 0.7
    shingle_words: int = 5
    num_permutations: int = 128

    def __post_init__(self) -> None:
        if not 0.3 <= self.threshold <= 1:
            raise ValueError(
                f"threshold={self.threshold} must be from 0.3 to 1; below, unrelated documents would be joined"
            )
        if self.shingle_words < 1:
            raise ValueError(f"shingle_words={self.shingle_words} must be at least 1")
        if not 16 <= self.num_permutations <= 1024:
            raise ValueError(f"num_permutations={self.num_permutations} must be from 16 to 1024")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Shares of each source's bytes that are held out, by whole groups."""

    validation: float = 0.015
    test: float = 0.015

    def __post_init__(self) -> None:
        if not (self.validation > 0 and self.test > 0 and self.validation + self.test < 0.5):
            raise ValueError(
                f"validation={self.validation} and test={self.test} must be above 0 and together below 0.5: "
                "a split may hold up to twice its share, and training needs the rest"
            )


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """The corpus stage. `sources`: name -> where its documents come from.

    `allow_licenses`: SPDX identifiers. An expression passes when what it obliges to is on the list: every part of
    `A AND B`, one part of `A OR B`.
    """

    sources: dict[str, SourceConfig]
    allow_licenses: tuple[str, ...] = PERMISSIVE
    filters: FilterConfig = field(default_factory=FilterConfig)
    near_duplicates: NearDuplicateConfig = field(default_factory=NearDuplicateConfig)
    split: SplitConfig = field(default_factory=SplitConfig)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: name at least one source of documents")
        for name in self.sources:
            # The name becomes a folder of shards and a label in reports.
            if not name.replace("_", "").replace("-", "").isalnum() or not name.isascii():
                raise ValueError(f"sources: {name!r} must consist of ASCII letters, digits, - and _")
            if name == "all":
                raise ValueError("sources: 'all' is what reports call the sum of the sources; choose another name")

"""Verbs that read what a run has recorded: report, verify and lineage."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gristmill.cli.options import PathArg

if TYPE_CHECKING:
    from gristmill.artifact import Origin


def report(path: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")]) -> None:
    """Write a run's report again from what stands in its folder."""
    from gristmill.pipeline import rewrite_report

    print(rewrite_report(path))


def verify(path: PathArg) -> None:
    """Hash every file that the manifests cover; names a damaged one and exits with 1."""
    from gristmill.artifact import verify as verify_path
    from gristmill.progress import data_size

    result = verify_path(path)
    for line in result.not_covered:
        print(f"not covered: {line}")
    for line in result.problems:
        print(line, file=sys.stderr)
    if result.problems:
        raise typer.Exit(1)
    print(f"{result.num_files:,} files, {data_size(result.num_bytes)}: every byte is as it was written")


def lineage(path: PathArg) -> None:
    """Walk from a model back to each source and license."""
    from gristmill.artifact import lineage as lineage_of
    from gristmill.artifact import load_ours
    from gristmill.current import find_checkpoint

    origin = lineage_of(path if load_ours(path) else find_checkpoint(path) or path)
    for line in _lineage_lines(origin, 0, set()):
        print(line)


def _lineage_lines(node: "Origin", depth: int, printed: set[str]) -> Iterator[str]:
    """A node and, indented below it, its ancestors. A node that was printed before is not expanded again."""
    from gristmill.progress import data_size

    title = node.kind if node.kind == node.name else f"{node.kind} {node.name}"
    start = f"{'  ' * depth}{title}  {node.content[:12]}"
    if node.id in printed and node.inputs:
        yield f"{start}  as above"
        return
    printed.add(node.id)
    sizes = sorted(node.detail.get("licenses", {}).items(), key=lambda license: -license[1])
    licenses = ", ".join(f"{name} {data_size(size)}" for name, size in sizes)
    licenses = licenses or node.detail.get("license_name") or node.detail.get("license", "")
    yield f"{start}  {licenses}".rstrip()
    for parent in node.inputs:
        yield from _lineage_lines(parent, depth + 1, printed)

"""`metrics.jsonl`: one JSON object a line, each with its `kind` and `step`."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gristmill.artifact import write_atomically
from gristmill.errors import Failure

if TYPE_CHECKING:  # whoever only reads figures needs no torch
    from gristmill.train.figures import Step

METRICS = "metrics.jsonl"
MFU_ABOVE_1 = "above 100%: the rate it is compared with was measured next to other work, or is too low for this machine"

Record = Mapping[str, Any]


class MetricsLog:
    """`metrics.jsonl`, the truth of the figures: cut back to the checkpoint that training goes on from.

    keep_trying: records that a full disk does not take are written with the next one that it takes.
    """

    def __init__(self, file: Path, keep_trying: bool = False) -> None:
        self.file, self.keep_trying = file, keep_trying
        self._seconds = 0.0  # of training before this process
        self._unwritten = ""

    def resume(self, step: int) -> None:
        """Go on from the checkpoint at `step`, in another process."""
        self._keep(lambda record: step > 0 and record["step"] <= step)
        self._seconds = max((record.get("seconds", 0.0) for record in read_metrics(self.file)), default=0.0)
        if step > 0:
            self.write("resume", {"step": step, "seconds": self._seconds})

    def cut(self, step: int) -> None:
        """Training went back: forget what came after `step`, but not why."""
        self._keep(lambda record: record["step"] <= step or record["kind"] == "skipped")

    def _keep(self, wanted: Callable[[Record], bool]) -> None:
        lines = self._unwritten.splitlines(keepends=True)
        self._unwritten = "".join(line for line in lines if wanted(json.loads(line)))
        kept = [record for record in read_metrics(self.file) if wanted(record)]
        write_atomically(self.file, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def has(self, kind: str, step: int) -> bool:
        return any(record["kind"] == kind and record["step"] == step for record in read_metrics(self.file))

    def train(self, step: "Step") -> None:
        figures = asdict(step)
        figures["seconds"] = round(figures["seconds"] + self._seconds, 3)
        self.write("train", figures)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        self._unwritten += json.dumps({"kind": kind, **record}) + "\n"
        end = self.file.stat().st_size if self.file.exists() else 0
        try:
            with self.file.open("ab") as file:
                file.write(self._unwritten.encode())
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint that follows it
        except OSError:
            with suppress(OSError):
                os.truncate(self.file, end)  # half a line would be a damaged one
            if not self.keep_trying:
                raise
        else:
            self._unwritten = ""


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; none if there is no file. The last line may be cut short: a run may be alive."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError
                records.append(record)
        except ValueError:
            if number < len(lines):
                raise Failure(f"{path} line {number} is damaged: not a JSON object: {line[:60]!r}") from None
    return records

"""What a person sees while training runs: a live panel on a terminal, a line now and then in a log."""

import time
from types import TracebackType

from rich.live import Live
from rich.table import Table
from rich.text import Text

from gristmill.model.counts import count_params
from gristmill.parallel.config import Layout
from gristmill.progress import LOG_EVERY_S, console
from gristmill.train.log import MFU_ABOVE_1
from gristmill.train.loop import Skipped, Started, Step


class Display:
    """`show` each logged step, `held_out` each validation; a context manager, so that the terminal is restored."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._bits: float | None = None
        self._said = 0.0
        self._first: Step | None = None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def held_out(self, bits_per_byte: float) -> None:
        self._bits = bits_per_byte

    def show(self, step: Step) -> None:
        first = self._first = self._first or step  # memory is still cold: its own speed says little
        done = step.step - first.step
        left = duration((self.steps - step.step) * (step.seconds - first.seconds) / done) if done else "after two steps"
        rows = {
            "step": f"{step.step:,} of {self.steps:,}",
            "loss": f"{step.loss:.3f}",
            "held-out bits per byte": f"{self._bits:.3f}" if self._bits is not None else "at the first validation",
            "tokens/s": f"{step.tokens_per_second:,.0f}",
            "MFU, of the measured rate": share(step.mfu_measured),
            **({"MFU, of the data sheet": share(step.mfu_data_sheet)} if step.mfu_data_sheet else {}),
            "expert load, max over mean": f"{step.load_max_over_mean:.2f}",
            "time left": left,
        }
        if self._live:
            self._live.update(self._panel(rows, step.step / self.steps), refresh=True)
        elif time.monotonic() - self._said > LOG_EVERY_S or step.step == self.steps:
            self._said = time.monotonic()
            console.print("  " + "  ".join(f"{name} {value}" for name, value in rows.items()))

    def _panel(self, rows: dict[str, str], share: float) -> Table:
        table = Table.grid(padding=(0, 2))
        width = 40
        full = round(share * width)
        table.add_row("  ", Text("━" * full, style="cyan") + Text("━" * (width - full), style="bright_black"))
        for name, value in rows.items():
            table.add_row("  ", Text.assemble((f"{name:<27}", "bright_black"), value))
        return table


def share(mfu: float) -> str:
    return f"{mfu:.0%}" + (f" ({MFU_ABOVE_1})" if mfu > 1 else "")


def duration(seconds: float) -> str:
    """9 s, 4 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def say_started(started: Started, steps: int) -> None:
    for line in started.damage:
        console.print(f"  {line}; going on from an older checkpoint", style="red", markup=False)
    compute, counts = started.compute, count_params(started.model.cfg)
    if compute["kernels"] == "torch":
        console.print(
            "  PyTorch's own kernels: the native ones were not built or not asked for; with them training is "
            "faster (install g++, then gristmill again)"
        )
    layout = Layout(**compute["layout"])
    each = f" of each of {layout.world_size} processes" if layout.world_size > 1 else ""
    splits = {"weights": layout.split, "experts": layout.expert, "sequences": layout.context}
    split = ", ".join(f"{what} over {count} of them" for what, count in splits.items() if count > 1)
    console.print(
        f"  {f'going on at step {started.step:,}; ' if started.step else ''}{steps - started.step:,} steps; "
        f"{counts.total_params / 1e6:.1f}M parameters, {counts.active_params / 1e6:.1f}M active; {compute['dtype']} "
        f"on {compute['threads']} threads{each}{f', split: {split}' if split else ''}, {compute['kernels']} kernels"
    )


def say_skipped(event: Skipped) -> None:
    back = f", back to step {event.back_to:,}" if event.back_to is not None else ""
    console.print(f"  step {event.step:,} is left out: {event.reason}{back}", style="yellow", markup=False)

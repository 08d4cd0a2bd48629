"""`gristmill count`: what a shape holds, what a token costs and what there is to store, as aligned text."""

from collections.abc import Mapping, Sequence

from gristmill.model import ModelConfig
from gristmill.model.counts import (
    DTYPE_BYTES,
    TRAINING_BYTES,
    Part,
    count_params,
    count_parts,
    kv_bytes_per_token,
    train_flops_per_token,
)


def shape_text(name: str, cfg: ModelConfig, context: int, stored_bytes: Mapping[str, int] | None = None) -> str:
    """Show exact integers, each with its rounded form.

    context: tokens of a sequence. stored_bytes: of a directory's weights, by the form in which they are stored.
    """
    counts, parts = count_params(cfg), count_parts(cfg, context)
    total = counts.total_params
    forward = sum(part.forward_flops for part in parts)
    kv = {dtype: kv_bytes_per_token(cfg, size) for dtype, size in DTYPE_BYTES.items()}
    token = [
        ["forward", *_both(forward, "FLOP")],
        ["training", *_both(round(train_flops_per_token(cfg, context)), "FLOP")],
        *([f"KV cache, {dtype}", *_both(size, "B")] for dtype, size in kv.items()),
    ]
    sequence = [[f"KV cache, {dtype}", *_both(size * context, "B")] for dtype, size in kv.items()]
    checkpoint = [[dtype, *_both(total * size, "B")] for dtype, size in DTYPE_BYTES.items()]
    checkpoint.append(["training with AdamW", *_both(total * TRAINING_BYTES, "B")])
    rows = [["", "parameters", "", "active", "", "forward", ""], *map(_row, parts)]
    rows.append(["total", *_both(total), *_both(counts.active_params), *_both(forward, "FLOP")])
    blocks = [
        [f"{name}: {short(total)} parameters, {short(counts.active_params)} active"],
        aligned(rows),
        [f"A token in a sequence of {context:,}", *aligned(token)],
        [f"A sequence of {context:,}", *aligned(sequence)],
        ["A checkpoint", *aligned(checkpoint)],
    ]
    if stored_bytes:
        stored = [[form, *_both(size, "B")] for form, size in stored_bytes.items()]
        blocks.append(["Stored here", *aligned([*stored, ["total", *_both(sum(stored_bytes.values()), "B")]])])
    return "\n\n".join("\n".join(block) for block in blocks)


def short(value: float, unit: str = "") -> str:
    """Two decimals: 131596523520 -> "131.60B", and with a unit "131.60 GFLOP"."""
    for divisor, prefix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if value >= divisor:
            return f"{value / divisor:.2f}{' ' if unit else ''}{prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def _both(value: int, unit: str = "") -> list[str]:
    return [f"{value:,}", short(value, unit)]


def _row(part: Part) -> list[str]:
    return [part.name, *_both(part.total_params), *_both(part.active_params), *_both(part.forward_flops, "FLOP")]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join(["  " + first.ljust(widths[0]), *padded]).rstrip())
    return lines

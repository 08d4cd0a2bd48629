"""Draws docs/architecture.svg: the layers of rooms, and the paths of a batch and of a request.

It reads the rooms from tests/test_layers.py. Run `python docs/architecture.py` after changing them.
"""

import ast
from collections.abc import Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "gristmill"
SVG = ROOT / "docs" / "architecture.svg"
# Each path is a row of (step, room that does it).
BATCH = (
    ("documents", "corpus"), ("ids", "tokenizer"), ("shards", "streaming"), ("batch", "streaming"),
    ("loss", "model"), ("update", "train"), ("checkpoint", "train"), ("score", "evaluate"), ("export", "hub"),
)  # fmt: skip
REQUEST = (
    ("request", "serve"), ("admission", "serve"), ("schedule", "inference"), ("blocks", "inference"),
    ("forward pass", "model"), ("sample", "inference"), ("text", "inference"), ("response", "serve"),
)  # fmt: skip
PURPOSE = ("commands, order of stages", "uses of a model", "training", "engine, scoring", "scale, formats",
           "model, data, measures", "computation, text, storage", "artifacts, files, errors")  # fmt: skip
WIDTH, MARGIN, LABEL = 960, 20, 200
BAND, BOX, GAP = 46, 30, 8  # heights of a layer and of a box; space between boxes
STYLE = """
  .page { fill: #fff; stroke: #d0d7de } text { fill: #1f2328; font: 13px system-ui, sans-serif }
  .band { fill: #f6f8fa } .box { fill: #dbe9f9; stroke: #6c9bd1 } .batch { fill: #d7f0dc; stroke: #5fa874 }
  .request { fill: #fbe5cd; stroke: #cf9247 } .small { font-size: 11px } .head { font-weight: 600 }
  .muted { fill: #59636e } .arrow { stroke: #59636e; fill: none }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #3d444d } text { fill: #f0f6fc } .band { fill: #151b23 }
    .box { fill: #16324f; stroke: #4a80ba } .batch { fill: #173a22; stroke: #4c9163 }
    .request { fill: #4a3013; stroke: #b57f38 } .muted { fill: #9198a1 } .arrow { stroke: #9198a1 }
  }"""


def layers() -> list[list[str]]:
    """Return the existing rooms by layer, the lowest first."""
    for node in ast.parse((ROOT / "tests" / "test_layers.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "LAYERS":
            found = eval(compile(ast.Expression(node.value), "LAYERS", "eval"), {})
            return [[room for room in rooms if list(PACKAGE.glob(f"{room}*"))] for rooms in found]
    raise LookupError("tests/test_layers.py has no LAYERS")


def text(x: float, y: float, words: str, look: str = "", anchor: str = "start") -> str:
    return f'<text class="{look}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, look: str) -> str:
    return f'<rect class="{look}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"/>'


def draw_layers(y: float) -> tuple[list[str], float]:
    """Return the shapes of the layers, the highest on top, and where they end."""
    shapes = [text(MARGIN, y, "Layers: a room imports only rooms of lower layers", "head")]
    y += 12
    for level, rooms in reversed(list(enumerate(layers()))):
        rooms = rooms if len(rooms) <= 6 else [", ".join(rooms)]
        room_width = (WIDTH - 2 * MARGIN - LABEL) / len(rooms) - GAP
        shapes.append(box(MARGIN, y, WIDTH - 2 * MARGIN, BAND - 4, "band"))
        shapes.append(text(MARGIN + 10, y + 26, f"L{level}", "head"))
        shapes.append(text(MARGIN + 36, y + 26, PURPOSE[-1 - level], "muted small"))
        for number, room in enumerate(rooms):
            x = MARGIN + LABEL + number * (room_width + GAP)
            shapes.append(box(x, y + 6, room_width, BOX, "box"))
            shapes.append(text(x + room_width / 2, y + 26, room, "small" if len(room) > 40 else "", "middle"))
        y += BAND
    return shapes, y


def draw_path(title: str, steps: Sequence[tuple[str, str]], look: str, y: float) -> tuple[list[str], float]:
    """Return the shapes of a path from left to right, and where they end."""
    shapes = [text(MARGIN, y, title, "head")]
    pitch = (WIDTH - 2 * MARGIN + 18) / len(steps)
    for number, (step, room) in enumerate(steps):
        x, middle = MARGIN + number * pitch, y + 34
        if number:
            shapes.append(f'<path class="arrow" marker-end="url(#tip)" d="M{x - 17:g} {middle:g}h13"/>')
        shapes.append(box(x, y + 12, pitch - 18, 44, look))
        shapes.append(text(x + (pitch - 18) / 2, y + 31, step, "", "middle"))
        shapes.append(text(x + (pitch - 18) / 2, y + 47, room, "muted small", "middle"))
    return shapes, y + 56


def picture() -> str:
    shapes, end = draw_layers(34)
    for title, steps, look in (
        ("The path of a batch", BATCH, "batch"),
        ("The path of a request", REQUEST, "request"),
    ):
        more, end = draw_path(title, steps, look, end + 30)
        shapes += more
    height = end + 20
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        'role="img" aria-label="The layers of Gristmill, and the paths of a batch and of a request">',
        f"<style>{STYLE}\n</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="muted" d="M0 0.5L7.5 4L0 7.5z"/></marker></defs>',
        box(0.5, 0.5, WIDTH - 1, height - 1, "page"),
        *shapes,
        "</svg>\n",
    ))  # fmt: skip


if __name__ == "__main__":
    SVG.write_text(picture())

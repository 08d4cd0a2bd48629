"""The lineage picture: from each source and its licenses to what was made of it, as SVG.

Pure: takes the stages' artifacts, reads their manifests' inputs, draws. Boxes stand in columns by how many steps they
are from the data; an arrow that is already implied by a longer way round is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gristmill.artifact import Artifact, Origin, origin
from gristmill.report.charts import svg
from gristmill.report.text import THIN, escape, percent, short, size

BOX = 146
GAP = 29
PITCH = 16  # px between lines in a box


@dataclass
class Node:
    """`lines` are (look, text): look is "title", "detail" or "hash". `parents` are ids."""

    id: str
    name: str
    kind: str
    lines: list[tuple[str, str]]
    parents: list[str] = field(default_factory=list)
    depth: int = 0

    @property
    def height(self) -> int:
        return 14 + PITCH * len(self.lines)


def graph(stages: Mapping[str, Artifact], details: Mapping[str, str]) -> list[Node]:
    """Nodes in an order in which parents come before children. `details`: stage -> a few words of what it holds."""
    nodes: dict[str, Node] = {}
    made = [origin(name, artifact.manifest) for name, artifact in stages.items()]
    stage_of = {stage.id: stage.name for stage in made}  # the others are of the runs before this one

    def add(found: Origin) -> None:
        if found.id in nodes:
            return
        for parent in found.inputs:
            add(parent)
        parents = list(dict.fromkeys(parent.id for parent in found.inputs))
        if found.kind == "source":
            name, lines = f"source {found.name}", _source_lines(found.name, found.detail)
        else:
            name = stage_of.get(found.id) or f"{found.kind} {found.key[:8]}"
            lines = [("title", name), ("detail", details.get(name, "")), ("hash", found.content[:8])]
        depth = 1 + max((nodes[parent].depth for parent in parents), default=-1)
        kind = "source" if found.kind == "source" else "stage"
        nodes[found.id] = Node(found.id, name, kind, [line for line in lines if line[1]], parents, depth)

    for stage in made:
        add(stage)
    above: dict[str, set[str]] = {}
    for node in nodes.values():  # parents come before children
        above[node.id] = set(node.parents).union(*(above[parent] for parent in node.parents))
    for node in nodes.values():
        node.parents = [p for p in node.parents if not any(p in above[q] for q in node.parents)]
    return list(nodes.values())


def _source_lines(name: str, said: Mapping) -> list[tuple[str, str]]:  # type: ignore[type-arg]
    total = sum(said["licenses"].values()) or 1
    ranked = sorted(said["licenses"].items(), key=lambda item: (-item[1], item[0]))
    if "documents" in said:
        lines = [("title", name), ("detail", f"{short(said['documents'])} docs, {size(said['bytes'])}")]
    else:
        lines = [
            ("title", _cut(name, 18)),
            ("detail", "published model"),
            ("detail", _cut(said.get("license_name") or said["license"], 20)),
        ]
    shown = ranked if len(ranked) <= 4 else ranked[:3]
    lines += [("detail", f"{_cut(license, 14)} {percent(held / total)}") for license, held in shown]
    if len(ranked) > len(shown):
        lines.append(("detail", f"and {len(ranked) - len(shown)}{THIN}more licenses"))
    if said.get("fingerprint"):
        lines.append(("hash", str(said["fingerprint"])[:8]))
    return lines


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def draw(nodes: Sequence[Node], *, id: str, upright: bool) -> str:
    """Left to right, or (upright) top to bottom with two boxes side by side, for narrow pages."""
    columns = [[n for n in nodes if n.depth == depth] for depth in range(max((n.depth for n in nodes), default=-1) + 1)]
    places: dict[str, tuple[float, float]] = {}
    if upright:
        width, height = 2.0 * BOX + GAP, 2.0
        for column in columns:
            for start in range(0, len(column), 2):
                row = column[start : start + 2]
                left = (width - len(row) * BOX - (len(row) - 1) * GAP) / 2
                for n, node in enumerate(row):
                    places[node.id] = (left + n * (BOX + GAP), height)
                height += max(node.height for node in row) + (GAP if start + 2 >= len(column) else 12)
        height -= GAP - 2
    else:
        width = len(columns) * BOX + (len(columns) - 1) * GAP
        height = max((sum(n.height + 18 for n in column) - 18 for column in columns), default=0) + 4.0
        for depth, column in enumerate(columns):
            y = (height - sum(n.height + 18 for n in column) + 18) / 2
            for node in column:
                places[node.id] = (depth * (BOX + GAP), y)
                y += node.height + 18
    by_id = {node.id: node for node in nodes}
    arrows = [
        _arrow(places[parent], by_id[parent].height, places[node.id], node.height, upright)
        for node in nodes
        for parent in node.parents
    ]
    boxes = [_box(node, *places[node.id]) for node in nodes]
    told = "; ".join(f"{n.name} from {', '.join(by_id[p].name for p in n.parents)}" for n in nodes if n.parents)
    arrowhead = (
        f'<marker id="{escape(id)}-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="tip" d="M0 0.5L7.5 4L0 7.5z"/></marker>'
    )
    body = arrowhead + "".join(arrows).replace("#TIP", f"#{escape(id)}-tip") + "".join(boxes)
    return svg(body, id=id, title="Lineage", description=told or "Nothing yet.", width=max(width, 1), height=height)


def _arrow(start: tuple[float, float], start_h: float, end: tuple[float, float], end_h: float, upright: bool) -> str:
    if upright:
        x1, y1, x2, y2 = start[0] + BOX / 2, start[1] + start_h, end[0] + BOX / 2, end[1]
        path = f"M{x1:g} {y1:g}C{x1:g} {(y1 + y2) / 2:g} {x2:g} {(y1 + y2) / 2:g} {x2:g} {y2:g}"
    else:
        x1, y1, x2, y2 = start[0] + BOX, start[1] + start_h / 2, end[0], end[1] + end_h / 2
        path = f"M{x1:g} {y1:g}C{(x1 + x2) / 2:g} {y1:g} {(x1 + x2) / 2:g} {y2:g} {x2:g} {y2:g}"
    return f'<path class="arrow" marker-end="url(#TIP)" d="{path}"/>'


def _box(node: Node, x: float, y: float) -> str:
    text = "".join(
        f'<text class="box-{look}" x="{x + 10:g}" y="{y + 20 + n * PITCH:g}">{escape(_cut(words, 20))}</text>'
        for n, (look, words) in enumerate(node.lines)
    )
    return f'<rect class="box {node.kind}" x="{x:g}" y="{y:g}" width="{BOX}" height="{node.height}" rx="5"/>{text}'

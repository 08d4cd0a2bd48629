// Grids of layers by experts: one path for each colour, so that thousands of cells cost nine elements.
const SVG = "http://www.w3.org/2000/svg";
const EDGES = [0.25, 0.5, 0.75, 0.9, 1.1, 1.33, 2, 4]; // times the balanced share, as in the report of a run

export class Grid {
  // say: called with (layer, expert) under the pointer, and with nothing when it leaves.
  constructor(svg, prefix, say) {
    this.svg = svg;
    this.prefix = prefix;
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = (part, count) => Math.min(count - 1, Math.max(0, Math.floor(part * count)));
      say(
        at((event.clientY - box.top) / box.height, this.layers),
        at((event.clientX - box.left) / box.width, this.experts),
      );
    });
    svg.addEventListener("pointerleave", () => say());
  }

  shape(layers, experts) {
    this.layers = layers;
    this.experts = experts;
    this.svg.setAttribute("viewBox", `0 0 ${experts} ${layers}`);
    this.svg.style.height = `${Math.min(20 * layers, Math.max(120, 8 * layers))}px`;
    this.svg.replaceChildren();
    this.paths = new Map();
  }

  // color: of (layer, expert) a number, or nothing for the ground.
  draw(color, label) {
    const cells = new Map();
    for (let layer = 0; layer < this.layers; layer++)
      for (let expert = 0; expert < this.experts; expert++) {
        const chosen = color(layer, expert) ?? "ground";
        cells.set(chosen, (cells.get(chosen) ?? "") + `M${expert + 0.06} ${layer + 0.08}h.88v.84h-.88z`);
      }
    for (const chosen of cells.keys())
      if (!this.paths.has(chosen)) {
        const path = document.createElementNS(SVG, "path");
        path.setAttribute("class", `${this.prefix}${chosen}`);
        this.svg.append(path);
        this.paths.set(chosen, path);
      }
    for (const [chosen, path] of this.paths) path.setAttribute("d", cells.get(chosen) ?? "");
    this.svg.setAttribute("aria-label", label);
  }
}

// Of a weight: four steps of one colour.
export const weightStep = (weight) => (weight === undefined ? undefined : Math.min(4, 1 + Math.floor(weight * 4)));

// Of a share, as times the balanced one: the report's nine steps from idle to busy.
export const shareStep = (times) => EDGES.filter((edge) => times >= edge).length;

export function table(element, head, rows) {
  const row = (cells, kind) => {
    const tr = document.createElement("tr");
    cells.forEach((text, n) => {
      const cell = document.createElement(n ? kind : "th");
      if (cell.tagName === "TH") cell.scope = kind === "td" ? "row" : "col";
      cell.textContent = text;
      tr.append(cell);
    });
    return tr;
  };
  const [thead, tbody] = ["thead", "tbody"].map((name) => document.createElement(name));
  thead.append(row(head, "th"));
  tbody.append(...rows.map((cells) => row(cells, "td")));
  element.replaceChildren(thead, tbody);
}

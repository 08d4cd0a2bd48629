// What is known of one token: what else could have stood there, and the experts that were asked, here and in all.
import { level, percent, visible } from "./answer.js";
import { Grid, shareStep, table, weightStep } from "./experts.js";

const find = (id) => document.getElementById(id);
const probability = (logprob) => percent(Math.exp(logprob));

export class Inspector {
  constructor() {
    this.span = null;
    this.mixture = null;
    this.grids = [
      new Grid(find("token-grid"), "w", (layer, expert) => this.readToken(layer, expert)),
      new Grid(find("share-grid"), "h", (layer, expert) => this.readShare(layer, expert)),
    ];
    for (const id of ["token-numbers", "share-numbers"]) find(id).addEventListener("toggle", () => this.numbers());
  }

  // mixture: of the model's card; null for a dense model.
  begin(mixture) {
    this.mixture = mixture;
    find("dense").hidden = mixture !== null;
    if (mixture === null) return;
    for (const grid of this.grids) grid.shape(mixture.layers, mixture.experts);
    const options = Array.from({ length: mixture.layers }, (_, layer) => {
      const option = document.createElement("option");
      option.value = String(layer);
      option.textContent = `their first expert in layer ${layer + 1}`;
      return option;
    });
    find("tint").append(...options);
  }

  // The class and hue of a token's span, by what the page is asked to show.
  tint(span) {
    const by = find("tint").value;
    const [token] = span.tokens;
    span.classList.remove("p1", "p2", "p3", "p4", "hue");
    if (by === "probability") {
      if (token.logprob !== null && level(token)) span.classList.add(`p${level(token)}`);
    } else if (by !== "none" && token.experts?.ids.length) {
      span.classList.add("hue");
      span.style.setProperty("--hue", (360 * token.experts.ids[Number(by)][0]) / this.mixture.experts);
    }
  }

  // Once a frame at most, however fast tokens come.
  show(span) {
    this.span?.classList.remove("here");
    span.classList.add("here");
    this.span = span;
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.span) this.draw();
    });
  }

  clear() {
    this.span = null;
    find("no-token").hidden = false;
    for (const id of ["token", "mixture", "tinting"]) find(id).hidden = true;
  }

  draw() {
    const { tokens, answer } = this.span;
    const [token] = tokens;
    find("no-token").hidden = true;
    find("token").hidden = find("tinting").hidden = false;
    find("token-text").textContent = visible(this.span.textContent);
    const several = tokens.length > 1 ? `, the first of ${tokens.length} that make it` : "";
    find("token-place").textContent = `token ${token.index + 1} of ${answer.tokens.length}${several}`;
    this.alternatives(token);
    const has = Boolean(token.experts?.ids.length);
    find("mixture").hidden = !has;
    if (has) this.experts(token, answer);
    find("summary").textContent =
      `${probability(token.logprob)} probable. ` +
      token.top.map(({ text, logprob }) => `${visible(text)} ${probability(logprob)}`).join(", ");
  }

  alternatives(token) {
    const mine = token.top.findIndex(({ text, logprob }) => text === token.text && logprob === token.logprob);
    const listed = mine < 0 ? [...token.top, token] : token.top;
    const most = Math.exp(listed[0].logprob);
    find("alternatives").replaceChildren(
      ...listed.map((one, n) => {
        const item = document.createElement("li");
        if (n === (mine < 0 ? listed.length - 1 : mine)) item.className = "taken";
        const [text, bar, value] = ["code", "i", "data"].map((name) => document.createElement(name));
        text.textContent = visible(one.text);
        bar.style.setProperty("--part", Math.exp(one.logprob) / most);
        value.textContent = probability(one.logprob);
        value.value = Math.exp(one.logprob);
        item.append(text, bar, value);
        return item;
      }),
    );
  }

  experts(token, answer) {
    const { layers, experts, per_token } = this.mixture;
    this.weights = token.experts.ids.map(
      (ids, layer) => new Map(ids.map((id, n) => [id, token.experts.weights[layer][n]])),
    );
    this.times = (layer, expert) =>
      ((answer.shared[layer].get(expert) ?? 0) * experts) / (per_token * answer.tokens.length);
    this.grids[0].draw(
      (layer, expert) => weightStep(this.weights[layer].get(expert)),
      `Which ${per_token} of ${experts} experts this token asked in each of ${layers} layers`,
    );
    this.grids[1].draw(
      (layer, expert) => shareStep(this.times(layer, expert)),
      `How often each of ${experts} experts was asked in each of ${layers} layers over the whole answer`,
    );
    this.readToken();
    this.readShare();
    this.numbers();
  }

  readToken(layer, expert) {
    if (!this.weights) return;
    const weight = layer === undefined ? undefined : this.weights[layer].get(expert);
    const part = weight === undefined ? "not asked" : percent(weight);
    find("token-readout").textContent =
      layer === undefined
        ? `${this.mixture.per_token} of ${this.mixture.experts} in each layer`
        : `layer ${layer + 1} · expert ${expert} · ${part}`;
  }

  readShare(layer, expert) {
    if (!this.times) return;
    find("share-readout").textContent =
      layer === undefined
        ? `${this.span.answer.tokens.length} tokens`
        : `layer ${layer + 1} · expert ${expert} · ${this.times(layer, expert).toFixed(2)} × balanced`;
  }

  // Only what is open, as they may be thousands of cells.
  numbers() {
    if (!this.weights) return;
    const { experts, layers, per_token } = this.mixture;
    const told = (map) => [...map].map(([id, weight]) => `${id} · ${percent(weight)}`);
    if (find("token-numbers").open)
      table(
        find("token-numbers").querySelector("table"),
        ["Layer", ...Array.from({ length: per_token }, (_, n) => (n ? `${n + 1}.` : "Heaviest"))],
        this.weights.map((map, layer) => [String(layer + 1), ...told(map)]),
      );
    if (find("share-numbers").open)
      table(
        find("share-numbers").querySelector("table"),
        ["Expert", ...Array.from({ length: layers }, (_, layer) => `Layer ${layer + 1}`)],
        Array.from({ length: experts }, (_, expert) => [
          String(expert),
          ...Array.from({ length: layers }, (_, layer) => `${this.times(layer, expert).toFixed(2)}×`),
        ]),
      );
  }
}

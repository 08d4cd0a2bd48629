// An answer as it grows: its tokens as spans, each of which can be pointed at and reached by the arrow keys.
export const percent = (share) => {
  const value = 100 * share;
  if (value >= 99.95 && share < 1) return "> 99.9%";
  if (value < 0.01) return "< 0.01%";
  return `${value.toFixed(value < 1 ? 2 : 1)}%`;
};

// White space that can be seen.
export const visible = (text) =>
  text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍") || "∅";

const LEVELS = [0.5, 0.2, 0.05, 0.01]; // probabilities under which a token is tinted one step more

export class Answer {
  // root: an empty element. tint: of a span with its tokens, called for each.
  constructor(root, tint) {
    this.root = root;
    this.tint = tint;
    this.tokens = []; // all, in order
    this.spans = [];
    this.text = "";
    this.shared = []; // of each layer how often each expert was chosen
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.pending = []; // tokens that are only the beginning of a character
    this.spelled = ""; // the text of all spans
    this.rest = document.createTextNode(""); // text whose tokens are not told: cut by a stop text
    root.append(this.rest);
  }

  add(text, tokens) {
    this.text += text;
    const made = document.createDocumentFragment();
    for (const token of tokens) {
      token.index = this.tokens.length;
      this.tokens.push(token);
      this.count(token);
      if (token.bytes === null) continue;
      this.pending.push(token);
      const spelled = this.decoder.decode(token.bytes, { stream: true });
      if (spelled) this.spell(spelled, made);
    }
    this.root.insertBefore(made, this.rest);
    this.rest.data = this.text.startsWith(this.spelled) ? this.text.slice(this.spelled.length) : "";
  }

  // Append a span of the part that is in the text: of a control token and behind a stop text, nothing.
  spell(spelled, to) {
    const left = this.text.slice(this.spelled.length);
    const part = left.startsWith(spelled) ? spelled : spelled.startsWith(left) ? left : "";
    if (part) to.append(this.span(part));
    else this.pending = [];
  }

  span(text) {
    const span = document.createElement("span");
    span.textContent = text;
    span.className = `t${text.includes("\n") ? " line" : ""}${text.startsWith("\n") ? " break" : ""}`;
    span.tabIndex = this.spans.length ? -1 : 0; // Tab reaches the answer, arrows its tokens
    span.tokens = this.pending;
    span.answer = this;
    span.place = this.spans.length;
    this.pending = [];
    this.spelled += text;
    this.spans.push(span);
    this.tint(span);
    return span;
  }

  count({ experts }) {
    experts?.ids.forEach((ids, layer) => {
      this.shared[layer] ??= new Map();
      for (const id of ids) this.shared[layer].set(id, (this.shared[layer].get(id) ?? 0) + 1);
    });
  }

  // Should the spans not be able to spell it, the text itself stands there.
  end() {
    const spelled = this.decoder.decode(); // of a character that never became whole
    if (spelled) {
      const made = document.createDocumentFragment();
      this.spell(spelled, made);
      this.root.insertBefore(made, this.rest);
      this.rest.data = this.text.slice(this.spelled.length);
    }
    if (!this.text.startsWith(this.spelled)) this.root.textContent = this.text;
  }
}

export const level = (token) => LEVELS.filter((edge) => Math.exp(token.logprob) < edge).length;

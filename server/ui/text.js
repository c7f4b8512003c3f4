// The text of an answer: appended once a frame, in blocks, so that a long one costs no more per
// token than a short one; tokens coloured by probability; the mark where the model's memory begins.

import { $, announce, count, h } from "./dom.js";

const BLOCK = 1500; // characters from which a block ends at the next line
const LEVELS = [0.9, 0.5, 0.2, 0.05]; // probabilities at which the colour changes

/** The class of a token's colour: "p0" is likely, "p4" a surprise. */
function level(logprob) {
  const p = Math.exp(logprob);
  const found = LEVELS.findIndex((bound) => p >= bound);
  return `p${found < 0 ? LEVELS.length : found}`;
}

export class TextView {
  /** onFlush: called after text has been added. */
  constructor(label, onFlush = () => {}) {
    this.element = h("div", { class: "answer" });
    this._label = label;
    this._onFlush = onFlush;
    this.clear();
    this.element.addEventListener("pointerover", (event) => this._point(event.target));
    this.element.addEventListener("pointerleave", hideTip);
    this.element.addEventListener("keydown", (event) => this._onKey(event));
    this.element.addEventListener("blur", () => this._select(-1));
  }

  clear() {
    this.element.replaceChildren();
    this._spans = [];
    this._at = -1;
    this._waiting = [];
    this._frame = 0;
    this._length = 0;
    this._horizon = null;
    this._newBlock();
  }

  /** Everything at once. tokens: [end, logprob, alternatives] with ends in characters.
   *  horizon: the character before which the model remembers nothing, and what to say there. */
  show(text, tokens, horizon = null) {
    cancelAnimationFrame(this._frame);
    this.clear();
    this._horizon = horizon;
    let start = 0;
    for (const token of tokens) {
      this._waiting.push([text.slice(start, token[0]), token]);
      start = token[0];
    }
    if (start < text.length) this._waiting.push([text.slice(start), null]);
    this.flush();
  }

  /** Add text with the next frame. */
  append(text, token = null) {
    this._waiting.push([text, token]);
    if (!this._frame) {
      this._frame = requestAnimationFrame(() => this.flush());
      // a hidden page has no frames, and would keep everything waiting
      if (document.hidden && this._waiting.length > 500) this.flush();
    }
  }

  /** Put what waits into the page. */
  flush() {
    cancelAnimationFrame(this._frame);
    this._frame = 0;
    for (const [text, token] of this._waiting) this._add(text, token);
    this._waiting = [];
    this._onFlush();
  }

  _add(text, token) {
    const horizon = this._horizon;
    if (horizon && this._length <= horizon.at && this._length + text.length > horizon.at) {
      const cut = horizon.at - this._length;
      this._horizon = null;
      if (cut > 0) this._add(text.slice(0, cut), token);
      this._placeHorizon(horizon.label);
      this._add(text.slice(cut), token);
      return;
    }
    this._length += text.length;
    if (token === null) {
      if (this._tail === null) {
        this._tail = document.createTextNode("");
        this._block.append(this._tail);
      }
      this._tail.appendData(text);
    } else {
      const span = h("span", { class: level(token[1]) }, text);
      span.token = token;
      this._spans.push(span);
      this._block.append(span);
      this._tail = null;
      if (this._spans.length === 1) {
        this.element.tabIndex = 0;
        this.element.setAttribute("role", "group");
        this.element.setAttribute("aria-label", `${this._label}. The left and right arrow keys move between tokens.`);
      }
    }
    this._blockLength += text.length;
    if (this._blockLength > BLOCK && text.endsWith("\n")) this._newBlock();
  }

  _newBlock() {
    this._block = h("div", { class: "block" });
    this.element.append(this._block);
    this._tail = null;
    this._blockLength = 0;
  }

  _placeHorizon(label) {
    for (const each of this.element.children) each.classList.add("forgotten");
    this.element.append(h("div", { class: "horizon", role: "note" }, label));
    this._newBlock();
  }

  _point(target) {
    if (target.token) showTip(target);
    else hideTip();
  }

  _onKey(event) {
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
    if (event.key === "Escape") return this._select(-1);
    if (!(event.key in moves) || !this._spans.length) return undefined;
    event.preventDefault();
    const last = this._spans.length - 1;
    return this._select(Math.min(last, Math.max(0, this._at + moves[event.key])));
  }

  _select(at) {
    this._spans[this._at]?.classList.remove("current");
    this._at = at;
    const span = this._spans[at];
    if (!span) return hideTip();
    span.classList.add("current");
    span.scrollIntoView({ block: "nearest" });
    showTip(span);
    return announce(spoken(span));
  }
}

const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 10 ? `${p.toFixed(0)} %` : p >= 0.1 ? `${p.toFixed(1)} %` : "below 0.1 %";
};
const visible = (text) =>
  text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(no text)";

function spoken(span) {
  const [, logprob, others] = span.token;
  const named = others.map(([text, each]) => `${visible(text)} ${percent(each)}`).join(", ");
  return `${visible(span.textContent)}, ${percent(logprob)}. Likeliest: ${named}`;
}

function showTip(span) {
  const tip = $("token-tip");
  const [, logprob, others] = span.token;
  tip.replaceChildren(
    h("p", {}, h("b", {}, visible(span.textContent)), ` ${percent(logprob)}`),
    h("ol", {}, others.map(([text, each]) => {
      const bar = h("i", {});
      bar.style.width = `${Math.max(1, 100 * Math.exp(each))}%`;
      return h("li", { class: text === span.textContent ? "taken" : null }, bar, h("span", {}, visible(text)), h("span", {}, percent(each)));
    })),
  );
  tip.hidden = false;
  const at = span.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const above = at.top - size.height - 6;
  tip.style.left = `${Math.max(6, Math.min(at.left, innerWidth - size.width - 6))}px`;
  tip.style.top = `${above > 6 ? above : at.bottom + 6}px`;
}

function hideTip() {
  $("token-tip").hidden = true;
}

/** The words at the place where memory begins. */
export const horizonLabel = (contextStart) =>
  `the model remembers from here on: context_start, token ${count(contextStart)}`;

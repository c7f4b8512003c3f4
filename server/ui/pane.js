// One conversation: its turns, the composer below them, and the life of a running turn, from its
// request over lost connections and reloads to what the session kept of it.

import { ApiError, events, get, post, request, session as at } from "./api.js";
import { announce, bytes, confirm, count, h, plural } from "./dom.js";
import { continuesAway, samplingFields, wantsProbabilities } from "./parameters.js";
import { nameOf } from "./sessions.js";
import { forgetTurns, loadTurns, saveTurns } from "./store.js";
import { horizonLabel, TextView } from "./text.js";
import { newTurn, placeOf, positionOf, recovered, takeEvent, takeTime } from "./turn.js";

const SAVE_EVERY = 1000; // milliseconds between two savings of a running turn
const POLL = 300;
const NUM_ALTERNATIVES = 5;
const NO_TEMPLATE = "This model has no chat template, so it continues text; --chat-template plain lets it chat.";

export class Pane {
  /** app: what the panes share, see main.js. letter: A or B. */
  constructor(app, letter) {
    this.app = app;
    this.turns = [];
    this.session = null;
    this.running = null;
    this._views = [];
    this._isStuck = true;
    this._build(letter);
    this.refresh();
  }

  _build(letter) {
    const kind = letter.toLowerCase();
    this._badge = h("span", { class: `badge ${kind}` }, letter);
    this._title = h("h2", { id: `title-${kind}` }, "New session");
    this._facts = h("p", { class: "fine facts-line" });
    const button = (text, act, extra = {}) => h("button", { type: "button", onclick: () => this._try(act), ...extra }, text);
    this._fork = button("Fork", () => this.fork());
    this._download = button("Download", () => this.download());
    this._delete = button("Delete", () => this.remove());
    this._close = button("Close", () => this.app.close(this), { "aria-label": `Close the conversation ${letter}` });
    this._list = h("div", { class: "turns" });
    this._empty = h("p", { class: "empty" });
    this._scroller = h("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": `Turns of the conversation ${letter}` }, this._empty, this._list);
    this._scroller.addEventListener("scroll", () => {
      const { scrollTop, scrollHeight, clientHeight } = this._scroller;
      this._isStuck = scrollHeight - scrollTop - clientHeight < 40;
    }, { passive: true });
    this._error = h("p", { class: "error", role: "alert" });
    this._input = h("textarea", { id: `prompt-${kind}`, rows: "3", spellcheck: "false", "aria-label": `Prompt for the conversation ${letter}`, oninput: () => this.refresh(), onkeydown: (event) => this._onKey(event) });
    this._send = h("button", { type: "button", class: "main-action", onclick: () => this.app.send(this) }, "Send");
    this._stop = h("button", { type: "button", onclick: () => this._try(() => this.stop()) }, "Stop");
    this._mode = h("select", { "aria-label": "Mode", onchange: () => this.refresh() },
      h("option", { value: "text" }, "Continue text"), h("option", { value: "chat" }, "Chat"));
    if (this.app.hasTemplate) this._mode.value = "chat";
    else this._mode.querySelector("[value=chat]").disabled = true;
    this._both = h("label", { class: "both" }, h("input", { type: "checkbox" }), " to both");
    this._hint = h("p", { class: "fine" });
    this.element = h("section", { class: `pane ${kind}`, "aria-labelledby": `title-${kind}` },
      h("div", { class: "pane-head" }, this._badge, this._title, h("div", { class: "row" }, this._fork, this._download, this._delete, this._close), this._facts),
      this._scroller, this._error,
      h("div", { class: "composer" }, this._input, h("div", { class: "row" }, this._mode, h("span", { class: "grow" }), this._both, this._stop, this._send), this._hint));
  }

  _onKey(event) {
    const isSend = event.key === "Enter" && !event.isComposing && (event.ctrlKey || event.metaKey || (this.isChat && !event.shiftKey));
    if (isSend) {
      event.preventDefault();
      this.app.send(this);
    } else if (event.key === "Escape" && this.running) {
      this._try(() => this.stop());
    }
  }

  get isChat() {
    return this._mode.value === "chat";
  }

  get wantsBoth() {
    return this._both.firstChild.checked;
  }

  get prompt() {
    return this._input.value;
  }

  set prompt(text) {
    this._input.value = text;
    this.refresh();
  }

  focus() {
    this._input.focus();
  }

  async _try(act) {
    this._error.textContent = "";
    try {
      await act();
    } catch (error) {
      if (error.name !== "AbortError") this._error.textContent = error.message;
    }
    this.refresh();
  }

  // What is shown

  refresh() {
    const isRunning = this.running !== null;
    const { session, app } = this;
    this._title.textContent = session ? nameOf(session) : "New session";
    this._title.title = session?.id ?? "";
    this._facts.textContent = session ? this._told(session) : "";
    for (const each of [this._fork, this._download, this._delete]) {
      each.disabled = isRunning;
      each.hidden = !session;
    }
    this._badge.hidden = this._both.hidden = this._close.hidden = app.panes.length < 2;
    this._stop.hidden = !isRunning;
    const canContinue = !this.isChat && session !== null && session.position > 0;
    this._send.disabled = isRunning || (this.prompt === "" && !canContinue);
    this._send.textContent = this.isChat || this.prompt !== "" ? "Send" : "Continue";
    this._empty.hidden = this.turns.length > 0;
    this._empty.textContent = this.isChat ? "Say something." : "Write the beginning of a text; the model goes on.";
    this._input.placeholder = this.isChat ? "Message" : canContinue ? "More text, or nothing to let it go on" : "def fibonacci(n):";
    this._hint.textContent = (app.hasTemplate ? "" : `${NO_TEMPLATE} `) + (this.isChat ? "Enter sends, Shift+Enter is a new line." : "Ctrl+Enter sends.");
    this._showActions();
    this._stick();
  }

  _told(session) {
    const told = [plural(session.position, "token"), `${bytes(session.bytes)} stored`];
    told.push(session.context_start ? `remembers from token ${count(session.context_start)}` : "remembers all of them");
    if (session.context_policy === "exact") told.push("exact");
    if (!session.durable) told.push("ends with the server");
    if (session.interrupted) told.push("a crash interrupted its last turn, which was undone");
    return told.join(" · ");
  }

  _addView(turn) {
    const text = new TextView("Answer", () => this._stick());
    const note = h("p", { class: "fine turn-note" });
    const back = h("button", { type: "button", onclick: () => this._try(() => this.rewindTo(this.turns.indexOf(turn))) }, "Rewind to before this");
    const branch = h("button", { type: "button", onclick: () => this._try(() => this.branchAfter(this.turns.indexOf(turn))) }, "Branch here");
    const prompt = h("div", { class: "prompt" }, turn.mode === "recovered" ? "" : turn.prompt);
    prompt.hidden = turn.mode === "recovered" || turn.prompt === "";
    const forgotten = h("div", { class: "horizon", role: "note" });
    const element = h("article", { class: `turn ${turn.mode}`, "aria-label": `Turn from token ${turn.start}` }, prompt, forgotten, text.element, h("div", { class: "row turn-foot" }, note, h("span", { class: "grow" }), branch, back));
    const view = { turn, text, note, back, branch, element, forgotten, prompt };
    this._views.push(view);
    this._list.append(element);
    text.show(turn.text, turn.tokens);
    this._showTurn(view);
    return view;
  }

  _showTurns() {
    this._list.replaceChildren();
    this._views = [];
    for (const turn of this.turns) this._addView(turn);
    this._showHorizon();
    this._isStuck = true;
    this._stick();
    this.refresh();
    this.app.draw();
  }

  _showTurn({ turn, note, element }) {
    const words = {
      running: "generating …", stopped: "stopped", failed: "failed",
      lost: "not kept: the session is as it was before this turn",
    };
    const reasons = { length: "reached the longest answer", stop: "ended by itself", timeout: "out of time", abort: "ended from outside" };
    const told = [words[turn.status] ?? reasons[turn.reason] ?? turn.reason ?? "done"];
    if (turn.mode === "recovered") told[0] = `what the server keeps of this session: its last ${plural(turn.completionTokens, "token")}`;
    else if (turn.status !== "lost") told.push(plural(turn.completionTokens, "token"), `tokens ${count(turn.start)} to ${count(positionOf(turn))}`);
    note.textContent = told.join(" · ");
    element.classList.toggle("lost", turn.status === "lost");
    element.setAttribute("aria-busy", turn.status === "running" ? "true" : "false");
  }

  _kept() {
    return this.turns.filter((each) => each.status !== "lost");
  }

  _showActions() {
    const kept = this._kept();
    const numUndoable = this.session?.checkpoints ?? 0;
    for (const { turn, back, branch } of this._views) {
      const fromEnd = kept.length - kept.indexOf(turn);
      const isKept = kept.includes(turn) && turn.mode !== "recovered" && this.session !== null;
      back.hidden = !isKept || fromEnd > numUndoable;
      branch.hidden = !isKept || fromEnd - 1 > numUndoable;
      back.disabled = branch.disabled = this.running !== null;
    }
  }

  /** Mark where the model's memory begins, in the turn that holds the place. */
  _showHorizon() {
    const start = this.session?.context_start ?? 0;
    for (const view of this._views) {
      const { turn, text, element, forgotten, prompt } = view;
      const place = turn.status === "lost" ? "before" : placeOf(turn, start);
      const isNew = view.place !== place && turn.status !== "running";
      view.place = place;
      element.classList.toggle("forgotten", place === "after");
      prompt.classList.toggle("forgotten", place === "prompt" || typeof place === "number");
      forgotten.hidden = place !== "prompt";
      forgotten.textContent = place === "prompt" ? `${horizonLabel(start)}, within this prompt` : "";
      const isInText = typeof place === "number";
      if (isNew && (isInText || view.hadHorizon)) {
        text.show(turn.text, turn.tokens, isInText ? { at: place, label: horizonLabel(start) } : null);
        view.hadHorizon = isInText;
      }
    }
  }

  /** Scroll to the end, unless the reader has scrolled away from it. */
  _stick() {
    if (this._isStuck) this._scroller.scrollTop = 1e9;
  }

  // Opening

  /** Show a session: the turns that this tab knows, or what the server keeps of it. */
  async open(id) {
    this.session = await get(at(id));
    this.turns = loadTurns(id);
    const mode = this.turns.findLast((each) => each.mode !== "recovered")?.mode;
    if (mode) this._mode.value = mode;
    const last = this.turns.at(-1);
    if (last?.status === "running") {
      this._showTurns();
      await this._try(() => this._pickUp(last));
      return;
    }
    await this._reconcile();
    this._showTurns();
  }

  clear() {
    this.session = null;
    this.turns = [];
    this._error.textContent = "";
    this._showTurns();
    this._input.focus();
  }

  /** Drop turns that the session does not hold any more; ask for its last ids if others are new. */
  async _reconcile() {
    const { id, position } = this.session;
    const kept = this.turns.filter((each) => each.status === "lost" || (each.end ?? Infinity) <= position);
    const end = kept.filter((each) => each.status !== "lost").at(-1)?.end ?? 0;
    this.turns = end === position ? kept : [await this._recover()].filter(Boolean);
    saveTurns(id, this.turns);
  }

  async _recover() {
    const { tokens, start, context_start: contextStart } = await get(`${at(this.session.id)}/tokens`);
    if (!tokens.length) return null;
    const text = await textOf(tokens);
    const num = contextStart - start;
    const marks = num > 0 ? [[num, (await textOf(tokens.slice(0, num))).length]] : [];
    return recovered(text, start, this.session, [...marks, [tokens.length, text.length]]);
  }

  // Turns

  async send(text) {
    await this._try(async () => {
      if (this.running) return;
      const name = text.trim().slice(0, 60);
      if (this.session === null) {
        this.session = await post("v1/sessions", { metadata: name ? { name } : {} });
        this.app.changed();
      }
      const turn = newTurn(this.isChat ? "chat" : "text", text, this.session.position, continuesAway());
      this.turns.push(turn);
      this._addView(turn);
      this.prompt = "";
      this._isStuck = true;
      const isSent = await this._run(turn, (signal) => this._request(turn, signal));
      if (!isSent && this.prompt === "") this.prompt = text;
    });
  }

  _request(turn, signal) {
    const isChat = turn.mode === "chat";
    const body = {
      ...samplingFields(), session_id: this.session.id, stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
      on_disconnect: turn.continues ? "continue" : "cancel",
    };
    if (isChat) body.messages = [{ role: "user", content: turn.prompt }];
    else body.prompt = turn.prompt;
    if (wantsProbabilities()) Object.assign(body, isChat ? { logprobs: true, top_logprobs: NUM_ALTERNATIVES } : { logprobs: NUM_ALTERNATIVES });
    return request(isChat ? "v1/chat/completions" : "v1/completions", { method: "POST", json: body, signal });
  }

  /** Read a turn to its end, over lost connections. False: the server refused it. */
  async _run(turn, open) {
    const controller = new AbortController();
    this.running = { turn, controller, isStopped: false };
    this.refresh();
    announce("Generating");
    try {
      let isOver = false;
      while (!isOver) {
        try {
          await this._read(turn, await open(controller.signal));
          isOver = true;
        } catch (error) {
          if (error.name === "AbortError") break;
          if (!(error instanceof ApiError)) throw error;
          if (error.status !== 0) {
            if (turn.completionTokens === 0 && turn.lastEventId === null) {
              await this._drop(turn);
              throw error;
            }
            break; // 404, 410: the turn's events are gone
          }
          this._error.textContent = "The connection was lost; waiting for the server …";
          await this.app.whenReachable(controller.signal);
          this._error.textContent = "";
          if (!turn.continues) break;
          open = (signal) => this._events(turn, signal);
        }
      }
      await this._settle(turn);
    } finally {
      this.running = null;
      if (this.session) saveTurns(this.session.id, this.turns);
      this._showHorizon();
      for (const view of this._views) this._showTurn(view);
      this.refresh();
      this._stick();
      this.app.changed();
      this.app.draw();
    }
    announce(turn.status === "lost" ? "The turn was not kept" : `Finished: ${plural(turn.completionTokens, "token")}`);
    return true;
  }

  _events(turn, signal) {
    const headers = turn.lastEventId === null ? {} : { "Last-Event-ID": turn.lastEventId };
    return request(`${at(this.session.id)}/events`, { headers, signal });
  }

  async _pickUp(turn) {
    if (turn.continues) await this._run(turn, (signal) => this._events(turn, signal));
    else {
      await this._settle(turn);
      this._showTurns();
    }
  }

  async _read(turn, response) {
    if (response.status === 204) return;
    const view = this._views.find((each) => each.turn === turn);
    let before = null;
    let saved = performance.now();
    for await (const batch of events(response)) {
      const numBefore = turn.completionTokens;
      for (const { id, data, isDone } of batch) {
        if (id !== null) turn.lastEventId = id;
        if (isDone) continue;
        if (data.error) {
          turn.status = "failed";
          this._error.textContent = data.error.message;
          continue;
        }
        for (const [text, token] of takeEvent(turn, data)) view.text.append(text, token);
      }
      const now = performance.now();
      const num = turn.completionTokens - numBefore;
      // the first batch came after the prompt had been processed
      if (before !== null && num > 0 && numBefore > 0) takeTime(turn, now - before, num);
      before = now;
      if (now - saved > SAVE_EVERY) {
        saved = now;
        saveTurns(this.session.id, this.turns);
        this._showTurn(view);
        this.app.draw();
      }
    }
    const isComplete = turn.end !== null || turn.status === "failed";
    if (!isComplete) throw new ApiError(0, "The connection was lost.");
  }

  /** What the session holds after a turn, also where its last events did not arrive. */
  async _settle(turn) {
    const found = await this._whenFree();
    if (found === null) {
      turn.status = "lost";
      this.session = null;
      throw new ApiError(404, "The session is gone: without --session-dir, sessions end with the server.");
    }
    this.session = found;
    turn.bytes = found.bytes;
    if (turn.end === null && found.position <= turn.start) {
      if (turn.status !== "failed") turn.status = "lost";
      turn.end = turn.start;
      return;
    }
    if (turn.end === null) {
      turn.reason = "abort";
      turn.status = "stopped";
      await this._addMissing(turn);
    } else if (turn.status === "running") {
      turn.status = this.running?.isStopped && turn.reason !== "length" && turn.reason !== "stop" ? "stopped" : "done";
    }
    turn.end = found.position;
    turn.contextStart = found.context_start;
  }

  async _whenFree() {
    for (;;) {
      try {
        const found = await get(at(this.session.id));
        if (found.residence !== "resident") return found;
      } catch (error) {
        if (error.status === 404) return null;
        if (error.status !== 0) throw error;
        await this.app.whenReachable();
      }
      await new Promise((resolve) => setTimeout(resolve, POLL));
    }
  }

  /** A stopped turn keeps what was sent, which may be more than what arrived. */
  async _addMissing(turn) {
    const known = turn.start + (turn.promptTokens ?? 0) + turn.completionTokens;
    const num = this.session.position - known;
    if (num <= 0 || turn.promptTokens === null) return;
    const { tokens } = await get(`${at(this.session.id)}/tokens`);
    const text = await textOf(tokens.slice(-num));
    turn.text += text;
    turn.completionTokens += num;
    this._views.find((each) => each.turn === turn)?.text.append(text);
  }

  async _drop(turn) {
    this.turns = this.turns.filter((each) => each !== turn);
    const view = this._views.find((each) => each.turn === turn);
    view.element.remove();
    this._views = this._views.filter((each) => each !== view);
    try {
      this.session = await get(at(this.session.id));
    } catch (error) {
      if (error.status === 404) this.session = null;
    }
  }

  async stop() {
    const { running } = this;
    if (!running) return;
    running.isStopped = true;
    if (running.turn.continues && this.app.canCancel) {
      await post(`${at(this.session.id)}/cancel`);
    } else if (running.turn.continues) {
      this._error.textContent = "This turn was told to go on without its client, and this server cannot cancel it: it ends by itself.";
    } else {
      running.controller.abort();
    }
  }

  /** Keep what a running turn has, since the page is going away. */
  keep() {
    if (this.running && this.session) saveTurns(this.session.id, this.turns);
  }

  // Verbs

  async rewindTo(index) {
    const num = this._kept().length - this._kept().indexOf(this.turns[index]);
    const { prompt } = this.turns[index];
    this.session = await rewound(this.session, num);
    this.turns = this.turns.slice(0, index);
    await this._reconcile();
    this._showTurns();
    if (this.prompt === "") this.prompt = prompt;
    this.app.changed();
    announce(`Rewound to token ${this.session.position}`);
    this.focus();
  }

  async fork() {
    await this._branch(0, this.turns);
  }

  async branchAfter(index) {
    const num = this._kept().length - 1 - this._kept().indexOf(this.turns[index]);
    await this._branch(num, this.turns.slice(0, index + 1));
  }

  async _branch(numRewinds, turns) {
    const at_ = turns.filter((each) => each.status !== "lost").at(-1)?.end ?? this.session.position;
    const metadata = { ...this.session.metadata, parent: this.session.id, forked_at: String(at_) };
    const answer = await post(`${at(this.session.id)}/fork`, { n: 1, metadata });
    const forked = await rewound(answer.data[0], numRewinds);
    saveTurns(forked.id, turns);
    await this.app.openBeside(forked.id);
    this.app.changed();
  }

  async download() {
    const response = await request(`${at(this.session.id)}/snapshot`);
    const url = URL.createObjectURL(await response.blob());
    const link = h("a", { href: url, download: `${this.session.id}-${this.session.position}.session` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
    announce("Snapshot downloaded");
  }

  async remove() {
    const { id, position } = this.session;
    const isSure = await confirm("Delete this session?", `${nameOf(this.session)}, ${plural(position, "token")}. It cannot be brought back.`, "Delete");
    if (!isSure) return;
    await request(at(id), { method: "DELETE" });
    forgetTurns(id);
    this.clear();
    this.app.changed();
  }
}

async function textOf(tokens) {
  return (await post("detokenize", { tokens })).prompt;
}

async function rewound(session, num) {
  let found = session;
  for (let i = 0; i < num; i += 1) {
    found = await post(`${at(found.id)}/rewind`, {}, { headers: { "If-Match": `"${found.position}"` } });
  }
  return found;
}

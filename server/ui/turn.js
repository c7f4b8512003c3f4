// One turn of a session: what was asked, what came back, token counts and times. Plain data, which
// the tab keeps; and the reading of a stream's events into it.

const MAX_TIMES = 64;
const MARK_EVERY = 8; // tokens between two pairs of (tokens, characters)

/** start: the session's position before it. status: running, done, stopped, lost or failed. */
export function newTurn(mode, prompt, start, continues) {
  return {
    mode, prompt, start, continues, text: "", tokens: [], marks: [], times: [], timeSize: 4,
    promptTokens: null, completionTokens: 0, end: null, contextStart: null, bytes: null,
    status: "running", reason: null, lastEventId: null,
  };
}

/** What the server still has of a session whose turns this tab does not know. */
export function recovered(text, start, session, marks) {
  return {
    ...newTurn("recovered", "", start, false), text, marks, promptTokens: 0,
    completionTokens: session.position - start, end: session.position,
    contextStart: session.context_start, bytes: session.bytes, status: "done",
  };
}

/** What a stream's event adds to a turn: pieces of text with their tokens, [text, token or null]. */
export function takeEvent(turn, data) {
  const choice = data.choices?.[0];
  const pieces = choice ? piecesOf(turn, choice) : [];
  if (data.usage) {
    turn.promptTokens = data.usage.prompt_tokens;
    turn.completionTokens = data.usage.completion_tokens;
    const last = turn.marks.at(-1)?.[0] ?? -MARK_EVERY;
    if (turn.completionTokens >= last + MARK_EVERY) turn.marks.push([turn.completionTokens, turn.text.length]);
  }
  if (choice?.finish_reason) turn.reason = choice.finish_reason;
  if (choice?.context_start != null) turn.contextStart = choice.context_start;
  if (data.session) {
    turn.end = data.session.position;
    turn.contextStart = data.session.context_start;
  }
  return pieces;
}

function piecesOf(turn, choice) {
  const text = choice.text ?? choice.delta?.content ?? "";
  const found = tokensOf(choice.logprobs);
  const isWhole = found.map(([token]) => token).join("") === text;
  const pieces = found.map(([token, logprob, others], place) => {
    // a token that is a part of a character has no text of its own: the last one has it all
    const own = isWhole ? token : place === found.length - 1 ? text : "";
    turn.text += own;
    const entry = [turn.text.length, logprob, others];
    turn.tokens.push(entry);
    return [own, entry];
  });
  if (!found.length && text) {
    turn.text += text;
    pieces.push([text, null]);
  }
  return pieces;
}

/** Tokens of an event as [text, logprob, [[text, logprob], ...]], in both of OpenAI's shapes. */
function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((each) => [
      each.token, each.logprob, each.top_logprobs.map((other) => [other.token, other.logprob]),
    ]);
  }
  return logprobs.tokens.map((token, place) => [
    token, logprobs.token_logprobs[place], Object.entries(logprobs.top_logprobs?.[place] ?? {}),
  ]);
}

/** Add the time of some tokens; times are [position, milliseconds, tokens], a few for each turn. */
export function takeTime(turn, milliseconds, numTokens) {
  const { times } = turn;
  const last = times.at(-1);
  const position = turn.start + (turn.promptTokens ?? 0) + turn.completionTokens;
  if (last && last[2] < turn.timeSize) {
    last[0] = position;
    last[1] += milliseconds;
    last[2] += numTokens;
    return;
  }
  times.push([position, milliseconds, numTokens]);
  if (times.length <= MAX_TIMES) return;
  turn.timeSize *= 2;
  turn.times = [];
  for (let i = 0; i + 1 < times.length; i += 2) {
    const [a, b] = [times[i], times[i + 1]];
    turn.times.push([b[0], a[1] + b[1], a[2] + b[2]]);
  }
  if (times.length % 2) turn.times.push(times.at(-1));
}

/** Position of the turn's last token so far. */
export const positionOf = (turn) =>
  turn.end ?? turn.start + (turn.promptTokens ?? 0) + turn.completionTokens;

/** Where in a turn memory begins: "before" it, "after" it, "prompt", or a character of its text. */
export function placeOf(turn, contextStart) {
  if (contextStart <= turn.start) return "before";
  if (contextStart >= positionOf(turn)) return "after";
  const inText = contextStart - turn.start - (turn.promptTokens ?? 0);
  if (inText <= 0) return "prompt";
  let found = [0, 0];
  for (const mark of turn.marks) {
    if (mark[0] > inText) {
      const part = (inText - found[0]) / (mark[0] - found[0]);
      return Math.round(found[1] + part * (mark[1] - found[1]));
    }
    found = mark;
  }
  return found[1];
}

// What this tab remembers of conversations, so that a reload shows them again. The server keeps
// states and the last ids, not the text of old turns; nothing of it outlives the tab.

const PREFIX = "cottention.session.";
const OPEN = "cottention.open";
const MAX_TOKENS_KEPT = 2000;

/** The turns of a session as plain objects; [] where the tab knows none. */
export function loadTurns(id) {
  try {
    return JSON.parse(sessionStorage.getItem(PREFIX + id) ?? "[]");
  } catch {
    return [];
  }
}

/** Keep the turns of a session; where the tab's storage is full, those of others go first. */
export function saveTurns(id, turns) {
  const lean = turns.map((turn) => ({
    ...turn,
    tokens: turn.tokens.length > MAX_TOKENS_KEPT ? [] : turn.tokens,
  }));
  const text = JSON.stringify(lean);
  for (;;) {
    try {
      sessionStorage.setItem(PREFIX + id, text);
      return;
    } catch {
      const other = Object.keys(sessionStorage).find(
        (key) => key.startsWith(PREFIX) && key !== PREFIX + id,
      );
      if (other === undefined) return;
      sessionStorage.removeItem(other);
    }
  }
}

export function forgetTurns(id) {
  sessionStorage.removeItem(PREFIX + id);
}

/** Ids of the sessions in the panes, null for an empty pane. */
export function loadOpen() {
  try {
    const ids = JSON.parse(sessionStorage.getItem(OPEN) ?? "[null]");
    return Array.isArray(ids) && ids.length ? ids.slice(0, 2) : [null];
  } catch {
    return [null];
  }
}

export const saveOpen = (ids) => sessionStorage.setItem(OPEN, JSON.stringify(ids));

// The list of sessions, as a tree of forks: a fork made here names the session it came from.

import { get } from "./api.js";
import { $, bytes, count, h, plural } from "./dom.js";

const PAGE = 100;
const MOST = 500;

/** The newest sessions of this key, up to MOST, and whether there are more. */
export async function fetchSessions() {
  const found = [];
  let hasMore = true;
  while (hasMore && found.length < MOST) {
    const after = found.length ? `&after=${encodeURIComponent(found.at(-1).id)}` : "";
    const page = await get(`v1/sessions?limit=${PAGE}${after}`);
    found.push(...page.data);
    hasMore = page.has_more && page.data.length > 0;
  }
  return { sessions: found, hasMore };
}

export const nameOf = (session) => session.metadata.name || session.id.slice(0, 13);

/** Show the tree. open: ids in the panes. onOpen, onBeside: called with a session's id. */
export function showSessions({ sessions, hasMore }, open, onOpen, onBeside) {
  const host = $("sessions");
  const focused = document.activeElement?.dataset?.focus;
  if (!sessions.length) {
    host.replaceChildren(h("p", { class: "fine" }, "No sessions yet. The first prompt opens one."));
    return;
  }
  const byId = new Map(sessions.map((each) => [each.id, each]));
  const children = new Map();
  const roots = [];
  for (const each of sessions) {
    const parent = each.metadata.parent;
    if (byId.has(parent) && parent !== each.id) children.set(parent, [...(children.get(parent) ?? []), each]);
    else roots.push(each);
  }
  const shown = new Set();
  const list = (some) => h("ul", {}, some.filter((each) => !shown.has(each.id)).map(item));
  const item = (session) => {
    shown.add(session.id);
    const place = open.indexOf(session.id);
    const forks = children.get(session.id) ?? [];
    const from = session.metadata.forked_at ? `forked at ${session.metadata.forked_at}, ` : "";
    const facts = `${from}${plural(session.position, "token")}, ${bytes(session.bytes)}, ${session.residence}`;
    return h("li", {},
      h("div", { class: "entry" },
        h("button", { type: "button", class: "open", "data-focus": `open ${session.id}`, "aria-current": place >= 0 ? "true" : null, onclick: () => onOpen(session.id), title: session.id },
          place >= 0 && open.length > 1 ? h("span", { class: `badge ${place ? "b" : "a"}` }, place ? "B" : "A") : null,
          h("span", { class: "name" }, nameOf(session)),
          h("span", { class: "fine" }, facts)),
        h("button", { type: "button", class: "beside", "data-focus": `beside ${session.id}`, "aria-label": `Show ${nameOf(session)} beside the conversation`, title: "Show beside", onclick: () => onBeside(session.id) }, "◫")),
      forks.length ? list(forks) : null);
  };
  host.replaceChildren(list(roots), hasMore ? h("p", { class: "fine" }, `The newest ${count(sessions.length)} are shown.`) : "");
  if (focused) host.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
}

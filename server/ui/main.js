// The page: what the server serves, the panes, the list of sessions, the key and the theme.

import { get, request, saveKey, savedKey, setUnauthorizedHandler } from "./api.js";
import { $, bytes, confirm, count, h, notice, plural } from "./dom.js";
import { drawMeasurements } from "./measurements.js";
import { Pane } from "./pane.js";
import { showParameters } from "./parameters.js";
import { fetchSessions, showSessions } from "./sessions.js";
import { loadOpen, saveOpen } from "./store.js";

const RETRY = 1000; // milliseconds between two looks for a server that is away
const WATCH = 10_000;
const CANCEL = "/v1/sessions/{session_id}/cancel";

const app = {
  panes: [],
  capacity: null,
  hasTemplate: false,
  canCancel: false,
  list: { sessions: [], hasMore: false },

  /** Send the composer's text of a pane, in both panes if that is wanted. */
  send(pane) {
    const text = pane.prompt;
    const both = app.panes.length > 1 && pane.wantsBoth;
    return Promise.all((both ? app.panes : [pane]).map((each) => each.send(text)));
  },

  /** Sessions have changed: fetch the list again. */
  async changed() {
    saveOpen(openIds());
    try {
      app.list = await fetchSessions();
      app.capacity = await get("v1/capacity");
    } catch (error) {
      if (error.status !== 0 && error.status !== 401) notice(error.message);
      return;
    }
    showList();
  },

  draw() {
    if (app.capacity) drawMeasurements(app.panes, app.capacity);
  },

  async open(id) {
    await openIn(app.panes[0], id);
  },

  async openBeside(id) {
    if (app.panes.length < 2) addPane();
    await openIn(app.panes[1], id);
  },

  close(pane) {
    if (pane.running) return;
    app.panes = app.panes.filter((each) => each !== pane);
    const ids = openIds();
    $("panes").replaceChildren();
    app.panes = [];
    restore(ids);
  },

  /** Wait until the server answers. */
  async whenReachable(signal) {
    for (;;) {
      if (await isReady()) return;
      signal?.throwIfAborted();
      await new Promise((resolve) => setTimeout(resolve, RETRY));
    }
  },
};

const openIds = () => app.panes.map((each) => each.session?.id ?? null);

async function openIn(pane, id) {
  if (pane.running) return notice("A turn runs in this pane; stop it first.");
  notice();
  try {
    await pane.open(id);
  } catch (error) {
    notice(error.message);
  }
  return app.changed();
}

function addPane() {
  const pane = new Pane(app, app.panes.length ? "B" : "A");
  app.panes.push(pane);
  $("panes").append(pane.element);
  $("panes").classList.toggle("two", app.panes.length > 1);
  for (const each of app.panes) each.refresh();
  return pane;
}

function showList() {
  showSessions(app.list, openIds(), app.open, app.openBeside);
  const { slots, free_slots: free, sessions_per_gb: perGb } = app.capacity;
  $("capacity").textContent = `${free} of ${plural(slots, "slot")} free · at least ${count(perGb.resident)} running sessions per GB`;
}

function restore(ids) {
  for (const id of ids) {
    const pane = addPane();
    if (id !== null) pane.open(id).catch((error) => (error.status === 404 ? pane.clear() : notice(error.message))).finally(app.changed);
  }
  app.draw();
}

// The server

let version = null;

async function isReady() {
  try {
    await request("ready");
    showState("ready", "ready");
    return true;
  } catch (error) {
    showState("away", error.status === 503 ? "shutting down" : "not reachable");
    return false;
  }
}

function showState(state, text) {
  if ($("server").dataset.state === state) return;
  $("server").dataset.state = state;
  $("server").textContent = text;
}

async function watch() {
  const wasReady = $("server").dataset.state === "ready";
  if ((await isReady()) && !wasReady) app.changed();
}

/** What is served, and what it can do. Raises ApiError 401 where a key is needed. */
async function start() {
  const [model] = (await get("v1/models")).data;
  $("model").textContent = model.id;
  document.title = `${model.id} · cottention-server`;
  version = (await get("version")).version;
  $("version").textContent = `cottention-server ${version}.`;
  if (!model.capabilities.includes("sessions")) {
    $("panes").replaceChildren(h("p", { class: "empty" }, `${model.id} reads texts and does not write any. It serves ${model.capabilities.join(" and ")}: see docs/api.md.`));
    $("parameters-box").hidden = $("measurements").hidden = $("sessions-box").hidden = true;
    return;
  }
  app.hasTemplate = model.chat_template;
  const { paths } = await get("openapi.json");
  app.canCancel = CANCEL in paths;
  app.capacity = await get("v1/capacity");
  $("panes").replaceChildren();
  app.panes = [];
  restore(loadOpen());
  await app.changed();
}

async function boot() {
  notice();
  try {
    await start();
    showState("ready", "ready");
  } catch (error) {
    if (error.status === 401) return;
    if (error.status !== 0) {
      notice(error.message);
      return;
    }
    showState("away", "not reachable");
    await app.whenReachable();
    await boot();
  }
}

// The key

function askForKey() {
  const dialog = $("key-dialog");
  $("key-error").textContent = savedKey() ? "The server does not accept this key." : "";
  showState("locked", "key needed");
  if (!dialog.open) dialog.showModal();
}

function setUpKey() {
  setUnauthorizedHandler(askForKey);
  $("key-button").addEventListener("click", () => {
    $("key-error").textContent = "";
    $("key-dialog").showModal();
  });
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
  $("key-form").addEventListener("submit", () => {
    saveKey($("key-input").value.trim());
    $("key-input").value = "";
    boot();
  });
}

// Snapshots

function setUpImport() {
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", async () => {
    const [file] = $("import-file").files;
    $("import-file").value = "";
    if (!file) return;
    const isSure = await confirm("Upload this snapshot?", `${file.name}, ${bytes(file.size)}. The server makes a new session of it. A snapshot decides what the model remembers: take it only from whom you trust.`, "Upload");
    if (!isSure) return;
    notice();
    try {
      const metadata = encodeURIComponent(JSON.stringify({ name: file.name.slice(0, 60) }));
      const answer = await request(`v1/sessions/import?metadata=${metadata}`, { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
      const { id, position } = await answer.json();
      await app.open(id);
      notice(`Uploaded: a session of ${plural(position, "token")}.`, true);
    } catch (error) {
      notice(error.message);
    }
  });
}

function setUpTheme() {
  const choice = $("theme");
  choice.value = document.documentElement.dataset.theme ?? "auto";
  choice.addEventListener("change", () => {
    if (choice.value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = choice.value;
    localStorage.setItem("cottention.theme", choice.value);
  });
}

showParameters();
setUpKey();
setUpImport();
setUpTheme();
$("new-session").addEventListener("click", () => {
  const [pane] = app.panes;
  if (!pane || pane.running) return;
  notice();
  pane.clear();
  app.changed();
});
if (matchMedia("(max-width: 60rem)").matches) {
  for (const id of ["sessions-box", "measurements", "parameters-box"]) $(id).open = false;
}
addEventListener("pagehide", () => app.panes.forEach((each) => each.keep()));
new ResizeObserver(() => app.draw()).observe($("memory-chart"));
setInterval(watch, WATCH);
boot();

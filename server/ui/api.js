// The server's endpoints, with the key of this tab, and its event streams.

// This file is ui/api.js: the endpoints begin one folder above it, whatever prefix a proxy adds.
const BASE = new URL("../", import.meta.url);
const KEY = "cottention.key";

export const savedKey = () => sessionStorage.getItem(KEY) ?? "";
export function saveKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** An answer that is no success. `status` 0: there was none. */
export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let onUnauthorized = () => {};
export function setUnauthorizedHandler(handler) {
  onUnauthorized = handler;
}

/** A response with a 2xx status. Raises ApiError; AbortError where `signal` aborted. */
export async function request(path, { method = "GET", json, body, headers = {}, signal } = {}) {
  const sent = { ...headers };
  if (savedKey()) sent.Authorization = `Bearer ${savedKey()}`;
  if (json !== undefined) {
    sent["Content-Type"] = "application/json";
    body = JSON.stringify(json);
  }
  let response;
  try {
    response = await fetch(new URL(path, BASE), {
      method, body, headers: sent, signal, credentials: "same-origin", cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch {
    // a proxy's page, for instance
  }
  if (response.status === 401) onUnauthorized();
  throw new ApiError(response.status, told.message ?? `The server answered ${response.status}.`, told.code);
}

export const get = async (path, options) => (await request(path, options)).json();
export const post = async (path, json = {}, options = {}) =>
  (await request(path, { method: "POST", json, ...options })).json();

/** The events {id, data} of a response, until [DONE] or the end. `isDone` is in the last one. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      const batch = blocks.map(parse).filter((each) => each !== null);
      if (batch.length) yield batch;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError(0, "The connection was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  let id = null;
  let data = null;
  for (const line of block.split("\n")) {
    if (line.startsWith("id: ")) id = line.slice(4);
    else if (line.startsWith("data: ")) data = line.slice(6);
  }
  if (data === null) return null;
  return data === "[DONE]" ? { id, isDone: true } : { id, isDone: false, data: JSON.parse(data) };
}

export const session = (id) => `v1/sessions/${encodeURIComponent(id)}`;

// Shows the server's description, with the key of this tab, which the page at / keeps as well.
"use strict";

// This file is docs/start.js: the endpoints begin one folder above it, whatever prefix a proxy adds.
const BASE = new URL("../", document.currentScript.src);
const KEY = "cottention.key";
const form = document.getElementById("key-form");
const told = document.getElementById("told");

function withKey(headers) {
  const key = sessionStorage.getItem(KEY);
  const has = Object.keys(headers).some((name) => name.toLowerCase() === "authorization");
  return key && !has ? { ...headers, Authorization: `Bearer ${key}` } : headers;
}

async function start() {
  const answer = await fetch(new URL("openapi.json", BASE), { headers: withKey({}) });
  form.hidden = answer.status !== 401;
  told.textContent = "";
  if (answer.status === 401) {
    if (sessionStorage.getItem(KEY)) told.textContent = "That is not a key of this server.";
    return;
  }
  if (!answer.ok) throw new Error(`openapi.json is answered with ${answer.status}`);
  const spec = await answer.json();
  spec.servers = [{ url: BASE.pathname.replace(/\/$/, "") || "/" }];
  SwaggerUIBundle({
    spec,
    dom_id: "#swagger",
    deepLinking: true,
    validatorUrl: null,
    requestInterceptor: (request) => {
      request.headers = withKey(request.headers);
      return request;
    },
  });
}

function tell(error) {
  told.textContent = String(error);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, document.getElementById("key").value);
  start().catch(tell);
});
start().catch(tell);

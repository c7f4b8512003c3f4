// The two charts beside a conversation: bytes and milliseconds, as measured, by position.

import { drawChart } from "./charts.js";
import { $, bytes, count } from "./dom.js";
import { positionOf } from "./turn.js";

const SHORTEST_AXIS = 256;

/** panes: what is shown, one or two, each with `turns`. capacity: of /v1/capacity. */
export function drawMeasurements(panes, capacity) {
  const shown = panes.map((pane, place) => ({ turns: pane.turns.filter((each) => each.status !== "lost"), kind: place ? "b" : "a", name: panes.length > 1 ? (place ? "B: " : "A: ") : "" }));
  const last = Math.max(0, ...shown.flatMap(({ turns }) => turns.map(positionOf)));
  const xMax = Math.max(SHORTEST_AXIS, last * 1.02);
  drawMemory(shown, capacity, xMax, last);
  drawTime(shown, xMax);
}

function drawMemory(shown, capacity, xMax, last) {
  const perToken = capacity.softmax_bytes_per_token;
  const slot = capacity.bytes_per_place.resident;
  const series = [{ points: [[0, 0], [xMax, perToken * xMax]], kind: "softmax", label: "softmax cache of this shape" }];
  let stored = null;
  for (const { turns, kind, name } of shown) {
    if (!turns.length) continue;
    series.push({ points: [[turns[0].start, slot], [Math.max(...turns.map(positionOf)), slot]], kind: `${kind} thin`, label: `${name}in its slot, while a turn runs` });
    const points = turns.filter((each) => each.bytes !== null).map((each) => [each.end, each.bytes]);
    if (points.length) {
      series.push({ points, kind, label: `${name}stored after a turn, measured`, hasDots: true });
      stored ??= points.at(-1);
    }
  }
  const told = [];
  if (stored) told.push(`Stored: ${count(stored[1])} bytes at token ${count(stored[0])}.`);
  told.push(`A running turn has a slot of ${count(slot)} bytes, at any age.`);
  told.push(`A softmax cache of the same layers and heads takes ${count(perToken)} bytes more with each token${last ? `: ${bytes(perToken * last)} by now` : ""}.`);
  $("memory-text").textContent = told.join(" ");
  const yMax = Math.max(perToken * xMax, slot * 1.25);
  drawChart($("memory-chart"), "memory-title", series, {
    xMax, yMax, yUnit: 1024 ** Math.floor(Math.log(yMax) / Math.log(1024)), formatX: short,
    formatY: (n) => bytes(Math.round(n)).replace(/\.0+ /, " "), summary: told.join(" "),
  });
}

function drawTime(shown, xMax) {
  const series = [];
  const told = [];
  for (const { turns, kind, name } of shown) {
    const points = turns.flatMap((each) => each.times).map(([position, ms, n]) => [position, ms / n]);
    if (!points.length) continue;
    series.push({ points, kind, label: name ? `${name.slice(0, 1)}` : null });
    const sorted = points.map(([, ms]) => ms).sort((a, b) => a - b);
    told.push(`${name}median ${sorted[sorted.length >> 1].toFixed(2)} ms per token, at positions ${count(points[0][0])} to ${count(points.at(-1)[0])}.`);
  }
  const all = series.flatMap(({ points }) => points.map(([, ms]) => ms)).sort((a, b) => a - b);
  const most = all[Math.floor(all.length * 0.98)] ?? 1;
  const summary = told.length ? `${told.join(" ")} Measured in this browser, from one event to the next.` : "Measured in this browser when a turn runs.";
  $("time-text").textContent = summary;
  drawChart($("time-chart"), "time-title", series, { xMax, yMax: Math.max(0.01, most * 1.5), formatX: short, formatY: (ms) => `${Number(ms.toPrecision(2))} ms`, summary });
}

const short = (n) => (n >= 10_000 ? `${Number((n / 1000).toPrecision(3))}k` : count(Math.round(n)));

// Two small line charts, drawn as SVG by hand.

import { svg } from "./dom.js";

const HEIGHT = 150;
const LEFT = 50;
const RIGHT = 10;
const TOP = 10;
const BOTTOM = 22;

/** series: [{points: [[x, y]], kind, label, hasDots}]; an empty list draws the axes alone. */
export function drawChart(host, titleId, series, { xMax, yMax, yUnit, formatX, formatY, summary }) {
  const width = Math.max(200, host.clientWidth);
  const x = (value) => LEFT + (value / xMax) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (Math.min(value, yMax) / yMax) * (HEIGHT - TOP - BOTTOM);
  const root = svg("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img",
    "aria-labelledby": titleId, "aria-description": summary,
  });
  for (const value of ticks(yMax, yUnit)) {
    root.append(
      svg("line", { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), class: "grid" }),
      svg("text", { x: LEFT - 6, y: y(value) + 3.5, class: "tick end" }, formatY(value)),
    );
  }
  for (const value of ticks(xMax)) {
    const place = value === 0 ? "tick" : x(value) > width - 30 ? "tick end" : "tick middle";
    root.append(svg("text", { x: x(value), y: HEIGHT - 6, class: place }, formatX(value)));
  }
  for (const { points, kind, hasDots } of series) {
    if (points.length > 1) {
      const path = points.map(([px, py], i) => `${i ? "L" : "M"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`);
      root.append(svg("path", { d: path.join(""), class: `line ${kind}` }));
    }
    if (hasDots || points.length === 1) {
      for (const [px, py] of points) {
        root.append(svg("circle", { cx: x(px).toFixed(1), cy: y(py).toFixed(1), r: 3, class: `dot ${kind}` }));
      }
    }
  }
  host.replaceChildren(root, legend(series));
}

function legend(series) {
  const list = document.createElement("ul");
  list.className = "legend";
  for (const { label, kind, hasDots } of series.filter((each) => each.label)) {
    const item = document.createElement("li");
    const key = svg("svg", { width: 18, height: 8, "aria-hidden": "true" });
    key.append(
      hasDots
        ? svg("circle", { cx: 9, cy: 4, r: 3, class: `dot ${kind}` })
        : svg("path", { d: "M1 4H17", class: `line ${kind}` }),
    );
    item.append(key, label);
    list.append(item);
  }
  return list;
}

/** Three or four round values from 0 to `max`, in `unit`s. */
function ticks(max, unit = 1) {
  const power = unit * 10 ** Math.floor(Math.log10(max / unit / 3));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => max / each <= 4);
  const found = [];
  for (let value = 0; value <= max * 1.0001; value += step) found.push(value);
  return found;
}

// Elements, dialogs and announcements. Text enters the page by textContent alone.

export const $ = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

/** An element: `on*` properties are listeners, others attributes; strings among children are text. */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((each) => each !== null && each !== undefined));
  return element;
}

/** Say something to screen readers without moving the focus. */
export function announce(text) {
  $("announce").textContent = text;
}

/** Show a problem, or nothing. */
export function notice(text = "", isGood = false) {
  $("notice").hidden = text === "";
  $("notice").classList.toggle("good", isGood);
  $("notice").textContent = text;
}

/** Ask before something is done; resolves to whether the answer was yes. */
export function confirm(title, text, yes) {
  const dialog = $("confirm-dialog");
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

const NUMBER = new Intl.NumberFormat("en");
export const count = (n) => NUMBER.format(n);

export function bytes(n) {
  if (n < 1024) return `${n} B`;
  const unit = n < 1024 ** 2 ? [1024, "KiB"] : n < 1024 ** 3 ? [1024 ** 2, "MiB"] : [1024 ** 3, "GiB"];
  const value = n / unit[0];
  return `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ${unit[1]}`;
}

export function plural(n, one, many = `${one}s`) {
  return `${count(n)} ${n === 1 ? one : many}`;
}

// The form of sampling parameters: what each does, and what holds where it is left empty.

import { $, h } from "./dom.js";

const SAVED = "cottention.parameters";

const FIELDS = [
  { name: "max_tokens", label: "Longest answer", unit: "tokens", preset: "200", min: 1, step: 1,
    empty: "16, or the model's max_new_tokens", help: "The answer ends here if not before." },
  { name: "temperature", label: "Temperature", preset: "0.7", min: 0, step: 0.1,
    empty: "the model's, else 1", help: "0 always takes the likeliest token; above 1 the text gets wilder." },
  { name: "top_p", label: "Top p", preset: "", min: 0, max: 1, step: 0.05,
    empty: "the model's, else 1", help: "Draw only from the likeliest tokens that have this probability together." },
  { name: "top_k", label: "Top k", preset: "", min: 0, step: 1,
    empty: "the model's, else all", help: "Draw only from this many of the likeliest tokens." },
  { name: "min_p", label: "Min p", preset: "", min: 0, max: 1, step: 0.05,
    empty: "the model's, else 0", help: "Drop tokens less likely than this part of the likeliest one." },
  { name: "repetition_penalty", label: "Repetition penalty", preset: "", min: 0, step: 0.05,
    empty: "the model's, else 1", help: "Above 1 makes tokens that were there before less likely." },
  { name: "frequency_penalty", label: "Frequency penalty", preset: "", min: -2, max: 2, step: 0.1,
    empty: "0", help: "Makes a token less likely each time that it was generated." },
  { name: "seed", label: "Seed", preset: "", step: 1,
    empty: "a new one each time", help: "The same seed at the same position gives the same text." },
  { name: "stop", label: "Stop at", preset: "", isText: true,
    empty: "nothing", help: "The answer ends before this text. \\n is a new line." },
];

export function showParameters() {
  const saved = load();
  const form = $("parameters");
  form.append(
    toggle("probabilities", "Colour tokens by probability", saved,
      "Asks for the five likeliest tokens at each place; point at a token, or use the arrow keys in the text."),
    toggle("continues", "Let a turn go on while I am away", saved,
      "A turn that has begun runs to its end even if this page is closed, and is picked up when it is opened again."),
    ...FIELDS.map((field) => {
      const input = h("input", {
        id: `p-${field.name}`, type: field.isText ? "text" : "number", min: field.min,
        max: field.max, step: field.step && "any", placeholder: field.empty,
        value: saved[field.name] ?? field.preset, "aria-describedby": `h-${field.name}`,
      });
      const label = h("label", { for: input.id }, field.label, field.unit ? h("span", { class: "fine" }, ` ${field.unit}`) : null);
      return h("div", { class: "field" }, label, input,
        h("p", { id: `h-${field.name}`, class: "fine" }, `${field.help} If empty: ${field.empty}.`));
    }),
  );
  form.addEventListener("input", () => localStorage.setItem(SAVED, JSON.stringify(values())));
  form.addEventListener("submit", (event) => event.preventDefault());
}

function toggle(name, label, saved, help) {
  const input = h("input", { id: `p-${name}`, type: "checkbox", checked: saved[name] ?? false, "aria-describedby": `h-${name}` });
  return h("div", { class: "field check" }, input, h("label", { for: input.id }, label), h("p", { id: `h-${name}`, class: "fine" }, help));
}

function load() {
  try {
    return JSON.parse(localStorage.getItem(SAVED) ?? "{}");
  } catch {
    return {};
  }
}

function values() {
  const found = Object.fromEntries(FIELDS.map(({ name }) => [name, $(`p-${name}`).value]));
  return { ...found, probabilities: isChecked("probabilities"), continues: isChecked("continues") };
}

const isChecked = (name) => $(`p-${name}`).checked;
export const wantsProbabilities = () => isChecked("probabilities");
export const continuesAway = () => isChecked("continues");

/** The fields of a request that the form has values for. */
export function samplingFields() {
  const fields = {};
  for (const { name, isText } of FIELDS) {
    const text = $(`p-${name}`).value;
    if (text === "") continue;
    fields[name] = isText ? text.replaceAll("\\n", "\n") : Number(text);
  }
  return fields;
}

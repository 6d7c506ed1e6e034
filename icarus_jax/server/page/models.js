// The served models: their colours, and the form's checkboxes and handoff rules.

import { byId, make } from "./dom.js";

const COLOURS = 8; // the classes model-0 to model-7 of style.css; the ninth model has the first one's colour again
const FIRST_CHOSEN = 8;
const numbers = new Map(); // a model's name -> its number in the order of /v1/models

/** Returns the class with a model's colour. */
export function colourOf(name) {
  if (!numbers.has(name)) numbers.set(name, numbers.size); // a head loaded since the list was fetched
  return `model-${numbers.get(name) % COLOURS}`;
}

/** Offers the models of /v1/models. */
export function showModels(cards) {
  const boxes = cards.map((card, i) => {
    const box = make("input", { type: "checkbox", name: "model", value: card.id, checked: i < FIRST_CHOSEN });
    box.dataset.kv = card.kv;
    const text = card.parent ? card.id : `${card.id} (trunk)`;
    return make("label", { className: colourOf(card.id), title: `K/V: ${card.kv}` }, box, ` ${text}`);
  });
  byId("models").replaceChildren(...boxes);
  byId("kl").checked = cards.every((card) => readsTheTrunks(card.kv));
  byId("rules").replaceChildren();
}

const readsTheTrunks = (kv) => kv === "base" || kv === "shared";
const boxes = () => [...document.querySelectorAll("#models input")];

/** Returns the names of the chosen models. */
export const chosenModels = () => boxes().filter((box) => box.checked).map((box) => box.value);

/** Returns whether all of these models read the trunk's K/V, so that one prefill serves them all. */
export const allShare = (names) => boxes().every((box) => !names.includes(box.value) || readsTheTrunks(box.dataset.kv));

/** Adds an empty handoff rule to the form, and moves the focus there. */
export function addRule() {
  const on = make("input", { type: "text", required: true, maxLength: 1000 });
  const models = make("select", {}, ...boxes().map((box) => make("option", {}, box.value)));
  const remove = make("button", { type: "button", ariaLabel: "Remove this handoff" }, "Remove");
  const rule = make("li", { className: "row" }, make("label", {}, "after the text ", on), make("label", {}, " go on with ", models), remove);
  remove.addEventListener("click", () => {
    rule.remove();
    byId("add-rule").focus();
  });
  byId("rules").append(rule);
  on.focus();
}

/** Returns the handoff rules as the API takes them. */
export function handoffRules() {
  return [...byId("rules").children].map((rule) => ({
    on: rule.querySelector("input").value.replaceAll("\\n", "\n"),
    model: rule.querySelector("select").value,
  }));
}

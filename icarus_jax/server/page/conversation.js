// The conversation so far: its messages, and who wrote each of its tokens.

import { bar, byId, make } from "./dom.js";
import { colourOf } from "./models.js";

export const conversation = { messages: [], tokens: [] }; // tokens: {id, writer}; the writer of a prompt's token is null

/** Goes on with an answer: what the other models said is forgotten. */
export function goOnWith(prompt, promptIds, answer) {
  const { messages, tokens } = conversation;
  messages.push({ role: "user", content: prompt }, { role: "assistant", content: answer.content });
  const known = tokens.slice(0, commonLength(promptIds));
  const fresh = promptIds.slice(known.length).map((id) => ({ id, writer: null }));
  conversation.tokens = [...known, ...fresh, ...answer.tokens];
  const said = make("p", { className: "text" }, ...[...answer.text.childNodes].map((node) => node.cloneNode(true)));
  byId("turns").append(make("li", {}, make("p", { className: "text you" }, prompt), make("h3", {}, answer.title.textContent), said));
  byId("conversation").hidden = false;
}

/** Returns how many tokens a prompt and the conversation have in common at their beginning. */
function commonLength(ids) {
  const differs = ids.findIndex((id, i) => conversation.tokens[i]?.id !== id);
  return differs < 0 ? ids.length : differs;
}

/** Begins a new conversation. */
export function restart() {
  Object.assign(conversation, { messages: [], tokens: [] });
  byId("turns").replaceChildren();
  byId("conversation").hidden = true;
}

/** Splits a prompt into runs of tokens of the same origin: cached, and then by whom it was written, or prefilled. */
function origins(ids, cached) {
  const known = conversation.tokens.slice(0, Math.min(commonLength(ids), cached));
  const origin = [
    ...known.map(({ writer }) => (writer === null ? PROMPTS : writtenBy(writer))),
    ...Array(cached - known.length).fill(EARLIER),
    ...Array(ids.length - cached).fill(PREFILLED),
  ];
  const runs = [];
  for (const part of origin) {
    if (runs.at(-1)?.label === part.label) runs.at(-1).count += 1;
    else runs.push({ ...part, count: 1 });
  }
  return runs;
}

const PREFILLED = { label: "prefilled for this request", className: "prefilled" };
const EARLIER = { label: "cached: from an earlier request", className: "cached" };
const PROMPTS = { label: "cached: a prompt of this conversation", className: "cached" };
const writtenBy = (model) => ({ label: `cached: written by ${model}`, className: `filled ${colourOf(model)}` });

/** Shows what a prompt's tokens cost, from the usage of an answer by so many models on the trunk's K/V. */
export function showCost(ids, usage, models, shared) {
  const cached = usage.prompt_tokens_details.cached_tokens;
  const computed = usage.prompt_tokens - cached;
  const saved = models.length * usage.prompt_tokens - computed;
  const all = models.length > 1 ? `once for ${models.length} models` : "for one model";
  byId("cost-bar").replaceChildren(...bar(origins(ids, cached)));
  byId("cost-text").textContent =
    `${usage.prompt_tokens} prompt tokens: ${cached} cached, ${computed} prefilled` +
    (shared ? ` ${all}; ${saved} tokens of prefill saved.` : ". Models with K/V of their own prefill for themselves.");
  byId("cost").hidden = false;
}

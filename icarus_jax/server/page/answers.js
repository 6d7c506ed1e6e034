// The columns: one choice of the streamed answer each.

import { make } from "./dom.js";
import { describe, divergence, levelOf } from "./kl.js";
import { colourOf } from "./models.js";

/** A choice of the answer, and the column that shows it. */
export class Answer {
  content = ""; // what a later turn quotes: the text without reasoning
  tokens = []; // of each generated token: its id and the model that wrote it
  ended = false;
  #began = performance.now();
  #first = null; // when the first token came
  #writer = null; // the model that writes now
  #run = null; // the element of its text
  #scored = []; // scored tokens whose text has not come yet
  #farthest = { nats: 0 };
  #kl = null;
  #reason = "";
  #rate = ""; // tokens/s

  /** Makes an empty column; onChosen(answer) is called when the user goes on with this answer. */
  constructor(model, onChosen) {
    const name = make("span", { className: colourOf(model) }, model);
    this.title = make("h3", {}, name);
    this.text = make("p", { className: "text" });
    this.cost = make("p", { className: "hint" }, "waiting");
    this.button = make("button", { type: "button", hidden: true }, `Continue with ${model}`);
    this.button.addEventListener("click", () => onChosen(this));
    this.column = make("section", { className: `answer ${colourOf(model)}`, ariaLabel: `Answer of ${model}`, ariaBusy: "true" });
    this.column.append(this.title, this.text, this.cost, this.button);
    this.column.dataset.model = model;
    this.model = model;
  }

  /** Takes in a chunk's choice. */
  feed(choice) {
    const ids = choice.token_ids ?? [];
    const text = (choice.delta.reasoning_content ?? "") + (choice.delta.content ?? "");
    this.content += choice.delta.content ?? "";
    this.tokens.push(...ids.map((id) => ({ id, writer: choice.model })));
    this.#scored.push(...(choice.logprobs?.content ?? []));
    if (ids.length && choice.model !== this.#writer) this.#begin(choice.model);
    if (text) this.#write(text);
    if (ids.length && this.#first === null) {
      this.#first = performance.now();
      performance.mark("first-token", { detail: this.model });
    }
    const seconds = (performance.now() - this.#first) / 1000;
    if (ids.length && seconds > 0) this.#rate = `${((this.tokens.length - 1) / seconds).toFixed(0)} tokens/s`;
    if (choice.kl_to_base !== undefined) this.#kl = choice.kl_to_base;
    if (choice.finish_reason) this.end(choice.finish_reason);
    this.#count();
  }

  /** Marks the answer as complete, or as cut off. Only a complete one can be continued. */
  end(reason, complete = true) {
    if (this.ended) return;
    this.ended = true;
    this.#reason = reason;
    this.column.ariaBusy = "false";
    this.button.hidden = !complete;
    this.#count();
  }

  #begin(model) {
    const colour = colourOf(model);
    if (this.#writer !== null) {
      this.text.append(make("span", { className: `handoff ${colour}` }, `→ ${model}`));
      this.title.append(" → ", make("span", { className: colour }, model));
    }
    this.#writer = model;
    this.#run = make("span", { className: `run ${colour}` });
    this.text.append(this.#run);
  }

  #write(text) {
    if (this.#run === null) this.#begin(this.model);
    const tokens = this.#scored.filter((token) => token.reference_logprob !== undefined);
    this.#scored = [];
    if (!tokens.length) return this.#run.append(text);
    const nats = divergence(tokens);
    if (nats > this.#farthest.nats) this.#farthest = { nats, text };
    this.#run.append(make("span", { className: levelOf(nats), title: describe(tokens, this.#writer) }, text));
  }

  #count() {
    const parts = [`${this.tokens.length} tokens`];
    if (this.#first !== null) {
      parts.push(`the first after ${Math.round(this.#first - this.#began)} ms`);
      if (this.#rate) parts.push(this.#rate);
    }
    if (this.#kl !== null) parts.push(`KL to the trunk ${this.#kl.toFixed(2)} nats`);
    if (this.ended && this.#farthest.text) parts.push(`farthest at ${JSON.stringify(this.#farthest.text)} (${this.#farthest.nats.toFixed(1)})`);
    if (this.#reason) parts.push(`ended: ${this.#reason}`);
    this.cost.textContent = parts.join(" · ");
  }
}

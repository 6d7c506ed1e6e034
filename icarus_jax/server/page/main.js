// Ties the page together: what the user does becomes requests, and what the server says is shown.

import { events, getJson, setKey } from "./api.js";
import { Answer } from "./answers.js";
import { conversation, goOnWith, restart, showCost } from "./conversation.js";
import { byId } from "./dom.js";
import { legend } from "./kl.js";
import { watch } from "./live.js";
import { addRule, allShare, chosenModels, handoffRules, showModels } from "./models.js";

let running = null; // the AbortController of the request that is being answered

function showError(error) {
  byId("error").textContent = error?.message ?? "";
  byId("error").hidden = !error;
  if (error?.status === 401) {
    byId("key").open = true;
    byId("key-input").focus();
  }
}

function say(text) {
  byId("status").textContent = text;
}

async function load() {
  try {
    showModels((await getJson("v1/models")).data);
    showError(null);
  } catch (error) {
    showError(error);
  }
  watch(); // after the models: their order gives the colours
}

/** The body of the request. The server computes the prompt once, for all models. */
function requestFor(models, prompt) {
  const body = {
    models,
    messages: [...conversation.messages, { role: "user", content: prompt }],
    max_tokens: byId("max-tokens").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
    reference_logprobs: byId("kl").checked,
    return_token_ids: true,
    stream: true,
    stream_options: { include_usage: true },
  };
  const handoff = handoffRules();
  return handoff.length ? { ...body, handoff } : body;
}

async function ask() {
  if (running) return say("The models are still answering. Stop them first.");
  const models = chosenModels();
  if (!models.length) return showError(new Error("Choose at least one model."));
  const prompt = byId("prompt").value;
  const request = requestFor(models, prompt);
  const turn = { prompt, promptIds: [], answers: [] };
  turn.answers = models.map((model) => new Answer(model, (answer) => choose(turn, answer)));
  begin(turn, request.reference_logprobs);
  try {
    for await (const event of events("v1/chat/completions", request, running.signal)) take(turn, event, models);
    say(models.length > 1 ? `All ${models.length} answers are complete.` : "The answer is complete.");
  } catch (error) {
    const stopped = error.name === "AbortError";
    turn.answers.forEach((answer) => answer.end(stopped ? "stopped" : "error", false));
    if (!stopped) showError(error);
    say(stopped ? "Stopped." : "");
  }
  running = null;
  setBusy(false);
}

function begin(turn, withKl) {
  running = new AbortController();
  setBusy(true);
  showError(null);
  byId("cost").hidden = true;
  byId("legend").hidden = !withKl;
  byId("answers").replaceChildren(...turn.answers.map((answer) => answer.column));
  byId("results").hidden = false;
  say(turn.answers.length > 1 ? `${turn.answers.length} models are answering.` : "The model is answering.");
  performance.mark("ask");
}

function take(turn, event, models) {
  if (event.prompt_token_ids) turn.promptIds = event.prompt_token_ids;
  for (const choice of event.choices) turn.answers[choice.index].feed(choice);
  if (event.usage) showCost(turn.promptIds, event.usage, models, allShare(models));
}

/** Goes on with one of the answers. */
function choose(turn, answer) {
  if (running) return say("The models are still answering. Stop them first.");
  goOnWith(turn.prompt, turn.promptIds, answer);
  clear();
  say(`The conversation goes on with the answer of ${answer.model}.`);
}

function clear() {
  byId("results").hidden = byId("cost").hidden = true;
  byId("answers").replaceChildren();
  byId("prompt").value = "";
  byId("prompt").focus();
}

/** Buttons that do nothing now stay in the focus order: the focus must not get lost under the user. */
function setBusy(busy) {
  byId("send").ariaDisabled = String(busy);
  byId("stop").ariaDisabled = String(!busy);
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("add-rule").addEventListener("click", addRule);
byId("restart").addEventListener("click", () => {
  running?.abort();
  restart();
  clear();
  say("A new conversation.");
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key-input").value);
  byId("key-input").value = "";
  byId("key").open = false;
  load();
});
byId("legend").append(...legend());
load();

// The live view: pages, cache hits, throughput and queue, from /page/stats.

import { getJson } from "./api.js";
import { bar, byId, make } from "./dom.js";
import { colourOf } from "./models.js";

const EVERY_MS = 1500;
const POINTS = 60; // of the chart
const rates = [];
let last = null; // the numbers of the poll before
let timer = null;

/** Starts to poll, or starts anew, for example with another key. */
export function watch() {
  clearTimeout(timer);
  poll();
}

async function poll() {
  let again = true;
  try {
    if (!document.hidden) show(await getJson("page/stats"));
  } catch (error) {
    again = error.status !== 401 && error.status !== 403; // another key is needed: see `watch`
    note(error.message);
  }
  if (again) timer = setTimeout(poll, EVERY_MS);
}

function note(message) {
  byId("live-note").textContent = message;
  byId("live-note").hidden = !message;
  byId("live").hidden = Boolean(message);
}

function show(now) {
  note("");
  const cached = now.cached_tokens_same_model + now.cached_tokens_cross_model;
  const hits = [
    { count: now.cached_tokens_cross_model, className: "cross", label: "cached, written for another model" },
    { count: now.cached_tokens_same_model, className: "cached", label: "cached, written for the same model" },
    { count: Math.max(0, now.prompt_tokens - cached), className: "prefilled", label: "not cached" },
  ];
  const pages = [
    { count: now.pages_used, className: "used", label: "held by sequences and sessions" },
    { count: now.pages_cached, className: "cached", label: "kept for later prompts" },
    { count: now.pages_total - now.pages_used - now.pages_cached, className: "free", label: "empty" },
  ];
  const owners = Object.entries(now.pages_by_model).map(([model, count]) => ({
    count,
    className: `filled ${colourOf(model)}`,
    label: `first written for ${model}`,
  }));
  byId("pages").replaceChildren(...bar(pages));
  byId("owners").replaceChildren(...bar(owners));
  byId("prompt-tokens").replaceChildren(...bar(hits));
  const saved = now.prompt_tokens ? Math.round((100 * cached) / now.prompt_tokens) : 0;
  byId("numbers").replaceChildren(
    ...pair("tokens/s", rate(now).toFixed(0)),
    ...pair("sequences running", now.running),
    ...pair("sequences waiting", now.waiting),
    ...pair("prefill saved", `${saved}%`),
    ...pair("tokens generated", now.generated_tokens),
    ...pair("fan-out requests", now.fan_out_requests),
    ...pair("handoffs", now.handoffs),
    ...pair("sessions", now.sessions),
    ...pair("pages evicted", now.evictions),
    ...pair("preemptions", now.preemptions),
  );
}

const pair = (name, value) => [make("dt", {}, name), make("dd", {}, String(value))];

/** Returns the tokens a second since the poll before, and draws the last ones. */
function rate(now) {
  const seconds = last ? now.time - last.time : 0;
  const tokens = last ? now.generated_tokens - last.generated_tokens : 0;
  const value = seconds > 0 && tokens > 0 ? tokens / seconds : 0; // a server started anew counts from 0
  last = now;
  rates.push(value);
  if (rates.length > POINTS) rates.shift();
  const most = Math.max(1, ...rates);
  const points = rates.map((y, i) => `${POINTS - rates.length + i},${(19 - (18 * y) / most).toFixed(1)}`);
  byId("chart").firstElementChild.setAttribute("points", points.join(" "));
  return value;
}

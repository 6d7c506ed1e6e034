// How far a token is from the trunk: its log-probability under the model that wrote it, less that under the trunk.

import { make } from "./dom.js";

// In nats, by their upper ends. Each level has a colour and a line of its own (style.css).
const LEVELS = [
  { below: -0.1, className: "kl-minus", label: "under -0.1 nats: the trunk was surer (dashed)" },
  { below: 0.1, className: "kl-0", label: "-0.1 to 0.1: as the trunk (no mark)" },
  { below: 0.5, className: "kl-1", label: "0.1 to 0.5 (dotted)" },
  { below: 2, className: "kl-2", label: "0.5 to 2 (line)" },
  { below: Infinity, className: "kl-3", label: "2 and more: the trunk would hardly say it (double line)" },
];

/** Returns the class of a divergence in nats. */
export const levelOf = (nats) => LEVELS.find((level) => nats < level.below).className;

/** Returns the list that explains the colours. */
export const legend = () => LEVELS.map(({ className, label }) => make("li", {}, make("span", { className }, "token"), ` ${label}`));

/** Returns the divergence of scored tokens of the API, in nats. */
export const divergence = (tokens) => tokens.reduce((sum, token) => sum + token.logprob - token.reference_logprob, 0);

/** Describes scored tokens for a title. */
export function describe(tokens, model) {
  const lines = tokens.map(
    ({ token, logprob, reference_logprob: reference }) =>
      `${JSON.stringify(token)}: ${(logprob - reference).toFixed(2)} nats (${model} ${logprob.toFixed(2)}, trunk ${reference.toFixed(2)})`,
  );
  return lines.join("\n");
}

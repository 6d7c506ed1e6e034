// The server's HTTP API: the key, JSON answers, and streams of server-sent events.

const KEY = "icarus-api-key";

/** What the server said of a request that failed. status: the HTTP status; 0: there was no whole answer. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Keeps the key for as long as the tab is open; '' forgets it. */
export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

async function send(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer. Is it running?");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new ServerError(answer.status, body?.error?.message ?? `The server answered with status ${answer.status}.`);
}

/** Returns the JSON that the server gives at a path. Paths are relative, so that a proxy may serve us in a folder. */
export async function getJson(path) {
  return (await send(path)).json();
}

/** Yields the JSON of each event of a streamed answer. Throws ServerError for an error within the stream too. */
export async function* events(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const answer = await send(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  for await (const data of dataOf(answer.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(500, event.error.message);
    yield event;
  }
  throw new ServerError(0, "The connection broke before the answers were complete.");
}

async function* dataOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      return;
    }
    if (piece.done) return;
    const parts = (text + piece.value).split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

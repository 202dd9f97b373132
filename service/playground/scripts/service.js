// The service behind this page: what it can do, what it answers. Knows no elements.

import { eventsOf } from "./events.js";

const at = (path) => new URL(path, document.baseURI);
const KEY = "vlsae-key";
const thumbnails = new Map(); // path -> promise of an object URL
const concepts = new Map(); // id -> promise of a concept

/** What went wrong. `kind`: refused, broken (in the middle), unreachable or stopped; `text`: what had come until then. */
export class Failure extends Error {
  constructor(kind, { status = 0, code = "", message = "", param = null, retryAfter = 0, text = "" } = {}) {
    super(message);
    Object.assign(this, { kind, status, code, param, retryAfter, text });
  }
}

// ---- the key: of this tab, for as long as it is open
export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function send(path, options = {}) {
  const headers = { ...options.headers, ...(key.get() ? { authorization: `Bearer ${key.get()}` } : {}) };
  let answer;
  try {
    answer = await fetch(at(path), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw new Failure("stopped");
    throw new Failure("unreachable");
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function refusal(answer) {
  const about = await answer.json().then((body) => body.error, () => null);
  const retryAfter = Number.parseInt(answer.headers.get("retry-after") || "0", 10) || 0;
  return new Failure("refused", { ...about, status: answer.status, retryAfter });
}

/** Read off the contract, which is public: the model's name, whether a key is needed, and what can be asked for. */
export async function describe() {
  const contract = await (await send("openapi.json")).json();
  const { ChatCompletionRequest: chat, SteeringRequest: steering } = contract.components.schemas;
  const explain = steering.properties.explain;
  const operation = contract.paths["/v1/chat/completions"].post;
  return {
    model: chat.properties.model.enum[0],
    keyed: operation.security.length > 0,
    explains: Boolean(explain) && !(explain.enum && !explain.enum.includes(true)),
    shows: "/v1/concepts/{concept_id}" in contract.paths || "/v1/concepts" in contract.paths,
  };
}

/** Empty where it is ready, else why not. */
export async function whyNotReady() {
  try {
    await send("readyz");
    return "";
  } catch (failure) {
    if (failure.kind === "refused" && failure.status === 503) return failure.message || "The model is not ready yet.";
    throw failure;
  }
}

/**
 * Asks, and calls `onText` with the whole text so far whenever it grows. Returns text, receipt, usage and finish reason;
 * throws a Failure, and one in the middle of an answer has its text.
 */
export async function ask(body, { signal, onText }) {
  const answer = await send("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const found = { text: "", receipt: null, usage: null, finish: null };
  try {
    for await (const data of eventsOf(answer.body)) {
      if (data === "[DONE]") return found;
      take(JSON.parse(data), found, onText);
    }
  } catch (error) {
    if (error instanceof Failure) throw error;
    throw new Failure(signal.aborted ? "stopped" : "broken", { text: found.text });
  }
  throw new Failure(signal.aborted ? "stopped" : "broken", { text: found.text });
}

function take(chunk, found, onText) {
  if (chunk.error) throw new Failure("broken", { ...chunk.error, text: found.text });
  const choice = chunk.choices?.[0];
  found.receipt = chunk.steering ?? found.receipt;
  found.usage = chunk.usage ?? found.usage;
  found.finish = choice?.finish_reason ?? found.finish;
  if (choice?.delta?.content) {
    found.text += choice.delta.content;
    onText(found.text);
  }
}

/** One concept with its example texts and pictures. */
export const concept = (id) => remembered(concepts, id, async () => (await send(`v1/concepts/${id}`)).json());

/** An object URL of a thumbnail: an <img> cannot send a key. */
export const thumbnail = (path) =>
  remembered(thumbnails, path, async () => URL.createObjectURL(await (await send(path.replace(/^\//, ""))).blob()));

function remembered(kept, name, load) {
  if (!kept.has(name)) kept.set(name, load().catch((error) => { kept.delete(name); throw error; }));
  return kept.get(name);
}

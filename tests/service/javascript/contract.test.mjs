// The contract through the official JavaScript client. SERVER_URL, MODEL, PICTURE (a data: URL) and API_KEY come from
// the environment; API_KEY need not be a real one where the service has no keys.
import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";

const { SERVER_URL, MODEL, PICTURE, API_KEY } = process.env;
const client = new OpenAI({ baseURL: `${SERVER_URL}/v1`, apiKey: API_KEY, maxRetries: 0 });
const question = {
  role: "user",
  content: [
    { type: "image_url", image_url: { url: PICTURE } },
    { type: "text", text: "Describe the picture ." },
  ],
};
const greedy = { model: MODEL, messages: [question], temperature: 0, max_tokens: 12 };
const ask = (changes = {}, options = {}) => client.chat.completions.create({ ...greedy, ...changes }, options);

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

const textOf = (chunks, index = 0) =>
  chunks
    .flatMap((chunk) => chunk.choices)
    .filter((choice) => choice.index === index)
    .map((choice) => choice.delta.content ?? "")
    .join("");

test("a completion with its receipt", async () => {
  const answer = await ask();
  assert.equal(answer.object, "chat.completion");
  assert.equal(answer.model, MODEL);
  assert.ok(answer.choices[0].message.content.length > 0);
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  assert.equal(answer.steering.applied, true);
  assert.match(answer._request_id, /^.{8,}$/);
});

test("steering is a field like any other", async () => {
  const half = await ask({ steering: { strength: 0.5 } });
  assert.equal(half.steering.strength, 0.5);
  const off = await ask({ model: `${MODEL}:off` });
  assert.equal(off.steering.applied, false);
  const byHeader = await ask({}, { headers: { "x-steering-strength": "0.5" } });
  assert.deepEqual(byHeader.steering, half.steering);
});

test("a stream says what the whole says", async () => {
  const whole = await ask();
  const chunks = await collect(await ask({ stream: true, stream_options: { include_usage: true } }));
  assert.equal(textOf(chunks), whole.choices[0].message.content);
  assert.deepEqual(chunks.at(-1).usage, whole.usage);
  assert.deepEqual(chunks.at(-1).steering, whole.steering);
  assert.ok(chunks.length > 5);
});

test("the stream helper puts two choices together", async () => {
  const twice = { n: 2, seed: 7, temperature: 1, logprobs: true, top_logprobs: 2 };
  const whole = await ask(twice);
  const streamed = await client.chat.completions.stream({ ...greedy, ...twice }).finalChatCompletion();
  for (const index of [0, 1]) {
    assert.equal(streamed.choices[index].message.content, whole.choices[index].message.content);
    assert.equal(streamed.choices[index].finish_reason, whole.choices[index].finish_reason);
    assert.deepEqual(streamed.choices[index].logprobs.content, whole.choices[index].logprobs.content);
  }
});

test("an error is the client's own class, with code and param", async () => {
  await assert.rejects(ask({ max_tokens: 0 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.deepEqual([error.status, error.code, error.param], [400, "invalid_value", "max_tokens"]);
    assert.equal(error.type, "invalid_request_error");
    assert.match(error.requestID, /^.{8,}$/);
    return true;
  });
  await assert.rejects(ask({ model: "other" }), OpenAI.NotFoundError);
  await assert.rejects(ask({ stream: true, steering: { preset: "no such" } }), OpenAI.BadRequestError);
  await assert.rejects(ask({ tools: [{ type: "function", function: { name: "f" } }] }), { param: "tools" });
});

test("an aborted stream ends here and there", async () => {
  const stream = await ask({ stream: true, n: 8, temperature: 2, max_tokens: 200 });
  let seen = false;
  for await (const _chunk of stream) {
    const { running } = await (await fetch(`${SERVER_URL}/readyz`)).json();
    if (running > 0) stream.controller.abort();
    seen ||= running > 0;
  }
  assert.ok(seen, "it ended before it was seen to run");
  const aborted = AbortSignal.abort();
  await assert.rejects(ask({}, { signal: aborted }), OpenAI.APIUserAbortError);
  for (let tries = 0; tries < 100; tries += 1) {
    const { running } = await (await fetch(`${SERVER_URL}/readyz`)).json();
    if (running === 0) return;
    await new Promise((resume) => setTimeout(resume, 50));
  }
  assert.fail("the engine still runs");
});

test("models", async () => {
  const listed = await collect(await client.models.list());
  assert.deepEqual(listed.map((model) => model.id), [MODEL, `${MODEL}:off`, `${MODEL}:steered`]);
  assert.equal((await client.models.retrieve(`${MODEL}:off`)).id, `${MODEL}:off`);
});

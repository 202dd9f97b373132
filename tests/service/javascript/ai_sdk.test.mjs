// The contract through the AI SDK. SERVER_URL, MODEL and PICTURE (a data: URL) come from the environment, and what the
// service's page says of this client: STEERING and SCHEMA (options) and RECEIPT (where it stands in an `answer`).
import assert from "node:assert/strict";
import test from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const { SERVER_URL, MODEL, PICTURE, STEERING, SCHEMA, RECEIPT } = process.env;
const options = (code) => new Function(`return { ${code} }`)();
const receiptOf = (answer) => new Function("answer", `return ${RECEIPT}`)(answer);
const ITS_ERROR = "steering.strength: Input should be less than or equal to 1";
const TOO_STRONG = { providerOptions: { vlsae: { steering: { strength: 7 } } } };
const NO_TOOLS = /for an answer that follows a schema send response_format/;

const service = { name: "vlsae", baseURL: `${SERVER_URL}/v1`, apiKey: "unused", includeUsage: true };
const model = createOpenAICompatible({ ...service, ...options(SCHEMA) })(MODEL);
const question = {
  role: "user",
  content: [
    { type: "file", mediaType: "image/png", data: PICTURE },
    { type: "text", text: "Describe the picture ." },
  ],
};
const greedy = { model, messages: [question], temperature: 0, maxOutputTokens: 200, maxRetries: 0 };
const seen = z.object({
  shape: z.enum(["star", "ring", "cross"]),
  others: z.array(z.enum(["red", "green"])).max(2),
  sure: z.boolean(),
});

async function collect(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

test("an answer, and the same streamed", async () => {
  const whole = await generateText(greedy);
  assert.ok(whole.text.length > 0);
  const stream = streamText(greedy);
  const parts = await collect(stream.textStream);
  assert.equal(parts.join(""), whole.text);
  assert.ok(parts.length > 3);
  assert.equal((await stream.usage).totalTokens, whole.usage.totalTokens);
  const turns = [question, ...whole.response.messages, { role: "user", content: "And now ?" }];
  assert.ok((await generateText({ ...greedy, messages: turns })).text.length > 0);
});

test("an answer by a schema", async () => {
  const output = Output.object({ schema: seen });
  const whole = await generateText({ ...greedy, output });
  assert.deepEqual(whole.output, seen.parse(whole.output));
  const parts = await collect(streamText({ ...greedy, output }).partialOutputStream);
  assert.deepEqual(parts.at(-1), whole.output);
});

test("what zod has that other schemas do not", async () => {
  const schema = z.object({
    pair: z.tuple([z.boolean(), z.enum(["left", "right"])]),
    sure: z.record(z.enum(["shape", "color"]), z.boolean()),
    id: z.uuid(),
    day: z.iso.date(),
  });
  const { output } = await generateText({ ...greedy, output: Output.object({ schema }) });
  assert.deepEqual(output, schema.parse(output));
});

test("steering and the receipt", async () => {
  const receipt = receiptOf(await generateText({ ...greedy, ...options(STEERING) }));
  assert.deepEqual([receipt.applied, receipt.strength], [true, 0.8]);
  const stream = streamText({ ...greedy, ...options(STEERING), include: { rawChunks: true } });
  const raw = (await collect(stream.stream)).filter((part) => part.type === "raw");
  assert.deepEqual(raw.at(-1).rawValue.steering, receipt);
});

test("the receipt as metadata, for whoever wants it in every answer", async () => {
  const metadata = (body) => (body?.steering ? { vlsae: { steering: body.steering } } : undefined);
  const metadataExtractor = {
    extractMetadata: async ({ parsedBody }) => metadata(parsedBody),
    createStreamExtractor: () => {
      let last;
      return { processChunk: (chunk) => (last = chunk), buildMetadata: () => metadata(last) };
    },
  };
  const noted = { ...greedy, model: createOpenAICompatible({ ...service, metadataExtractor })(MODEL) };
  const { providerMetadata } = await generateText(noted);
  assert.equal(providerMetadata.vlsae.steering.applied, true);
  const stream = streamText(noted);
  await collect(stream.textStream);
  assert.deepEqual(await stream.providerMetadata, providerMetadata);
});

test("an error is its own class, with our message", async () => {
  const expected = (error) => {
    assert.ok(APICallError.isInstance(error));
    assert.deepEqual([error.statusCode, error.message], [400, ITS_ERROR]);
    assert.deepEqual([error.data.error.param, error.data.error.code], ["steering.strength", "invalid_value"]);
    return true;
  };
  await assert.rejects(generateText({ ...greedy, ...TOO_STRONG }), expected);
  let streamed;
  const onError = ({ error }) => {
    streamed = error;
  };
  await collect(streamText({ ...greedy, ...TOO_STRONG, onError }).textStream);
  assert.ok(expected(streamed));
});

test("tools are refused", async () => {
  const tools = { look: tool({ inputSchema: z.object({}) }) };
  for (const toolChoice of ["auto", "required"]) {
    await assert.rejects(generateText({ ...greedy, tools, toolChoice }), (error) => {
      assert.ok(APICallError.isInstance(error));
      assert.match(error.message, NO_TOOLS);
      return true;
    });
  }
});

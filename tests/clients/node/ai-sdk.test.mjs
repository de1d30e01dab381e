// The Vercel AI SDK, by its provider for OpenAI-compatible servers and by OpenAI's own, over chat and over Responses.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { DEMO_URL, HARMFUL, Pick, SCRIPTED_URL, test } from "./suite.mjs";

const apiKey = "unused";
const compatible = (baseURL) =>
  createOpenAICompatible({ name: "finesteer", baseURL, apiKey, includeUsage: true, supportsStructuredOutputs: true });
const providers = {
  compatible: (url, model) => compatible(url).chatModel(model),
  "openai.chat": (url, model) => createOpenAI({ baseURL: url, apiKey }).chat(model),
  "openai.responses": (url, model) => createOpenAI({ baseURL: url, apiKey }).responses(model),
};

const Person = z.object({ name: z.string(), age: z.number() });
const get_weather = tool({
  description: "The weather in a city.",
  inputSchema: z.object({ city: z.enum(["Paris", "Oslo"]) }),
  execute: async ({ city }) => `12 degrees in ${city}`,
});
const onError = () => {};

async function collect(result) {
  const parts = [];
  for await (const part of result.fullStream) {
    if (part.type === "error") throw part.error;
    parts.push(part);
  }
  return parts;
}

function forEach(name, run) {
  for (const [provider, model] of Object.entries(providers)) test(`${name}: ${provider}`, () => run(model));
}

forEach("text, whole and streamed", async (model) => {
  const fields = { model: model(DEMO_URL, "demo"), prompt: HARMFUL, temperature: 0, maxOutputTokens: 16, maxRetries: 0 };
  const whole = await generateText(fields);
  const stream = streamText({ ...fields, onError });
  const parts = await collect(stream);
  const text = parts.filter((part) => part.type === "text-delta").map((part) => part.text).join("");
  assert.equal(text, whole.text);
  assert.ok(text);
  assert.equal((await stream.usage).totalTokens, whole.usage.totalTokens);
});

forEach("an object from any model", async (model) => {
  const { output } = await generateText({
    model: model(DEMO_URL, "demo"),
    prompt: HARMFUL,
    temperature: 0,
    maxOutputTokens: 200,
    maxRetries: 0,
    output: Output.object({ schema: Pick }),
  });
  assert.ok(Pick.parse(output));
});

forEach("an object in a stream", async (model) => {
  const stream = streamText({
    model: model(SCRIPTED_URL, "scripted"),
    prompt: "Who is Ada?",
    maxRetries: 0,
    output: Output.object({ schema: Person }),
    onError,
  });
  await collect(stream);
  assert.deepEqual(await stream.output, { name: "Ada", age: 36 });
});

forEach("a call from any model", async (model) => {
  const { toolCalls } = await generateText({
    model: model(DEMO_URL, "demo"),
    prompt: HARMFUL,
    maxOutputTokens: 60,
    maxRetries: 0,
    tools: { get_weather },
    toolChoice: { type: "tool", toolName: "get_weather" },
  });
  assert.equal(toolCalls[0].toolName, "get_weather");
  assert.ok(["Paris", "Oslo"].includes(toolCalls[0].input.city));
});

forEach("the tools loop", async (model) => {
  const { text, steps } = await generateText({
    model: model(SCRIPTED_URL, "scripted"),
    prompt: "What is the weather in Paris and Oslo?",
    maxRetries: 0,
    tools: { get_weather },
    stopWhen: stepCountIs(3),
  });
  assert.equal(text, "The tools say: 12 degrees in Paris; 12 degrees in Oslo");
  assert.equal(steps.length, 2);
});

forEach("the tools loop in a stream", async (model) => {
  const stream = streamText({
    model: model(SCRIPTED_URL, "scripted"),
    prompt: "What is the weather in Paris and Oslo?",
    maxRetries: 0,
    tools: { get_weather },
    stopWhen: stepCountIs(3),
    onError,
  });
  const kinds = (await collect(stream)).map((part) => part.type);
  assert.equal(kinds.filter((kind) => kind === "tool-call").length, 2);
  assert.ok(kinds.includes("tool-input-delta"));
  assert.equal(await stream.text, "The tools say: 12 degrees in Paris; 12 degrees in Oslo");
});

forEach("instructions reach the model", async (model) => {
  const { text } = await generateText({
    model: model(SCRIPTED_URL, "scripted"),
    system: "Be brief.",
    prompt: "What were you told?",
    maxRetries: 0,
  });
  assert.equal(text, "I was told: Be brief.");
});

test("text completions: compatible", async () => {
  const model = compatible(DEMO_URL).completionModel("demo");
  const { text } = await generateText({ model, prompt: "The cat", maxOutputTokens: 5, maxRetries: 0 });
  assert.ok(text);
});

test("steering by option, by header and by name", async () => {
  const fields = { prompt: HARMFUL, temperature: 0, maxOutputTokens: 16, maxRetries: 0 };
  const provider = compatible(DEMO_URL);
  const answers = await Promise.all([
    generateText({ ...fields, model: provider.chatModel("demo") }),
    generateText({ ...fields, model: provider.chatModel("demo:unsteered") }),
    generateText({
      ...fields,
      model: provider.chatModel("demo"),
      providerOptions: { finesteer: { steer_strength: 0 } },
    }),
    generateText({ ...fields, model: provider.chatModel("demo"), headers: { "X-FineSteer-Strength": "0" } }),
  ]);
  const [steered, ...plain] = answers.map((answer) => answer.text);
  assert.equal(new Set(plain).size, 1);
  assert.notEqual(steered, plain[0]);
});

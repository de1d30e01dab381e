// openai for Node: chat, completions, Responses; whole, streamed, parsed, with tools.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { DEMO_URL, HARMFUL, Pick, SCRIPTED_URL, test } from "./suite.mjs";

const client = new OpenAI({ baseURL: DEMO_URL, apiKey: "unused", maxRetries: 0 });
const clever = new OpenAI({ baseURL: SCRIPTED_URL, apiKey: "unused", maxRetries: 0 });

const said = (content) => [{ role: "user", content }];
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};
const greedy = { model: "demo", temperature: 0, max_tokens: 16 };
const greedyResponse = { model: "demo", temperature: 0, max_output_tokens: 16 };

test("chat, whole and streamed", async () => {
  const whole = await client.chat.completions.create({ ...greedy, messages: said(HARMFUL) });
  assert.equal(whole.steering.reason, "gate_open");
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...greedy, messages: said(HARMFUL), stream: true }))
    text += chunk.choices[0].delta.content ?? "";
  assert.equal(text, whole.choices[0].message.content);
});

test("steering fields", async () => {
  const plain = await client.chat.completions.create({ ...greedy, messages: said(HARMFUL), steer_strength: 0 });
  assert.equal(plain.steering.reason, "strength_zero");
});

test("chat, the stream helper", async () => {
  const stream = client.chat.completions.stream({ ...greedy, max_tokens: 200, messages: said(HARMFUL) });
  let text = "";
  stream.on("content", (delta) => (text += delta));
  const final = await stream.finalChatCompletion();
  assert.equal(text, final.choices[0].message.content);
  assert.equal(final.choices[0].finish_reason, "stop");
});

test("chat, parse", async () => {
  const answer = await client.chat.completions.parse({
    ...greedy,
    max_tokens: 200,
    messages: said(HARMFUL),
    response_format: zodResponseFormat(Pick, "pick"),
  });
  assert.ok(Pick.parse(answer.choices[0].message.parsed));
});

test("chat, the tools loop", async () => {
  const cities = [];
  const runner = clever.chat.completions.runTools({
    model: "scripted",
    messages: said("What is the weather in Paris and Oslo?"),
    tools: [
      {
        type: "function",
        function: {
          name: "get_weather",
          parameters,
          parse: JSON.parse,
          function: ({ city }) => (cities.push(city), `12 degrees in ${city}`),
        },
      },
    ],
  });
  assert.equal(await runner.finalContent(), "The tools say: 12 degrees in Paris; 12 degrees in Oslo");
  assert.deepEqual(cities, ["Paris", "Oslo"]);
});

test("chat, the tools loop in a stream", async () => {
  const runner = clever.chat.completions.runTools({
    model: "scripted",
    stream: true,
    messages: said("What is the weather in Paris and Oslo?"),
    tools: [
      {
        type: "function",
        function: { name: "get_weather", parameters, parse: JSON.parse, function: ({ city }) => `12 degrees in ${city}` },
      },
    ],
  });
  assert.equal(await runner.finalContent(), "The tools say: 12 degrees in Paris; 12 degrees in Oslo");
});

test("errors are the client's own", async () => {
  await assert.rejects(
    client.chat.completions.create({ ...greedy, messages: said("hi"), steer_strenght: 1 }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "steer_strenght",
  );
  await assert.rejects(client.chat.completions.create({ ...greedy, messages: said("hi"), model: "gpt-9" }), OpenAI.NotFoundError);
});

test("completions", async () => {
  const whole = await client.completions.create({ ...greedy, prompt: "The cat" });
  let text = "";
  for await (const chunk of await client.completions.create({ ...greedy, prompt: "The cat", stream: true }))
    text += chunk.choices[0].text;
  assert.equal(text, whole.choices[0].text);
});

test("responses, whole and streamed", async () => {
  const whole = await client.responses.create({ ...greedyResponse, input: HARMFUL });
  assert.equal(whole.steering.reason, "gate_open");
  const final = await client.responses.stream({ ...greedyResponse, input: HARMFUL }).finalResponse();
  assert.equal(final.output_text, whole.output_text);
});

test("responses, parse", async () => {
  const response = await client.responses.parse({
    ...greedyResponse,
    max_output_tokens: 200,
    input: HARMFUL,
    text: { format: zodTextFormat(Pick, "pick") },
  });
  assert.ok(Pick.parse(response.output_parsed));
});

test("responses, the tools loop", async () => {
  const tools = [{ type: "function", name: "get_weather", strict: true, parameters }];
  const first = await clever.responses.create({ model: "scripted", input: "What is the weather in Paris?", tools });
  const call = first.output.find((item) => item.type === "function_call");
  assert.deepEqual(JSON.parse(call.arguments), { city: "Paris" });
  const last = await clever.responses.create({
    model: "scripted",
    previous_response_id: first.id,
    input: [{ type: "function_call_output", call_id: call.call_id, output: "12 degrees" }],
    tools,
  });
  assert.equal(last.output_text, "The tools say: 12 degrees");
});

test("models", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.deepEqual(names.slice(0, 2), ["demo", "demo:unsteered"]);
});

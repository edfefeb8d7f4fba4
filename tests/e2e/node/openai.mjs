// OpenAI's package for Node.js against the server at the URL given: what it got, as JSON.
import OpenAI from "openai";

const url = process.argv[2];
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const asked = {
  model: "",
  messages: [{ role: "user", content: "What is the capital of France? Answer with one word." }],
  temperature: 0,
  max_tokens: 8,
};
const parameters = {
  type: "object",
  properties: { city: { type: "string", maxLength: 12 } },
  required: ["city"],
  additionalProperties: false,
};

async function chat() {
  const reply = await client.chat.completions.create(asked);
  return { text: reply.choices[0].message.content, finish: reply.choices[0].finish_reason, usage: reply.usage };
}

async function stream() {
  const chunks = await client.chat.completions.create({
    ...asked,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage = null;
  for await (const chunk of chunks) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, usage };
}

async function tools() {
  const tool = { type: "function", function: { name: "get_weather", parameters, strict: true } };
  const fields = { ...asked, tools: [tool], tool_choice: "required", parallel_tool_calls: false, max_tokens: 100 };
  const whole = await client.chat.completions.create(fields);
  const runner = client.chat.completions.stream(fields);
  const streamed = await runner.finalChatCompletion();
  const call = (reply) => {
    const { name, arguments: text } = reply.choices[0].message.tool_calls[0].function;
    return { name, arguments: JSON.parse(text) };
  };
  return { whole: call(whole), streamed: call(streamed), finish: whole.choices[0].finish_reason };
}

async function responses() {
  const fields = { model: "", input: asked.messages[0].content, temperature: 0, max_output_tokens: 16 };
  const whole = await client.responses.create(fields);
  const events = [];
  let text = "";
  for await (const event of await client.responses.create({ ...fields, stream: true })) {
    events.push(event.type);
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  const kept = await client.responses.retrieve(whole.id);
  let later = await client.responses.create({ ...fields, background: true });
  while (later.status === "queued" || later.status === "in_progress") {
    later = await client.responses.retrieve(later.id);
  }
  const next = await client.responses.create({
    model: "",
    input: "Say it again.",
    previous_response_id: whole.id,
    max_output_tokens: 100,
    tools: [{ type: "function", name: "get_weather", parameters, strict: true }],
    tool_choice: { type: "function", name: "get_weather" },
  });
  await client.responses.delete(whole.id);
  const gone = await client.responses.retrieve(whole.id).catch((error) => error.status);
  return {
    text: whole.output_text,
    streamed: text,
    kept: kept.output_text,
    later: later.output_text,
    first: events[0],
    last: events.at(-1),
    next: next.output.map((item) => item.type),
    gone,
  };
}

async function embeddings() {
  const reply = await client.embeddings.create({ model: "", input: ["a", "b"] });
  return { sizes: reply.data.map((entry) => entry.embedding.length) };
}

async function errors() {
  const wrong = await client.chat.completions.create({ ...asked, temperature: 9 }).catch((error) => error);
  return { kind: wrong.constructor.name, status: wrong.status, param: wrong.param };
}

const made = {};
for (const part of [chat, stream, tools, responses, embeddings, errors]) made[part.name] = await part();
console.log(JSON.stringify(made));

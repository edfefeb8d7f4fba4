// Anthropic's package for Node.js against the server at the URL given: what it got, as JSON.
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.argv[2], apiKey: "unused", maxRetries: 0 });
const asked = {
  model: "",
  messages: [{ role: "user", content: "What is the capital of France? Answer with one word." }],
  max_tokens: 8,
  temperature: 0,
};

async function messages() {
  const reply = await client.messages.create(asked);
  return { text: reply.content[0].text, stop: reply.stop_reason, usage: reply.usage };
}

async function stream() {
  const runner = client.messages.stream(asked);
  let text = "";
  runner.on("text", (delta) => (text += delta));
  const final = await runner.finalMessage();
  return { text, final: final.content[0].text, usage: final.usage };
}

async function tools() {
  const reply = await client.messages.create({
    ...asked,
    max_tokens: 100,
    tools: [
      {
        name: "get_weather",
        input_schema: {
          type: "object",
          properties: { city: { type: "string", maxLength: 12 } },
          required: ["city"],
          additionalProperties: false,
        },
      },
    ],
    tool_choice: { type: "tool", name: "get_weather" },
  });
  const call = reply.content.find((block) => block.type === "tool_use");
  return { name: call.name, input: call.input, stop: reply.stop_reason };
}

async function count() {
  return await client.messages.countTokens({ model: "", messages: asked.messages });
}

async function errors() {
  const wrong = await client.messages.create({ ...asked, max_tokens: 0 }).catch((error) => error);
  return { kind: wrong.constructor.name, status: wrong.status };
}

const made = {};
for (const part of [messages, stream, tools, count, errors]) made[part.name] = await part();
console.log(JSON.stringify(made));

// Written against what openapi-typescript makes of /openapi.json; compiled with tsc --strict, never run.
import type { components, paths } from "./made/vserve";

type Schemas = components["schemas"];
type ChatReply = paths["/v1/chat/completions"]["post"]["responses"]["200"]["content"]["application/json"];
type ResponseReply = paths["/v1/responses"]["post"]["responses"]["200"]["content"]["application/json"];
type ChatBody = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"];
type ResponsesBody = paths["/v1/responses"]["post"]["requestBody"]["content"]["application/json"];
type Failure = paths["/v1/chat/completions"]["post"]["responses"]["default"]["content"]["application/json"];

async function post<Body, Reply>(path: keyof paths, body: Body): Promise<Reply> {
  const reply = await fetch(`http://127.0.0.1:8000${path}`, { method: "POST", body: JSON.stringify(body) });
  if (!reply.ok) {
    const failure: Failure = await reply.json();
    throw new Error(failure.error.message);
  }
  return reply.json();
}

export async function chat(question: string): Promise<string> {
  const body: ChatBody = { messages: [{ role: "user", content: question }], max_tokens: 16, temperature: 0 };
  const reply = await post<ChatBody, ChatReply>("/v1/chat/completions", body);
  const total: number = reply.usage.total_tokens;
  const [choice] = reply.choices;
  if (choice === undefined) throw new Error(`${total} tokens and no choice`);
  return `${choice.message.content ?? ""} (${choice.finish_reason})`;
}

export async function respond(question: string): Promise<string> {
  const body: ResponsesBody = { input: question, store: false };
  const reply: Schemas["Response"] = await post<ResponsesBody, ResponseReply>("/v1/responses", body);
  return `${reply.id}: ${reply.status}, ${reply.output.length} items`;
}

export const chunkText = (chunk: Schemas["ChatCompletionChunk"]): string => chunk.choices[0]?.delta.content ?? "";

// What must not compile: a wrong type, a reply's field that is not there.
// @ts-expect-error max_tokens is a number
export const wrong: ChatBody = { messages: [{ role: "user", content: "x" }], max_tokens: "many" };
// @ts-expect-error messages are required
export const missing: ChatBody = { max_tokens: 1 };
// @ts-expect-error there is no such field
export const unknown = (reply: ChatReply): unknown => reply.answers;

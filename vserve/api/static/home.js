"use strict";

// The home page: how the server is, and a conversation with its model.  Nothing is stored: a reload forgets it all.
const LOOK_MS = 2000;
const at = (id) => document.getElementById(id);
const guarded = document.documentElement.dataset.guarded === "yes";
let key = "";
let turns = []; // of the conversation, as the API takes them
let running = null; // the AbortController of the answer under way

const headers = (more) => (key ? { ...more, authorization: `Bearer ${key}` } : { ...more });
const open = () => !guarded || key !== "";

// ---- The server -------------------------------------------------------------------------------------------------

async function ask(path) {
  const reply = await fetch(path, { headers: headers(), cache: "no-store" });
  const body = await reply.json();
  if (reply.ok || "phase" in body) return body;
  throw Object.assign(new Error(body.error ? body.error.message : `HTTP ${reply.status}`), { status: reply.status });
}

function state(name, words) {
  at("state").dataset.state = name;
  if (at("state").textContent !== words) at("state").textContent = words;
}

const percent = (share) => `${Math.round(share * 100)} %`;

async function look() {
  let starting = false;
  try {
    // Alive or not is 200 here; /health would answer 503 while the server starts.
    const health = await ask("livez");
    starting = health.phase !== "ready";
    const done = health.progress == null ? "" : `, ${percent(health.progress)}`;
    const words = starting ? `${health.phase[0].toUpperCase()}${health.phase.slice(1)}${done}` : "Ready";
    state(health.status === "ok" && !starting ? "ok" : "unavailable", words);
    if (open() && !starting) {
      show(await ask("load"));
      if (at("model").options.length === 0) await models();
    }
  } catch (error) {
    const gone = error instanceof TypeError; // what fetch throws where there is no server
    if (gone) state("gone", "Not reachable");
    else refused(error);
  }
}

function show(load) {
  at("figures").hidden = false;
  at("running").textContent = load.running ?? load.embedding_requests ?? 0;
  at("waiting").textContent = load.queue_size;
  for (const [name, share] of [["cache", load.kv_cache_usage ?? 0], ["busy", load.gpu_utilization]]) {
    at(name).textContent = percent(share);
    at(`${name}-meter`).value = share;
  }
}

async function models() {
  const { data } = await ask("v1/models");
  at("model").replaceChildren(...data.map((model) => new Option(model.id)));
  at("model").disabled = data.length < 2;
  const note = () => {
    const model = data[at("model").selectedIndex];
    at("model-note").textContent = model ? `${model.max_model_len.toLocaleString("en")} tokens of context` : "";
  };
  at("model").onchange = note;
  note();
}

function refused(error) {
  at("model-note").textContent = error.message;
  if (error.status === 401 || error.status === 403) key = ""; // one that does not work is not sent again and again
}

async function watch() {
  if (!document.hidden) await look();
  setTimeout(watch, LOOK_MS);
}

// ---- The conversation -------------------------------------------------------------------------------------------

function say(role, words) {
  at("empty").hidden = true;
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  const who = document.createElement("span");
  who.className = "hidden";
  who.textContent = { user: "You: ", assistant: "Model: ", error: "Error: " }[role];
  const reasoning = document.createElement("span");
  reasoning.className = "reasoning";
  const answer = document.createElement("span");
  answer.className = "answer";
  answer.textContent = words;
  turn.append(who, reasoning, answer);
  at("log").append(turn);
  at("log").scrollTop = at("log").scrollHeight;
  return turn;
}

// The data of each event of a reply, as it comes (the event stream format of the HTML standard).
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield data.join("\n");
    }
  }
}

async function chat(words) {
  turns.push({ role: "user", content: words });
  say("user", words);
  const turn = say("assistant", "");
  turn.classList.add("growing");
  running = new AbortController();
  busy(true);
  try {
    await stream(turn);
  } catch (error) {
    if (error.name !== "AbortError") say("error", error.message);
  } finally {
    turn.classList.remove("growing");
    const content = turn.querySelector(".answer").textContent;
    if (content) turns.push({ role: "assistant", content });
    else {
      turns.pop(); // an unanswered question would be asked twice
      if (!turn.querySelector(".reasoning").textContent) turn.remove();
    }
    running = null;
    busy(false);
    at("words").focus();
  }
}

async function stream(turn) {
  const began = performance.now();
  let first = 0;
  const body = { messages: turns, stream: true, stream_options: { include_usage: true } };
  if (at("model").value) body.model = at("model").value;
  const reply = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers({ "content-type": "application/json" }),
    body: JSON.stringify(body),
    signal: running.signal,
  });
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  for await (const data of events(reply)) {
    if (data === "[DONE]") break;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    const delta = event.choices[0]?.delta ?? {};
    const log = at("log");
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    if (delta.content || delta.reasoning) first ||= performance.now();
    turn.querySelector(".reasoning").append(delta.reasoning ?? "");
    turn.querySelector(".answer").append(delta.content ?? "");
    if (follows) log.scrollTop = log.scrollHeight;
    if (event.usage) figure(event.usage.completion_tokens, began, first);
  }
}

function figure(count, began, first) {
  const seconds = (performance.now() - first) / 1000;
  const pace = count > 1 && seconds > 0.05 ? `, then ${((count - 1) / seconds).toFixed(1)} a second` : "";
  at("figure").textContent = `${count} tokens; the first after ${((first - began) / 1000).toFixed(2)} s${pace}`;
}

function busy(now) {
  at("send").disabled = now;
  at("stop").disabled = !now;
  at("clear").disabled = now || !document.querySelector(".turn");
  at("log").setAttribute("aria-busy", String(now));
}

at("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const words = at("words").value.trim();
  if (!words || running) return;
  at("words").value = "";
  chat(words);
});

at("words").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("chat-form").requestSubmit();
  }
});

at("stop").addEventListener("click", () => running?.abort());

at("clear").addEventListener("click", () => {
  turns = [];
  for (const turn of at("log").querySelectorAll(".turn")) turn.remove();
  at("empty").hidden = false;
  at("figure").textContent = "";
  busy(false);
});

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  look();
});

at("key-form").hidden = !guarded;
if (guarded) at("model-note").textContent = "This server asks for an API key.";
fetch("version", { cache: "no-store" })
  .then((reply) => reply.json())
  .then(({ version }) => (at("version").textContent = version))
  .catch(() => {});
watch();

// The box to try a prompt: what it sends, and the answer as it comes.

import { byId, number, plural, say, seconds } from "./text.js";

const ENDS = { length: "as long as asked", stop: "ended by itself", tool_calls: "calls a tool" };

export class PromptBox {
  #running = null; // what stops the answer that comes now
  #models = [];

  // headers: gives those that every request needs; denied: is told when the key is not known.
  constructor(headers, denied) {
    Object.assign(this, { headers, denied });
    this.form = byId("prompt-form");
    this.answer = byId("answer");
    this.note = byId("answer-note");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.stop());
    byId("stop").addEventListener("click", () => this.stop());
  }

  show(state) {
    this.#models = state.models;
    byId("kinds").hidden = !state.chat;
    byId("max-tokens").max = state.max_len;
  }

  stop() {
    this.#running?.abort();
  }

  async #send() {
    if (this.#running || !this.#models.length) return;
    const running = (this.#running = new AbortController());
    const text = document.createTextNode("");
    this.answer.replaceChildren(text);
    this.answer.hidden = true;
    this.#busy(true);
    say(this.note, "Waiting for the first token");
    try {
      say(this.note, await this.#stream(running.signal, text));
      this.note.classList.remove("bad");
    } catch (error) {
      const stopped = running.signal.aborted;
      say(this.note, stopped ? "Stopped" : `It failed: ${error.message}`);
      this.note.classList.toggle("bad", !stopped);
    } finally {
      this.#running = null;
      this.#busy(false);
    }
  }

  #busy(busy) {
    if (busy) this.note.classList.remove("bad");
    byId("send").disabled = busy;
    byId("stop").disabled = !busy;
    this.answer.setAttribute("aria-busy", String(busy));
  }

  #request() {
    const chat = !byId("kinds").hidden && this.form.elements.kind.value === "chat";
    const prompt = byId("prompt").value;
    const body = {
      model: this.#models[0],
      ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
      max_tokens: byId("max-tokens").valueAsNumber,
      temperature: byId("temperature").valueAsNumber,
      stream: true,
      stream_options: { include_usage: true },
    };
    return [chat ? "v1/chat/completions" : "v1/completions", JSON.stringify(body)];
  }

  // Returns what is to be said of the whole answer.
  async #stream(signal, text) {
    const began = performance.now();
    const [path, body] = this.#request();
    const headers = { "Content-Type": "application/json", ...this.headers() };
    const answer = await fetch(path, { method: "POST", body, headers, signal });
    if (!answer.ok) {
      if (answer.status === 401) this.denied();
      const said = await answer.json().catch(() => null);
      throw new Error(said?.error?.message ?? `the server answered ${answer.status}`);
    }
    let [first, reason, usage, whole] = [null, null, null, false];
    for await (const data of eventsOf(answer.body)) {
      if (data === "[DONE]") {
        whole = true;
        continue;
      }
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        const more = choice.delta ? choice.delta.content : choice.text;
        reason = choice.finish_reason ?? reason;
        if (!more) continue;
        if (first === null) {
          first = performance.now();
          say(this.note, `First token after ${seconds((first - began) / 1000)}`);
        }
        this.#append(text, more);
      }
    }
    if (!whole) throw new Error("the connection ended before the answer");
    return summary(began, first, usage, reason);
  }

  #append(text, more) {
    const box = this.answer;
    const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    box.hidden = false;
    text.appendData(more);
    if (follows) box.scrollTop = box.scrollHeight;
  }
}

function summary(began, first, usage, reason) {
  const parts = [];
  const took = (performance.now() - (first ?? began)) / 1000;
  if (first !== null) parts.push(`first token after ${seconds((first - began) / 1000)}`);
  if (usage) {
    parts.push(plural(usage.completion_tokens, "token"));
    if (usage.completion_tokens > 1 && took > 0) {
      parts.push(`${number((usage.completion_tokens - 1) / took)} tokens/s`);
    }
  }
  parts.push(ENDS[reason] ?? reason ?? "ended");
  const said = parts.join(" · ");
  return said[0].toUpperCase() + said.slice(1);
}

// The data of server-sent events, whose lines may come in any pieces.
async function* eventsOf(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

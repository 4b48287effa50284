// Asks the server what it does, twice a second while anybody looks, and shows it.

import { Charts } from "./charts.js";
import { PromptBox } from "./prompt.js";
import { Slots, showQueue } from "./slots.js";
import { byId, say } from "./text.js";

const PAUSE = 500; // milliseconds
const RETRY = 2000;
const PATIENCE = 10000;
const STATES = {
  loading: "The model is being loaded",
  ready: "Takes requests",
  draining: "Shutting down: takes no new requests",
  stopped: "Stopped",
  failed: "The engine has failed, and has to be started again",
  engine_hangs: "A step of the engine takes too long",
};

let key = ""; // stays here: not in a URL, a cookie or any storage
let timer = null;
let asking = false;
const slots = new Slots();
const charts = new Charts();
const prompts = new PromptBox(authorization, () => askForKey("This server doesn't know this key."));

function authorization() {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function show(state) {
  say(byId("state"), STATES[state.state] ?? state.state);
  byId("state").classList.toggle("bad", ["failed", "engine_hangs"].includes(state.state));
  byId("main").hidden = !state.models;
  if (!state.models) return;
  say(byId("model"), state.models.join(", "));
  document.title = `${state.models[0]} – Caravan`;
  slots.show(state);
  showQueue(state);
  charts.show(state);
  prompts.show(state);
}

function askForKey(problem) {
  clearTimeout(timer);
  timer = null;
  key = "";
  say(byId("key-error"), problem);
  say(byId("state"), "Locked");
  byId("key-form").hidden = false;
  byId("main").hidden = true;
  byId("key").focus();
}

async function ask() {
  if (asking || document.hidden) return;
  asking = true;
  clearTimeout(timer);
  timer = setTimeout(ask, await poll());
  asking = false;
  if (!byId("key-form").hidden) clearTimeout(timer);
}

// Returns after how many milliseconds to ask again.
async function poll() {
  try {
    const answer = await fetch("page/state", {
      headers: authorization(),
      cache: "no-store",
      signal: AbortSignal.timeout(PATIENCE),
    });
    if (answer.status === 401) {
      askForKey(key ? "This server doesn't know this key." : "");
      return RETRY;
    }
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    show(await answer.json());
    return PAUSE;
  } catch (error) {
    say(byId("state"), "No answer from the server; trying again");
    console.debug(error);
    return RETRY;
  }
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  byId("key").value = "";
  if (!/^[!-~]+$/.test(key)) return askForKey("A key has letters, digits and signs, and no spaces.");
  byId("key-form").hidden = true;
  ask();
});
document.addEventListener("visibilitychange", ask);

if (document.documentElement.dataset.locked === "yes") askForKey("");
else ask();

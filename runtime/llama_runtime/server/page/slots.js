// Slots as rows, and those who wait for one. A row keeps its sequence until that ends.

import { byId, make, number, plural, say, seconds } from "./text.js";

const COMPACT = 32; // more rows than this are small
const LEAST_SCALE = 64; // tokens

export class Slots {
  #list = byId("slots");
  #rows = [];
  #places = new Map(); // of sequences, by their id

  show(state) {
    this.#resize(state.slots);
    this.#settle(state.running);
    const longest = Math.max(0, ...state.running.map((one) => one.prompt + one.tokens));
    const scale = Math.max(LEAST_SCALE, 2 ** Math.ceil(Math.log2(Math.max(1, longest))));
    const shown = new Set();
    for (const one of state.running) {
      const place = this.#places.get(one.id);
      shown.add(place);
      this.#rows[place].fill(one, scale);
    }
    this.#rows.forEach((row, place) => shown.has(place) || row.clear());
    say(byId("slots-note"), this.#note(state));
    say(byId("scale"), `full row: ${plural(scale, "token")}`);
  }

  #note(state) {
    const limit = state.limit < state.slots ? `, of which ${state.limit} may be in use now` : "";
    return `${state.running.length} of ${state.slots} in use${limit}`;
  }

  #resize(count) {
    if (this.#rows.length === count) return;
    this.#list.replaceChildren();
    this.#places.clear();
    this.#rows = Array.from({ length: count }, (_, place) => new Row(this.#list, place));
    this.#list.classList.toggle("compact", count > COMPACT);
  }

  // With several devices two sequences may have one slot number: the second takes a free row.
  #settle(running) {
    const ids = new Set(running.map((one) => one.id));
    for (const id of [...this.#places.keys()]) if (!ids.has(id)) this.#places.delete(id);
    const taken = new Set(this.#places.values());
    for (const one of running) {
      if (this.#places.has(one.id)) continue;
      let place = one.slot < this.#rows.length ? one.slot : 0;
      while (taken.has(place)) place = (place + 1) % this.#rows.length;
      taken.add(place);
      this.#places.set(one.id, place);
    }
  }
}

class Row {
  #id = null;

  constructor(list, place) {
    this.element = make("li", "idle", list);
    say(make("span", "number", this.element), String(place));
    this.request = make("span", "request", this.element);
    this.track = make("span", "track", this.element);
    this.track.setAttribute("aria-hidden", "true");
    for (const part of ["unread", "read", "done"]) make("span", part, this.track);
    const what = make("span", "what", this.element);
    this.what = make("span", "", what);
    this.unit = make("span", "unit", what);
    this.age = make("span", "age", this.element);
  }

  fill(one, scale) {
    const reads = one.tokens === 0;
    this.element.className = one.id === this.#id ? "busy" : "busy fresh"; // fresh: from zero at once
    this.#id = one.id;
    const style = this.track.style;
    style.setProperty("--prompt", Math.min(1, one.prompt / scale));
    style.setProperty("--read-to", Math.min(1, one.read / scale));
    style.setProperty("--done", one.tokens / scale);
    say(this.request, one.request);
    this.element.title = `request ${one.request}: prompt of ${plural(one.prompt, "token")}, ` +
      `${number(one.tokens)} of at most ${number(one.max_tokens)} generated`;
    const share = Math.floor((100 * one.read) / Math.max(1, one.prompt));
    say(this.what, reads ? `${share} %` : number(one.tokens));
    say(this.unit, reads ? " read" : one.tokens === 1 ? " token" : " tokens");
    say(this.age, seconds(one.age));
  }

  clear() {
    if (this.#id === null) return;
    this.#id = null;
    this.element.className = "idle";
    this.element.removeAttribute("title");
    for (const part of [this.request, this.what, this.unit, this.age]) say(part, "");
  }
}

export function showQueue(state) {
  const list = byId("queue");
  while (list.children.length > state.waiting.length) list.lastChild.remove();
  state.waiting.forEach((one, index) => {
    const item = list.children[index] ?? make("li", "", list);
    if (!item.children.length) {
      for (const part of ["request", "size", "age"]) make("span", part, item);
    }
    const [request, size, age] = item.children;
    say(request, one.request);
    say(size, plural(one.prompt, "token"));
    say(age, seconds(one.age));
  });
  const more = state.num_waiting - state.waiting.length;
  const count = state.num_waiting ? plural(state.num_waiting, "sequence") : "Nothing";
  const verb = state.num_waiting > 1 ? "wait" : "waits";
  say(byId("queue-note"), `${count} ${verb} for a slot${more && state.waiting.length ? `; ${more} not shown` : ""}`);
}

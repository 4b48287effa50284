// Speed and latency of the last minute, from counters that are asked for again and again.

import { byId, make, number, say, seconds } from "./text.js";

const SPAN = 60; // seconds that a chart shows
const RATE_WINDOW = 2; // seconds
const QUANTILE_WINDOW = 10;
const BREAK = 3; // seconds without an answer, after which a line has a gap
const [WIDTH, HEIGHT] = [300, 50];
const SVG = "http://www.w3.org/2000/svg";

export class Charts {
  #samples = []; // answers of the last minute, oldest first
  #charts = {
    out: new Chart("out", (rate) => number(rate), "tokens/s"),
    in: new Chart("in", (rate) => number(rate), "tokens/s"),
    first: new Chart("first", seconds, "median", true),
    between: new Chart("between", seconds, "median", true),
  };

  show(state) {
    const last = this.#samples.at(-1);
    if (last && (state.time < last.time || state.finished < last.finished)) this.clear();
    this.#samples.push(state);
    while (this.#samples[0].time < state.time - SPAN - QUANTILE_WINDOW) this.#samples.shift();
    const points = {
      out: [this.#rate(state, "completion_tokens")],
      in: [this.#rate(state, "prompt_tokens")],
      first: this.#quantiles(state, "first_token"),
      between: this.#quantiles(state, "between"),
    };
    for (const [name, values] of Object.entries(points)) this.#charts[name].add(state.time, values);
  }

  clear() { // another process answers
    this.#samples = [];
    for (const chart of Object.values(this.#charts)) chart.clear();
  }

  #before(state, window) {
    return this.#samples.find((one) => one.time >= state.time - window - 0.25);
  }

  #rate(state, name) {
    const before = this.#before(state, RATE_WINDOW);
    return before === state ? null : (state[name] - before[name]) / (state.time - before.time);
  }

  #quantiles(state, name) {
    const before = this.#before(state, QUANTILE_WINDOW)[name].counts;
    const { counts, first_bucket: first, per_doubling: per } = state[name];
    const fresh = counts.map((count, bucket) => count - before[bucket]);
    return [0.5, 0.95].map((share) => quantile(fresh, share, first, per));
  }
}

// The middle of the bucket in which a share of all values has come together; null of none.
export function quantile(counts, share, first, perDoubling) {
  let left = share * counts.reduce((sum, count) => sum + count, 0);
  if (left === 0) return null;
  const bucket = counts.findIndex((count) => (left -= count) <= 1e-9);
  return first * 2 ** (Math.max(0, bucket - 0.5) / perDoubling);
}

class Chart {
  #points = [];

  constructor(id, format, unit, second = false) {
    const figure = byId(id);
    Object.assign(this, { format, unit, second });
    this.name = figure.querySelector("figcaption").textContent;
    const value = make("p", "value", figure);
    this.value = make("span", "", value);
    value.append(" ");
    say(make("small", "", value), unit);
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("class", "chart");
    this.svg.setAttribute("role", "img");
    figure.append(this.svg);
    this.area = this.#path("area");
    this.lines = [this.#path("first"), ...(second ? [this.#path("second")] : [])];
    const foot = make("p", "peak", figure);
    this.left = make("span", "", foot);
    this.right = make("span", "", foot);
  }

  clear() {
    this.#points = [];
  }

  add(time, values) {
    const points = this.#points;
    points.push({ time, values });
    while (points[0].time < time - SPAN) points.shift();
    const top = Math.max(...points.flatMap((point) => point.values.map((value) => value ?? 0)));
    this.lines.forEach((line, index) => line.setAttribute("d", this.#line(time, index, top, false)));
    this.area.setAttribute("d", this.second ? "" : this.#line(time, 0, top, true));
    const [now, high] = values.map((value) => (value == null ? "–" : this.format(value)));
    say(this.value, now);
    say(this.left, this.second ? `p95 ${high}` : "last minute");
    say(this.right, top ? `peak ${this.format(top)}` : "");
    this.svg.setAttribute("aria-label",
      `${this.name} in the last minute: now ${now} ${this.unit}, at most ${this.format(top)}`);
  }

  #line(now, index, top, closed) {
    let path = "";
    let before = null;
    for (const { time, values } of this.#points) {
      if (values[index] == null) continue;
      const x = (WIDTH * (1 - (now - time) / SPAN)).toFixed(1);
      const y = (HEIGHT - 1 - (top ? (HEIGHT - 4) * (values[index] / top) : 0)).toFixed(1);
      if (before === null || time - before.time > BREAK) {
        if (closed && before !== null) path += `V${HEIGHT}Z`;
        path += closed ? `M${x} ${HEIGHT}V${y}` : `M${x} ${y}`;
      } else {
        path += `L${x} ${y}`;
      }
      before = { time };
    }
    return closed && path ? `${path}V${HEIGHT}Z` : path;
  }

  #path(className) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", className);
    this.svg.append(path);
    return path;
  }
}

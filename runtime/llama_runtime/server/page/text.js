// Numbers as they are shown, and elements. Whatever comes from the server is set as text.

export function number(value) {
  return value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
}

export function seconds(value) {
  if (value < 0.0015) return "1 ms";
  if (value < 0.9995) return `${Math.round(1000 * value)} ms`;
  if (value < 100) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  return value < 6000 ? `${Math.round(value / 60)} min` : `${Math.round(value / 3600)} h`;
}

export function plural(count, name) {
  return `${number(count)} ${name}${count === 1 ? "" : "s"}`;
}

export function make(name, className, parent) {
  const made = document.createElement(name);
  if (className) made.className = className;
  parent?.append(made);
  return made;
}

// Writing the same text again would have screen readers say it again.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function byId(id) {
  return document.getElementById(id);
}

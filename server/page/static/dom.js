// Elements from plain data: text is always text, never HTML.

/** An element; `attributes` whose names are those of events are listeners, `children` are elements or strings. */
export function make(tag, attributes = {}, ...children) {
  const namespace = ["svg", "rect", "line", "path", "text", "circle", "title", "g"].includes(tag)
    ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Names and values as a definition list. */
export function facts(pairs) {
  const list = make("dl", { class: "facts" });
  for (const [name, value] of pairs) {
    if (value !== null && value !== undefined && value !== "") list.append(make("dt", {}, name), make("dd", {}, String(value)));
  }
  return list;
}

export function number(value, digits = 3) {
  return value === null || value === undefined ? "–" : Number(value).toPrecision(digits).replace(/\.?0+$/, "");
}

export const percent = (share) => `${(100 * share).toFixed(1)} %`;

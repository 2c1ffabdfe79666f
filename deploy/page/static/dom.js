// Elements are built, never parsed: no text of a model or a server can become markup.

/** h("p", {class: "muted", onclick: f}, "text", child): an element. Null and false children are left out. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else if (name in element && !name.includes("-") && name !== "list") element[name === "class" ? "className" : name] = value;
    else element.setAttribute(name === "className" ? "class" : name, value === true ? "" : value);
  }
  if (props.class) element.className = props.class;
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** The pressed button of a group of buttons that carry data-NAME. */
export function choose(root, name, value) {
  for (const button of root.querySelectorAll(`[data-${name}]`)) {
    button.setAttribute("aria-pressed", String(button.dataset[name] === value));
  }
}

/** A value of localStorage; `fallback` if there is none, or if storage is switched off. */
export function stored(key, fallback) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function store(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** Offer these values, under names, and keep the chosen one if it is still among them. */
export function options(select, values, nameOf = (value) => value) {
  const named = values.map(nameOf);
  const same = [...select.options].map((option) => option.textContent).join("\n") === named.join("\n");
  if (same && select.options.length === values.length) return;
  const chosen = select.value;
  select.replaceChildren(...values.map((value, n) => h("option", { value }, named[n])));
  if (values.includes(chosen)) select.value = chosen;
}

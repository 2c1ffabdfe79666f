// Calls of the server's API, with the keys that they need. A key is kept in sessionStorage, which ends with the tab. It
// is sent only in a header, and only to the server that sent this page.

import { byId } from "./dom.js";

const NAMES = { api: "the API key (--api-key)", admin: "the admin key (--admin-api-key)" };
const slot = (kind) => `emoe.key.${kind}`;
const kindOf = (path) => (path.startsWith("admin/") ? "admin" : "api");

export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function keyOf(kind) {
  try {
    return sessionStorage.getItem(slot(kind));
  } catch {
    return null;
  }
}

let engine = 0;

/** The group of workers whose cluster is shown and changed: its engine's number. */
export const chosenEngine = () => engine;

export function chooseEngine(number) {
  engine = number;
}

/** A path for the chosen group. The first one needs no name, so that servers with one group see the paths they know. */
function ofEngine(path) {
  return engine === 0 ? path : `${path}${path.includes("?") ? "&" : "?"}engine=${engine}`;
}

let asking = null;

/** Ask the user for a key. Resolves to whether one was given; questions at the same time share one dialog. */
function ask(kind, why) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("ask");
    const field = byId("ask-key");
    byId("ask-title").textContent = `This server asks for ${NAMES[kind]}`;
    byId("ask-why").textContent = why;
    field.value = "";
    byId("ask-cancel").onclick = () => dialog.close("cancel");
    dialog.returnValue = "cancel";
    dialog.querySelector("form").onsubmit = () => dialog.close("given");
    dialog.onclose = () => {
      const given = dialog.returnValue === "given" && field.value.trim() !== "";
      if (given) sessionStorage.setItem(slot(kind), field.value.trim());
      field.value = "";
      resolve(given);
    };
    dialog.showModal();
  }).finally(() => (asking = null));
  return asking;
}

/** fetch() with the key. Asks for one on 401, and raises ApiError with the server's words. */
export async function call(path, options = {}) {
  const kind = kindOf(path);
  for (;;) {
    const key = keyOf(kind);
    const headers = { ...options.headers };
    if (key) headers.Authorization = `Bearer ${key}`;
    if (options.json !== undefined) headers["Content-Type"] = "application/json";
    const { json, ...rest } = options;
    const body = json === undefined ? undefined : JSON.stringify(json);
    const response = await fetch(kind === "admin" ? ofEngine(path) : path, { ...rest, headers, body, credentials: "omit", cache: "no-store" });
    if (response.ok) return response;
    const error = await failure(response);
    if (response.status !== 401 || !(await ask(kind, error.message))) throw error;
  }
}

async function failure(response) {
  try {
    const { error } = await response.json();
    return new ApiError(error.message, response.status, error.code);
  } catch {
    return new ApiError(`the server answered ${response.status}`, response.status, null);
  }
}

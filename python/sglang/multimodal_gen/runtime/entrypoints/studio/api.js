// Talking to the server: the key, errors as the server words them, and streams of events.

/** Where the API is: the page may lie behind a proxy's prefix. */
export const ROOT = new URL("..", import.meta.url);

const KEY = "studio.key";

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
  }

  /** There was no answer at all. */
  get unreachable() {
    return this.status === 0;
  }
}

export const apiKey = () => sessionStorage.getItem(KEY);

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

let askForKey = async () => false;
let asking = null;

/** `ask` is called when the server wants a key; it resolves with whether there is a new one. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

function newKey(rejected) {
  if (apiKey() !== rejected) return Promise.resolve(true); // somebody else was asked meanwhile
  asking ??= askForKey(rejected !== null).finally(() => (asking = null));
  return asking;
}

/**
 * The server's response. Throws ApiError with the server's own sentence. Without a valid key the user is asked, once
 * for all requests that wait.
 */
export async function request(path, { method = "GET", body, headers = {}, signal } = {}) {
  for (;;) {
    const key = apiKey();
    const authorization = key === null ? {} : { Authorization: `Bearer ${key}` };
    let response;
    try {
      response = await fetch(new URL(path, ROOT), { method, body, headers: { ...headers, ...authorization }, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached.");
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || !(await newKey(key))) throw error;
  }
}

export const getJson = async (path, options) => (await request(path, options)).json();

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  const found = body?.error;
  return new ApiError(found?.message ?? `The server answered ${response.status}.`, {
    status: response.status,
    code: found?.code ?? null,
    param: found?.param ?? null,
  });
}

/** The state that /health tells: `ready`, `starting`, `failed` with its error, or `unreachable`. */
export async function health() {
  try {
    const response = await fetch(new URL("health", ROOT));
    const body = await response.json();
    return { state: body.state ?? (response.ok ? "ready" : "starting"), error: body.error ?? null };
  } catch {
    return { state: "unreachable", error: null };
  }
}

/** The events of a text/event-stream response: their JSON, one by one. Throws ApiError for an error in the stream. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      text += value ?? "";
      const blocks = text.split(/\r?\n\r?\n/);
      text = blocks.pop();
      for (const block of blocks) {
        const event = parsed(block);
        if (event?.error) throw new ApiError(event.error.message, { status: 500, ...event.error });
        if (event) yield event;
      }
      if (done) return;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The JSON of one event, or of a comment that tells a state; null for other comments and the closing `[DONE]`. */
function parsed(block) {
  const lines = block.split(/\r?\n/);
  const [state] = lines.filter((line) => line.startsWith(": {"));
  if (state) return JSON.parse(state.slice(2));
  const data = lines
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(5).trimStart())
    .join("\n");
  return data === "" || data === "[DONE]" ? null : JSON.parse(data);
}

/** Bytes as a Blob from base64. */
export function blobOf(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type });
}

/** Waits, unless it is told to stop. */
export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener(
      "abort",
      () => {
        clearTimeout(timer);
        reject(new DOMException("stopped", "AbortError"));
      },
      { once: true },
    );
  });
}

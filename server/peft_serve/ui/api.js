// The server's public routes, as any client uses them. Addresses are relative to the page's folder, so that a proxy
// may serve all of it below a path of its own.
const ROOT = new URL("..", import.meta.url);
const address = (path) => new URL(path, ROOT).href;
const JSON_TYPE = { "content-type": "application/json" };
const KEY = "key";

/** The key that this tab sends, or "": it is kept until the tab is closed, and in this tab alone. */
export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return ""; // storage is switched off
  }
}

export function keepKey(text) {
  sessionStorage.setItem(KEY, text);
}

const bearer = () => (key() ? { authorization: `Bearer ${key()}` } : {});

/** What the server refused, in its own words: `problem` has `detail` and, for an upload, `errors`. */
export class Refused extends Error {
  constructor(problem, status) {
    super(problem.detail || problem.error?.message || problem.error || `the server answered ${status}`);
    this.status = status;
    this.code = problem.code || "";
    this.errors = Array.isArray(problem.errors) ? problem.errors : [];
  }
}

/** fetch, with words for a server that cannot be reached. */
async function reach(path, init) {
  try {
    return await fetch(address(path), { ...init, headers: { ...init.headers, ...bearer() } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused({ detail: "The server does not answer. Is it still running?" }, 0);
  }
}

async function problemOf(response) {
  let problem = {};
  try {
    problem = await response.json();
  } catch {
    // Not JSON: a proxy's page, as a rule. The status says what can be said.
  }
  return new Refused(problem, response.status);
}

export async function call(method, path, { body, signal } = {}) {
  const init = { method, signal };
  if (body !== undefined) Object.assign(init, { body: JSON.stringify(body), headers: JSON_TYPE });
  const response = await reach(path, init);
  if (!response.ok) throw await problemOf(response);
  return response.status === 204 ? null : response.json();
}

const named = (name) => encodeURIComponent(name);

export const info = () => call("GET", "info");
export const list = async () => (await call("GET", "adapters")).adapters;
export const versions = async (name) => (await call("GET", `adapters/${named(name)}/versions`)).versions;
export const pin = (name, on) => call("POST", `adapters/${named(name)}/${on ? "pin" : "unpin"}`);
export const rollback = (name, version) => call("POST", `adapters/${named(name)}/rollback`, { body: { version } });
export const remove = (name) => call("DELETE", `adapters/${named(name)}`);
export const describe = (name) => call("GET", `v1/models/${named(name)}`);

const asked = (path, adapter) => (adapter === "base" ? path : `${path}?adapter=${named(adapter)}`);

/** What is sent for each way to ask: a path and a body, also to be shown as a command. */
export const asks = {
  generate: (adapter, inputs, parameters) => ({ path: asked("generate_stream", adapter), body: { inputs, parameters: { ...parameters, details: true } } }),
  classify: (adapter, inputs, parameters) => ({ path: asked("classify", adapter), body: { inputs, parameters } }),
  embed: (adapter, inputs) => ({ path: asked("embed", adapter), body: { inputs } }),
};

/** The command that asks the same. */
export function asCurl({ path, body }) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const keyed = key() ? " \\\n  -H 'authorization: Bearer YOUR_KEY'" : "";
  return `curl -N ${quoted(address(path))}${keyed} \\\n  -H 'content-type: application/json' \\\n  -d ${quoted(JSON.stringify(body))}`;
}

export const answer = ({ path, body }, signal) => call("POST", path, { body, signal });

/** The next piece of a stream. */
async function piece(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused({ detail: "The connection broke off in the middle of the answer." }, 0);
  }
}

/** Stream an answer: `onEvent` gets each event's object as it comes. Throws `Refused` for a failure within, too. */
export async function stream({ path, body }, signal, onEvent) {
  const response = await reach(path, { method: "POST", headers: JSON_TYPE, body: JSON.stringify(body), signal });
  if (!response.ok) throw await problemOf(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let isWhole = false;
  for (;;) {
    const { value, done } = await piece(reader);
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const event = JSON.parse(line.slice(5));
      if (event.error !== undefined) throw new Refused(event, response.status);
      isWhole ||= event.generated_text !== null;
      onEvent(event);
    }
  }
  if (!isWhole) throw new Refused({ detail: "The answer broke off: the server ended it before its last token." }, 0);
}

/** Send an upload: a `File` that is an archive, or a list of `File`s. `onProgress` gets the share that is sent. */
export function upload(name, content, { check = false, onProgress }) {
  const request = new XMLHttpRequest();
  const done = new Promise((resolve, reject) => {
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onerror = () => reject(new Refused({ detail: "The connection broke while it was sent: the server is gone, or it is larger than the server takes." }, 0));
    request.onabort = () => reject(new DOMException("stopped", "AbortError"));
    request.onload = () => {
      let answer = {};
      try {
        answer = JSON.parse(request.responseText);
      } catch {
        // As above: the status says what can be said.
      }
      if (request.status < 300) resolve({ ...answer, status: request.status });
      else reject(new Refused(answer, request.status));
    };
  });
  request.open(check ? "POST" : "PUT", address(check ? "adapters/validate" : `adapters/${named(name)}`));
  for (const [name, value] of Object.entries(bearer())) request.setRequestHeader(name, value);
  if (Array.isArray(content)) {
    const form = new FormData();
    for (const file of content) form.append("files", file, file.name);
    request.send(form);
  } else {
    request.setRequestHeader("content-type", "application/octet-stream");
    request.send(content);
  }
  return { done, abort: () => request.abort() };
}

// The server's public routes, as any client uses them. Addresses are relative to the page's folder, so that a proxy
// may serve all of it below a path of its own.
const ROOT = new URL("..", import.meta.url);
const address = (path) => new URL(path, ROOT).href;
const JSON_TYPE = { "content-type": "application/json" };

/** What the server refused, in its own words: `problem` has `detail` and, for an upload, `errors`. */
export class Refused extends Error {
  constructor(problem, status) {
    super(problem.detail || problem.error?.message || problem.error || `the server answered ${status}`);
    this.status = status;
    this.code = problem.code || "";
    this.errors = Array.isArray(problem.errors) ? problem.errors : [];
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
  const response = await fetch(address(path), init);
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

export function classify(adapter, inputs, parameters, signal) {
  return call("POST", asked("classify", adapter), { body: { inputs, parameters }, signal });
}

export function embed(adapter, inputs, signal) {
  return call("POST", asked("embed", adapter), { body: { inputs }, signal });
}

/** Stream an answer: `onEvent` gets each event's object as it comes. Throws `Refused` for a failure within, too. */
export async function generate(adapter, inputs, parameters, signal, onEvent) {
  const response = await fetch(address(asked("generate_stream", adapter)), {
    method: "POST",
    headers: JSON_TYPE,
    body: JSON.stringify({ inputs, parameters: { ...parameters, details: true } }),
    signal,
  });
  if (!response.ok) throw await problemOf(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const event = JSON.parse(line.slice(5));
      if (event.error !== undefined) throw new Refused(event, response.status);
      onEvent(event);
    }
  }
}

/** Send an upload: a `File` that is an archive, or a list of `File`s. `onProgress` gets the share that is sent. */
export function upload(name, content, { check = false, onProgress }) {
  const request = new XMLHttpRequest();
  const done = new Promise((resolve, reject) => {
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onerror = () => reject(new Refused({ detail: "the connection broke; send it again" }, 0));
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

/** Watch the server; `onEvent` gets each snapshot, `onState` whether the connection stands. Returns what ends it. */
export function watch(onEvent, onState) {
  const source = new EventSource(address("v1/events"));
  source.onopen = () => onState(true);
  source.onerror = () => onState(false);
  source.onmessage = (message) => onEvent(JSON.parse(message.data));
  return () => source.close();
}

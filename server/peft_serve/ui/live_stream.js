// The stream of /v1/events, kept open: when it breaks off it is asked for again. Not by an EventSource, which can
// send no key, and gives up for good after an answer that is no stream (a proxy's page while the server starts again).
const EVENTS = new URL("../v1/events", import.meta.url).href;
const AGAIN_MS = 2000;
const NO_KEY = 401;

const pause = (ms, signal) => new Promise((done) => {
  const timer = setTimeout(done, ms);
  signal.addEventListener("abort", () => (clearTimeout(timer), done()));
});

/** Read one stream to its end; tells whether it is worth to ask again. */
async function read(headers, signal, onEvent, onState) {
  const response = await fetch(EVENTS, { headers, signal });
  if (response.status === NO_KEY) return false;
  if (!response.ok) return true;
  onState(true);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let { value, done } = await reader.read(); !done; { value, done } = await reader.read()) {
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) onEvent(JSON.parse(line.slice(5)));
  }
  return true;
}

/** `onEvent` gets each snapshot, `onState` whether the connection stands. Returns what ends it. */
export function follow(key, onEvent, onState) {
  const stop = new AbortController();
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  (async () => {
    for (let isWorth = true; isWorth && !stop.signal.aborted;) {
      try {
        isWorth = await read(headers, stop.signal, onEvent, onState);
      } catch {
        // The connection broke, or was never made: the state says so.
      }
      if (!stop.signal.aborted) onState(false);
      await pause(AGAIN_MS, stop.signal);
    }
  })();
  return () => stop.abort();
}

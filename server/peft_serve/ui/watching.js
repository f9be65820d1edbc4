// A tab's share in the live view: one worker holds it for all tabs of the server, where the browser has such workers.
import { follow } from "./live_stream.js";

const SIGN_MS = 20_000;

function share(worker, key, onEvent, onState) {
  const rest = () => worker.port.postMessage({ rest: true });
  const say = () => (document.hidden ? rest() : worker.port.postMessage({ key }));
  worker.port.onmessage = ({ data }) => {
    if (data.isOn !== undefined) onState(data.isOn);
    if (data.event) onEvent(data.event);
  };
  const timer = setInterval(say, SIGN_MS);
  document.addEventListener("visibilitychange", say);
  addEventListener("pagehide", rest);
  addEventListener("pageshow", say);
  say();
  return () => {
    clearInterval(timer);
    document.removeEventListener("visibilitychange", say);
    removeEventListener("pagehide", rest);
    removeEventListener("pageshow", say);
    rest();
  };
}

/** `onEvent` gets each snapshot, `onState` whether the connection stands. Returns what ends it. */
export function watch(key, onEvent, onState) {
  if (globalThis.SharedWorker === undefined) return follow(key, onEvent, onState);
  const worker = new SharedWorker(new URL("live_worker.js", import.meta.url), { type: "module" });
  let end = share(worker, key, onEvent, onState);
  let isOver = false;
  worker.onerror = () => {
    end(); // this browser runs no such workers: the tab watches for itself
    if (!isOver) end = follow(key, onEvent, onState);
  };
  return () => {
    isOver = true;
    end();
  };
}

// One live view for all tabs. A browser opens six connections to a server in all: if every tab held one of its own,
// the seventh would never load. Tabs say with which key they watch, again and again, and "rest" when nobody sees them.
import { follow } from "./live_stream.js";

const SILENT_MS = 150_000; // a tab that is gone says nothing; the timers of one in the background are slow
const views = new Map();

/** The view of one key: what it last told, and who looks at it. */
function viewOf(key) {
  if (!views.has(key)) {
    const view = { last: {}, tabs: new Map() };
    const tell = (part) => {
      Object.assign(view.last, part);
      for (const port of view.tabs.keys()) port.postMessage(part);
    };
    view.end = follow(key, (event) => tell({ event }), (isOn) => tell({ isOn }));
    views.set(key, view);
  }
  return views.get(key);
}

function leave(port) {
  for (const [key, view] of views) {
    view.tabs.delete(port);
    if (view.tabs.size) continue;
    view.end();
    views.delete(key);
  }
}

globalThis.onconnect = ({ ports: [port] }) => {
  port.onmessage = ({ data }) => {
    if (data.rest) return leave(port);
    const view = viewOf(data.key);
    if (!view.tabs.has(port)) port.postMessage(view.last);
    view.tabs.set(port, Date.now());
  };
};

setInterval(() => {
  for (const view of views.values()) {
    for (const [port, at] of view.tabs) if (Date.now() - at > SILENT_MS) leave(port);
  }
}, 10_000);

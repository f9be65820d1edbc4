// The page: its head, its two places, and what both of them share (the server's facts, adapters, the live view).
import { Adapters } from "./adapters.js";
import * as api from "./api.js";
import { introduce } from "./colours.js";
import { Live, Strip } from "./live.js";
import { Play } from "./play.js";
import { figure, html, render, useCallback, useEffect, useRef, useState } from "./view.js";

const KEPT = 120; // snapshots for the curves: a minute
const EVERY_MS = 5000; // the list of adapters, for what others do to it

function useHash() {
  const [hash, setHash] = useState(location.hash);
  useEffect(() => {
    const moved = () => setHash(location.hash);
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  return hash;
}

function useLive() {
  const [events, setEvents] = useState([]);
  const [isOn, setOn] = useState(false);
  useEffect(() => api.watch((event) => setEvents((old) => [...old.slice(1 - KEPT), event]), setOn), []);
  return { events, isOn, now: events.at(-1) };
}

function useAdapters() {
  const [adapters, setAdapters] = useState(null);
  const [problem, setProblem] = useState("");
  const refresh = useCallback(async () => {
    try {
      const found = await api.list();
      introduce(found.map((each) => each.name));
      setAdapters(found);
      setProblem("");
    } catch (error) {
      setProblem(`The list of adapters did not come: ${error.message}`);
    }
  }, []);
  useEffect(() => {
    refresh();
    const timer = setInterval(() => document.hidden || refresh(), EVERY_MS);
    return () => clearInterval(timer);
  }, []);
  return { adapters, problem, refresh };
}

function storedTheme() {
  try {
    return localStorage.getItem("theme") || "";
  } catch {
    return ""; // storage is switched off: the system's theme it is
  }
}

function Theme() {
  const [theme, setTheme] = useState(storedTheme);
  const isDark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  useEffect(() => {
    document.documentElement.dataset.theme = theme;
  }, [theme]);
  const turn = () => {
    const next = isDark ? "light" : "dark";
    setTheme(next);
    try {
      localStorage.setItem("theme", next);
    } catch {
      // It holds for this visit.
    }
  };
  return html`<button class="quiet icon" onClick=${turn} aria-label=${`Switch to ${isDark ? "light" : "dark"} colours`}
    title=${`Switch to ${isDark ? "light" : "dark"} colours`}>${isDark ? "☀" : "☾"}</button>`;
}

function Head({ base, place, live }) {
  const tab = (name, text) => html`<a href=${`#${name}`} aria-current=${place === name ? "page" : undefined}>${text}</a>`;
  return html`<header class="head">
    <a class="brand" href="#play"><img src="icon.svg" alt="" width="28" height="28" /><b>peft-serve</b></a>
    ${base && html`<span class="base" title="The base model, loaded once"><b>${base.model_id}</b>
      <small>${figure(base.base.num_parameters / 1e6)} M · ${base.model_dtype} · ${base.model_device_type}</small></span>`}
    <nav aria-label="Places">${tab("play", "Playground")}${tab("adapters", "Adapters")}</nav>
    <${Strip} live=${live} />
    <${Theme} />
  </header>`;
}

function App() {
  const hash = useHash();
  const place = hash === "#adapters" ? "adapters" : "play";
  const live = useLive();
  const { adapters, problem, refresh } = useAdapters();
  const [base, setBase] = useState(null);
  const main = useRef(null);
  useEffect(() => {
    api.info().then(setBase, () => setBase(null));
  }, []);
  const skip = (event) => {
    event.preventDefault();
    main.current.focus();
  };
  return html`<a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
    <${Head} base=${base} place=${place} live=${live} />
    ${problem && html`<p class="alarm" role="alert">${problem}</p>`}
    <div class="columns">
      <main id="main" ref=${main} tabindex="-1">
        <div hidden=${place !== "play"}><${Play} adapters=${adapters} base=${base} live=${live.now} /></div>
        ${place === "adapters" && html`<${Adapters} adapters=${adapters} refresh=${refresh} live=${live.now} />`}
      </main>
      <${Live} live=${live} />
    </div>`;
}

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);

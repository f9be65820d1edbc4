// The page: its head, its two places, and what both of them share (the server's facts, adapters, the live view).
import { Adapters } from "./adapters.js";
import * as api from "./api.js";
import { forget, writes } from "./asking.js";
import { SPAN_S } from "./charts.js";
import { introduce } from "./colours.js";
import { KeyForm } from "./key.js";
import { Live, Strip } from "./live.js";
import { Play } from "./play.js";
import { Theme } from "./theme.js";
import { html, parameters, render, useCallback, useEffect, useRef, useState } from "./view.js";
import { watch } from "./watching.js";

const EVERY_MS = 5000; // the list of adapters, for what others do to it
const NO_KEY = 401;
const PATIENCE_MS = 1500; // a connection that comes back within it is not worth a word

/** The place that the address names, and who is to be asked there: `#play?with=a,b`. */
function useAddress() {
  const [hash, setHash] = useState(location.hash);
  useEffect(() => {
    const moved = () => setHash(location.hash);
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  const [place, query] = hash.slice(1).split("?");
  const wanted = (new URLSearchParams(query?.replaceAll("+", "%2B")).get("with") ?? "").split(",").filter(Boolean);
  return { place: place === "adapters" ? "adapters" : "play", wanted };
}

/** The last minute's snapshots; a server that was started again begins a new one. */
function kept(old, event) {
  const last = old.at(-1);
  if (last && event.time < last.time) return [event];
  return [...old.filter((each) => event.time - each.time <= SPAN_S), event];
}

function useLive() {
  const [events, setEvents] = useState([]);
  const [isOn, setOn] = useState(null);
  useEffect(() => watch(api.key(), (event) => setEvents((old) => kept(old, event)), setOn), []);
  return { events, isOn, now: events.at(-1) };
}

/** Whether something has been so for a while. */
function useLasting(is) {
  const [isLong, setLong] = useState(false);
  useEffect(() => {
    if (!is) return setLong(false);
    const timer = setTimeout(() => setLong(true), PATIENCE_MS);
    return () => clearTimeout(timer);
  }, [is]);
  return isLong;
}

/** The base and the adapters, asked again when the server is back: it may be another one. */
function useServer(isOn) {
  const [base, setBase] = useState(null);
  const [adapters, setAdapters] = useState(null);
  const [problem, setProblem] = useState(null);
  const refresh = useCallback(async () => {
    try {
      const found = await api.list();
      introduce(found.map((each) => each.name));
      setAdapters(found);
      setProblem(null);
    } catch (error) {
      setProblem(error);
    }
  }, []);
  useEffect(() => {
    if (isOn === false) return;
    forget();
    api.info().then(setBase, setProblem);
    refresh();
  }, [isOn]);
  const isLocked = problem?.status === NO_KEY;
  useEffect(() => {
    if (isLocked) return;
    const timer = setInterval(() => document.hidden || refresh(), EVERY_MS);
    return () => clearInterval(timer);
  }, [isLocked]);
  return { base, adapters, problem, isLocked, refresh };
}

/** Files that are dragged over the playground are for the other place; dropped here, the browser would show them. */
function useDragging() {
  useEffect(() => {
    const enter = (event) => {
      if (event.dataTransfer?.types.includes("Files")) location.hash = "#adapters";
    };
    addEventListener("dragenter", enter);
    return () => removeEventListener("dragenter", enter);
  }, []);
}

function Head({ base, place, live, isWriter, isLocked }) {
  const tab = (name, text) => html`<a href=${`#${name}`} aria-current=${place === name ? "page" : undefined}>${text}</a>`;
  return html`<header class="head">
    <a class="brand" href="#play"><img src="icon.svg" alt="" width="28" height="28" /><b>peft-serve</b></a>
    ${base && html`<span class="base" title="The base model, loaded once"><b>${base.model_id}</b>
      <small>${parameters(base.base.num_parameters)} · ${base.model_dtype} · ${base.model_device_type}</small></span>`}
    <nav aria-label="Places">${tab("play", "Playground")}${tab("adapters", "Adapters")}</nav>
    ${isLocked ? html`<div class="strip"></div>` : html`<${Strip} live=${live} isWriter=${isWriter} />`}
    <${Theme} />
  </header>`;
}

function Alarm({ isGone, problem }) {
  if (isGone) return html`<p class="alarm" role="alert"><b>The server does not answer.</b> The page tries again by itself; what was being answered has to be asked again.</p>`;
  if (problem) return html`<p class="alarm" role="alert"><b>The list of adapters did not come.</b> ${problem.message}</p>`;
  return null;
}

function App() {
  const { place, wanted } = useAddress();
  const live = useLive();
  const { base, adapters, problem, isLocked, refresh } = useServer(live.isOn);
  const isGone = useLasting(live.isOn === false) && !isLocked;
  const isWriter = !base || writes(base);
  const main = useRef(null);
  useDragging();
  const skip = (event) => {
    event.preventDefault();
    main.current.focus();
  };
  return html`<a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
    <${Head} base=${base} place=${place} live=${live} isWriter=${isWriter} isLocked=${isLocked} />
    <${Alarm} isGone=${isGone} problem=${live.isOn ? problem : null} />
    ${isLocked && html`<div class="columns lone"><main id="main" ref=${main} tabindex="-1"><${KeyForm} /></main></div>`}
    ${!isLocked && html`<div class="columns">
      <main id="main" ref=${main} tabindex="-1">
        <div hidden=${place !== "play"}><${Play} adapters=${adapters} base=${base} live=${live.now} wanted=${wanted} /></div>
        ${place === "adapters" && html`<${Adapters} adapters=${adapters} refresh=${refresh} live=${live.now} maxBytes=${base?.max_adapter_bytes} />`}
      </main>
      <${Live} live=${live} isWriter=${isWriter} />
    </div>`}`;
}

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);

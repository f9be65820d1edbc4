// The playground: pick adapters, write a prompt, and watch the answers side by side.
import { Answer } from "./answers.js";
import { ask } from "./asking.js";
import { Lanes } from "./lanes.js";
import { Options, UNSET } from "./options.js";
import { Picker } from "./picker.js";
import { html, useEffect, useRef, useState } from "./view.js";

const EXAMPLES = [
  "My parcel is two weeks late and nobody answers.",
  "You have won a prize! Call now to claim it.",
  "How many people live in Utrecht?",
  "A warm and funny film.",
];
const STORIES = ["Once upon a time", "The old man looked at the sea and", "She opened the letter and"];
const STARTERS = 3;

/** Rows and adapters of the step that had most adapters, then rows, among the server's snapshots so far. */
function fuller(most, rows) {
  const adapters = new Set(rows.map((row) => row.adapter)).size;
  const isMore = adapters > most.adapters || (adapters === most.adapters && rows.length > most.rows);
  return isMore ? { rows: rows.length, adapters } : most;
}

/** The runs of one question, their clock, and what stops them. Tokens are shown once a frame, however many come. */
function useRuns(base) {
  const [runs, setRuns] = useState([]);
  const current = useRef({ runs: [], stop: null, frame: 0 });
  const show = () => {
    const box = current.current;
    box.frame ||= requestAnimationFrame(() => {
      box.frame = 0;
      setRuns([...box.runs]);
    });
  };
  const start = (names, text, options) => {
    current.current.stop?.abort();
    const stop = new AbortController();
    const made = names.map((name) => ({ name, status: "running", ticks: [] }));
    current.current.runs = made;
    current.current.stop = stop;
    setRuns([...made]);
    return Promise.all(made.map(async (run, i) => {
      const change = (part) => {
        Object.assign(run, part);
        if (current.current.runs[i] !== run) return;
        show();
      };
      try {
        await ask(run.name, base, text, options, stop.signal, (part, { at }) => {
          run.ticks.push(at);
          change(part);
        });
        change({ status: "done" });
      } catch (error) {
        change(error.name === "AbortError" ? { status: "stopped" } : { status: "failed", error });
      }
    }));
  };
  return { runs, start, stop: () => current.current.stop?.abort() };
}

function useChosen(adapters) {
  const [chosen, setChosen] = useState(null);
  useEffect(() => {
    if (chosen !== null || adapters === null) return;
    const usable = adapters.filter((each) => !each.problem).map((each) => each.name);
    setChosen(usable.length ? usable.slice(0, STARTERS) : ["base"]);
  }, [adapters]);
  const toggle = (name) => setChosen((old) => ((old ?? []).includes(name) ? old.filter((each) => each !== name) : [...(old ?? []), name]));
  return [chosen ?? [], toggle];
}

export function Play({ adapters, base, live }) {
  const [chosen, toggle] = useChosen(adapters);
  const [text, setText] = useState(EXAMPLES[0]);
  const [options, setOptions] = useState(UNSET);
  const [most, setMost] = useState({ rows: 0, adapters: 0 });
  const { runs, start, stop } = useRuns(base);
  const isBusy = runs.some((run) => run.status === "running");
  const isReady = Boolean(base && chosen.length && text.trim());
  const wasBusy = useRef(false);
  useEffect(() => {
    // The snapshot after the last token still tells of steps before it.
    if (live && (isBusy || wasBusy.current)) setMost((old) => fuller(old, live.rows));
    wasBusy.current = isBusy;
  }, [live]);
  const run = (event) => {
    event?.preventDefault();
    if (!isReady) return;
    setMost({ rows: 0, adapters: 0 });
    wasBusy.current = true;
    start(chosen, text, options);
  };
  const keys = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(event);
  };
  const ended = runs.filter((each) => each.status !== "running").length;
  return html`<h1 class="sr">Playground</h1>
    <form class="ask" onSubmit=${run}>
      <${Picker} adapters=${adapters} chosen=${chosen} onToggle=${toggle} />
      <label class="prompt"><span>Prompt</span>
        <textarea rows="3" value=${text} onInput=${(event) => setText(event.target.value)} onKeyDown=${keys} placeholder="Write something for all of them"></textarea></label>
      <p class="examples"><span class="note">Try</span> ${(options.isFree ? STORIES : EXAMPLES).map((each) => html`<button type="button" class="quiet small" onClick=${() => setText(each)}>${each}</button>`)}</p>
      <label class="check"><input type="checkbox" checked=${!options.isFree} onChange=${(event) => setOptions({ ...options, isFree: !event.target.checked })} />
        Ask each adapter in its own words <span class="note">its template, its labels; off: all of them go on with the bare text</span></label>
      <${Options} options=${options} onChange=${setOptions} />
      <p class="actions"><button type="submit" class="primary" disabled=${!isReady}>${chosen.length > 1 ? `Ask all ${chosen.length}` : "Ask"}</button>
        ${isBusy && html`<button type="button" onClick=${stop}>Stop</button>`}
        <kbd class="note">Ctrl + Enter</kbd></p>
    </form>
    <p class="sr" role="status">${runs.length ? (isBusy ? `${ended} of ${runs.length} answers are complete` : `All ${runs.length} answers have ended`) : ""}</p>
    <${Lanes} runs=${runs} most=${most} />
    <div class="answers">${runs.map((each, i) => html`<${Answer} key=${i} run=${each} />`)}</div>
    ${!runs.length && html`<p class="empty">The answers appear here side by side. All of them run in one batch over one copy of the base.</p>`}`;
}

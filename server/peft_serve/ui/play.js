// The playground: pick adapters, write a prompt, and watch the answers side by side.
import { Answer } from "./answers.js";
import { writes } from "./asking.js";
import { Lanes } from "./lanes.js";
import { Options, UNSET } from "./options.js";
import { MOST, Picker } from "./picker.js";
import { useRuns } from "./runs.js";
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

/** Who is chosen: those of the address (`#play?with=a,b`), else the first few of the list. */
function useChosen(adapters, wanted) {
  const [chosen, setChosen] = useState(null);
  useEffect(() => {
    if (wanted.length) setChosen(wanted.slice(0, MOST));
  }, [wanted.join()]);
  useEffect(() => {
    if (chosen !== null || adapters === null || wanted.length) return;
    const usable = adapters.filter((each) => !each.problem).map((each) => each.name);
    setChosen(usable.length ? usable.slice(0, STARTERS) : ["base"]);
  }, [adapters]);
  const toggle = (name) => setChosen((old) => ((old ?? []).includes(name) ? old.filter((each) => each !== name) : [...(old ?? []), name]));
  return [chosen ?? [], toggle];
}

function Examples({ texts, onPick }) {
  return html`<p class="examples"><span class="note">Try</span>
    ${texts.map((each) => html`<button type="button" class="quiet small" onClick=${() => onPick(each)}>${each}</button>`)}</p>`;
}

function Words({ options, onChange }) {
  return html`<label class="check"><input type="checkbox" checked=${!options.isFree} onChange=${(event) => onChange({ ...options, isFree: !event.target.checked })} />
    Use each adapter's own template and labels <span class="note">off: all of them continue the bare text</span></label>`;
}

function Empty({ isWriter }) {
  return html`<div class="empty"><span class="ghosts" aria-hidden="true"><i></i><i></i><i></i></span>
    <p>${isWriter ? "Answers stream here side by side." : "What each head reads in the text appears here."}${" "}
      All of them run in one batch over one copy of the base.</p></div>`;
}

const said = (runs, isBusy, ended) => {
  if (!runs.length) return "";
  return isBusy ? `${ended} of ${runs.length} answers are complete` : `All ${runs.length} answers have ended`;
};

export function Play({ adapters, base, live, wanted }) {
  const [chosen, toggle] = useChosen(adapters, wanted);
  const [text, setText] = useState(EXAMPLES[0]);
  const [options, setOptions] = useState(UNSET);
  const [most, setMost] = useState({ rows: 0, adapters: 0 });
  const { runs, start, stop, again } = useRuns(base);
  const isWriter = !base || writes(base);
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
    <form class="ask" noValidate onSubmit=${run}>
      <${Picker} adapters=${adapters} chosen=${chosen} onToggle=${toggle} />
      <label class="prompt"><span>${isWriter ? "Prompt" : "Text"}</span>
        <textarea rows="3" dir="auto" value=${text} onInput=${(event) => setText(event.target.value)} onKeyDown=${keys} placeholder="Write something for all of them"></textarea></label>
      <${Examples} texts=${options.isFree ? STORIES : EXAMPLES} onPick=${setText} />
      ${isWriter && html`<${Words} options=${options} onChange=${setOptions} />`}
      <${Options} options=${options} onChange=${setOptions} isWriter=${isWriter} />
      <p class="actions"><button type="submit" class="primary" disabled=${!isReady}>${chosen.length > 1 ? `Ask all ${chosen.length}` : "Ask"}</button>
        ${isBusy && html`<button type="button" onClick=${stop}>Stop</button>`}
        <span class="note">${chosen.length ? html`<kbd>Ctrl</kbd> <kbd>Enter</kbd>` : "Choose at least one to ask."}</span></p>
    </form>
    <p class="sr" role="status">${said(runs, isBusy, ended)}</p>
    <${Lanes} runs=${runs} most=${most} isWriter=${isWriter} />
    <div class="answers" data-count=${runs.length}>${runs.map((each, i) => html`<${Answer} key=${i} run=${each} queue=${live?.queue} onAgain=${() => again(i)} />`)}</div>
    ${!runs.length && html`<${Empty} isWriter=${isWriter} />`}`;
}

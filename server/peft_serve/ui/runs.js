// The answers of one question: who is asked, how far each is, and what stops or repeats them.
import { ask } from "./asking.js";
import { useRef, useState } from "./view.js";

/** Runs as they stand, and `start`, `stop` and `again`. Tokens are shown once a frame, however many come. */
export function useRuns(base) {
  const [runs, setRuns] = useState([]);
  const box = useRef({ runs: [], stop: null, frame: 0, question: null }).current;
  const show = () => {
    box.frame ||= requestAnimationFrame(() => {
      box.frame = 0;
      setRuns([...box.runs]);
    });
  };
  const launch = async (i, { text, options, stop }) => {
    const run = { name: box.runs[i].name, status: "running", ticks: [] };
    box.runs[i] = run;
    show();
    const change = ({ at, ...part }) => {
      if (at !== undefined) run.ticks.push(at);
      Object.assign(run, part);
      if (box.runs[i] === run) show();
    };
    try {
      await ask(run.name, base, text, options, stop.signal, change);
      change({ status: "done" });
    } catch (error) {
      change(error.name === "AbortError" ? { status: "stopped" } : { status: "failed", error });
    }
  };
  const start = (names, text, options) => {
    box.question?.stop.abort();
    box.question = { text, options, stop: new AbortController() };
    box.runs = names.map((name) => ({ name }));
    names.forEach((_, i) => launch(i, box.question));
    setRuns([...box.runs]);
  };
  const stop = () => box.question?.stop.abort();
  const again = (i) => {
    if (box.question.stop.signal.aborted) box.question = { ...box.question, stop: new AbortController() };
    launch(i, box.question);
  };
  return { runs, start, stop, again };
}

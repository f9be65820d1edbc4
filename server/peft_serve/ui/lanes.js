// The shared batch as one sees it from here: a lane for each answer on one axis of time, a tick for each token.
import { hued } from "./colours.js";
import { html, milliseconds, plural } from "./view.js";

/** What the server said while these ran: the step of most adapters, if it was seen to hold more than one. */
function proof(most) {
  if (most.adapters < 2) return "";
  return ` The server's fullest step held ${plural(most.rows, "row")} of ${plural(most.adapters, "adapter")}.`;
}

function caption(runs, isStreamed) {
  if (!isStreamed) return "Each tick is the moment an answer was there.";
  return runs.length > 1 ? "Each tick is a token. Those in one column came from one forward pass, which all of them share." : "Each tick is a token.";
}

function Lane({ run, at }) {
  const first = run.ticks[0];
  const told = first === undefined ? "nothing yet" : `first token after ${milliseconds(first)}, ${plural(run.ticks.length, "token")}`;
  return html`<div class="lane hued" style=${hued(run.name)}>
    <span class="who" title=${run.name}>${run.name}</span>
    <svg class="track" role="img" aria-label=${`${run.name}: ${told}`}>
      ${first !== undefined && html`<rect class="wait" x="0" y="8" height="2" width=${at(first)} />`}
      ${run.ticks.map((ms) => html`<rect class="tick" x=${at(ms)} y="2" width="3" height="14" rx="1.5" />`)}
    </svg></div>`;
}

export function Lanes({ runs, most, isWriter }) {
  const last = Math.max(0, ...runs.map((run) => run.ticks.at(-1) ?? 0));
  if (!last) return null;
  const span = last * 1.02;
  const at = (ms) => `${((100 * ms) / span).toFixed(2)}%`;
  const tokens = runs.reduce((sum, run) => sum + run.ticks.length, 0);
  const isStreamed = isWriter && runs.some((run) => run.ticks.length > 1);
  const title = runs.length === 1 ? "One answer" : isStreamed || most.adapters > 1 ? "One batch" : "Side by side";
  const rate = isStreamed ? `, ${Math.round((1000 * tokens) / last)} a second together` : "";
  return html`<section class="lanes" aria-label="Tokens over time">
    <h2>${title} <span class="note">${plural(tokens, isStreamed ? "token" : "answer")} in ${milliseconds(last)}${rate}</span></h2>
    <div class="tracks">${runs.map((run) => html`<${Lane} run=${run} at=${at} />`)}
      <div class="axis note" aria-hidden="true"><span>asked</span><span>${milliseconds(last)}</span></div></div>
    <p class="note">${caption(runs, isStreamed)}${proof(most)}</p>
  </section>`;
}

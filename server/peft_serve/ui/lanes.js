// The shared batch as one sees it from here: a lane for each answer on one axis of time, a tick for each token.
import { hued } from "./colours.js";
import { html, milliseconds, plural } from "./view.js";

/** What the server said while these ran: the step with most rows, and of how many adapters. */
function proof(most) {
  if (!most.rows) return "";
  return `The server's fullest step held ${plural(most.rows, "row")} of ${plural(most.adapters, "adapter")}.`;
}

export function Lanes({ runs, most }) {
  const last = Math.max(0, ...runs.map((run) => run.ticks.at(-1) ?? 0));
  if (!last) return null;
  const span = last * 1.02;
  const at = (ms) => `${((100 * ms) / span).toFixed(2)}%`;
  const tokens = runs.reduce((sum, run) => sum + run.ticks.length, 0);
  const together = runs.length > 1;
  const rate = (1000 * tokens) / last;
  return html`<section class="lanes" aria-label="Tokens over time">
    <h2>${together ? "One batch" : "One stream"} <span class="note">${plural(tokens, "token")} in ${milliseconds(last)}${tokens > runs.length ? `, ${Math.round(rate)} a second together` : ""}</span></h2>
    <div class="tracks">
      ${runs.map((run) => html`<div class="lane hued" style=${hued(run.name)}>
        <span class="who">${run.name}</span>
        <svg class="track" role="img" aria-label=${`${run.name}: first token after ${milliseconds(run.ticks[0])}, ${plural(run.ticks.length, "token")}`}>
          ${run.ticks.length > 0 && html`<rect class="wait" x="0" y="8" height="2" width=${at(run.ticks[0])} />`}
          ${run.ticks.map((ms) => html`<rect class="tick" x=${at(ms)} y="2" width="3" height="14" rx="1.5" />`)}
        </svg></div>`)}
    </div>
    <p class="note">${together && tokens > runs.length ? "Each tick is a token. Those in one column came from one forward pass that all of them share." : together ? "Each tick is the moment an answer was there. All of them share the base's forward passes." : "Each tick is a token."} ${proof(most)}</p>
  </section>`;
}

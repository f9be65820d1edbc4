// What one adapter says: text as it streams, or bars, and how fast it came.
import { hued } from "./colours.js";
import { html, milliseconds, percent, useState } from "./view.js";

const FEW = 5;

function Bars({ scores }) {
  const [isLong, setLong] = useState(false);
  const shown = isLong ? scores : scores.slice(0, FEW);
  return html`<ol class="bars">
    ${shown.map((each) => html`<li><span class="label">${each.label}</span>
      <meter min="0" max="1" value=${each.score} aria-label=${each.label}></meter><i class="bar" style=${{ "--w": `${100 * Math.min(Math.max(each.score, 0), 1)}%` }}></i>
      <b>${percent(each.score)}</b></li>`)}
  </ol>
  ${scores.length > FEW && html`<button type="button" class="quiet small" aria-expanded=${isLong} onClick=${() => setLong(!isLong)}>
    ${isLong ? "Show fewer" : `${scores.length - FEW} more`}</button>`}`;
}

function Entities({ entities }) {
  if (!entities.length) return html`<p class="note">No entity found.</p>`;
  return html`<ul class="entities">${entities.map((each) => html`<li><b>${each.word}</b> <small>${each.entity ?? each.entity_group}</small> ${percent(each.score)}</li>`)}</ul>`;
}

function Vector({ vector }) {
  const norm = Math.hypot(...vector);
  return html`<p class="vector">[${vector.slice(0, 6).map((x) => x.toFixed(3)).join(", ")}, …]</p><p class="note">${vector.length} numbers, length ${norm.toFixed(2)}</p>`;
}

function Body({ run }) {
  if (run.error) return html`<div class="refusal"><p><b>${run.error.message}</b></p>
    ${run.error.errors?.length > 0 && html`<ul>${run.error.errors.map((each) => html`<li><code>${each.path}</code> ${each.reason}</li>`)}</ul>`}</div>`;
  if (run.scores) return html`<p class="said"><b>${run.text ?? run.scores[0]?.label}</b></p><${Bars} scores=${run.scores} />`;
  if (run.entities) return html`<${Entities} entities=${run.entities} />`;
  if (run.answer) return html`<p class="said"><b>${run.answer.answer || "no answer"}</b> <small>${percent(run.answer.score)}</small></p>`;
  if (run.vector) return html`<${Vector} vector=${run.vector} />`;
  const isOn = run.status === "running";
  if (!run.text) return html`<p class="said note">${isOn ? "…" : "An empty answer."}</p>`;
  return html`<p class="said">${run.text.trimStart()}${isOn && html`<span class="caret"></span>`}</p>`;
}

/** Tokens a second from the first token on; null for an answer of fewer than two. */
export function speed(ticks) {
  return ticks.length > 1 ? (1000 * (ticks.length - 1)) / (ticks.at(-1) - ticks[0]) : null;
}

const REASONS = { length: "length reached", eos_token: "complete", stop_sequence: "stop string" };

export function Answer({ run }) {
  const { ticks, details, adapter } = run;
  const rate = speed(ticks);
  const end = run.status === "stopped" ? "stopped" : run.error ? "refused" : REASONS[details?.finish_reason] ?? (run.status === "done" ? "complete" : "");
  const version = adapter?.version ? `v${adapter.version}` : "";
  return html`<article class="answer hued" style=${hued(run.name)} data-status=${run.status} aria-label=${`Answer of ${run.name}`}>
    <header><i class="swatch"></i><h3>${run.name}</h3><small>${[adapter?.peft_type, version].filter(Boolean).join(" · ")}</small>
      <span class="end">${end}</span></header>
    <div class="body" aria-live="polite" aria-busy=${run.status === "running"}><${Body} run=${run} /></div>
    <footer><span><b class="ttft">${milliseconds(ticks[0])}</b> to the first token</span>
      ${rate !== null && html`<span><b class="rate">${rate.toFixed(rate < 10 ? 1 : 0)}</b> tokens/s</span>`}
      ${details && html`<span><b>${details.prompt_tokens}</b> + <b>${details.generated_tokens}</b> tokens</span>`}
      ${details?.skipped_tokens > 0 && html`<span><b>${details.skipped_tokens}</b> from the cache</span>`}</footer>
  </article>`;
}

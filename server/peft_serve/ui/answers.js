// What one adapter says: text as it streams, or bars, and how fast it came.
import { asCurl } from "./api.js";
import { hued } from "./colours.js";
import { html, methodName, milliseconds, percent, useState } from "./view.js";

const FEW = 5;
const BUSY = 429;
const SHOWN_MS = 1500;
const SIGNS = {
  text: "M9 9h11v12H9ZM5 15H4V3h11v2",
  command: "M4 5l7 7-7 7M13 19h8",
  done: "M4 12.5l5.5 5.5L20 6.5",
};

function Bars({ scores }) {
  const [isLong, setLong] = useState(false);
  const shown = isLong ? scores : scores.slice(0, FEW);
  return html`<ol class="bars">
    ${shown.map((each) => html`<li><span class="label" dir="auto">${each.label}</span>
      <meter min="0" max="1" value=${each.score} aria-label=${each.label}></meter><i class="bar" style=${{ "--w": `${100 * Math.min(Math.max(each.score, 0), 1)}%` }}></i>
      <b>${percent(each.score)}</b></li>`)}
  </ol>
  ${scores.length > FEW && html`<button type="button" class="quiet small" aria-expanded=${isLong} onClick=${() => setLong(!isLong)}>
    ${isLong ? "Show fewer" : `${scores.length - FEW} more`}</button>`}`;
}

function Entities({ entities }) {
  if (!entities.length) return html`<p class="note">No entity found.</p>`;
  return html`<ul class="entities">${entities.map((each) => html`<li><b dir="auto">${each.word}</b><span class="badge">${each.entity ?? each.entity_group}</span><span>${percent(each.score)}</span></li>`)}</ul>`;
}

function Vector({ vector }) {
  const norm = Math.hypot(...vector);
  return html`<p class="vector">[${vector.slice(0, 6).map((x) => x.toFixed(3)).join(", ")}, …]</p>
    <p class="note">Its embedding: ${vector.length} numbers, length ${norm.toFixed(2)}</p>`;
}

function Refusal({ error, onAgain }) {
  return html`<div class="refusal"><p><b>${error.message}</b></p>
    ${error.errors?.length > 0 && html`<ul>${error.errors.map((each) => html`<li><code>${each.path}</code> ${each.reason}</li>`)}</ul>`}
    <p class="actions"><button type="button" onClick=${onAgain}>Ask again</button></p></div>`;
}

/** What a request without a token waits for, as far as the live view tells it. */
function waitsFor(name, queue) {
  return queue?.adapters.some((each) => each.name === name) ? "In the queue" : "Waiting for the first token";
}

function Body({ run, queue, onAgain }) {
  const isOn = run.status === "running";
  const caret = isOn && html`<span class="caret"></span>`;
  const text = run.text && html`<p class="said" dir="auto">${run.text.trimStart()}${caret}</p>`;
  if (run.error) return html`${text}<${Refusal} error=${run.error} onAgain=${onAgain} />`;
  if (run.scores) return html`<p class="said" dir="auto"><b>${run.text ?? run.scores[0]?.label}</b></p><${Bars} scores=${run.scores} />`;
  if (run.entities) return html`<${Entities} entities=${run.entities} />`;
  if (run.answer) return html`<p class="said" dir="auto"><b>${run.answer.answer || "no answer"}</b> <small>${percent(run.answer.score)}</small></p>`;
  if (run.vector) return html`<${Vector} vector=${run.vector} />`;
  if (text) return text;
  return html`<p class="said note">${isOn ? html`${waitsFor(run.name, queue)}<span class="dots" aria-hidden="true"></span>` : run.status === "stopped" ? "Stopped before its first token." : "An empty answer."}</p>`;
}

/** A button that copies, where the page may: browsers allow it on https and on localhost. */
function Copy({ text, label, sign }) {
  const [isDone, setDone] = useState(false);
  if (!navigator.clipboard) return null;
  const copy = async () => {
    await navigator.clipboard.writeText(text());
    setDone(true);
    setTimeout(() => setDone(false), SHOWN_MS);
  };
  const told = isDone ? "Copied" : label;
  return html`<button type="button" class="quiet icon" onClick=${copy} aria-label=${told} title=${told}>
    <svg viewBox="0 0 24 24" width="15" height="15" aria-hidden="true"><path d=${isDone ? SIGNS.done : sign} /></svg></button>`;
}

/** Tokens a second from the first token on; null for an answer of fewer than two. */
export function speed(ticks) {
  return ticks.length > 1 ? (1000 * (ticks.length - 1)) / (ticks.at(-1) - ticks[0]) : null;
}

const REASONS = { length: "length reached", eos_token: "complete", stop_sequence: "stop string" };

/** How it ended, in a word, and whether well. */
function ending({ status, error, details }) {
  if (status === "running") return ["", ""];
  if (status === "stopped") return ["stopped", "cut"];
  if (error) return [error.status === BUSY ? "server is full" : error.status ? "refused" : "broke off", "bad"];
  const reason = details?.finish_reason;
  return [REASONS[reason] ?? "complete", reason === "length" ? "cut" : "good"];
}

function Figures({ run }) {
  const { ticks, details } = run;
  const rate = speed(ticks);
  const isWhole = run.status === "done" && ticks.length === 1;
  return html`<span><b class="ttft">${milliseconds(ticks[0])}</b> ${isWhole ? "to the answer" : "to first token"}</span>
    ${rate !== null && html`<span><b class="rate">${rate.toFixed(rate < 10 ? 1 : 0)}</b> tokens/s</span>`}
    ${details && html`<span title="Tokens of the prompt, and of the answer"><b>${details.prompt_tokens}</b> → <b>${details.generated_tokens}</b> tokens</span>`}
    ${details?.skipped_tokens > 0 && html`<span title="Tokens of the prompt that were computed before, for a prompt that began alike"><b>${details.skipped_tokens}</b> from the cache</span>`}`;
}

export function Answer({ run, queue, onAgain }) {
  const { ticks, adapter, request } = run;
  const [end, mood] = ending(run);
  const version = adapter?.version ? `v${adapter.version}` : "";
  const isOver = run.status !== "running";
  return html`<article class="answer hued" style=${hued(run.name)} data-status=${run.status} aria-label=${`Answer of ${run.name}`}>
    <header><i class="swatch"></i><h3>${run.name}</h3><small>${[adapter?.peft_type && methodName(adapter.peft_type), version].filter(Boolean).join(" · ")}</small>
      <span class=${`end ${mood}`}>${end}</span></header>
    <div class="body" aria-live="polite" aria-busy=${!isOver}><${Body} run=${run} queue=${queue} onAgain=${onAgain} /></div>
    ${(ticks.length > 0 || (isOver && request)) && html`<footer>${ticks.length > 0 && html`<${Figures} run=${run} />`}
      ${isOver && html`<span class="copies">${run.text && html`<${Copy} label="Copy the answer" sign=${SIGNS.text} text=${() => run.text} />`}
        ${request && html`<${Copy} label="Copy as a curl command" sign=${SIGNS.command} text=${() => asCurl(request)} />`}</span>`}</footer>`}
  </article>`;
}

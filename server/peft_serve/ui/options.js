// The drawer of parameters. A field that is left empty is not sent, so that the adapter's defaults, then the
// server's, hold.
import { html } from "./view.js";

const FREE_LENGTH = 64;
const NUMBERS = [
  { name: "max_new_tokens", label: "New tokens", min: 1, step: 1, hint: "default" },
  { name: "temperature", label: "Temperature", min: 0, max: 100, step: "any", hint: "greedy" },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: "any", hint: "1" },
  { name: "top_k", label: "Top k", min: 0, step: 1, hint: "off" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 100, step: "any", hint: "1" },
  { name: "seed", label: "Seed", min: 0, step: 1, hint: "random" },
  { name: "task_id", label: "Task", min: 0, step: 1, hint: "default" },
];

export const UNSET = { isFree: false, isEndless: false, choices: "", stop: "", second: "" };

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/** The `parameters` of /generate. */
export function parametersOf(options) {
  const found = {};
  for (const { name } of NUMBERS) if (options[name] !== undefined && options[name] !== "") found[name] = Number(options[name]);
  if (lines(options.stop).length) found.stop = lines(options.stop);
  if (lines(options.choices).length) found.choices = lines(options.choices);
  if (options.isEndless) found.ignore_eos = true;
  if (options.isFree) {
    found.template = null;
    if (!found.choices) found.choices = null;
    found.max_new_tokens ??= FREE_LENGTH;
  }
  return found;
}

/** How many fields differ from their defaults. */
const numSet = (options) => NUMBERS.filter(({ name }) => options[name]).length + (options.stop ? 1 : 0) + (options.choices ? 1 : 0) + (options.second ? 1 : 0) + (options.isEndless ? 1 : 0);

/** The fields that fit: a base that writes nothing has no tokens to draw. */
const fits = (isWriter) => NUMBERS.filter(({ name }) => isWriter || name === "task_id");

export function Options({ options, onChange, isWriter }) {
  const set = (name) => (event) => onChange({ ...options, [name]: event.target.value });
  const count = numSet(options);
  return html`<details class="drawer">
    <summary>Parameters ${count > 0 && html`<span class="badge">${count} set</span>`}</summary>
    <div class="fields">
      ${fits(isWriter).map(({ name, label, min, max, step, hint }) => html`<label key=${name}>${label}
        <input type="number" name=${name} min=${min} max=${max} step=${step} placeholder=${name === "max_new_tokens" && options.isFree ? FREE_LENGTH : hint}
          value=${options[name] ?? ""} onInput=${set(name)} /></label>`)}
    </div>
    <div class="fields wide">
      ${isWriter && html`<label>Choices, one a line
        <textarea rows="3" name="choices" placeholder="yes${"\n"}no" value=${options.choices} onInput=${set("choices")}></textarea></label>
      <label>Stop strings, one a line
        <textarea rows="3" name="stop" value=${options.stop} onInput=${set("stop")}></textarea></label>`}
      <label>Second text, or context of a question
        <textarea rows="3" name="second" dir="auto" placeholder="for heads that read pairs or answer questions" value=${options.second} onInput=${set("second")}></textarea></label>
    </div>
    ${isWriter && html`<label class="check"><input type="checkbox" name="ignore_eos" checked=${options.isEndless} onChange=${(event) => onChange({ ...options, isEndless: event.target.checked })} />
      Go on past the end <span class="note">write all the new tokens, whatever the model says</span></label>`}
    <p><button type="button" class="quiet" disabled=${!count} onClick=${() => onChange({ ...UNSET, isFree: options.isFree })}>Back to defaults</button></p>
  </details>`;
}

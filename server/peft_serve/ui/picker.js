// Choosing who answers: chips for the base and the adapters, found by typing. An expression of several adapters
// (`a:0.7+b:0.3`) or a version (`a@2`) is taken as it is written.
import { hued } from "./colours.js";
import { html, methodName, useState } from "./view.js";

export const MOST = 5; // a browser opens six connections to a server, and the live view holds one
const FEW = 12;
const MANY = 100;
const EXPRESSION = /^[A-Za-z0-9][A-Za-z0-9._@:+-]*$/;

function Chip({ name, method, isOn, isFull, onToggle }) {
  return html`<button type="button" class="chip hued" style=${hued(name)} aria-pressed=${isOn} disabled=${isFull && !isOn}
    onClick=${() => onToggle(name)}><i class="swatch"></i>${name}${method && html` <small>${methodName(method)}</small>`}</button>`;
}

/** What the list shows for what was typed: names in the list's order, so that no chip moves from under the pointer. */
function find(adapters, chosen, wanted, isLong) {
  const methods = new Map((adapters ?? []).filter((each) => !each.problem).map((each) => [each.name, each.peft_type]));
  const names = ["base", ...methods.keys()];
  const needle = wanted.toLowerCase();
  const matches = names.filter((name) => name.toLowerCase().includes(needle));
  const near = new Set(matches.slice(0, isLong || needle ? MANY : FEW));
  const written = chosen.filter((name) => name !== "base" && !methods.has(name));
  const shown = [...names.filter((name) => near.has(name) || chosen.includes(name)), ...written];
  const isNew = EXPRESSION.test(wanted) && !methods.has(wanted) && /[+:@]/.test(needle);
  return { methods, matches, shown, isNew, left: matches.filter((name) => !shown.includes(name)).length };
}

export function Picker({ adapters, chosen, onToggle }) {
  const [typed, setTyped] = useState("");
  const [isLong, setLong] = useState(false);
  const wanted = typed.trim();
  const { methods, matches, shown, isNew, left } = find(adapters, chosen, wanted, isLong);
  const isFull = chosen.length >= MOST;
  const take = (name) => {
    if (!name || (isFull && !chosen.includes(name))) return;
    onToggle(name);
    setTyped("");
  };
  const add = (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    take(isNew ? wanted : matches[0]);
  };
  const hint = isFull
    ? `${MOST} at a time: a browser opens six connections, and one carries the live view.`
    : "Every one you pick answers the same text.";
  return html`<fieldset class="picker">
    <legend>Who answers <span class="note">${chosen.length} chosen</span></legend>
    <input type="search" class="find" placeholder="Find an adapter, or write a:0.7+b:0.3" aria-label="Find an adapter, or write a combination"
      value=${typed} onInput=${(event) => setTyped(event.target.value)} onKeyDown=${add} spellcheck=${false} />
    <div class=${`chips ${isLong ? "long" : ""}`}>
      ${shown.map((name) => html`<${Chip} key=${name} name=${name} method=${methods.get(name)} isOn=${chosen.includes(name)} isFull=${isFull} onToggle=${onToggle} />`)}
      ${isNew && html`<button type="button" class="chip new" disabled=${isFull} onClick=${() => take(wanted)}>Add ${wanted}</button>`}
      ${(left > 0 || isLong) && !wanted && html`<button type="button" class="quiet small" aria-expanded=${isLong} onClick=${() => setLong(!isLong)}>${isLong ? "Show fewer" : `${left} more`}</button>`}
      ${left > 0 && (isLong || wanted) && html`<span class="note">and ${left} more: type to find them</span>`}
      ${adapters && !matches.length && !isNew && html`<span class="note">No adapter has “${wanted}” in its name.</span>`}
      ${!adapters && html`<span class="note">Loading the list.</span>`}
    </div>
    <p class="note" role="status">${hint}</p>
  </fieldset>`;
}

// Choosing who answers: chips for the base and the adapters, found by typing. An expression of several adapters
// (`a:0.7+b:0.3`) or a version (`a@2`) is taken as it is written.
import { hued } from "./colours.js";
import { html, useState } from "./view.js";

export const MOST = 5; // a browser opens six connections to a server, and the live view holds one
const SHOWN = 24;
const EXPRESSION = /^[A-Za-z0-9][A-Za-z0-9._@:+-]*$/;

function Chip({ name, method, isOn, isFull, onToggle }) {
  return html`<button type="button" class="chip hued" style=${hued(name)} aria-pressed=${isOn} disabled=${isFull && !isOn}
    onClick=${() => onToggle(name)}><i class="swatch"></i>${name}${method && html` <small>${method}</small>`}</button>`;
}

export function Picker({ adapters, chosen, onToggle }) {
  const [wanted, setWanted] = useState("");
  const usable = (adapters ?? []).filter((each) => !each.problem);
  const methods = new Map(usable.map((each) => [each.name, each.peft_type]));
  const needle = wanted.trim().toLowerCase();
  const matches = ["base", ...usable.map((each) => each.name)].filter((name) => name.toLowerCase().includes(needle));
  const near = new Set(matches.slice(0, SHOWN));
  const names = ["base", ...methods.keys()];
  // In the list's order, whatever is chosen: a chip must not move from under the pointer.
  const shown = [...names.filter((name) => near.has(name) || chosen.includes(name)), ...chosen.filter((name) => name !== "base" && !methods.has(name))];
  const isNew = needle && EXPRESSION.test(wanted.trim()) && !methods.has(wanted.trim()) && /[+:@]/.test(needle);
  const isFull = chosen.length >= MOST;
  const add = (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    const first = isNew ? wanted.trim() : matches[0];
    if (!first || (isFull && !chosen.includes(first))) return;
    onToggle(first);
    setWanted("");
  };
  const left = matches.length - SHOWN;
  const hint = isFull
    ? `${MOST} at a time: a browser opens six connections, and one carries the live view.`
    : "Every one you pick answers the same prompt.";
  return html`<fieldset class="picker">
    <legend>Who answers <span class="note">${chosen.length} chosen</span></legend>
    <input type="search" class="find" placeholder="Find an adapter, or write a:0.7+b:0.3" aria-label="Find an adapter, or write a combination"
      value=${wanted} onInput=${(event) => setWanted(event.target.value)} onKeyDown=${add} spellcheck="false" />
    <div class="chips">
      ${shown.map((name) => html`<${Chip} key=${name} name=${name} method=${methods.get(name)} isOn=${chosen.includes(name)} isFull=${isFull} onToggle=${onToggle} />`)}
      ${isNew && html`<button type="button" class="chip" disabled=${isFull} onClick=${() => { onToggle(wanted.trim()); setWanted(""); }}>Add ${wanted.trim()}</button>`}
      ${left > 0 && html`<span class="note">and ${left} more: type to find them</span>`}
      ${adapters && !shown.length && html`<span class="note">No adapter has that in its name.</span>`}
      ${!adapters && html`<span class="note">Loading the list.</span>`}
    </div>
    <p class="note">${hint}</p>
  </fieldset>`;
}

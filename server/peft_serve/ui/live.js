// What the server is doing now, as /v1/events tells it: the batch, the slots, the queue and the rates.
import { Curve, History, counted } from "./charts.js";
import { hued } from "./colours.js";
import { bytes, figure, html, methodName, percent, plural } from "./view.js";

const LEGEND = 8;
const SLOTS = 128;

/** The one line of the head that is always in sight. */
export function Strip({ live, isWriter }) {
  const { now, isOn } = live;
  const state = isOn === false ? "no connection" : (now?.state ?? "connecting");
  const rate = isWriter ? now?.tokens_per_s : now?.prompt_tokens_per_s;
  return html`<div class="strip" title="Tokens of all requests, over two seconds">
    <span class="dot" data-state=${state}></span><span class="state">${state}</span>
    <span class="rate"><b>${figure(isOn ? (rate ?? 0) : 0)}</b> <small>tokens/s</small></span>
  </div>`;
}

/** Names of adapters in their colours, each with a number. */
function Legend({ entries, most }) {
  return html`<ul class="legend">${entries.slice(0, most).map(({ name, word, count }) => html`<li class="hued" style=${hued(name)} key=${name}>
    <i class="swatch"></i><span class="name" title=${name}>${name}</span>${word && html`<small>${word}</small>`}<b>${count}</b></li>`)}
    ${entries.length > most && html`<li class="note">and ${entries.length - most} more</li>`}</ul>`;
}

function Batch({ events, now }) {
  const { rows } = now;
  const groups = counted(rows);
  const said = groups.map((each) => `${each.name} ${each.count}`).join(", ") || "no rows";
  const entries = groups.map(({ name, method, count }) => ({ name, count, word: name === "base" || !method ? "" : methodName(method) }));
  return html`<section>
    <h3>Batch <span class="note">${rows.length ? `${plural(rows.length, "row")} · ${plural(groups.length, "adapter")}` : "idle"}</span></h3>
    <div class="rows" role="img" aria-label=${`Rows of the last step: ${said}`}>
      ${rows.map((row) => html`<i class=${`row hued ${row.phase}`} style=${hued(row.adapter)}
        title=${`${row.adapter}: ${row.phase}, ${plural(row.tokens, "token")}`}></i>`)}
      ${!rows.length && html`<span class="note">Rows of a step show up here, coloured by adapter.</span>`}
    </div>
    <${History} events=${events} now=${now} />
    ${rows.length > 0 && html`<${Legend} entries=${entries} most=${LEGEND} />`}
  </section>`;
}

function Slots({ now }) {
  const taken = new Map(now.slots.map((each) => [each.slot, each]));
  const cells = Array.from({ length: Math.min(now.num_slots, SLOTS) }, (_, i) => taken.get(i + 1));
  const said = now.slots.map((each) => each.adapter + (each.pinned ? " (pinned)" : "")).join(", ") || "none";
  return html`<section>
    <h3>Device slots <span class="note">${now.slots.length} of ${now.num_slots} · ${bytes(now.tiers.device.bytes)}</span></h3>
    <div class="slots" role="img" aria-label=${`In the slots: ${said}`}>
      ${cells.map((each) => each
        ? html`<i class=${`slot hued ${each.pinned ? "pinned" : ""} ${each.in_flight ? "busy" : ""}`} style=${hued(each.adapter)}
            title=${`${each.adapter}: ${bytes(each.bytes)}, ${each.in_flight} in flight${each.pinned ? ", pinned" : ""}`}></i>`
        : html`<i class="slot"></i>`)}
    </div>
    <p class="note">${now.tiers.host.adapters ? `${plural(now.tiers.host.adapters, "adapter")} in the host's memory, ${bytes(now.tiers.host.bytes)}` : "None is loaded yet: each is when it is first asked."}</p>
  </section>`;
}

function Queue({ queue }) {
  const entries = queue.adapters.map((each) => ({ name: each.name, count: each.waiting }));
  return html`<section>
    <h3>Queue <span class="note">${queue.waiting ? `${queue.waiting} waiting${queue.loading ? `, ${queue.loading} for a load` : ""}` : "empty"}</span></h3>
    ${entries.length > 0 && html`<${Legend} entries=${entries} most=${LEGEND} />`}
  </section>`;
}

function Rates({ events, now, isWriter }) {
  const shown = isWriter ? "tokens_per_s" : "prompt_tokens_per_s";
  return html`<section>
    <h3>Tokens per second <span class="note">last minute</span></h3>
    <p class="big">${figure(now[shown])} <small>${isWriter ? "written" : "read"}</small>
      ${isWriter && html`<span>${figure(now.prompt_tokens_per_s)} <small>of prompts</small></span>`}</p>
    <${Curve} events=${events} now=${now} of=${(event) => event[shown]} label="Tokens per second" />
  </section>`;
}

function Fact({ name, title, children }) {
  return html`<div title=${title}><dt>${name}</dt><dd>${children}</dd></div>`;
}

export function Live({ live, isWriter }) {
  const { events, now, isOn } = live;
  const waits = isOn === false ? "The server does not answer." : isOn ? "Waiting for the first snapshot." : "Connecting to the live view.";
  if (!now) return html`<aside class="live" aria-label="Live view"><h2>Live</h2><p class="note">${waits}</p></aside>`;
  return html`<aside class=${`live ${isOn ? "" : "stale"}`} aria-label="Live view">
    <h2>Live</h2>
    <${Rates} events=${events} now=${now} isWriter=${isWriter} />
    <${Batch} events=${events} now=${now} />
    <${Queue} queue=${now.queue} />
    <${Slots} now=${now} />
    <dl class="facts">
      <${Fact} name="Step" title="Time of one forward pass, of late">${now.step_ms === null ? "–" : `${now.step_ms.toFixed(1)} ms`}<//>
      <${Fact} name="Requests" title="Requests that ended">${figure(now.requests_per_s)}/s<//>
      ${isWriter && html`<${Fact} name="KV cache" title="KV blocks in use">${percent(now.kv_usage)}<//>
        <${Fact} name="Prefix hits" title="Tokens of prompts that need not be computed again">${percent(now.prefix_cache_hit_share)}<//>`}
    </dl>
  </aside>`;
}

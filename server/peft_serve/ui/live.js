// What the server is doing now, as /v1/events tells it: the batch, the slots, the queue and the rates.
import { hued } from "./colours.js";
import { bytes, figure, html, percent, plural } from "./view.js";

const WIDTH = 240;
const HEIGHT = 44;

/** A curve of the last minute. */
function Curve({ values, label, unit }) {
  const top = Math.max(...values, 1);
  const points = values.map((value, i) => [
    (WIDTH * (i + 120 - values.length)) / 119,
    HEIGHT - 2 - (value / top) * (HEIGHT - 6),
  ]);
  const line = points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  const first = points.length ? points[0][0] : WIDTH;
  const said = `${label}: now ${figure(values.at(-1) ?? 0)}, at most ${figure(Math.max(...values, 0))} ${unit} in the last minute`;
  return html`<svg class="curve" viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" role="img" aria-label=${said}>
    ${line && html`<path class="area" d="${line}L${WIDTH} ${HEIGHT}L${first} ${HEIGHT}Z" /><path class="line" d=${line} />`}
  </svg>`;
}

/** The one line of the head that is always in sight. */
export function Strip({ live }) {
  const { now, isOn } = live;
  const state = isOn ? (now?.state ?? "connecting") : "no connection";
  return html`<div class="strip" title="Tokens drawn by all requests, over two seconds">
    <span class="dot" data-state=${state}></span><span class="state">${state}</span>
    <b>${figure(now?.tokens_per_s ?? 0)}</b> <small>tokens/s</small>
  </div>`;
}

/** How many rows each adapter has, most first. */
function counted(rows) {
  const found = new Map();
  for (const row of rows) {
    const seen = found.get(row.adapter) ?? { name: row.adapter, method: row.method, count: 0 };
    seen.count += 1;
    found.set(row.adapter, seen);
  }
  return [...found.values()].sort((a, b) => b.count - a.count);
}

function Batch({ rows }) {
  const groups = counted(rows);
  const said = groups.map((each) => `${each.name} ${each.count}`).join(", ") || "no rows";
  return html`<section>
    <h3>Batch <span class="note">${rows.length ? `${plural(rows.length, "row")} · ${plural(groups.length, "adapter")}` : "idle"}</span></h3>
    <div class="rows" role="img" aria-label=${`Rows of the last step: ${said}`}>
      ${rows.map((row) => html`<i class=${`row hued ${row.phase}`} style=${hued(row.adapter)}
        title=${`${row.adapter}: ${row.phase}, ${plural(row.tokens, "token")}`}></i>`)}
      ${!rows.length && html`<span class="note">Rows of the step in progress show up here, coloured by adapter.</span>`}
    </div>
    ${rows.length > 0 && html`<ul class="legend">${groups.slice(0, 8).map((each) => html`<li class="hued" style=${hued(each.name)}>
      <i class="swatch"></i>${each.name} <small>${each.name === "base" ? "" : each.method}</small> <b>${each.count}</b></li>`)}</ul>`}
  </section>`;
}

function Slots({ now }) {
  const taken = new Map(now.slots.map((each) => [each.slot, each]));
  const cells = Array.from({ length: Math.min(now.num_slots, 128) }, (_, i) => taken.get(i + 1));
  const said = now.slots.map((each) => each.adapter + (each.pinned ? " (pinned)" : "")).join(", ") || "none";
  return html`<section>
    <h3>Device slots <span class="note">${now.slots.length} of ${now.num_slots} · ${bytes(now.tiers.device.bytes)}</span></h3>
    <div class="slots" role="img" aria-label=${`In the slots: ${said}`}>
      ${cells.map((each) => each
        ? html`<i class=${`slot hued ${each.pinned ? "pinned" : ""} ${each.in_flight ? "busy" : ""}`} style=${hued(each.adapter)}
            title=${`${each.adapter}: ${bytes(each.bytes)}, ${each.in_flight} in flight${each.pinned ? ", pinned" : ""}`}></i>`
        : html`<i class="slot"></i>`)}
    </div>
    <p class="note">${plural(now.tiers.host.adapters, "adapter")} in the host's memory, ${bytes(now.tiers.host.bytes)}</p>
  </section>`;
}

function Queue({ queue }) {
  return html`<section>
    <h3>Queue <span class="note">${queue.waiting ? `${queue.waiting} waiting${queue.loading ? `, ${queue.loading} for a load` : ""}` : "empty"}</span></h3>
    ${queue.adapters.length > 0 && html`<ul class="legend">${queue.adapters.slice(0, 12).map((each) => html`<li class="hued" style=${hued(each.name)}>
      <i class="swatch"></i>${each.name} <b>${each.waiting}</b></li>`)}</ul>`}
  </section>`;
}

export function Live({ live }) {
  const { events, now, isOn } = live;
  if (!now) return html`<aside class="live" aria-label="Live view"><p class="note">${isOn ? "Waiting for the first snapshot." : "Connecting to the live view."}</p></aside>`;
  const drawn = events.map((each) => each.tokens_per_s);
  return html`<aside class=${`live ${isOn ? "" : "stale"}`} aria-label="Live view">
    <h2>Live</h2>
    <section>
      <h3>Tokens per second <span class="note">last minute</span></h3>
      <p class="big">${figure(now.tokens_per_s)} <small>drawn</small> <span>${figure(now.prompt_tokens_per_s)} <small>of prompts</small></span></p>
      <${Curve} values=${drawn} label="Tokens per second" unit="tokens per second" />
    </section>
    <${Batch} rows=${now.rows} />
    <${Queue} queue=${now.queue} />
    <${Slots} now=${now} />
    <dl class="facts">
      <div><dt>Step</dt><dd>${now.step_ms === null ? "–" : `${now.step_ms.toFixed(1)} ms`}</dd></div>
      <div><dt>Requests</dt><dd>${figure(now.requests_per_s)}/s</dd></div>
      <div><dt>KV cache</dt><dd>${percent(now.kv_usage)}</dd></div>
      <div><dt>Prefix hits</dt><dd>${percent(now.prefix_cache_hit_share)}</dd></div>
    </dl>
  </aside>`;
}

// The last minute as two small drawings: a curve, and the batch's make-up over time.
import { hued } from "./colours.js";
import { figure, html } from "./view.js";

export const SPAN_S = 60;
const WIDTH = 240;
const HEIGHT = 44;
const WIDEST = 6; // a column reaches back to the snapshot before, but not over a time that nobody watched
const FLOOR = 4; // rows that fill the height at least

const across = (event, now) => (WIDTH * (event.time - now.time + SPAN_S)) / SPAN_S;

/** A curve of the last minute. */
export function Curve({ events, now, of, label }) {
  const values = events.map(of);
  const highest = Math.max(...values, 0);
  const top = Math.max(highest, 1);
  const points = events.map((event, i) => [across(event, now), HEIGHT - 2 - (values[i] / top) * (HEIGHT - 6)]);
  const line = points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  const first = points.length ? points[0][0].toFixed(1) : WIDTH;
  const said = `${label}: now ${figure(values.at(-1) ?? 0)}, at most ${figure(highest)} in the last minute`;
  return html`<svg class="curve" viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" role="img" aria-label=${said}>
    ${highest > 0 && html`<path class="area" d="${line}L${WIDTH} ${HEIGHT}L${first} ${HEIGHT}Z" /><path class="line" d=${line} />`}
  </svg>`;
}

/** How many rows each adapter has, most first. */
export function counted(rows) {
  const found = new Map();
  for (const row of rows) {
    const seen = found.get(row.adapter) ?? { name: row.adapter, method: row.method, count: 0 };
    seen.count += 1;
    found.set(row.adapter, seen);
  }
  return [...found.values()].sort((a, b) => b.count - a.count);
}

/** The rows of each snapshot as a column, in the colours of their adapters. */
export function History({ events, now }) {
  const most = Math.max(...events.map((event) => event.rows.length), 1);
  const unit = HEIGHT / Math.sqrt(Math.max(most, FLOOR)); // by the root: a step of 80 rows must not flatten those of 4
  const columns = events.map((event, i) => {
    if (!event.rows.length) return null;
    const x = across(event, now);
    const width = i ? Math.min(x - across(events[i - 1], now), WIDEST) : 1;
    let y = HEIGHT;
    const share = unit / Math.sqrt(event.rows.length);
    return counted(event.rows).sort((a, b) => (a.name < b.name ? -1 : 1)).map(({ name, count }) => {
      const height = count * share;
      y -= height;
      return html`<rect class="hued" style=${hued(name)} x=${(x - width).toFixed(1)} y=${y.toFixed(1)} width=${(width + 0.1).toFixed(1)} height=${height.toFixed(1)} />`;
    });
  });
  if (!columns.some(Boolean)) return null;
  return html`<svg class="curve history" viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" role="img" aria-label=${`The batch in the last minute: at most ${most} rows in one step`}>${columns}</svg>`;
}

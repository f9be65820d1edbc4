// One hue for each adapter, the same everywhere on the page for as long as it is open.
const FIRST = [255, 30, 150, 310, 75, 200, 350, 120, 285, 50, 175, 230];
const GOLDEN_ANGLE = 137.5;
const GREY = { "--h": 260, "--k": 0.015 };
const given = new Map();
let isKnown = false;

function give(name) {
  if (given.has(name)) return;
  const i = given.size;
  given.set(name, i < FIRST.length ? FIRST[i] : (FIRST[0] + i * GOLDEN_ANGLE) % 360);
}

/** The inline style that colours an adapter's things; the base is grey, and so is everything before the list is there. */
export function hued(name) {
  if (name === "base" || !isKnown) return GREY;
  give(name);
  return { "--h": given.get(name), "--k": 0.15 };
}

/** Give the adapters of the list their hues in its order, so that neighbours differ and a reload changes none. */
export function introduce(names) {
  isKnown = true;
  for (const name of names) give(name);
}

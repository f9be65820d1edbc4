// What every part of the page is made with: preact's functions, bound to htm's templates, and small formats.
// Text reaches the page through templates only, so that it stays text.
import { h, render, Fragment } from "./vendor/preact.js";
import { useCallback, useEffect, useMemo, useRef, useState } from "./vendor/hooks.js";
import htm from "./vendor/htm.js";

export const html = htm.bind(h);
export { render, Fragment, useCallback, useEffect, useMemo, useRef, useState };

const UNITS = ["B", "KB", "MB", "GB", "TB"];

/** A number of bytes, for people. */
export function bytes(count) {
  if (count === null || count === undefined) return "–";
  let unit = 0;
  for (; count >= 1000 && unit < UNITS.length - 1; unit++) count /= 1000;
  return `${count >= 100 || unit === 0 ? Math.round(count) : count.toFixed(1)} ${UNITS[unit]}`;
}

/** A number of milliseconds, for people. */
export function milliseconds(ms) {
  if (ms === null || ms === undefined) return "–";
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

/** A rate or a count, with as many digits as one reads. */
export function figure(value) {
  if (value === null || value === undefined) return "–";
  return value >= 100 || Number.isInteger(value) ? Math.round(value).toLocaleString("en") : value.toFixed(1);
}

export function percent(share) {
  return share === null || share === undefined ? "–" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}

export function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

const METHODS = {
  LORA: "LoRA", ADALORA: "AdaLoRA", IA3: "IA³", LOHA: "LoHa", LOKR: "LoKr", VERA: "VeRA", RANDLORA: "RandLoRA",
  XLORA: "X-LoRA", PROMPT_TUNING: "prompt tuning", MULTITASK_PROMPT_TUNING: "multitask prompts", P_TUNING: "p-tuning",
  PREFIX_TUNING: "prefix tuning", ADAPTION_PROMPT: "adaption prompt", LN_TUNING: "LayerNorm tuning", FOURIERFT: "FourierFT",
};

/** A peft type as its papers write it, or as it is. */
export function methodName(type) {
  return METHODS[type] ?? type;
}

/** A number of parameters, for people. */
export function parameters(count) {
  return count >= 1e9 ? `${(count / 1e9).toFixed(1)} B` : count >= 1e6 ? `${figure(count / 1e6)} M` : `${figure(count / 1e3)} k`;
}

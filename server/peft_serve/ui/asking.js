// One question to one adapter, from the click to its end. Knows what an adapter can do, and no page.
import * as api from "./api.js";
import { parametersOf } from "./options.js";

const known = new Map();

/** What an adapter can do: `tasks`, and the `head` it answers with. An expression is asked to generate. */
async function abilities(name, base) {
  if (name === "base") return base.base;
  if (/[+:@]/.test(name)) return { tasks: base.base.tasks, head: null };
  if (!known.has(name)) known.set(name, api.describe(name).catch((error) => (known.delete(name), Promise.reject(error))));
  return known.get(name);
}

/** What was known of an adapter, or of all of them, may hold no more. */
export function forget(name) {
  if (name === undefined) known.clear();
  else known.delete(name);
}

export const writes = (base) => base.base.tasks.includes("generate");

function inputsOf(head, text, second) {
  if (head?.task === "QUESTION_ANS") return { question: text, context: second };
  return second ? { text, text_pair: second } : text;
}

/** Ask, and tell `tell` what changes: `{request, text, scores, entities, answer, vector, details, ...}` in parts. */
export async function ask(name, base, text, options, signal, tell) {
  const parameters = parametersOf(options);
  const began = performance.now();
  const tick = (part) => tell({ ...part, at: performance.now() - began });
  const { tasks, head } = await abilities(name, base);
  const read = async (request, put) => {
    tell({ request });
    tick(put(await api.answer(request, signal)));
  };
  if (head && tasks.includes("classify")) {
    const kept = parameters.task_id === undefined ? {} : { task_id: parameters.task_id };
    await read(api.asks.classify(name, inputsOf(head, text, options.second), kept), (answer) => readings(answer, head.task));
  } else if (writes(base)) {
    const request = api.asks.generate(name, text, parameters);
    tell({ request });
    let said = "";
    await api.stream(request, signal, (event) => {
      if (event.generated_text !== null) said = event.generated_text;
      else if (!event.token.special) said += event.token.text;
      const part = { text: said };
      if (event.details) Object.assign(part, { details: event.details, adapter: event.adapter, scores: event.details.choices });
      tick(part);
    });
  } else if (tasks.includes("classify")) {
    await read(api.asks.classify(name, text, { ...parameters, max_new_tokens: undefined }), (answer) => readings(answer, "SEQ_CLS"));
  } else {
    await read(api.asks.embed(name, text), ([vector]) => ({ vector }));
  }
}

/** The answer of a head, by its task. */
function readings(answer, task) {
  if (task === "TOKEN_CLS") return { entities: answer };
  if (task === "QUESTION_ANS") return { answer };
  return { scores: answer[0] };
}

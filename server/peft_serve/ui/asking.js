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

export function forget(name) {
  known.delete(name);
}

function inputsOf(head, text, second) {
  if (head?.task === "QUESTION_ANS") return { question: text, context: second };
  return second ? { text, text_pair: second } : text;
}

/** Ask, and tell `tell` what changes: `{text, scores, entities, answer, vector, details, status, ...}` in parts. */
export async function ask(name, base, text, options, signal, tell) {
  const parameters = parametersOf(options);
  const began = performance.now();
  const since = () => performance.now() - began;
  const { tasks, head } = await abilities(name, base);
  const generates = base.base.tasks.includes("generate");
  if (head && tasks.includes("classify")) {
    const kept = parameters.task_id === undefined ? {} : { task_id: parameters.task_id };
    tell(read(await api.classify(name, inputsOf(head, text, options.second), kept, signal), head.task), { at: since() });
  } else if (generates) {
    let said = "";
    await api.generate(name, text, parameters, signal, (event) => {
      if (event.generated_text !== null) said = event.generated_text;
      else if (!event.token.special) said += event.token.text;
      const part = { text: said };
      if (event.details) Object.assign(part, { details: event.details, adapter: event.adapter, scores: event.details.choices });
      tell(part, { at: since() });
    });
  } else if (tasks.includes("classify")) {
    tell(read(await api.classify(name, text, { ...parameters, max_new_tokens: undefined }, signal), "SEQ_CLS"), { at: since() });
  } else {
    const [vector] = await api.embed(name, text, signal);
    tell({ vector }, { at: since() });
  }
}

/** The answer of a head, by its task. */
function read(answer, task) {
  if (task === "TOKEN_CLS") return { entities: answer };
  if (task === "QUESTION_ANS") return { answer };
  return { scores: answer[0] };
}

// Uploading: drop a folder, its files or an archive, and read what came of it.
import * as api from "./api.js";
import { bytes, html, methodName, percent, plural, useEffect, useRef, useState } from "./view.js";

const ARCHIVE = /\.(zip|tar|tar\.gz|tgz)$/i;
const WANTED = /^(adapter_config\.json|adapter(_model)?\.(safetensors|bin)|head_config\.json|model_head\.safetensors|peft_serve\.json|chat_template\.jinja|tokenizer(_config)?\.json|added_tokens\.json)$/;
const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;

/** A name for the adapter, made of a file's or a folder's. */
function nameOf(text) {
  return text.replace(ARCHIVE, "").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 64).replace(/[^A-Za-z0-9]+$/, "");
}

const fileOf = (entry) => new Promise((resolve, reject) => entry.file(resolve, reject));
const someOf = (reader) => new Promise((resolve, reject) => reader.readEntries(resolve, reject));

/** What was dropped: `{files, label}`; of a folder the files that lie in it directly. */
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (entries.length === 1 && entries[0].isDirectory) {
    const reader = entries[0].createReader();
    const found = [];
    for (let some = await someOf(reader); some.length; some = await someOf(reader)) found.push(...some);
    return { files: await Promise.all(found.filter((each) => each.isFile).map(fileOf)), label: entries[0].name };
  }
  return { files: [...transfer.files], label: "" };
}

/** What will be sent of the files: an archive as it is, else those of a checkpoint. */
function picked(files, label) {
  const archive = files.find((file) => ARCHIVE.test(file.name));
  if (archive) return { content: archive, label: archive.name, size: archive.size, count: 1 };
  const wanted = files.filter((file) => WANTED.test(file.name));
  const folder = label || files[0]?.webkitRelativePath?.split("/")[0] || "";
  return { content: wanted, label: folder, size: wanted.reduce((sum, file) => sum + file.size, 0), count: wanted.length };
}

/** Why nothing of it is sent, or "". */
function problemOf({ count, size, label }, maxBytes) {
  if (!count) return "None of these files belongs to a checkpoint: adapter_config.json and adapter_model.safetensors, or an archive of them.";
  if (maxBytes && size > maxBytes) return `${label || "This"} has ${bytes(size)}, and this server takes ${bytes(maxBytes)} at most (--max-adapter-bytes).`;
  return "";
}

function Refusal({ error }) {
  return html`<div class="refusal" role="alert">
    <p><b>Not accepted.</b> ${error.errors.length ? `${plural(error.errors.length, "reason")}, and nothing was kept:` : error.message}</p>
    ${error.errors.length > 0 && html`<ul>${error.errors.map((each) => html`<li><code>${each.path}</code><span>${each.reason}</span></li>`)}</ul>`}
  </div>`;
}

function Accepted({ answer, name, wasCheck }) {
  const what = wasCheck ? "Fine as it is." : answer.status === 201 ? `${name} is version ${answer.version} now.` : `${name} has these very files already.`;
  return html`<div class="accepted" role="status">
    <p><b>${what}</b> ${methodName(answer.peft_type)}${answer.rank ? `, rank ${answer.rank}` : ""}: ${plural(answer.num_tensors, "tensor")} bound to ${plural(answer.num_sites, "place")} of the base, ${bytes(answer.bytes)}.
      ${answer.tried && " It was tried out on the base."}</p>
    ${!wasCheck && html`<p class="actions"><a class="button" href=${`#play?with=${encodeURIComponent(name)}`}>Ask it</a></p>`}
    ${answer.warnings?.length > 0 && html`<ul>${answer.warnings.map((each) => html`<li>${each}</li>`)}</ul>`}
  </div>`;
}

/** Files may be dropped anywhere on the page: beside the box a browser would leave the page and show them. */
function useDrop(take) {
  const [isOver, setOver] = useState(false);
  const current = useRef(take);
  current.current = take;
  useEffect(() => {
    const over = (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return; // text that is dragged into a field is none of ours
      event.preventDefault();
      setOver(true);
    };
    const leave = (event) => event.relatedTarget === null && setOver(false);
    const drop = async (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      setOver(false);
      current.current(await dropped(event.dataTransfer));
    };
    const all = { dragover: over, dragleave: leave, drop };
    for (const [name, listener] of Object.entries(all)) addEventListener(name, listener);
    return () => {
      for (const [name, listener] of Object.entries(all)) removeEventListener(name, listener);
    };
  }, []);
  return isOver;
}

export function Upload({ onDone, maxBytes }) {
  const [choice, setChoice] = useState(null);
  const [name, setName] = useState("");
  const [progress, setProgress] = useState(null);
  const [outcome, setOutcome] = useState(null);
  const sending = useRef(null);
  const take = ({ files, label }) => {
    const found = picked(files, label);
    const problem = problemOf(found, maxBytes);
    setChoice(problem ? null : found);
    setOutcome(problem ? { error: { errors: [], message: problem } } : null);
    if (found.label && !problem) setName(nameOf(found.label));
  };
  const isOver = useDrop(take);
  const send = async (check) => {
    setOutcome(null);
    setProgress(0);
    sending.current = api.upload(name, choice.content, { check, onProgress: setProgress });
    try {
      const answer = await sending.current.done;
      setOutcome({ answer, wasCheck: check, name });
      if (!check) onDone(name);
    } catch (error) {
      setOutcome(error.name === "AbortError" ? null : { error });
    }
    setProgress(null);
  };
  const isSending = progress !== null;
  const isNamed = NAME.test(name);
  const isReady = choice !== null && isNamed && !isSending;
  return html`<section class="upload" aria-labelledby="upload-title">
    <h2 id="upload-title">Add an adapter</h2>
    <div class=${`drop ${isOver ? "over" : ""}`}>
      <p><b>${isOver ? "Let go to take it" : "Drop a checkpoint here"}</b><br /><span class="note">what PEFT's save_pretrained wrote: the folder, its files, or a .zip, .tar or .tar.gz of it</span></p>
      <p class="actions center">
        <label class="button">Choose files<input class="sr" type="file" multiple onChange=${(event) => take({ files: [...event.target.files], label: "" })} /></label>
        <label class="button">Choose a folder<input class="sr" type="file" webkitdirectory onChange=${(event) => take({ files: [...event.target.files], label: "" })} /></label></p>
      ${choice && html`<p class="chosen">${choice.label} <span class="note">${plural(choice.count, "file")}, ${bytes(choice.size)}</span></p>`}
    </div>
    <div class="send">
      <label>Name <input type="text" value=${name} onInput=${(event) => setName(event.target.value)} aria-invalid=${Boolean(name) && !isNamed} aria-describedby="name-hint" spellcheck=${false} autocomplete="off" /></label>
      <button type="button" class="primary" disabled=${!isReady} onClick=${() => send(false)}>Upload</button>
      <button type="button" disabled=${choice === null || isSending} onClick=${() => send(true)}>Only check</button>
      ${isSending && html`<button type="button" onClick=${() => sending.current.abort()}>Stop</button>`}
    </div>
    <p class="note" id="name-hint">${name && !isNamed ? "A name begins with a letter or digit and has up to 64 letters, digits, dots, dashes and underscores." : "A name that is taken gets a new version; requests that run keep theirs."}</p>
    ${isSending && html`<p class="progress"><progress max="1" value=${progress < 1 ? progress : undefined} aria-label="Upload"></progress>
      <span role="status">${progress < 1 ? `Sending: ${percent(progress)}` : "Sent. The server checks it and tries it out."}</span></p>`}
    ${outcome?.error && html`<${Refusal} error=${outcome.error} />`}
    ${outcome?.answer && html`<${Accepted} ...${outcome} />`}
  </section>`;
}

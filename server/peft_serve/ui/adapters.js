// Every adapter: its version, where it is, who uses it, and what an operator does with it.
import * as api from "./api.js";
import { forget } from "./asking.js";
import { hued } from "./colours.js";
import { Upload } from "./upload.js";
import { bytes, html, methodName, plural, useEffect, useRef, useState } from "./view.js";

const SHOWN = 200;
const PLACES = { device: "on the device", host: "in memory", disk: "on disk" };

/** A dialog that is open while it is on the page. */
function Dialog({ title, onClose, children }) {
  const box = useRef(null);
  useEffect(() => {
    box.current.showModal();
  }, []);
  return html`<dialog ref=${box} onClose=${onClose} aria-labelledby="dialog-title"><h2 id="dialog-title">${title}</h2>${children}</dialog>`;
}

function Delete({ entry, onClose, act }) {
  const uploads = entry.num_versions;
  return html`<${Dialog} title=${`Delete ${entry.name}?`} onClose=${onClose}>
    <p>${plural(uploads, "version")} of it will be gone for good. ${entry.in_flight ? `${plural(entry.in_flight, "running request")} will end on its weights first.` : "No request uses it now."}</p>
    <form method="dialog" class="actions"><button value="no">Keep it</button>
      <button type="button" class="danger" onClick=${() => act(() => api.remove(entry.name), `${entry.name} was deleted`)}>Delete ${entry.name}</button></form>
  <//>`;
}

function Versions({ entry, onClose, act }) {
  const [found, setFound] = useState(null);
  const [problem, setProblem] = useState("");
  useEffect(() => {
    api.versions(entry.name).then(setFound, (error) => setProblem(error.message));
  }, []);
  const back = (version) => act(() => api.rollback(entry.name, version.version), `${entry.name} is version ${version.version} now`);
  return html`<${Dialog} title=${`Versions of ${entry.name}`} onClose=${onClose}>
    ${problem && html`<p class="alarm">${problem}</p>`}
    <ul class="versions">${(found ?? []).map((each) => html`<li>
      <b>${each.version === 0 ? "folder" : `v${each.version}`}</b>
      <span>${each.peft_type ? methodName(each.peft_type) : "not read yet"} · ${bytes(each.bytes)}<br /><small>${(each.created ?? "").replace("T", " ").slice(0, 16)} · <code>${(each.digest ?? "").slice(7, 19)}</code></small></span>
      ${each.version === entry.version ? html`<span class="badge">current</span>` : each.version > 0 && html`<button type="button" onClick=${() => back(each)}>Use this one</button>`}
    </li>`)}</ul>
    <form method="dialog" class="actions"><button value="no">Close</button></form>
  <//>`;
}

function Method({ entry }) {
  if (!entry.peft_type) return html`<span class="note" title="A checkpoint of a folder is read when it is first used">read at first use</span>`;
  return html`${methodName(entry.peft_type)}${entry.rank ? html` <small>rank ${entry.rank}</small>` : ""}`;
}

function Acts({ entry, act, open }) {
  const { name, pinned } = entry;
  return html`<td class="acts">
    ${!entry.problem && html`<a class="quiet" href=${`#play?with=${encodeURIComponent(name)}`} aria-label=${`Ask ${name}`}>Ask</a>
      <button type="button" class="quiet" aria-label=${`${pinned ? "Unpin" : "Pin"} ${name}`} title=${pinned ? "Let it leave the device when it is idle" : "Keep it on the device"}
        onClick=${() => act(() => api.pin(name, !pinned), `${name} is ${pinned ? "no longer pinned" : "pinned"}`)}>${pinned ? "Unpin" : "Pin"}</button>`}
    ${entry.num_versions > 1 && html`<button type="button" class="quiet" aria-label=${`Versions of ${name}`} onClick=${() => open("versions", entry)}>Versions</button>`}
    ${entry.read_only
      ? html`<span class="note locked" title="It lies in a folder that the server only reads">read-only</span>`
      : html`<button type="button" class="quiet danger" aria-label=${`Delete ${name}`} onClick=${() => open("delete", entry)}>Delete</button>`}
  </td>`;
}

function Row({ entry, inFlight, act, open }) {
  const version = entry.version === null ? "" : entry.version === 0 ? "folder" : `v${entry.version}`;
  return html`<tr class="hued" style=${hued(entry.name)}>
    <th scope="row"><i class="swatch"></i>${entry.name}${entry.problem && html`<span class="problem">${entry.problem}</span>`}
      ${!entry.problem && entry.state !== "active" && html` <span class="badge">${entry.state}</span>`}</th>
    <td data-label="Method"><${Method} entry=${entry} /></td>
    <td data-label="Version">${version || "–"}${entry.num_versions > 1 && html` <small>of ${entry.num_versions}</small>`}</td>
    <td data-label="Where"><span class=${`where ${entry.residency}`}>${PLACES[entry.residency] ?? entry.residency}</span>${entry.pinned && html` <span class="badge">pinned</span>`}</td>
    <td data-label="In flight" class=${`number ${inFlight ? "" : "zero"}`}>${inFlight}</td>
    <td data-label="Size" class="number">${bytes(entry.bytes)}</td>
    <${Acts} entry=${entry} act=${act} open=${open} />
  </tr>`;
}

/** Requests by adapter in the slots, which the list's own counts lag behind. */
function flights(live) {
  const found = new Map();
  for (const slot of live?.slots ?? []) found.set(slot.adapter, slot.in_flight);
  return found;
}

export function Adapters({ adapters, refresh, live, maxBytes }) {
  const [wanted, setWanted] = useState("");
  const [said, setSaid] = useState({ text: "", isBad: false });
  const [dialog, setDialog] = useState(null);
  const seats = (live?.slots ?? []).map((slot) => `${slot.adapter} ${slot.pinned}`).join();
  useEffect(() => {
    refresh();
  }, [seats]);
  const act = async (work, text) => {
    setDialog(null);
    try {
      await work();
      setSaid({ text, isBad: false });
    } catch (error) {
      setSaid({ text: error.message, isBad: true });
    }
    await refresh();
  };
  const uploaded = (name) => {
    forget(name);
    refresh();
  };
  const found = (adapters ?? []).filter((each) => each.name.toLowerCase().includes(wanted.trim().toLowerCase()));
  const now = flights(live);
  const open = (kind, entry) => setDialog({ kind, entry });
  return html`<h1 class="sr">Adapters</h1>
    <${Upload} onDone=${uploaded} maxBytes=${maxBytes} />
    <section class="list" aria-labelledby="list-title">
      <div class="bar-above"><h2 id="list-title">Adapters <span class="note">${adapters ? adapters.length : ""}</span></h2>
        <input type="search" class="find" placeholder="Find by name" aria-label="Find an adapter by name" value=${wanted} onInput=${(event) => setWanted(event.target.value)} /></div>
      <p class=${said.isBad ? "alarm" : "note"} role=${said.isBad ? "alert" : "status"}>${said.text}</p>
      <div class="scroll" tabindex="0" role="region" aria-label="Table of adapters"><table>
        <thead><tr><th scope="col">Name</th><th scope="col">Method</th><th scope="col">Version</th><th scope="col">Where</th><th scope="col" class="number">In flight</th><th scope="col" class="number">Size</th><th scope="col"><span class="sr">What to do</span></th></tr></thead>
        <tbody>${found.slice(0, SHOWN).map((each) => html`<${Row} key=${each.name} entry=${each} inFlight=${now.get(each.name) ?? each.in_flight} act=${act} open=${open} />`)}</tbody>
      </table></div>
      ${found.length > SHOWN && html`<p class="note">${found.length - SHOWN} more: type to find them</p>`}
      ${adapters && !found.length && html`<p class="empty">${wanted ? html`No adapter has “${wanted.trim()}” in its name.` : "No adapter yet. Drop a checkpoint above, and ask it a moment later."}</p>`}
    </section>
    ${dialog?.kind === "delete" && html`<${Delete} entry=${dialog.entry} onClose=${() => setDialog(null)} act=${act} />`}
    ${dialog?.kind === "versions" && html`<${Versions} entry=${dialog.entry} onClose=${() => setDialog(null)} act=${act} />`}`;
}

// The question for a key, where the server wants one.
import * as api from "./api.js";
import { html, useState } from "./view.js";

export function KeyForm() {
  const [text, setText] = useState("");
  const send = (event) => {
    event.preventDefault();
    api.keepKey(text.trim());
    location.reload();
  };
  return html`<form class="ask key" onSubmit=${send}>
    <h1>This server asks for a key</h1>
    <p class="note">${api.key() ? "It did not take the last one." : "It is kept in this tab until you close it, and sent to this server only."}</p>
    <label>Key <input type="password" autocomplete="off" value=${text} onInput=${(event) => setText(event.target.value)} /></label>
    <p class="actions"><button type="submit" class="primary" disabled=${!text.trim()}>Use it</button></p>
  </form>`;
}

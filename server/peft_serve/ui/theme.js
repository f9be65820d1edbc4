// Light or dark: the system's, until somebody turns the switch.
import { html, useEffect, useState } from "./view.js";

const SUN = "M12 7a5 5 0 1 0 0 10 5 5 0 0 0 0-10ZM12 1v3M12 20v3M1 12h3M20 12h3M4.2 4.2l2.1 2.1M17.7 17.7l2.1 2.1M19.8 4.2l-2.1 2.1M6.3 17.7l-2.1 2.1";
const MOON = "M20.5 14.2A8.5 8.5 0 0 1 9.8 3.5a8.5 8.5 0 1 0 10.7 10.7Z";

function stored() {
  try {
    return localStorage.getItem("theme") || "";
  } catch {
    return ""; // storage is switched off: the system's theme it is
  }
}

function store(theme) {
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // It holds for this visit.
  }
}

/** What the system wants, as it changes. */
function useSystem() {
  const query = matchMedia("(prefers-color-scheme: dark)");
  const [isDark, setDark] = useState(query.matches);
  useEffect(() => {
    const changed = (event) => setDark(event.matches);
    query.addEventListener("change", changed);
    return () => query.removeEventListener("change", changed);
  }, []);
  return isDark;
}

export function Theme() {
  const [theme, setTheme] = useState(stored);
  const isSystemDark = useSystem();
  const isDark = theme ? theme === "dark" : isSystemDark;
  useEffect(() => {
    document.documentElement.dataset.theme = theme;
  }, [theme]);
  const turn = () => {
    const next = isDark ? "light" : "dark";
    setTheme(next);
    store(next);
  };
  const label = `Switch to ${isDark ? "light" : "dark"} colours`;
  return html`<button type="button" class="quiet icon" onClick=${turn} aria-label=${label} title=${label}>
    <svg viewBox="0 0 24 24" width="18" height="18" aria-hidden="true"><path d=${isDark ? SUN : MOON} /></svg></button>`;
}

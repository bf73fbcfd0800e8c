// The frame around every view: header, navigation, window and theme choice, the state of the connection, the question
// for a key, and the one live region of the page (connection and alerts only; scores would never stop talking).
import { forgetKey, setKeyPrompt } from "./api.ts";
import { h, setAttr, setText } from "./dom.ts";
import { age, clock, day, WINDOW_WORDS } from "./format.ts";
import { onFrame } from "./frames.ts";
import { store } from "./store.ts";
import { WINDOWS, type StoreHealth } from "./types.ts";

const PAGES: [string, string][] = [["#/", "Overview"], ["#/tickers", "Tickers"], ["#/try", "Try a text"], ["#/quality", "Model"]];
const THEMES = ["auto", "light", "dark"] as const;
type Theme = (typeof THEMES)[number];
const THEME_SIGN: Record<Theme, string> = { auto: "◐", light: "☀", dark: "☾" };

const announcer = h("div", { class: "sr-only", role: "status", "aria-live": "polite" });
let lastSaid = 0;
/** Says something to a screen reader, at most every ten seconds. */
export function announce(text: string, urgent = false): void {
  const now = performance.now();
  if (!urgent && now - lastSaid < 10_000) return;
  lastSaid = now;
  announcer.textContent = text;
}

export interface Shell { main: HTMLElement; select: (hash: string) => void }

export function shell(root: HTMLElement): Shell {
  const links = PAGES.map(([href, name]) => h("a", { href }, name));
  const main = h("main", { id: "main", tabindex: "-1" });
  root.replaceChildren(
    h("header", { class: "top" },
      h("a", { class: "brand", href: "#/", "aria-label": "cashtag live, overview" }, h("span", { class: "brand-mark", "aria-hidden": "true" }), h("span", null, "cashtag")),
      h("nav", { "aria-label": "Pages" }, ...links),
      h("div", { class: "controls" }, jump(), windows(), link(), theme())),
    problem(),
    main,
    h("footer", null, h("p", null, "Sentiment is not advice. Scores are p(Positive) − p(Negative) of a model, averaged over posts; bands are 95 % intervals; where there are too few posts there is no score.")),
    announcer);
  setKeyPrompt(keyDialog(root));
  return {
    main,
    select(hash) {
      for (const a of links) setAttr(a, "aria-current", a.getAttribute("href") === hash ? "page" : null);
    },
  };
}

function windows(): HTMLElement {
  const buttons = WINDOWS.map((w) => {
    const input = h("input", { type: "radio", name: "window", value: w, id: `window-${w}`, checked: w === store.window });
    input.addEventListener("change", () => store.setWindow(w));
    return [input, h("label", { for: `window-${w}`, title: WINDOW_WORDS[w] }, w)];
  });
  return h("fieldset", { class: "windows" }, h("legend", { class: "sr-only" }, "Length of the window"), ...buttons.flat());
}

function jump(): HTMLElement {
  const input = h("input", { type: "search", placeholder: "Ticker", "aria-label": "Go to a ticker (shortcut: slash)", list: "ticker-names", autocomplete: "off", spellcheck: "false", maxlength: 24 });
  const names = h("datalist", { id: "ticker-names" });
  input.addEventListener("focus", () => {
    names.replaceChildren(...[...store.tickers.values()].slice(0, 1000).map((s) => h("option", { value: s.key }, s.name ?? "")));
  });
  const form = h("form", { class: "jump", role: "search" }, input, names);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const symbol = input.value.trim().replace(/^\$/, "").toUpperCase();
    if (!symbol) return;
    input.value = "";
    location.hash = `#/ticker/${encodeURIComponent(symbol)}`;
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof HTMLElement && event.target.closest("input, textarea, select");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      input.focus();
    }
  });
  return form;
}

function theme(): HTMLElement {
  let current: Theme = "auto";
  try {
    const saved = localStorage.getItem("cashtag-theme") as Theme | null;
    if (saved && THEMES.includes(saved)) current = saved;
  } catch {
    // Storage may be forbidden.
  }
  const button = h("button", { type: "button", class: "theme" });
  const show = (): void => {
    setAttr(document.documentElement, "data-theme", current === "auto" ? null : current);
    setText(button, THEME_SIGN[current]);
    setAttr(button, "aria-label", `Colours: ${current}. Change`);
    setAttr(button, "title", `Colours: ${current}`);
  };
  button.addEventListener("click", () => {
    current = THEMES[(THEMES.indexOf(current) + 1) % THEMES.length]!;
    try {
      localStorage.setItem("cashtag-theme", current);
    } catch {
      // As above.
    }
    show();
  });
  show();
  return button;
}

/** State of the stream in words, the event clock, and how old what is shown is. */
function link(): HTMLElement {
  const state = h("span", { class: "link-word" });
  const detail = h("span", { class: "link-detail" });
  const node = h("div", { class: "link" }, h("span", { class: "link-dot", "aria-hidden": "true" }), state, detail);
  let said = "";
  const draw = (): void => {
    const words = { connecting: "connecting", live: "live", stale: "no data", offline: "offline" } as const;
    const word = words[store.link];
    setAttr(node, "data-state", store.link);
    setText(state, word);
    const since = store.updated === 0 ? "" : age(Date.now() - store.updated);
    setText(detail, since && (store.link !== "live" || Date.now() - store.updated > 5000) ? since : store.asOf ? clock(store.asOf) : "");
    setAttr(node, "title", store.asOf ? `newest post: ${day(store.asOf)} ${clock(store.asOf)} · page updated ${since}` : "");
    setAttr(document.body, "data-link", store.link);
    if (word !== said && (said !== "" || word !== "connecting")) {
      if (said !== "" && (word === "offline" || word === "live")) announce(word === "live" ? "Live again" : "Connection lost, trying again", true);
      if (word === "offline" || word === "live") said = word;
    }
  };
  store.on("link", () => onFrame("link", draw));
  window.setInterval(() => onFrame("link", draw), 1000);
  draw();
  return node;
}

/** Nothing is lost meanwhile, so it says that, too. */
function storeAway(health: StoreHealth): string {
  const since = health.since ? ` since ${clock(health.since)}` : "";
  return `The store (${health.kind}) cannot be written${since}: ${health.detail}. Posts are still taken and wait in the log; scores stand still until it is back.`;
}

/** One line under the header when the numbers cannot be trusted to be fresh. */
function problem(): HTMLElement {
  const text = h("p");
  const node = h("div", { class: "problem", hidden: true }, text);
  const draw = (): void => {
    const old = store.updated > 0 ? ` What you see is ${age(Date.now() - store.updated).replace(" ago", " old")}.` : "";
    const message = store.link === "offline" ? `The server cannot be reached; trying again.${old}`
      : store.link === "stale" ? `The connection is silent.${old}`
      : store.health?.state === "unavailable" ? storeAway(store.health)
      : store.error ? `The server answers with an error: ${store.error}` : "";
    setAttr(node, "hidden", message ? null : "");
    setText(text, message);
  };
  store.on("link", () => onFrame("problem", draw));
  window.setInterval(() => onFrame("problem", draw), 1000);
  return node;
}

function keyDialog(root: HTMLElement): (wrong: boolean) => Promise<string> {
  const input = h("input", { id: "key", type: "password", autocomplete: "off", spellcheck: "false", required: true });
  const hint = h("p", { id: "key-hint" });
  const dialog = h("dialog", { class: "key", "aria-labelledby": "key-title" },
    h("form", { method: "dialog" },
      h("h2", { id: "key-title" }, "This server wants a key"), hint,
      h("label", { for: "key" }, "Key"), input,
      h("button", { type: "submit", class: "primary" }, "Use it")));
  setAttr(input, "aria-describedby", "key-hint");
  root.append(dialog);
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  return (wrong) => new Promise((resolve) => {
    if (wrong) forgetKey();
    setText(hint, wrong ? "The key was refused. Another one?" : "It is kept for this tab only and sent to this server only.");
    input.value = "";
    if (!dialog.open) dialog.showModal();
    input.focus();
    const form = dialog.querySelector("form")!;
    form.onsubmit = (event) => {
      event.preventDefault();
      // A header cannot carry other characters.
      const value = input.value.trim();
      if (!/^[\x21-\x7e]+$/.test(value)) {
        setText(hint, "A key has no spaces and only ASCII characters.");
        return;
      }
      dialog.close();
      resolve(value);
    };
  });
}

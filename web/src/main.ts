// Boots the page: the shell, the store, and the view that the address names. Addresses live behind `#`, so the server
// needs to know none of them and every view can be linked to.
import { h } from "./dom.ts";
import { announce, shell } from "./shell.ts";
import { store } from "./store.ts";
import { overview } from "./views/overview.ts";
import { quality } from "./views/quality.ts";
import { ticker } from "./views/ticker.ts";
import { tickers } from "./views/tickers.ts";
import { tryText } from "./views/try.ts";
import type { View } from "./views/view.ts";

const root = document.getElementById("app")!;
const frame = shell(root);
let current: View | null = null;
let shown: string | null = null;

function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function route(): void {
  const hash = location.hash || "#/";
  if (hash === "#main") return;
  if (hash === shown) return;
  const first = shown === null;
  shown = hash;
  current?.destroy();
  const [, page = "", ...rest] = hash.split("/");
  const key = decoded(rest.join("/"));
  current = page === "" ? overview()
    : page === "tickers" ? tickers()
    : page === "ticker" && key ? ticker(key, "ticker")
    : page === "sector" && key ? ticker(key, "sector")
    : page === "try" ? tryText()
    : page === "quality" ? quality()
    : missing();
  frame.select(page === "ticker" ? "#/tickers" : page === "sector" ? "#/" : `#/${page}`);
  frame.main.replaceChildren(current.node);
  document.title = `${current.title} · cashtag live`;
  window.scrollTo(0, 0);
  if (!first) {
    // Where a reader with a keyboard or a screen reader goes on after the view has changed.
    frame.main.focus({ preventScroll: true });
    announce(current.title, true);
  }
}

function missing(): View {
  return {
    title: "Not found", destroy: () => undefined,
    node: h("section", { class: "panel" }, h("h1", null, "There is no such page"), h("p", null, h("a", { href: "#/" }, "To the overview"))),
  };
}

window.addEventListener("hashchange", route);
route();
let newest: string | null = null;
store.on("alerts", () => {
  const alert = store.alerts[0];
  const id = alert ? alert.at + alert.rule + alert.key : null;
  if (alert && newest !== null && id !== newest) announce(`Alert: ${alert.text}`);
  newest = id ?? "";
});
store.start();

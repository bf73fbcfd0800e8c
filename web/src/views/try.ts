// A box to try a text: the model's probabilities for whatever one types. Nothing typed here is stored or counted.
import { api } from "../api.ts";
import { h, setText } from "../dom.ts";
import { finite, milliseconds, probability } from "../format.ts";
import { MARK, rows, tone } from "../parts/probabilities.ts";
import type { Classified } from "../types.ts";
import { Scope, type View } from "./view.ts";

const MAX_LENGTH = 2000;
const EXAMPLES = [
  "Helixon beats by a mile and raises the outlook, shares at a record $HLXN",
  "amazing uptime from $QRYC today, really excited for the renewal call",
  "$OKLN beat on profit, missed on sales",
  "Lost half of what was feared. I'll take it.",
];

export function tryText(): View {
  const scope = new Scope();
  const area = h("textarea", { id: "try-text", rows: 4, maxlength: MAX_LENGTH, "aria-describedby": "try-hint", placeholder: "Write or paste a post about a stock or the market" });
  const button = h("button", { type: "submit", class: "primary" }, "Classify");
  const status = h("p", { class: "sub", role: "status" });
  const answers = h("ol", { class: "plain answers", role: "list", "aria-label": "Answers, newest first" });
  const form = h("form", null,
    h("label", { for: "try-text" }, "Text"), area,
    h("div", { class: "row" }, button, h("p", { id: "try-hint", class: "sub" }, "Ctrl + Enter classifies. Nothing you type here is stored or counted."), status));
  let running = false;
  const run = async (): Promise<void> => {
    const text = area.value.trim();
    if (!text || running) {
      area.focus();
      return;
    }
    running = true;
    button.disabled = true;
    setText(status, "…");
    try {
      const { result, ms } = await api.classify(text, scope.abort.signal);
      answers.prepend(h("li", { class: "answer" }, answer(text, result, ms)));
      while (answers.childElementCount > 20) answers.lastElementChild?.remove();
      setText(status, `${result.label}, ${probability(result.probabilities?.[result.label] ?? result.confidence)}`);
    } catch (error) {
      setText(status, error instanceof Error ? error.message : String(error));
    } finally {
      running = false;
      button.disabled = false;
    }
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    void run();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      void run();
    }
  });
  const examples = h("ul", { class: "examples", role: "list", "aria-label": "Examples" }, ...EXAMPLES.map((text) => {
    const example = h("button", { type: "button", class: "secondary" }, text);
    example.addEventListener("click", () => {
      area.value = text;
      void run();
    });
    return h("li", null, example);
  }));
  const node = h("div", { class: "try" },
    h("section", { class: "panel" }, h("h1", null, "Try a text"), form, examples), answers);
  return { title: "Try a text", node, destroy: () => scope.end() };
}

function answer(text: string, result: Classified, ms: number): HTMLElement {
  const kind = tone(result.label);
  const symbols = (Array.isArray(result.tickers) ? result.tickers : []).map((t) => (typeof t === "string" ? t : t.symbol));
  return h("article", { class: "panel" },
    h("p", { class: "post-text" }, text),
    h("p", { class: `verdict big ${kind}` }, h("span", { "aria-hidden": "true" }, MARK[kind]), ` ${result.label}`),
    rows(result.probabilities ?? {}),
    h("p", { class: "post-meta" },
      finite(result.confidence) === null ? null : h("span", { title: "0: all labels equally likely, 1: certain" }, `confidence ${result.confidence.toFixed(2)}`),
      h("span", { class: "quiet" }, `answered in ${milliseconds(ms)}`),
      ...symbols.slice(0, 20).map((s) => h("a", { href: `#/ticker/${encodeURIComponent(s)}`, class: "symbol" }, s))));
}

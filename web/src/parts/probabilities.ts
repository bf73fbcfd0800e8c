// All label probabilities of one text as one bar, with the numbers beside it. The order is fixed, negative to the left,
// so bars of different posts can be compared by position; patterns and text carry what colour carries.
import { h, setStyle } from "../dom.ts";
import { finite, probability } from "../format.ts";

const ORDER = ["Negative", "Neutral", "Positive"];

/** Known labels in their order, others (a model may have any labels) after them. */
export function ordered(probabilities: Record<string, number> | null | undefined): [string, number][] {
  const entries = Object.entries(probabilities ?? {}).filter(([, p]) => finite(p) !== null);
  const rank = (label: string): number => {
    const at = ORDER.indexOf(label);
    return at < 0 ? ORDER.length : at;
  };
  return entries.sort((a, b) => rank(a[0]) - rank(b[0]));
}

/** The class that styles a label; labels that are not ours are neutral. */
export function tone(label: string): "positive" | "negative" | "neutral" {
  return label === "Positive" ? "positive" : label === "Negative" ? "negative" : "neutral";
}
export const MARK = { positive: "▲", negative: "▼", neutral: "■" } as const;

export function bar(probabilities: Record<string, number> | null | undefined): HTMLElement {
  const parts = ordered(probabilities);
  const label = parts.map(([name, p]) => `${name} ${probability(p)}`).join(", ") || "no probabilities";
  const node = h("div", { class: "probabilities", role: "img", "aria-label": label });
  for (const [name, p] of parts) {
    const segment = h("span", { class: `segment ${tone(name)}` });
    setStyle(segment, "flex-grow", String(Math.max(0, p)));
    node.append(segment);
  }
  return node;
}

/** One row per label, for where there is room. */
export function rows(probabilities: Record<string, number>): HTMLElement {
  const list = h("dl", { class: "probability-rows" });
  for (const [name, p] of ordered(probabilities).reverse()) {
    const fill = h("span", { class: `fill ${tone(name)}` });
    setStyle(fill, "width", `${(100 * p).toFixed(1)}%`);
    list.append(
      h("dt", null, h("span", { class: `mark ${tone(name)}`, "aria-hidden": "true" }, MARK[tone(name)]), ` ${name}`),
      h("dd", null, h("span", { class: "track", "aria-hidden": "true" }, fill), h("span", { class: "figure" }, probability(p))));
  }
  return list;
}

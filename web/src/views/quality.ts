// How good the model is, from the run that made it (`metrics.json`): before and after fine-tuning, with intervals, by
// class and by kind of text, and whether its probabilities can be believed.
import { api } from "../api.ts";
import { h, setAttr, setStyle, svg, type Child } from "../dom.ts";
import { count, finite, probability, signed } from "../format.ts";
import type { Interval, Metrics, Quality } from "../types.ts";
import { Scope, type View } from "./view.ts";

export function quality(): View {
  const scope = new Scope();
  const body = h("div", { class: "quality" }, h("p", { class: "empty" }, "Loading…"));
  api.quality(scope.abort.signal).then((q) => body.replaceChildren(...content(q)), (error: unknown) =>
    body.replaceChildren(h("p", { class: "empty" }, `The figures cannot be read: ${error instanceof Error ? error.message : String(error)}`)));
  return { title: "Model", node: h("div", null, h("section", { class: "panel" }, h("h1", null, "How good the model is"), body)), destroy: () => scope.end() };
}

function content(q: Quality): Node[] {
  const after = q.after ?? (q as unknown as { metrics?: Metrics }).metrics;
  const before = q.before;
  if (!after) {
    return [h("p", { class: "empty" }, "This server has no figures for the adapter in use. A run directory of ", h("code", null, "cashtag run"), " carries them in ", h("code", null, "metrics.json"), ".")];
  }
  const p = finite(q.comparison?.mcnemar?.p_value);
  const out: Node[] = [
    h("p", { class: "sub" }, `${count(after.examples)} texts that nothing was trained on or chosen by.`,
      q.comparison && before ? ` Fine-tuning changed accuracy by ${signed(100 * q.comparison.accuracy.value, 1)} points (${signed(100 * q.comparison.accuracy.low, 1)} to ${signed(100 * q.comparison.accuracy.high, 1)}${p === null ? "" : `, McNemar p ${p < 0.001 ? "< 0.001" : `= ${p.toFixed(3)}`}`}).` : ""),
    measures(before, after),
    h("div", { class: "columns even" }, reliability(after), confusion(after)),
    classes(after),
  ];
  const kinds = Object.entries(q.by_kind_after ?? {});
  if (kinds.length > 0) out.push(byKind(kinds, q.by_kind_before ?? {}));
  return out;
}

function whisker(v: Interval | undefined, high: number, name: string): HTMLElement {
  const node = h("span", { class: "whisker", role: "img" });
  if (!v || finite(v.value) === null) return node;
  const at = (x: number): string => `${(100 * Math.max(0, Math.min(1, x / high))).toFixed(2)}%`;
  const band = h("span", { class: "whisker-band" });
  setStyle(band, "left", at(v.low));
  setStyle(band, "width", `calc(${at(v.high)} - ${at(v.low)})`);
  const dot = h("span", { class: "whisker-dot" });
  setStyle(dot, "left", at(v.value));
  node.append(band, dot);
  setAttr(node, "aria-label", `${name} ${v.value.toFixed(3)}, 95 % interval ${v.low.toFixed(3)} to ${v.high.toFixed(3)}`);
  return node;
}

const points = (v: Interval | undefined): string => (v ? `${(100 * v.value).toFixed(1)} %` : "–");
const bounds = (v: Interval | undefined): string => (v ? `${(100 * v.low).toFixed(1)} to ${(100 * v.high).toFixed(1)}` : "");

function table(head: Child[], rows: Child[][], label: string): HTMLElement {
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, h("table", { class: "data" },
    h("thead", null, h("tr", null, ...head.map((c) => h("th", { scope: "col" }, c)))),
    h("tbody", null, ...rows.map((cells) => h("tr", null, ...cells.map((c, i) => (i === 0 ? h("th", { scope: "row" }, c) : h("td", null, c))))))));
}

function measures(before: Metrics | undefined, after: Metrics): HTMLElement {
  const rows: Child[][] = (["accuracy", "macro_f1", "weighted_f1"] as const).map((key, i) => {
    const name = ["Accuracy", "Macro F1", "Weighted F1"][i]!;
    return [name, points(after[key]), bounds(after[key]), whisker(after[key], 1, name), before ? points(before[key]) : "–"];
  });
  const l = (v: Interval | undefined): string => (v ? v.value.toFixed(3) : "–");
  rows.push(["Log-loss", l(after.log_loss), after.log_loss ? `${after.log_loss.low.toFixed(3)} to ${after.log_loss.high.toFixed(3)}` : "", whisker(after.log_loss, Math.max(1.2, after.log_loss?.high ?? 0), "Log-loss"), l(before?.log_loss)]);
  rows.push(["Calibration error", probability(after.expected_calibration_error), "", "", before ? probability(before.expected_calibration_error) : "–"]);
  rows.push(["Always the commonest label", probability(after.majority_baseline), "", "", ""]);
  return table(["Measure", "After", "95 % interval", "0 to 1", "Before"], rows, "Measures before and after fine-tuning");
}

function reliability(m: Metrics): HTMLElement {
  const filled = (m.reliability ?? []).filter((b) => b.count > 0);
  const most = Math.max(1, ...filled.map((b) => b.count));
  const x = (v: number): number => 24 + 150 * v;
  const y = (v: number): number => 160 - 150 * v;
  const chart = svg("svg", { class: "reliability", viewBox: "0 0 184 184", role: "img",
    "aria-label": `Reliability: ${filled.map((b) => `of answers given with ${probability(b.confidence)}, ${probability(b.accuracy)} were right (${b.count})`).join("; ")}` },
    svg("line", { class: "ideal", x1: x(0), y1: y(0), x2: x(1), y2: y(1) }),
    ...[0, 0.5, 1].flatMap((v) => [
      svg("line", { class: "grid-line", x1: x(0), x2: x(1), y1: y(v), y2: y(v) }),
      svg("text", { x: 20, y: y(v) + 3, class: "tick end" }, String(100 * v)), svg("text", { x: x(v), y: 174, class: "tick middle" }, String(100 * v))]),
    ...filled.map((b) => svg("circle", { class: "bin", cx: x(b.confidence), cy: y(b.accuracy), r: 2.5 + 5 * Math.sqrt(b.count / most) })));
  return h("figure", null, chart, h("figcaption", null, "How sure (%) against how often right (%). On the line, a probability means what it says; larger dots are more texts."));
}

function confusion(m: Metrics): HTMLElement {
  const labels = (m.per_class ?? []).map((c) => c.label);
  const rows = (m.confusion ?? []).map((row, i) => {
    const total = Math.max(1, row.reduce((a, b) => a + b, 0));
    return [labels[i] ?? String(i), ...row.map((n, j) => {
      const cell = h("span", { class: i === j ? "heat right" : "heat" }, count(n));
      setStyle(cell, "--share", (n / total).toFixed(3));
      return cell;
    })];
  });
  return h("figure", null, table([h("span", { class: "quiet" }, "is ↓ · said →"), ...labels], rows, "Confusion matrix"), h("figcaption", null, "Rows are what a text is, columns what the model said."));
}

function classes(m: Metrics): HTMLElement {
  return table(["Label", "Precision", "Recall", "F1", "Texts"], (m.per_class ?? []).map((c) => [c.label, probability(c.precision), probability(c.recall), c.f1.toFixed(2), count(c.support)]), "By label");
}

function byKind(after: [string, Metrics][], before: Record<string, Metrics>): HTMLElement {
  return table(["Kind of text", "Accuracy", "95 % interval", "0 to 1", "Before", "Texts"],
    after.map(([kind, m]) => [kind, points(m.accuracy), bounds(m.accuracy), whisker(m.accuracy, 1, kind), before[kind] ? points(before[kind]!.accuracy) : "–", count(m.examples)]), "By kind of text");
}

// The page's one picture of a score: a line from −1 to +1 with zero marked, a band for the 95 % interval and a dot for
// the score. The dot is filled only when the interval lies on one side of zero, so a glance tells "direction" from
// "could be either". Thin data has no dot at all.
import { setAttr, setStyle, setText, svg, h } from "../dom.ts";
import { count, finite, scoreSentence, signed } from "../format.ts";
import type { Signal } from "../types.ts";

export type Scored = Pick<Signal, "sentiment_score" | "ci_low" | "ci_high" | "mentions">;

/** `up`, `down`, `open` (the interval contains zero) or `thin`. */
export function verdict(s: Scored): "up" | "down" | "open" | "thin" {
  const score = finite(s.sentiment_score);
  if (score === null) return "thin";
  const low = finite(s.ci_low) ?? score;
  const high = finite(s.ci_high) ?? score;
  return low > 0 ? "up" : high < 0 ? "down" : "open";
}

export interface ScaleView { node: SVGSVGElement; update: (s: Scored) => void }

const clamp = (v: number): number => Math.max(-1, Math.min(1, v));
const x = (v: number): number => 50 + 47 * clamp(v);

export function scale(size: "small" | "large" = "small"): ScaleView {
  const height = size === "large" ? 12 : 10;
  const middle = height / 2;
  const band = svg("rect", { class: "scale-band", y: middle - height / 4, height: height / 2, rx: 1 });
  const dot = svg("line", { class: "scale-dot" });
  const core = svg("line", { class: "scale-core" });
  const node = svg("svg", { class: `scale scale-${size}`, viewBox: `0 0 100 ${height}`, preserveAspectRatio: "none", role: "img" },
    svg("line", { class: "scale-track", x1: 3, x2: 97, y1: middle, y2: middle }),
    svg("line", { class: "scale-zero", x1: 50, x2: 50, y1: 1, y2: height - 1 }),
    band, dot, core);
  for (const line of [dot, core]) {
    setAttr(line, "y1", String(middle));
    setAttr(line, "y2", String(middle));
  }
  const update = (s: Scored): void => {
    const kind = verdict(s);
    setAttr(node, "data-verdict", kind);
    setAttr(node, "aria-label", scoreSentence(s));
    if (kind === "thin") return;
    const score = s.sentiment_score as number;
    const low = finite(s.ci_low) ?? score;
    const high = finite(s.ci_high) ?? score;
    setAttr(band, "x", x(low).toFixed(2));
    setAttr(band, "width", Math.max(0.5, x(high) - x(low)).toFixed(2));
    // A line of no length with round caps is a dot that keeps its shape while the drawing is stretched.
    for (const line of [dot, core]) {
      setAttr(line, "x1", x(score).toFixed(2));
      setAttr(line, "x2", x(score).toFixed(2));
    }
  };
  return { node, update };
}

export interface ScoreView { node: HTMLElement; update: (s: Scored) => void }

/** The number itself, with its sign, its interval and n; or that there is too little to say. */
export function score(options: { interval?: boolean; n?: boolean } = {}): ScoreView {
  const value = h("span", { class: "score-value" });
  const interval = h("span", { class: "score-interval" });
  const node = h("span", { class: "score" }, value, options.interval ? interval : null);
  const update = (s: Scored): void => {
    const kind = verdict(s);
    setAttr(node, "data-verdict", kind);
    setText(value, kind === "thin" ? "thin data" : signed(s.sentiment_score));
    const bounds = kind === "thin" || finite(s.ci_low) === null ? "" : `${signed(s.ci_low)} to ${signed(s.ci_high)}`;
    setText(interval, [bounds, options.n ? `n ${count(s.mentions)}` : ""].filter(Boolean).join(" · "));
  };
  return { node, update };
}

export interface SparkView { node: SVGSVGElement; update: (values: readonly (number | null)[] | null | undefined) => void }

/** The last scores as a line about zero; gaps are windows with thin data. */
export function spark(): SparkView {
  const line = svg("path", { class: "spark-line" });
  const last = svg("line", { class: "spark-last", x1: 0, x2: 0, y1: 0, y2: 0 });
  const node = svg("svg", { class: "spark", viewBox: "0 0 100 28", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("line", { class: "spark-zero", x1: 0, x2: 100, y1: 14, y2: 14 }), line, last);
  const update = (values: readonly (number | null)[] | null | undefined): void => {
    const v = (values ?? []).slice(-24);
    let path = "";
    let open = false;
    let end: [number, number] | null = null;
    v.forEach((raw, i) => {
      const value = finite(raw);
      if (value === null) {
        open = false;
        return;
      }
      const px = v.length < 2 ? 98 : 2 + (96 * i) / (v.length - 1);
      const py = 14 - 12 * clamp(value);
      const alone = !open && finite(v[i + 1]) === null;
      path += `${open ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}${alone ? "h.01" : ""}`;
      open = true;
      end = i === v.length - 1 ? [px, py] : null;
    });
    setAttr(line, "d", path || null);
    setStyle(last, "display", end ? "" : "none");
    if (end) {
      const [px, py] = end as [number, number];
      for (const [name, at] of [["x1", px], ["x2", px], ["y1", py], ["y2", py]] as const) setAttr(last, name, at.toFixed(1));
    }
  };
  return { node, update };
}

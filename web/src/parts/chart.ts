// Two charts on uPlot: the score with its interval band, and mentions by label as stacked bars. Colours come from the
// stylesheet, so themes and print follow; a chart redraws at most twice a second.
import uPlot from "uplot";
import { h, setAttr } from "../dom.ts";
import { finite, hourMinute, posts, signed, count } from "../format.ts";
import { throttled } from "../frames.ts";
import type { Signal } from "../types.ts";

function colour(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim() || "#888";
}

const AXIS_FONT = '11px "Inter", system-ui, "Segoe UI", sans-serif';
/** Half of the widest label of the time axis: the last one may stand at the very end. */
const RIGHT = 22;
let charts = 0;

const axisTime = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const axisDay = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
function timeLabels(_: uPlot, splits: number[]): string[] {
  const span = (splits.at(-1) ?? 0) - (splits[0] ?? 0);
  return splits.map((s) => (span > 172_800 ? axisDay : axisTime).format(s * 1000));
}

export class HistoryChart {
  readonly node: HTMLElement;
  private readonly box = h("div", { class: "chart-box", role: "img" });
  private readonly legend = h("p", { class: "chart-legend", "aria-hidden": "true" });
  private score: uPlot | null = null;
  private volume: uPlot | null = null;
  private signals: Signal[] = [];
  private readonly redraw: () => void;
  private readonly resize: ResizeObserver;
  private readonly theme: MutationObserver;
  private readonly scheme = matchMedia("(prefers-color-scheme: dark)");
  private readonly rebuild = (): void => {
    this.dispose();
    this.redraw();
  };

  constructor(private readonly options: { score: number; volume: number; label: string }) {
    this.node = h("div", { class: "chart" }, this.box, this.legend);
    this.redraw = throttled(`chart-${charts++}`, 500, () => this.draw());
    this.resize = new ResizeObserver(() => this.redraw());
    this.resize.observe(this.box);
    this.theme = new MutationObserver(this.rebuild);
    this.theme.observe(document.documentElement, { attributeFilter: ["data-theme"] });
    this.scheme.addEventListener("change", this.rebuild);
  }

  /** Oldest first. */
  set(signals: readonly Signal[]): void {
    this.signals = signals.slice(-2000);
    this.redraw();
  }

  /** A window that is new, or known and corrected. */
  put(s: Signal): void {
    let at = this.signals.length;
    while (at > 0 && this.signals[at - 1]!.start > s.start) at -= 1;
    const known = this.signals[at - 1];
    if (known && known.start === s.start) {
      if ((s.revision ?? 0) < (known.revision ?? 0)) return;
      this.signals[at - 1] = s;
    } else this.signals.splice(at, 0, s);
    if (this.signals.length > 2000) this.signals.shift();
    this.redraw();
  }
  all(): readonly Signal[] {
    return this.signals;
  }

  private data(): { score: uPlot.AlignedData; volume: uPlot.AlignedData } {
    const t: number[] = [];
    const columns: (number | null)[][] = [[], [], []];
    const bars: number[][] = [[], [], []];
    for (const s of this.signals) {
      t.push(Date.parse(s.start) / 1000);
      columns[0]!.push(finite(s.ci_high));
      columns[1]!.push(finite(s.sentiment_score));
      columns[2]!.push(finite(s.ci_low));
      // Stacked by hand: each series is drawn over the one behind it.
      const negative = finite(s.negative_count) ?? 0;
      const neutral = finite(s.neutral_count) ?? 0;
      const positive = finite(s.positive_count) ?? 0;
      bars[0]!.push(negative + neutral + positive);
      bars[1]!.push(negative + neutral);
      bars[2]!.push(negative);
    }
    return { score: [t, ...columns] as uPlot.AlignedData, volume: [t, ...bars] as uPlot.AlignedData };
  }

  private draw(): void {
    const width = Math.floor(this.box.clientWidth);
    if (width < 40) return;
    const data = this.data();
    setAttr(this.box, "aria-label", this.sentence());
    if (!this.score || !this.volume) this.build(width, data);
    else {
      if (this.score.width !== width) {
        this.score.setSize({ width, height: this.options.score });
        this.volume.setSize({ width, height: this.options.volume });
      }
      this.score.setData(data.score);
      this.volume.setData(data.volume);
    }
    this.tell(null);
  }

  private build(width: number, data: { score: uPlot.AlignedData; volume: uPlot.AlignedData }): void {
    const ink = colour("--ink-3");
    const grid = { stroke: colour("--line"), width: 1 };
    const positive = colour("--positive");
    const negative = colour("--negative");
    const sync = { key: `sync-${charts++}`, setSeries: false };
    const xScale: uPlot.Scale = { time: true, range: (_, min, max) => this.span(min, max) };
    const x: uPlot.Axis = { stroke: ink, font: AXIS_FONT, grid: { show: false }, ticks: { show: false }, values: timeLabels, size: 24, space: 70 };
    const cursor: uPlot.Cursor = { sync, y: false, points: { show: false }, drag: { x: false, y: false } };
    const line = colour("--ink");
    this.score = new uPlot({
      width, height: this.options.score, legend: { show: false }, cursor, padding: [8, RIGHT, 8, 0],
      scales: { x: xScale, y: { range: () => [-this.limit(), this.limit()] } },
      axes: [{ ...x, show: this.options.volume === 0 },
        { stroke: ink, font: AXIS_FONT, size: 40, grid, ticks: { show: false }, splits: () => [-1, -0.5, 0, 0.5, 1].map((share) => share * this.limit()), values: (_, v) => v.map((n) => signed(n, this.limit() < 1 ? 2 : 1)) }],
      bands: [{ series: [1, 3], fill: colour("--band") }],
      series: [{},
        { stroke: "transparent", points: { show: false } },
        { width: 2, points: { show: (u, i) => alone(u.data[i]), size: 5, fill: line }, stroke: (u) => signStroke(u, positive, negative, line) },
        { stroke: "transparent", points: { show: false } }],
      hooks: { setCursor: [(u) => this.tell(u.cursor.idx ?? null)] },
    }, data.score, this.box);
    const bars = uPlot.paths.bars!({ size: [0.8, 22], gap: 1 });
    const bar = (fill: string): uPlot.Series => ({ fill, stroke: fill, width: 0, paths: bars, points: { show: false } });
    this.volume = new uPlot({
      width, height: this.options.volume, legend: { show: false }, cursor, padding: [10, RIGHT, 0, 0],
      scales: { x: xScale, y: { range: (_, __, max) => [0, Math.max(4, max * 1.1)] } },
      axes: [x, { stroke: ink, font: AXIS_FONT, size: 40, grid: { show: false }, ticks: { show: false }, space: 16, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000] }],
      series: [{}, bar(positive), bar(colour("--neutral")), bar(negative)],
      hooks: { setCursor: [(u) => this.tell(u.cursor.idx ?? null)] },
    }, data.volume, this.box);
  }

  /** Half a window of room at both ends, so that the first and last bar are whole. */
  private span(min: number, max: number): [number, number] {
    const first = this.signals[0];
    const half = first ? (Date.parse(first.end) - Date.parse(first.start)) / 2000 : 30;
    return [min - half, Math.max(max, min) + half];
  }

  /** Half of the scale where all of it would be empty; never anything in between, so that pictures can be compared. */
  private limit(): number {
    const far = this.signals.some((s) => Math.abs(finite(s.ci_low) ?? 0) > 0.5 || Math.abs(finite(s.ci_high) ?? 0) > 0.5);
    return far ? 1 : 0.5;
  }

  /** The line under the charts: the window under the pointer, else the newest. */
  private tell(index: number | null): void {
    const s = this.signals[index ?? this.signals.length - 1];
    if (!s) {
      this.legend.textContent = "No windows yet.";
      return;
    }
    const value = finite(s.sentiment_score) === null ? "thin data" : `${signed(s.sentiment_score)} (${signed(s.ci_low)} to ${signed(s.ci_high)})`;
    const text = `${hourMinute(s.start)}–${hourMinute(s.end)} · ${value} · ${posts(s.mentions)}: ${count(s.positive_count)} ▲ ${count(s.neutral_count)} ■ ${count(s.negative_count)} ▼`;
    if (this.legend.textContent !== text) this.legend.textContent = text;
  }

  private sentence(): string {
    const last = this.signals.at(-1);
    const scores = this.signals.map((s) => finite(s.sentiment_score)).filter((v): v is number => v !== null);
    if (!last || scores.length === 0) return `${this.options.label}: no scores yet`;
    return `${this.options.label}: ${scores.length} windows with a score from ${hourMinute(this.signals[0]!.start)} to ${hourMinute(last.end)}, `
      + `lowest ${signed(Math.min(...scores))}, highest ${signed(Math.max(...scores))}, latest ${signed(scores.at(-1))}`;
  }

  private dispose(): void {
    this.score?.destroy();
    this.volume?.destroy();
    this.score = this.volume = null;
  }
  destroy(): void {
    this.dispose();
    this.resize.disconnect();
    this.theme.disconnect();
    this.scheme.removeEventListener("change", this.rebuild);
  }
}

/** Points are drawn only where a score has no neighbour: otherwise it would not be seen. */
function alone(values: ArrayLike<number | null | undefined> | undefined): boolean {
  return (values?.length ?? 0) < 3;
}

/** One line, coloured by the side of zero it is on: a vertical gradient with a hard edge at zero. */
function signStroke(u: uPlot, positive: string, negative: string, fallback: string): CanvasGradient | string {
  const top = u.valToPos(1, "y", true);
  const bottom = u.valToPos(-1, "y", true);
  // Zero is in the middle whatever half of the scale is shown.
  if (!Number.isFinite(top) || !Number.isFinite(bottom)) return fallback;
  const gradient = u.ctx.createLinearGradient(0, top, 0, bottom);
  gradient.addColorStop(0, positive);
  gradient.addColorStop(0.48, positive);
  gradient.addColorStop(0.5, fallback);
  gradient.addColorStop(0.52, negative);
  gradient.addColorStop(1, negative);
  return gradient;
}

// Numbers, signs and times as the page writes them. A value that is missing is an en dash, never 0.

export type Direction = "up" | "down" | "none";

const MISSING = "–";
const MINUS = "−";

/** Finite or null: what comes over the wire may be absent, null or a string. */
export function finite(value: unknown): number | null {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}

/** A score with its sign always written: colour is never the only carrier of direction. */
export function signed(value: number | null | undefined, digits = 2): string {
  const v = finite(value);
  if (v === null) return MISSING;
  const text = Math.abs(v).toFixed(digits);
  if (Number(text) === 0) return text;
  return (v > 0 ? "+" : MINUS) + text;
}

export function percent(value: number | null | undefined, digits = 0): string {
  const v = finite(value);
  return v === null ? MISSING : `${v.toFixed(digits)} %`;
}

/** A probability in percent. */
export function probability(value: number | null | undefined): string {
  const v = finite(value);
  return v === null ? MISSING : `${Math.round(100 * v)} %`;
}

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export function count(value: number | null | undefined): string {
  const v = finite(value);
  return v === null ? MISSING : grouped.format(v);
}

/** "1 post", "12 posts". */
export function posts(value: number | null | undefined): string {
  return `${count(value)} ${value === 1 ? "post" : "posts"}`;
}

export function times(value: number | null | undefined): string {
  const v = finite(value);
  return v === null ? MISSING : `${v < 10 ? v.toFixed(1) : v.toFixed(0)}×`;
}

export function rate(value: number | null | undefined): string {
  const v = finite(value);
  return v === null ? MISSING : `${v < 10 ? v.toFixed(1) : v.toFixed(0)}/s`;
}

export function milliseconds(value: number | null | undefined): string {
  const v = finite(value);
  if (v === null) return MISSING;
  const a = Math.abs(v);
  if (a < 1000) return `${Math.round(v)} ms`;
  if (a < 60_000) return `${(v / 1000).toFixed(1)} s`;
  if (a < 3_600_000) return `${Math.round(v / 60_000)} min`;
  if (a < 172_800_000) return `${Math.round(v / 3_600_000)} h`;
  return `${Math.round(v / 86_400_000)} days`;
}

export function age(ms: number): string {
  if (ms < 1500) return "just now";
  return `${milliseconds(Math.floor(ms / 1000) * 1000).replace(".0 s", " s")} ago`;
}

export function direction(value: number | null | undefined, threshold = 0): Direction {
  const v = finite(value);
  if (v === null || Math.abs(v) <= threshold) return "none";
  return v > 0 ? "up" : "down";
}

/** The arrow beside a trend; screen readers get the word. */
export function arrow(trend: string | null | undefined): string {
  return trend === "rising" ? "↗" : trend === "falling" ? "↘" : trend === "flat" ? "→" : "";
}

const clockFormat = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const minuteFormat = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const dayFormat = new Intl.DateTimeFormat("en-GB", { weekday: "short", day: "numeric", month: "short" });

export function time(iso: string | null | undefined): number | null {
  if (!iso) return null;
  const ms = Date.parse(iso);
  return Number.isNaN(ms) ? null : ms;
}
export function clock(iso: string | null | undefined): string {
  const ms = time(iso);
  return ms === null ? MISSING : clockFormat.format(ms);
}
export function hourMinute(iso: string | null | undefined): string {
  const ms = time(iso);
  return ms === null ? MISSING : minuteFormat.format(ms);
}
export function day(iso: string | null | undefined): string {
  const ms = time(iso);
  return ms === null ? "" : dayFormat.format(ms);
}

export const WINDOW_WORDS: Record<string, string> = { "1m": "1 minute", "5m": "5 minutes", "1h": "1 hour", "1d": "1 day" };

/** Sentence for a screen reader: what a scale shows. */
export function scoreSentence(s: {
  sentiment_score: number | null; ci_low: number | null; ci_high: number | null; mentions: number;
}): string {
  if (finite(s.sentiment_score) === null) return `no score: only ${posts(s.mentions)}`;
  const interval = finite(s.ci_low) === null ? "" : `, 95 % interval ${signed(s.ci_low)} to ${signed(s.ci_high)}`;
  return `score ${signed(s.sentiment_score)}${interval}, from ${posts(s.mentions)}`;
}

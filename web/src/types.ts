// The shapes of the live API (docs/live-api.md), as far as the page reads them. Every field may be missing or null in
// practice (older servers, partial data), so readers go through the helpers in format.ts and never assume.

export type WindowName = "1m" | "5m" | "1h" | "1d";
export const WINDOWS: readonly WindowName[] = ["1m", "5m", "1h", "1d"];
export type Scope = "ticker" | "sector" | "market";

export interface Signal {
  key: string;
  scope: Scope;
  name: string | null;
  window: WindowName;
  start: string;
  end: string;
  final: boolean;
  revision: number;
  mentions: number;
  unique_authors: number;
  positive_count: number;
  neutral_count: number;
  negative_count: number;
  /** null: too few posts to say anything. */
  sentiment_score: number | null;
  ci_low: number | null;
  ci_high: number | null;
  bullish_pct: number | null;
  bearish_pct: number | null;
  buzz_score: number | null;
  attention: number | null;
  attention_z: number | null;
  momentum: number | null;
  trend: "rising" | "falling" | "flat" | null;
  copies: number;
  damped: number;
  top_posts: string[];
  sparkline: (number | null)[];
}

export interface Post {
  seq: number;
  id: string;
  source: string;
  author: string;
  event_time: string;
  received_at: string;
  scored_at: string;
  available_at: string;
  text: string | null;
  url: string | null;
  tickers: { symbol: string; start: number; end: number }[];
  sectors: string[];
  probabilities: Record<string, number>;
  label: string;
  sentiment_score: number;
  confidence: number;
  weight: number;
  is_copy_of: string | null;
  damped: boolean;
  too_late?: boolean;
  model: string;
  adapter: string | null;
}

export interface Source {
  name: string;
  kind: string;
  state: "connected" | "reconnecting" | "stopped" | "done";
  since: string;
  posts_total: number;
  posts_per_s: number;
  last_post_at: string | null;
  lag_ms: number | null;
  reconnects: number;
  detail: string | null;
}

/** Whether the server can write what it counts; else what is shown stands still, and posts wait in the log. */
export interface StoreHealth {
  kind: string;
  state: "connected" | "unavailable";
  since: string | null;
  detail: string;
}

export interface Model {
  name: string;
  adapter: string | null;
  labels: string[];
  temperature: number | null;
}

export interface Alert {
  at: string;
  rule: string;
  key: string;
  window: WindowName;
  values: Record<string, unknown>;
  text: string;
}

export interface DeadLetter {
  at: string;
  source: string;
  reason: string;
  raw: string;
}

export interface Overview {
  window: WindowName;
  as_of: string;
  market: Signal | null;
  movers: Signal[];
  sectors: Signal[];
  sources: Source[];
  store?: StoreHealth;
  lag: {
    event_to_received_ms_p50: number | null;
    received_to_visible_ms_p50: number | null;
    received_to_visible_ms_p99: number | null;
  };
  model: Model;
  dead_letters: number;
}

export interface Classified {
  label: string;
  probabilities: Record<string, number>;
  confidence: number;
  tickers: (string | { symbol: string })[];
}

/** Keys of `metrics.json`, which `cashtag run` writes beside the adapter. */
export interface Interval { value: number; low: number; high: number }
export interface ClassMetrics { label: string; precision: number; recall: number; f1: number; support: number }
export interface Bin { lower: number; upper: number; count: number; confidence: number; accuracy: number }
export interface Metrics {
  examples: number;
  accuracy: Interval;
  macro_f1: Interval;
  weighted_f1: Interval;
  per_class: ClassMetrics[];
  confusion: number[][];
  log_loss: Interval;
  expected_calibration_error: number;
  reliability: Bin[];
  brier: number;
  mean_confidence: number;
  majority_baseline: number;
}
export interface Quality {
  before?: Metrics;
  after?: Metrics;
  comparison?: { examples: number; accuracy: Interval; mcnemar: { p_value: number } };
  by_kind_before?: Record<string, Metrics>;
  by_kind_after?: Record<string, Metrics>;
  temperature?: number;
}

// The overview: the market now and through the day, sectors, what moves, what is being said, and whether the machine
// behind it is well.
import { api } from "../api.ts";
import { h, setAttr, setChildren, setText } from "../dom.ts";
import { arrow, clock, count, finite, hourMinute, milliseconds, percent, posts, rate, signed, times, WINDOW_WORDS } from "../format.ts";
import { onFrame, throttled } from "../frames.ts";
import { HistoryChart } from "../parts/chart.ts";
import { Feed } from "../parts/feed.ts";
import { scale, score, spark } from "../parts/scale.ts";
import { store } from "../store.ts";
import type { Signal, Source } from "../types.ts";
import { Scope, type View } from "./view.ts";

const MOVERS = 12;

export function overview(): View {
  const scope = new Scope();
  const node = h("div", { class: "overview" },
    h("h1", { class: "sr-only" }, "Overview"),
    market(scope), sectors(scope),
    h("div", { class: "columns" }, movers(scope), live(scope)),
    h("div", { class: "columns even" }, alerts(scope), health(scope)));
  return { title: "Overview", node, destroy: () => scope.end() };
}

/** Subscribes a drawing job: now, and at most every `ms` when a topic changes. */
export function draws(scope: Scope, topics: Parameters<typeof store.on>[0][], key: string, ms: number, job: () => void): void {
  const later = throttled(key, ms, job);
  for (const topic of topics) scope.add(store.on(topic, later));
  onFrame(key, job);
}

export function figure(label: string, title?: string): { node: HTMLElement; set: (value: string, note?: string) => void } {
  const value = h("dd", null, "–");
  const note = h("dd", { class: "note" });
  return {
    node: h("div", { class: "figure", title }, h("dt", null, label), value, note),
    set(text, small = "") {
      setText(value, text);
      setText(note, small);
    },
  };
}

function market(scope: Scope): HTMLElement {
  const heading = h("h2", { id: "market-title" }, "Market");
  const sub = h("p", { class: "sub" });
  const number = score({ interval: true });
  const line = scale("large");
  const trend = h("p", { class: "trend" });
  const mentions = figure("Posts", "Posts in the window, copies included");
  const authors = figure("Authors");
  const bulls = figure("Bullish", "Share of posts that are positive");
  const bears = figure("Bearish", "Share of posts that are negative");
  const chart = new HistoryChart({ score: 214, volume: 76, label: "Market score" });
  scope.add(() => chart.destroy());
  draws(scope, ["market", "window", "snapshot"], "market", 250, () => {
    const s = store.market;
    setText(sub, `last ${WINDOW_WORDS[store.window]}${s ? `, ${hourMinute(s.start)} to ${hourMinute(s.end)}${s.final ? "" : ", still filling"}` : ""}`);
    const empty = { sentiment_score: null, ci_low: null, ci_high: null, mentions: 0 };
    number.update(s ?? empty);
    line.update(s ?? empty);
    setText(trend, s && s.trend ? `${arrow(s.trend)} ${s.trend}${finite(s.momentum) === null ? "" : `, ${signed(s.momentum)} against the windows before`}` : "");
    mentions.set(count(s?.mentions), s && s.copies ? `${count(s.copies)} copies` : "");
    authors.set(count(s?.unique_authors));
    bulls.set(percent(s?.bullish_pct));
    bears.set(percent(s?.bearish_pct));
  });
  const load = (): void => {
    api.history("market", "market", store.window, 288, scope.abort.signal).then((all) => chart.set(all), () => undefined);
  };
  load();
  scope.add(store.on("snapshot", load), store.onSignal((s) => s.scope === "market" && s.window === store.window && chart.put(s)));
  return h("section", { class: "panel market", "aria-labelledby": "market-title" },
    h("div", { class: "market-now" },
      h("div", { class: "title" }, heading, sub), h("div", { class: "hero" }, number.node), h("div", { class: "gauge" }, line.node, ends()), trend,
      h("dl", { class: "figures" }, mentions.node, authors.node, bulls.node, bears.node)),
    chart.node);
}

export function ends(): HTMLElement {
  return h("div", { class: "ends", "aria-hidden": "true" }, h("span", null, "−1 bearish"), h("span", null, "0"), h("span", null, "bullish +1"));
}

/** `health_care` as people write it. */
export const words = (key: string): string => key.replaceAll("_", " ");

function sectors(scope: Scope): HTMLElement {
  const grid = h("ul", { class: "tiles", role: "list" });
  const tiles = new Map<string, { node: HTMLElement; update: (s: Signal) => void }>();
  const tile = (s: Signal): { node: HTMLElement; update: (s: Signal) => void } => {
    const number = score();
    const line = scale();
    const small = spark();
    const note = h("span", { class: "tile-note" });
    const trend = h("span", { class: "tile-trend" });
    const node = h("li", null, h("a", { class: "tile", href: `#/sector/${encodeURIComponent(s.key)}` },
      h("span", { class: "tile-name" }, words(s.name ?? s.key)), small.node,
      h("span", { class: "tile-score" }, number.node, trend), line.node, note));
    return {
      node,
      update(next) {
        number.update(next);
        line.update(next);
        small.update(next.sparkline);
        setText(trend, arrow(next.trend));
        setAttr(trend, "title", next.trend);
        const current = store.isCurrent(next);
        setAttr(node, "data-old", current ? null : "");
        setText(note, !current ? `quiet since ${hourMinute(next.end)}` : `${posts(next.mentions)}${finite(next.attention) === null ? "" : ` · attention ${times(next.attention)}`}`);
      },
    };
  };
  draws(scope, ["sectors", "window", "snapshot"], "sectors", 500, () => {
    // Alphabetical: a tile stays where the eye knows it.
    const all = [...store.sectors.values()].sort((a, b) => (a.name ?? a.key).localeCompare(b.name ?? b.key));
    for (const key of [...tiles.keys()]) if (!store.sectors.has(key)) tiles.delete(key);
    setChildren(grid, all.map((s) => {
      let view = tiles.get(s.key);
      if (!view) tiles.set(s.key, (view = tile(s)));
      view.update(s);
      return view.node;
    }));
  });
  return h("section", { "aria-labelledby": "sectors-title", class: "sectors" }, h("h2", { id: "sectors-title" }, "Sectors"), grid);
}

/** The order the server uses, change of the score times how many speak of it; the rest by how many speak of it. */
function weight(s: Signal): number {
  return Math.abs(finite(s.momentum) ?? 0) * (finite(s.mentions) ?? 0);
}

function movers(scope: Scope): HTMLElement {
  const body = h("tbody");
  const rows = new Map<string, { node: HTMLElement; update: (s: Signal) => void }>();
  let order: string[] = [];
  const row = (s: Signal): { node: HTMLElement; update: (s: Signal) => void } => {
    const number = score();
    const line = scale();
    const small = spark();
    const momentum = h("td", { class: "numeric hide-s" });
    const attention = h("td", { class: "numeric hide-s" });
    const mentions = h("td", { class: "numeric" });
    const node = h("tr", null,
      h("th", { scope: "row" }, h("a", { href: `#/ticker/${encodeURIComponent(s.key)}` }, h("span", { class: "symbol" }, s.key), h("span", { class: "company" }, s.name ?? ""))),
      h("td", { class: "numeric" }, number.node), h("td", { class: "cell-scale" }, line.node), momentum, attention, mentions, h("td", { class: "cell-spark hide-s" }, small.node));
    return {
      node,
      update(next) {
        number.update(next);
        line.update(next);
        small.update(next.sparkline);
        setText(momentum, finite(next.momentum) === null ? "–" : `${arrow(next.trend)} ${signed(next.momentum)}`);
        setText(attention, times(next.attention));
        setText(mentions, count(next.mentions));
      },
    };
  };
  const table = h("table", { class: "data movers" },
    h("caption", { class: "sr-only" }, "Tickers whose score changed most, weighted by the number of posts"),
    h("thead", null, h("tr", null, ...[["Ticker", ""], ["Score", "numeric"], ["95 % interval", "cell-scale"], ["Change", "numeric hide-s"], ["Attention", "numeric hide-s"], ["Posts", "numeric"], ["Last windows", "cell-spark hide-s"]]
      .map(([name, c]) => h("th", { scope: "col", class: c || null }, name!)))), body);
  const update = (): void => {
    setChildren(body, order.flatMap((key) => {
      const s = store.tickers.get(key);
      if (!s) return [];
      let view = rows.get(key);
      if (!view) rows.set(key, (view = row(s)));
      view.update(s);
      return [view.node];
    }));
  };
  const sort = (): void => {
    // Nothing moves under a pointer or a focus.
    if (order.length > 0 && (body.matches(":hover") || body.contains(document.activeElement))) return;
    order = [...store.tickers.values()].filter((s) => (finite(s.mentions) ?? 0) > 0 && store.isCurrent(s))
      .sort((a, b) => weight(b) - weight(a) || b.mentions - a.mentions || a.key.localeCompare(b.key)).slice(0, MOVERS).map((s) => s.key);
    for (const key of [...rows.keys()]) if (!order.includes(key)) rows.delete(key);
  };
  draws(scope, ["tickers"], "movers", 500, update);
  draws(scope, ["window", "snapshot"], "movers-new", 0, () => {
    order = [];
    sort();
    update();
  });
  const timer = window.setInterval(() => !document.hidden && onFrame("movers-sort", () => (sort(), update())), 3000);
  scope.add(() => window.clearInterval(timer));
  return h("section", { class: "panel", "aria-labelledby": "movers-title" },
    h("div", { class: "title" }, h("h2", { id: "movers-title" }, "Movers"), h("p", { class: "sub" }, h("a", { href: "#/tickers" }, "all tickers"))), table);
}

function live(scope: Scope): HTMLElement {
  const feed = new Feed("Newest posts");
  const pace = h("p", { class: "sub" });
  let before = store.postsSeen;
  const timer = window.setInterval(() => {
    const now = store.postsSeen;
    setText(pace, rate((now - before) / 2));
    before = now;
  }, 2000);
  feed.reset(store.posts);
  scope.add(() => window.clearInterval(timer), () => feed.destroy(), store.on("snapshot", () => feed.reset(store.posts)), store.onPost((p) => feed.add(p)));
  return h("section", { class: "panel live", "aria-labelledby": "posts-title" },
    h("div", { class: "title" }, h("h2", { id: "posts-title" }, "Posts"), pace), feed.node);
}

function alerts(scope: Scope): HTMLElement {
  const list = h("ol", { class: "plain", role: "list" });
  const empty = h("p", { class: "empty" }, "No alerts so far.");
  draws(scope, ["alerts", "snapshot"], "alerts", 500, () => {
    setChildren(list, store.alerts.slice(0, 8).map((a) => h("li", { class: "alert" },
      h("time", { datetime: a.at }, hourMinute(a.at)), h("a", { href: `#/ticker/${encodeURIComponent(a.key)}`, class: "symbol" }, a.key), h("span", null, a.text))));
    setAttr(empty, "hidden", store.alerts.length ? "" : null);
  });
  return h("section", { class: "panel", "aria-labelledby": "alerts-title" }, h("h2", { id: "alerts-title" }, "Alerts"), list, empty);
}

const STATE_SIGN: Record<Source["state"], string> = { connected: "●", reconnecting: "◌", stopped: "✕", done: "✓" };

function health(scope: Scope): HTMLElement {
  const list = h("ul", { class: "plain sources", role: "list" });
  const received = figure("Post to receipt", "Median from the post's own time to its receipt; large when old posts are replayed");
  const visible = figure("Receipt to visible", "Median and 99th percentile from receipt to the signal that contains it");
  const dead = figure("Dead letters", "Messages that could not be read; none is lost, each is kept with its reason");
  const model = figure("Model");
  const letters = h("div");
  const details = h("details", { class: "letters" }, h("summary", null, "Show dead letters"), letters);
  details.addEventListener("toggle", () => {
    if (!details.open) return;
    letters.replaceChildren(h("p", { class: "empty" }, "Loading…"));
    api.deadLetters(scope.abort.signal).then((items) => {
      letters.replaceChildren(items.length === 0 ? h("p", { class: "empty" }, "There are none.") : h("ol", { class: "plain", role: "list" }, ...items.map((d) =>
        h("li", null, h("p", { class: "post-meta" }, h("time", { datetime: d.at }, clock(d.at)), h("span", null, d.source), h("span", null, d.reason)), h("pre", null, d.raw)))));
    }, (error: unknown) => letters.replaceChildren(h("p", { class: "empty" }, String(error))));
  });
  draws(scope, ["sources", "snapshot"], "health", 1000, () => {
    setChildren(list, [...store.sources.values()].slice(0, 50).map((s) => h("li", { "data-state": s.state },
      h("span", { class: "source-name" }, h("span", { class: "source-sign", "aria-hidden": "true" }, STATE_SIGN[s.state] ?? "?"), ` ${s.name}`),
      h("span", { class: "quiet" }, [s.state, rate(s.posts_per_s), posts(s.posts_total), s.reconnects ? `${count(s.reconnects)} reconnects` : "", s.detail ?? ""].filter(Boolean).join(" · ")))));
    received.set(milliseconds(store.lag?.event_to_received_ms_p50), "median");
    visible.set(milliseconds(store.lag?.received_to_visible_ms_p50), `99 % under ${milliseconds(store.lag?.received_to_visible_ms_p99)}`);
    dead.set(count(store.deadLetters));
    model.set(store.model?.name ?? "–", store.model?.adapter ?? "no adapter");
  });
  return h("section", { class: "panel", "aria-labelledby": "health-title" }, h("h2", { id: "health-title" }, "Sources and health"),
    list, h("dl", { class: "figures" }, received.node, visible.node, dead.node, model.node), details);
}

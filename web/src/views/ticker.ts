// One ticker (or sector): the score with its interval, how much is being said and by how many, the history, and the
// posts with their probabilities, those with the most weight marked.
import { api, ApiError } from "../api.ts";
import { h, setAttr, setText } from "../dom.ts";
import { arrow, count, finite, hourMinute, percent, posts, signed, times, WINDOW_WORDS } from "../format.ts";
import { HistoryChart } from "../parts/chart.ts";
import { Feed } from "../parts/feed.ts";
import { scale, score } from "../parts/scale.ts";
import { store } from "../store.ts";
import type { Post, Scope as SignalScope, Signal } from "../types.ts";
import { draws, ends, figure, words } from "./overview.ts";
import { Scope, type View } from "./view.ts";

const EMPTY = { sentiment_score: null, ci_low: null, ci_high: null, mentions: 0 };

export function ticker(key: string, kind: SignalScope & ("ticker" | "sector")): View {
  const scope = new Scope();
  const latest = (): Signal | undefined => (kind === "ticker" ? store.tickers : store.sectors).get(key);

  const name = h("p", { class: "sub" });
  const number = score({ interval: true });
  const line = scale("large");
  const note = h("p", { class: "trend" });
  const figures = {
    mentions: figure("Posts", "Posts in the window, copies included"),
    authors: figure("Authors", "Different authors"),
    attention: figure("Attention", "Posts against the usual number at this hour; z is the distance in standard deviations"),
    buzz: figure("Buzz", "0 to 100"),
    momentum: figure("Change", "Score against the windows before"),
    sides: figure("Bullish / bearish", "Share of posts that are positive / negative"),
    copies: figure("Copies", "Retweets and copies of a text already seen; they count with less weight"),
    damped: figure("Damped", "Posts of authors who post in bursts; they count with less weight"),
  };
  draws(scope, [kind === "ticker" ? "tickers" : "sectors", "window", "snapshot"], "ticker-now", 250, () => {
    const s = latest();
    const over = s !== undefined && !store.isCurrent(s);
    setText(name, [s?.name, over ? `quiet since ${hourMinute(s.end)}` : `last ${WINDOW_WORDS[store.window]}`, s && !over ? `${hourMinute(s.start)} to ${hourMinute(s.end)}${s.final ? "" : ", still filling"}` : ""].filter(Boolean).join(" · "));
    number.update(s ?? EMPTY);
    line.update(s ?? EMPTY);
    setText(note, !s ? "" : finite(s.sentiment_score) === null ? `Too few for a score: ${posts(s.mentions)} from ${hourMinute(s.start)} to ${hourMinute(s.end)}.`
      : [s.trend ? `${arrow(s.trend)} ${s.trend}` : "", s.revision > 0 && s.final ? `corrected ${s.revision}× by late posts` : ""].filter(Boolean).join(" · "));
    figures.mentions.set(count(s?.mentions), s ? `${count(s.positive_count)} ▲ ${count(s.neutral_count)} ■ ${count(s.negative_count)} ▼` : "");
    figures.authors.set(count(s?.unique_authors));
    figures.attention.set(times(s?.attention), finite(s?.attention_z) === null ? "" : `z ${signed(s?.attention_z, 1)}`);
    figures.buzz.set(count(s?.buzz_score), "of 100");
    figures.momentum.set(signed(s?.momentum));
    figures.sides.set(`${percent(s?.bullish_pct)} / ${percent(s?.bearish_pct)}`);
    figures.copies.set(count(s?.copies));
    figures.damped.set(count(s?.damped));
    feed.mark(s?.top_posts);
  });

  const chart = new HistoryChart({ score: 220, volume: 90, label: `${key} score` });
  const table = windowsTable(() => chart.all());
  const missing = h("p", { class: "empty", hidden: true }, `Nothing has been said about ${key} yet. The page fills as soon as something is.`);
  const feed = new Feed(`Posts about ${key}`, { limit: 60 });
  const older = h("button", { type: "button", class: "secondary" }, "Older posts");
  let next: number | null = null;
  const mine = (p: Post): boolean => (kind === "ticker" ? p.tickers?.some((t) => t.symbol === key) : p.sectors?.includes(key)) ?? false;

  const load = (): void => {
    api.history(key, kind, store.window, 500, scope.abort.signal).then(
      (all) => {
        chart.set(all);
        setAttr(missing, "hidden", all.length ? "" : null);
      },
      (error: unknown) => {
        if (error instanceof ApiError && error.status === 404) {
          chart.set([]);
          setAttr(missing, "hidden", null);
        }
      });
    api.posts({ [kind]: key, limit: 60 }, scope.abort.signal).then((page) => {
      feed.reset(page.posts);
      next = page.next_before;
      setAttr(older, "hidden", next === null ? "" : null);
    }, () => undefined);
  };
  older.addEventListener("click", () => {
    if (next === null) return;
    older.disabled = true;
    api.posts({ [kind]: key, limit: 60, before: next }, scope.abort.signal).then((page) => {
      feed.append(page.posts);
      next = page.next_before;
      setAttr(older, "hidden", next === null ? "" : null);
    }, () => undefined).finally(() => (older.disabled = false));
  });
  load();
  scope.add(() => chart.destroy(), () => feed.destroy(), store.on("snapshot", load),
    store.onPost((p) => mine(p) && feed.add(p)),
    store.onSignal((s) => {
      if (s.key !== key || s.scope !== kind || s.window !== store.window) return;
      chart.put(s);
      setAttr(missing, "hidden", "");
    }));

  const node = h("div", { class: "ticker" },
    h("section", { class: "panel market", "aria-labelledby": "ticker-title" },
      h("div", { class: "market-now" },
        h("div", { class: "title stacked" }, h("h1", { id: "ticker-title", class: kind }, words(key)), name),
        h("div", { class: "hero" }, number.node), h("div", { class: "gauge" }, line.node, ends()), note),
      h("div", null, missing, chart.node, table)),
    h("dl", { class: "panel figures wide" }, ...Object.values(figures).map((f) => f.node)),
    h("section", { class: "panel live tall", "aria-labelledby": "ticker-posts" },
      h("div", { class: "title" }, h("h2", { id: "ticker-posts" }, "Posts"), h("p", { class: "sub" }, "newest first")), feed.node, older));
  return { title: words(key), node, destroy: () => scope.end() };
}

/** The same history as numbers, for who cannot or would rather not read a chart. */
function windowsTable(all: () => readonly Signal[]): HTMLElement {
  const body = h("tbody");
  const details = h("details", { class: "letters" }, h("summary", null, "As a table"),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Windows as a table" }, h("table", { class: "data" }, h("thead", null, h("tr", null, ...["Window", "Score", "From", "To", "Posts", "Positive", "Neutral", "Negative"].map((c, i) =>
      h("th", { scope: "col", class: i ? "numeric" : null }, c)))), body)));
  details.addEventListener("toggle", () => {
    if (!details.open) return;
    body.replaceChildren(...[...all()].reverse().slice(0, 100).map((s) => h("tr", null, h("th", { scope: "row" }, `${hourMinute(s.start)}–${hourMinute(s.end)}`),
      ...[finite(s.sentiment_score) === null ? "thin" : signed(s.sentiment_score), signed(s.ci_low), signed(s.ci_high), count(s.mentions), count(s.positive_count), count(s.neutral_count), count(s.negative_count)]
        .map((c) => h("td", { class: "numeric" }, c)))));
  });
  return details;
}

// One post: its text with the tickers as links, the label with all probabilities, and what the pipeline did with it
// (copy, damped, weight, delay).
import { h, type Child } from "../dom.ts";
import { clock, finite, milliseconds, probability, time } from "../format.ts";
import type { Post } from "../types.ts";
import { bar, MARK, tone } from "./probabilities.ts";

const MAX_SHOWN = 1000;

/** Ticker spans are offsets into the text; they are checked, as they come from outside. Offsets count characters. */
export function withTickers(text: string, tickers: Post["tickers"] | null | undefined): Child[] {
  const characters = Array.from(text);
  const out: Child[] = [];
  let at = 0;
  for (const t of [...(tickers ?? [])].sort((a, b) => a.start - b.start)) {
    if (!(Number.isInteger(t.start) && Number.isInteger(t.end) && t.start >= at && t.end > t.start && t.end <= characters.length)) continue;
    if (t.start > at) out.push(characters.slice(at, t.start).join(""));
    out.push(h("a", { href: `#/ticker/${encodeURIComponent(t.symbol)}` }, characters.slice(t.start, t.end).join("")));
    at = t.end;
  }
  if (at < characters.length) out.push(characters.slice(at).join(""));
  return out;
}

/** Only http(s) becomes a link; a `javascript:` address from a post stays text that nobody sees. */
export function safeUrl(url: string | null | undefined): string | null {
  if (!url) return null;
  try {
    const parsed = new URL(url);
    return parsed.protocol === "https:" || parsed.protocol === "http:" ? parsed.href : null;
  } catch {
    return null;
  }
}

export function postNode(p: Post, options: { behind?: boolean } = {}): HTMLElement {
  const raw = p.text ?? "";
  const text = raw.length > MAX_SHOWN ? `${raw.slice(0, MAX_SHOWN)}…` : raw;
  const kind = tone(p.label);
  const top = finite(p.probabilities?.[p.label]) ?? finite(p.confidence);
  const spent = (time(p.available_at) ?? NaN) - (time(p.received_at) ?? NaN);
  const url = safeUrl(p.url);
  const chips: Child[] = [
    options.behind ? h("span", { class: "chip strong", title: "One of the posts with the most weight in this window" }, "behind the score") : null,
    p.is_copy_of ? h("span", { class: "chip", title: `Copy or retweet of ${p.is_copy_of}` }, "copy") : null,
    p.too_late ? h("span", { class: "chip", title: "Came after a window of its time was final: not counted there" }, "too late") : null,
    p.damped ? h("span", { class: "chip", title: "One author's burst: counted with less weight" }, "damped") : null,
    finite(p.weight) !== null && Math.abs(p.weight - 1) > 1e-6 ? h("span", { class: "chip", title: "Weight in the score" }, `weight ${p.weight.toFixed(2)}`) : null,
  ];
  return h("article", { class: `post ${kind}${p.damped || p.is_copy_of ? " faded" : ""}` },
    h("p", { class: "post-text" }, ...(p.text === null ? ["(text not stored)"] : withTickers(text, p.tickers))),
    h("div", { class: "post-verdict" },
      bar(p.probabilities),
      h("span", { class: `verdict ${kind}` }, h("span", { "aria-hidden": "true" }, MARK[kind]), ` ${p.label} ${probability(top)}`)),
    h("p", { class: "post-meta" },
      h("time", { datetime: p.event_time, title: `posted ${p.event_time}` }, clock(p.event_time)),
      h("span", { class: "quiet" }, p.source),
      Number.isFinite(spent) ? h("span", { class: "quiet", title: "From receipt to counted in the score" }, `scored in ${milliseconds(spent)}`) : null,
      ...chips,
      url ? h("a", { href: url, rel: "noopener noreferrer nofollow", target: "_blank" }, "source") : null));
}

// The stand-in for the pipeline behind server.mjs: FOR DEVELOPMENT ONLY. Words instead of a model, counts instead of the
// real windows.
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const SECONDS = { "1m": 60, "5m": 300, "1h": 3600, "1d": 86400 };
const GOOD = /\b(beat|beats|raise[sd]?|record|long|bought|buy|adding|added|up|green|rocket|jump\w*|surge\w*|upgrad\w*|wins?|highs?|love|great|best|rall\w*|bullish|calls|cheap|strong|higher|lift\w*)\b|🚀|🔥|🎉|\+\d/gi;
const BAD = /\b(miss\w*|cut|cuts|down|short|shorting|sold|puts|red|falls?|fell|crash|halt\w*|weak|lower|bearish|outage|denial|denies|denied|lost|lawsuit|stopped|liver|worst|ugly|bleed|losing|fade|fading|gone|dead|avoid|no offer)\b|-\d/gi;

const iso = (ms) => new Date(ms).toISOString();

function classifyText(text) {
  const good = (text.match(GOOD) ?? []).length;
  const bad = (text.match(BAD) ?? []).length;
  const noise = createHash("sha256").update(text).digest()[0] / 255 - 0.5;
  const logits = { Negative: 1.3 * bad + noise, Neutral: 0.9, Positive: 1.3 * good - noise };
  const sum = Object.values(logits).reduce((a, l) => a + Math.exp(l), 0);
  const probabilities = Object.fromEntries(Object.entries(logits).map(([k, l]) => [k, Math.exp(l) / sum]));
  const label = Object.entries(probabilities).sort((a, b) => b[1] - a[1])[0][0];
  const entropy = -Object.values(probabilities).reduce((a, p) => a + p * Math.log(p), 0);
  return { probabilities, label, confidence: 1 - entropy / Math.log(3) };
}

export class Pipeline {
  constructor() {
    this.windows = Object.fromEntries(Object.keys(SECONDS).map((w) => [w, new Map()]));
    this.list = [];
    this.names = new Map();
    this.alerts = [];
    this.deadLetters = [];
    this.seq = 0;
    this.texts = new Map();
    this.authors = new Map();
    this.alerted = new Set();
    this.dirty = new Set();
    this.asOf = Date.now();
    this.total = 0;
    this.onEvent = () => {};
    this.timer = setInterval(() => this.flush(), 250);
  }

  stop() {
    clearInterval(this.timer);
  }

  addNames(csv) {
    for (const line of csv.trim().split("\n").slice(1)) {
      const [symbol, name, sector, aliases] = line.split(",");
      this.names.set(symbol, { name, sector, alias: aliases || name });
    }
  }

  take(raw) {
    const found = [];
    for (const m of raw.text.matchAll(/\$([A-Z]{2,6})\b/g)) if (this.names.has(m[1])) found.push({ symbol: m[1], start: [...raw.text.slice(0, m.index)].length, end: [...raw.text.slice(0, m.index)].length + m[0].length });
    if (found.length === 0) for (const [symbol, n] of this.names) {
      const at = raw.text.indexOf(n.alias);
      if (at >= 0) found.push({ symbol, start: [...raw.text.slice(0, at)].length, end: [...raw.text.slice(0, at)].length + n.alias.length });
    }
    const now = Date.now();
    const event = Date.parse(raw.created_at);
    const plain = raw.text.replace(/^RT @\w+: /, "");
    const copyOf = this.texts.get(plain) ?? null;
    if (!copyOf) this.texts.set(plain, raw.id);
    const burst = (this.authors.get(raw.author) ?? []).filter((t) => event - t < 120_000);
    burst.push(event);
    this.authors.set(raw.author, burst);
    const damped = burst.length > 4;
    const scored = classifyText(plain);
    const post = {
      seq: ++this.seq, id: raw.id, source: raw.source ?? "demo", author: createHash("sha256").update(raw.author).digest("hex").slice(0, 16),
      event_time: raw.created_at, received_at: iso(now - 120), scored_at: iso(now - 30), available_at: iso(now), text: raw.text, url: null,
      tickers: found, sectors: [...new Set(found.map((t) => this.names.get(t.symbol).sector))], ...scored,
      sentiment_score: scored.probabilities.Positive - scored.probabilities.Negative, weight: damped ? 0.1 : copyOf ? 0.3 : 1,
      is_copy_of: copyOf, damped, model: "dev-word-list", adapter: null,
    };
    this.asOf = Math.max(event, this.total ? this.asOf : 0);
    this.total += 1;
    this.list.push(post);
    if (this.list.length > 20_000) this.list.splice(0, 5000);
    for (const [window, length] of Object.entries(SECONDS)) {
      const start = Math.floor(event / 1000 / length) * length * 1000;
      for (const [scope, key] of [["market", "market"], ...post.sectors.map((s) => ["sector", s]), ...new Set(found.map((t) => t.symbol))].map((e) => (Array.isArray(e) ? e : ["ticker", e]))) this.count(window, scope, key, start, length, post);
    }
    this.onEvent(null, "post", post);
  }

  count(window, scope, key, start, length, post) {
    const series = this.windows[window];
    const id = `${scope}/${key}`;
    if (!series.has(id)) series.set(id, []);
    const all = series.get(id);
    let w = all.at(-1);
    if (!w || w.start < start) {
      if (w) w.final = true;
      all.push((w = { scope, key, start, end: start + length * 1000, n: 0, sum: 0, squares: 0, weight: 0, counts: { Positive: 0, Neutral: 0, Negative: 0 }, authors: new Set(), copies: 0, damped: 0, top: [], final: false }));
      if (all.length > 600) all.shift();
    }
    w.n += 1;
    w.weight += post.weight;
    w.sum += post.weight * post.sentiment_score;
    w.squares += post.weight * post.sentiment_score ** 2;
    w.counts[post.label] += 1;
    w.authors.add(post.author);
    w.copies += post.is_copy_of ? 1 : 0;
    w.damped += post.damped ? 1 : 0;
    if (!post.is_copy_of && !post.damped) w.top = [post.id, ...w.top].slice(0, 5);
    this.dirty.add(`${window}|${id}`);
  }

  signal(window, all, at = all.length - 1) {
    const w = all[at];
    const thin = w.weight < 2.5;
    const mean = w.sum / w.weight;
    const half = 1.96 * Math.sqrt(Math.max(0.02, w.squares / w.weight - mean * mean) / w.weight);
    const score = (v) => (v && v.weight >= 2.5 ? v.sum / v.weight : null);
    const before = score(all[at - 1]);
    const usual = all.slice(Math.max(0, at - 24), at).reduce((a, v) => a + v.n, 0) / Math.max(1, Math.min(24, at));
    const momentum = thin || before === null ? null : mean - before;
    return {
      key: w.key, scope: w.scope, name: w.scope === "ticker" ? this.names.get(w.key)?.name ?? null : null, window, start: iso(w.start), end: iso(w.end), final: w.final,
      revision: 0, mentions: w.n, unique_authors: w.authors.size, positive_count: w.counts.Positive, neutral_count: w.counts.Neutral, negative_count: w.counts.Negative,
      sentiment_score: thin ? null : mean, ci_low: thin ? null : Math.max(-1, mean - half), ci_high: thin ? null : Math.min(1, mean + half),
      bullish_pct: (100 * w.counts.Positive) / w.n, bearish_pct: (100 * w.counts.Negative) / w.n, buzz_score: Math.min(100, 12 * Math.log2(1 + w.n)),
      attention: at < 3 ? null : w.n / Math.max(usual, 0.2), attention_z: at < 3 ? null : (w.n - usual) / Math.sqrt(usual + 1), momentum,
      trend: momentum === null ? null : momentum > 0.05 ? "rising" : momentum < -0.05 ? "falling" : "flat",
      copies: w.copies, damped: w.damped, top_posts: w.top, sparkline: all.slice(Math.max(0, at - 23), at + 1).map(score),
    };
  }

  flush() {
    for (const entry of this.dirty) {
      const [window, id] = entry.split("|");
      const s = this.signal(window, this.windows[window].get(id));
      this.onEvent(window, "signal", s);
      if (window === "5m" && s.attention_z > 4 && s.mentions > 20 && s.scope === "ticker" && !this.alerted.has(s.key + s.start)) {
        this.alerted.add(s.key + s.start);
        const alert = { at: s.end, rule: "attention", key: s.key, window, values: { attention_z: s.attention_z }, text: `${s.mentions} posts in 5 minutes, ${s.attention.toFixed(0)} times the usual` };
        this.alerts = [alert, ...this.alerts].slice(0, 50);
        this.onEvent(null, "alert", alert);
      }
    }
    this.dirty.clear();
  }

  latest(window, scope) {
    return [...this.windows[window]].filter(([id]) => id.startsWith(`${scope}/`)).map(([, all]) => this.signal(window, all));
  }
  overview(window) {
    const movers = this.latest(window, "ticker").sort((a, b) => Math.abs(b.momentum ?? 0) * b.mentions - Math.abs(a.momentum ?? 0) * a.mentions).slice(0, 20);
    return {
      window, as_of: iso(this.asOf), market: this.latest(window, "market")[0] ?? null, movers, sectors: this.latest(window, "sector"),
      sources: [{ name: "demo", kind: "replay", state: "connected", since: iso(Date.now()), posts_total: this.total, posts_per_s: this.pace ?? 0, last_post_at: iso(Date.now()), lag_ms: 12, reconnects: 0, detail: "development server" }],
      lag: { event_to_received_ms_p50: 12, received_to_visible_ms_p50: 160, received_to_visible_ms_p99: 410 },
      model: { name: "dev-word-list", adapter: null, labels: ["Positive", "Neutral", "Negative"], temperature: 1 }, dead_letters: this.deadLetters.length,
    };
  }
  signals(window, scope, limit, offset) {
    const all = this.latest(window, scope);
    return { window, as_of: iso(this.asOf), count: all.length, signals: all.slice(offset, offset + Math.min(limit, 500)) };
  }
  history(key, scope, window, limit) {
    const all = this.windows[window]?.get(`${scope}/${key}`);
    return all && { key, scope, window, signals: all.map((_, i) => this.signal(window, all, i)).slice(-limit) };
  }
  posts({ ticker, sector, before, limit = "50" }) {
    const out = [];
    for (let i = this.list.length - 1; i >= 0 && out.length < Math.min(Number(limit), 200); i--) {
      const p = this.list[i];
      if (before && p.seq >= Number(before)) continue;
      if (ticker && !p.tickers.some((t) => t.symbol === ticker)) continue;
      if (sector && !p.sectors.includes(sector)) continue;
      out.push(p);
    }
    return { posts: out, next_before: out.length ? out.at(-1).seq : null };
  }
  classify(input) {
    const texts = Array.isArray(input) ? input : [input];
    return { id: "classify-dev", object: "list", model: "dev-word-list", data: texts.map((text, index) => ({ index, ...classifyText(String(text)), tickers: [...String(text).matchAll(/\$([A-Z]{1,6})\b/g)].map((m) => m[1]) })) };
  }

  replay(folder, speed, start) {
    this.addNames(readFileSync(join(folder, "watchlist.csv"), "utf8"));
    const day = readFileSync(join(folder, "day.jsonl"), "utf8").trim().split("\n").map((l) => JSON.parse(l));
    const first = Date.parse(`${day[0].created_at.slice(0, 11)}${start}:00Z`);
    const began = Date.now();
    let next = 0;
    const poison = { at: iso(Date.now()), source: "demo", reason: "not JSON: expected value at column 1", raw: "<html>502 Bad Gateway</html>" };
    const step = () => {
      const clock = first + (Date.now() - began) * speed;
      const from = next;
      while (next < day.length && Date.parse(day[next].created_at) <= clock) this.take(day[next++]);
      this.pace = (next - from) * 10;
      if (next > 500 && this.deadLetters.length === 0) this.deadLetters.push(poison);
    };
    step();
    setInterval(step, 100);
  }

  load(perSecond, tickers, hostile) {
    const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
    const sectors = ["technology", "health care", "consumer", "financials", "energy", "utilities", "industrials", "materials"];
    for (let i = 0; i < tickers; i++) {
      const symbol = `Z${letters[Math.floor(i / 676) % 26]}${letters[Math.floor(i / 26) % 26]}${letters[i % 26]}`;
      this.names.set(symbol, { name: `Load test company ${i + 1}`, sector: sectors[i % sectors.length], alias: `Load test company ${i + 1}` });
    }
    const symbols = [...this.names.keys()];
    const words = ["up", "down", "beats", "misses", "looks strong", "looks weak", "at the highs", "what now", "sold mine", "bought more", "no idea"];
    const marks = ["<script>window.owned=1</script>", "<img src=x onerror=window.owned=1>", "\"><svg onload=window.owned=1>", "javascript:window.owned=1", "\u202Etxet desrever", "<style>*{display:none}</style>", "</article></ol><h1>gone</h1>"];
    let i = 0;
    const one = (at) => {
      const symbol = symbols[Math.floor(symbols.length * Math.random() ** 2)];
      i += 1;
      this.take({ id: `load-${i}`, author: `a${Math.floor(5000 * Math.random())}`, created_at: iso(at), text: `$${symbol} ${words[i % words.length]} ${Math.random().toString(36).slice(2, 8)}${hostile && i % 3 === 0 ? ` ${marks[i % marks.length]}` : ""}` });
    };
    for (let k = 0; k < 10 * tickers; k++) one(Date.now() - 3_600_000 * (1 - k / (10 * tickers)));
    this.pace = perSecond;
    setInterval(() => { for (let k = 0; k < perSecond / 10; k++) one(Date.now()); }, 100);
  }
}

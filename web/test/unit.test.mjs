// The parts with logic that need no browser: the event parser, number formats, addresses, ticker spans.
import assert from "node:assert/strict";
import { test } from "node:test";
import { build } from "esbuild";

const { outputFiles } = await build({
  stdin: { contents: 'export * from "./stream.ts"; export * from "./format.ts"; export { ordered } from "./parts/probabilities.ts"; export { verdict } from "./parts/scale.ts"; export { safeUrl } from "./parts/post.ts";', resolveDir: new URL("../src", import.meta.url).pathname },
  bundle: true, format: "esm", write: false, platform: "browser",
});
const m = await import(`data:text/javascript;base64,${Buffer.from(outputFiles[0].contents).toString("base64")}`);

test("events survive being cut anywhere", () => {
  const wire = ': hello\n\nid: 7\r\nevent: post\r\ndata: {"a":\r\ndata: 1}\r\n\r\nevent: signal\ndata:x\n\n\nid: 8\ndata: é€😀\n\nevent: resync\ndata: {}\n\n';
  const expected = [{ id: "7", event: "post", data: '{"a":\n1}' }, { id: "7", event: "signal", data: "x" }, { id: "8", event: "message", data: "é€😀" }, { id: "8", event: "resync", data: "{}" }];
  for (let size = 1; size < wire.length; size++) {
    const parser = new m.EventParser();
    const out = [];
    for (let i = 0; i < wire.length; i += size) parser.feed(wire.slice(i, i + size), (e) => out.push(e));
    assert.deepEqual(out, expected, `pieces of ${size}`);
  }
});

test("a line without an end is not buffered for ever", () => {
  const parser = new m.EventParser();
  assert.throws(() => { for (let i = 0; i < 100; i++) parser.feed("x".repeat(1 << 16), () => undefined); }, /4 MB/);
});

test("numbers: signs always, missing values never 0", () => {
  assert.equal(m.signed(0.314), "+0.31");
  assert.equal(m.signed(-0.314), "−0.31");
  assert.equal(m.signed(-0.001), "0.00");
  for (const missing of [null, undefined, NaN, Infinity, "1"]) {
    for (const format of [m.signed, m.percent, m.count, m.times, m.milliseconds, m.probability, m.rate]) assert.equal(format(missing), "–");
  }
  assert.equal(m.milliseconds(90_000), "2 min");
  assert.equal(m.count(12345), "12,345");
  assert.equal(m.clock("nonsense"), "–");
});

test("thin data has no verdict, and an interval across zero is open", () => {
  const s = (sentiment_score, ci_low, ci_high) => m.verdict({ sentiment_score, ci_low, ci_high, mentions: 3 });
  assert.equal(s(null, null, null), "thin");
  assert.equal(s(0.4, 0.1, 0.6), "up");
  assert.equal(s(0.4, -0.1, 0.8), "open");
  assert.equal(s(-0.4, -0.6, -0.2), "down");
});

test("labels have one order, and other labels come after", () => {
  assert.deepEqual(m.ordered({ Positive: 0.2, Odd: 0.1, Negative: 0.4, Neutral: 0.3, Bad: null }).map((e) => e[0]), ["Negative", "Neutral", "Positive", "Odd"]);
});

test("only http addresses become links", () => {
  assert.equal(m.safeUrl("javascript:alert(1)"), null);
  assert.equal(m.safeUrl("data:text/html,x"), null);
  assert.equal(m.safeUrl(" not an address"), null);
  assert.equal(m.safeUrl("https://example.org/a"), "https://example.org/a");
});

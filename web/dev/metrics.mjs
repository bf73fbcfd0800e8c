// A `metrics.json` in the shape that `cashtag run` writes, from drawn numbers: FOR DEVELOPMENT ONLY, to see the view of
// the model's figures without a run. Nothing in it was measured.
const LABELS = ["Positive", "Neutral", "Negative"];
const KINDS = ["plain", "mixed", "sarcastic", "contextual", "targeted"];

function drawn(seed) {
  let state = seed;
  return () => (state = (1664525 * state + 1013904223) >>> 0) / 2 ** 32;
}

function judged(count, skill, seed) {
  const random = drawn(seed);
  return Array.from({ length: count }, (_, i) => {
    const truth = Math.floor(3 * random());
    const logits = LABELS.map((_, c) => (c === truth ? skill * random() : 0) + 1.4 * random());
    const sum = logits.reduce((a, l) => a + Math.exp(2 * l), 0);
    return { truth, kind: KINDS[i % KINDS.length], p: logits.map((l) => Math.exp(2 * l) / sum) };
  });
}

function measure(all) {
  const n = all.length;
  const interval = (value, spread = 1) => {
    const half = (1.96 * spread) / (2 * Math.sqrt(n));
    return { value, low: value - half, high: value + half };
  };
  const said = (j) => j.p.indexOf(Math.max(...j.p));
  const confusion = LABELS.map((_, t) => LABELS.map((_, s) => all.filter((j) => j.truth === t && said(j) === s).length));
  const column = (c) => confusion.reduce((a, row) => a + row[c], 0);
  const per_class = LABELS.map((label, c) => {
    const support = confusion[c].reduce((a, b) => a + b, 0);
    const precision = confusion[c][c] / Math.max(1, column(c));
    const recall = confusion[c][c] / Math.max(1, support);
    return { label, precision, recall, f1: (2 * precision * recall) / Math.max(1e-9, precision + recall), support };
  });
  const accuracy = confusion.reduce((a, row, c) => a + row[c], 0) / n;
  const f1 = per_class.reduce((a, c) => a + c.f1, 0) / 3;
  const reliability = Array.from({ length: 10 }, (_, b) => {
    const bin = all.filter((j) => Math.min(9, Math.floor(10 * Math.max(...j.p))) === b);
    const mean = (f) => (bin.length ? bin.reduce((a, j) => a + f(j), 0) / bin.length : 0);
    return { lower: b / 10, upper: (b + 1) / 10, count: bin.length, confidence: mean((j) => Math.max(...j.p)), accuracy: mean((j) => Number(said(j) === j.truth)) };
  });
  return {
    examples: n, accuracy: interval(accuracy), macro_f1: interval(f1), weighted_f1: interval(f1), per_class, confusion,
    log_loss: interval(all.reduce((a, j) => a - Math.log(j.p[j.truth]), 0) / n, 2),
    expected_calibration_error: reliability.reduce((a, b) => a + (b.count / n) * Math.abs(b.confidence - b.accuracy), 0), reliability,
    brier: all.reduce((a, j) => a + j.p.reduce((s, p, c) => s + (p - Number(c === j.truth)) ** 2, 0), 0) / n,
    mean_confidence: all.reduce((a, j) => a + Math.max(...j.p), 0) / n, majority_baseline: Math.max(...per_class.map((c) => c.support)) / n,
  };
}

export function drawnMetrics() {
  const [before, after] = [judged(430, 0.3, 7), judged(430, 2.2, 7)];
  const kinds = (all) => Object.fromEntries(KINDS.map((k) => [k, measure(all.filter((j) => j.kind === k))]));
  const [b, a] = [measure(before), measure(after)];
  const gain = a.accuracy.value - b.accuracy.value;
  return {
    before: b, after: a, comparison: { examples: 430, accuracy: { value: gain, low: gain - 0.05, high: gain + 0.05 }, mcnemar: { p_value: 1e-9 } },
    by_kind_before: kinds(before), by_kind_after: kinds(after), temperature: 1.2,
  };
}

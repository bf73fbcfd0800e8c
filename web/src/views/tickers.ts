// All tickers as one table: sorted by what the reader chooses, filtered by what they type, drawn only where they look.
import { h, setAttr, setText } from "../dom.ts";
import { arrow, count, finite, hourMinute, signed, times } from "../format.ts";
import { onFrame, throttled } from "../frames.ts";
import { scale, score, spark } from "../parts/scale.ts";
import { VirtualList, type Row } from "../parts/virtual.ts";
import { store } from "../store.ts";
import type { Signal } from "../types.ts";
import { Scope, type View } from "./view.ts";

type Column = { id: string; name: string; class: string; value: (s: Signal) => number | string | null };
const COLUMNS: Column[] = [
  { id: "key", name: "Ticker", class: "c-key", value: (s) => s.key },
  { id: "score", name: "Score", class: "c-score numeric", value: (s) => finite(s.sentiment_score) },
  { id: "interval", name: "Interval", class: "c-scale", value: (s) => (finite(s.ci_high) === null ? null : (s.ci_high as number) - (s.ci_low as number)) },
  { id: "change", name: "Change", class: "c-change numeric", value: (s) => finite(s.momentum) },
  { id: "attention", name: "Attention", class: "c-attention numeric", value: (s) => finite(s.attention) },
  { id: "mentions", name: "Posts", class: "c-mentions numeric", value: (s) => finite(s.mentions) },
  { id: "spark", name: "Last windows", class: "c-spark", value: () => null },
];

function row(): Row<Signal> {
  const symbol = h("span", { class: "symbol" });
  const company = h("span", { class: "company" });
  const link = h("a", null, symbol, company);
  const number = score();
  const line = scale();
  const small = spark();
  const cells = COLUMNS.map((c) => h("div", { class: c.class, role: c.id === "key" ? "rowheader" : "cell" }));
  cells[0]!.append(link);
  cells[1]!.append(number.node);
  cells[2]!.append(line.node);
  cells[6]!.append(small.node);
  const node = h("div", { class: "grid-row", role: "row" }, ...cells);
  let shown: Signal | null = null;
  let wasCurrent = true;
  return {
    node,
    update(s) {
      // Signals are replaced, not changed: the same object has been drawn.
      const current = store.isCurrent(s);
      if (s === shown && current === wasCurrent) return;
      shown = s;
      wasCurrent = current;
      setAttr(node, "data-old", current ? null : "");
      setAttr(link, "href", `#/ticker/${encodeURIComponent(s.key)}`);
      setText(symbol, s.key);
      setText(company, [current ? "" : `last ${hourMinute(s.end)}`, s.name ?? ""].filter(Boolean).join(" · "));
      number.update(s);
      line.update(s);
      small.update(s.sparkline);
      setText(cells[3]!, finite(s.momentum) === null ? "–" : `${arrow(s.trend)} ${signed(s.momentum)}`);
      setText(cells[4]!, times(s.attention));
      setText(cells[5]!, count(s.mentions));
    },
  };
}

export function tickers(): View {
  const scope = new Scope();
  let by = "mentions";
  let down = true;
  let filter = "";
  const phone = matchMedia("(max-width: 640px)");
  const list = new VirtualList<Signal>(() => (phone.matches ? 60 : 46), row, "tickers");
  const found = h("p", { class: "sub", role: "status" });
  const heads = COLUMNS.map((c) => {
    const cell = h("div", { class: c.class, role: "columnheader" });
    if (c.id === "spark") cell.append(c.name);
    else {
      const button = h("button", { type: "button", class: "sort" }, c.name);
      button.addEventListener("click", () => {
        down = by === c.id ? !down : c.id !== "key";
        by = c.id;
        arrange(true);
      });
      cell.append(button);
    }
    return cell;
  });

  let order: string[] = [];
  const update = (): void => list.set(order.flatMap((key) => store.tickers.get(key) ?? []));
  const arrange = (asked = false): void => {
    if (!asked && order.length > 0 && (list.node.matches(":hover") || list.node.contains(document.activeElement))) {
      update();
      return;
    }
    const column = COLUMNS.find((c) => c.id === by)!;
    const needle = filter.toLowerCase();
    // What was said long ago comes after what is being said, whatever it is sorted by.
    const old = (s: Signal): number => (store.isCurrent(s) ? 0 : 1);
    const all = [...store.tickers.values()].filter((s) => !needle || s.key.toLowerCase().includes(needle) || (s.name ?? "").toLowerCase().includes(needle));
    all.sort((a, b) => {
      if (column.id !== "key" && old(a) !== old(b)) return old(a) - old(b);
      const x = column.value(a);
      const y = column.value(b);
      // Thin data sorts last in either direction: it is not a low score.
      if (x === null || y === null) return x === y ? a.key.localeCompare(b.key) : x === null ? 1 : -1;
      const compared = typeof x === "string" ? x.localeCompare(String(y)) : x - (y as number);
      return (down ? -compared : compared) || a.key.localeCompare(b.key);
    });
    order = all.map((s) => s.key);
    COLUMNS.forEach((c, i) => setAttr(heads[i]!, "aria-sort", c.id === by ? (down ? "descending" : "ascending") : null));
    setText(found, `${count(order.length)} of ${count(store.tickers.size)}`);
    setAttr(grid, "aria-rowcount", String(order.length + 1));
    update();
  };
  const input = h("input", { type: "search", placeholder: "Filter by symbol or name", "aria-label": "Filter tickers", autocomplete: "off", spellcheck: "false", maxlength: 40 });
  input.addEventListener("input", () => {
    filter = input.value.trim().replace(/^\$/, "");
    list.node.scrollTop = 0;
    arrange(true);
  });
  const head = h("div", { class: "grid-row grid-head", role: "row", "aria-rowindex": "1" }, ...heads);
  const grid = h("div", { class: "grid", role: "table", "aria-label": "Tickers" }, h("div", { role: "rowgroup" }, head), list.node);
  list.node.setAttribute("role", "presentation");
  scope.add(() => list.destroy(), store.on("tickers", throttled("tickers-update", 250, update)), store.on("snapshot", () => onFrame("tickers-arrange", () => arrange(true))));
  const timer = window.setInterval(() => !document.hidden && onFrame("tickers-arrange", () => arrange()), 2000);
  scope.add(() => window.clearInterval(timer));
  arrange(true);
  const node = h("section", { class: "panel tickers", "aria-labelledby": "tickers-title" },
    h("div", { class: "title" }, h("h1", { id: "tickers-title" }, "Tickers"), found), input, grid);
  return { title: "Tickers", node, destroy: () => scope.end() };
}

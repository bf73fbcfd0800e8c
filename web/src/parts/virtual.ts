// A long table of rows of one height: only the rows in view (and a few more) exist. Rows are recycled and updated in
// place, so 5,000 tickers cost what 30 cost. Positions use transform, not layout.
import { h, setAttr, setStyle } from "../dom.ts";
import { onFrame } from "../frames.ts";

export interface Row<T> { node: HTMLElement; update: (item: T, index: number) => void }

export class VirtualList<T> {
  readonly node: HTMLElement;
  private readonly inner = h("div", { class: "virtual-inner", role: "rowgroup" });
  private readonly pool: Row<T>[] = [];
  private items: readonly T[] = [];
  private readonly resize: ResizeObserver;

  constructor(private readonly rowHeight: () => number, private readonly make: () => Row<T>, private readonly key: string) {
    this.node = h("div", { class: "virtual" }, this.inner);
    this.node.addEventListener("scroll", () => this.redraw(), { passive: true });
    this.resize = new ResizeObserver(() => this.redraw());
    this.resize.observe(this.node);
  }

  set(items: readonly T[]): void {
    this.items = items;
    this.redraw();
  }
  redraw(): void {
    onFrame(this.key, () => this.draw());
  }

  private draw(): void {
    const height = this.rowHeight();
    const view = this.node.clientHeight || 600;
    const first = Math.max(0, Math.floor(this.node.scrollTop / height) - 4);
    const last = Math.min(this.items.length, Math.ceil((this.node.scrollTop + view) / height) + 4);
    setStyle(this.inner, "height", `${this.items.length * height}px`);
    const needed = last - first;
    while (this.pool.length < needed) {
      const row = this.make();
      this.pool.push(row);
      this.inner.append(row.node);
    }
    // Item i always lives in slot i mod pool size: scrolling by one row rewrites one row, and focus stays on its item.
    const size = this.pool.length;
    const used = new Set<number>();
    for (let i = first; i < last; i++) {
      const slot = i % size;
      used.add(slot);
      const row = this.pool[slot]!;
      setStyle(row.node, "transform", `translateY(${i * height}px)`);
      setStyle(row.node, "display", "");
      // The header row counts as the first.
      setAttr(row.node, "aria-rowindex", String(i + 2));
      row.update(this.items[i]!, i);
    }
    this.pool.forEach((row, slot) => !used.has(slot) && setStyle(row.node, "display", "none"));
  }

  destroy(): void {
    this.resize.disconnect();
  }
}

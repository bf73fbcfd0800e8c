// A list of posts that stays readable at any rate. New posts are taken over at most once a second and never while
// somebody reads (scrolled, pointing at it or focused inside): then they wait behind a button. The list is short; older
// posts are asked for.
import { h, setChildren, setStyle, setText, setAttr } from "../dom.ts";
import { count } from "../format.ts";
import { onFrame } from "../frames.ts";
import type { Post } from "../types.ts";
import { postNode } from "./post.ts";

const SHOWN = 40;
const EVERY_MS = 1000;
let feeds = 0;

export class Feed {
  readonly node: HTMLElement;
  private readonly list = h("ol", { class: "feed-list", role: "list" });
  private readonly more = h("button", { class: "feed-new", type: "button", hidden: true });
  private readonly empty = h("p", { class: "empty" }, "No posts yet.");
  private readonly nodes = new Map<string, HTMLElement>();
  private waiting: Post[] = [];
  private shown: Post[] = [];
  private extra: Post[] = [];
  private behind = new Set<string>();
  private last = 0;
  private timer = 0;
  private readonly name = `feed-${feeds++}`;
  private readonly limit: number;

  constructor(label: string, options: { limit?: number } = {}) {
    this.limit = options.limit ?? SHOWN;
    this.more.addEventListener("click", () => {
      this.take();
      this.list.scrollTop = 0;
    });
    setAttr(this.list, "aria-label", label);
    setAttr(this.list, "tabindex", "0");
    this.node = h("div", { class: "feed" }, this.more, this.list, this.empty);
  }

  private reading(): boolean {
    return this.list.scrollTop > 8 || this.list.matches(":hover") || this.list.contains(document.activeElement) && document.activeElement !== this.list;
  }

  /** A snapshot, newest first. */
  reset(posts: readonly Post[]): void {
    this.waiting = [];
    this.extra = [];
    this.shown = posts.slice(0, this.limit);
    onFrame(this.name, () => this.draw());
  }

  append(older: readonly Post[]): void {
    this.extra.push(...older);
    onFrame(this.name, () => this.draw());
  }

  mark(ids: readonly string[] | null | undefined): void {
    const next = new Set(ids ?? []);
    if (next.size === this.behind.size && [...next].every((id) => this.behind.has(id))) return;
    for (const id of [...next, ...this.behind]) this.nodes.delete(id);
    this.behind = next;
    onFrame(this.name, () => this.draw());
  }

  add(post: Post): void {
    this.waiting.unshift(post);
    if (this.waiting.length > 2 * this.limit) this.waiting.length = this.limit;
    if (this.timer) return;
    this.timer = window.setTimeout(() => {
      this.timer = 0;
      onFrame(this.name, () => (this.reading() ? this.announce() : this.take()));
    }, Math.max(0, this.last + EVERY_MS - performance.now()));
  }

  private announce(): void {
    setAttr(this.more, "hidden", this.waiting.length === 0 ? "" : null);
    setText(this.more, `${count(this.waiting.length)}${this.waiting.length >= this.limit ? "+" : ""} new`);
  }

  private take(): void {
    this.last = performance.now();
    this.shown = [...this.waiting, ...this.shown].slice(0, this.limit);
    this.waiting = [];
    this.draw();
  }

  private draw(): void {
    this.announce();
    const keep: HTMLElement[] = [];
    const used = new Set<string>();
    for (const post of [...this.shown, ...this.extra]) {
      if (used.has(post.id)) continue;
      used.add(post.id);
      let item = this.nodes.get(post.id);
      if (!item) {
        item = h("li", null, postNode(post, { behind: this.behind.has(post.id) }));
        this.nodes.set(post.id, item);
      }
      keep.push(item);
    }
    for (const id of [...this.nodes.keys()]) if (!used.has(id)) this.nodes.delete(id);
    setChildren(this.list, keep);
    setStyle(this.empty, "display", keep.length ? "none" : "");
    setStyle(this.list, "display", keep.length ? "" : "none");
  }

  destroy(): void {
    window.clearTimeout(this.timer);
  }
}

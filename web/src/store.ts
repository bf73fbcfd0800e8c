// What the page knows, and who wants to hear of it. Events are applied here at any rate; views subscribe to topics and
// draw in frames. Nothing grows without a bound.
import { api } from "./api.ts";
import { time } from "./format.ts";
import { throttled } from "./frames.ts";
import { Stream, type LinkState } from "./stream.ts";
import { WINDOWS, type Alert, type Model, type Overview, type Post, type Signal, type Source, type StoreHealth, type WindowName } from "./types.ts";

const MAX_POSTS = 400;
const MAX_ALERTS = 50;
const MAX_TICKERS = 20_000;

export type Topic = "market" | "sectors" | "tickers" | "posts" | "sources" | "alerts" | "link" | "window" | "snapshot";
type Listener = () => void;

/** `/?window=1h` is how a link chooses one; else the last choice. */
function chosenWindow(): WindowName {
  try {
    const wanted = (new URLSearchParams(location.search).get("window") ?? localStorage.getItem("cashtag-window")) as WindowName | null;
    if (wanted && WINDOWS.includes(wanted)) return wanted;
  } catch {
    // Storage may be forbidden; the default will do.
  }
  return "5m";
}

class Store {
  window: WindowName = chosenWindow();
  market: Signal | null = null;
  readonly sectors = new Map<string, Signal>();
  readonly tickers = new Map<string, Signal>();
  readonly sources = new Map<string, Source>();
  posts: Post[] = [];
  alerts: Alert[] = [];
  model: Model | null = null;
  lag: Overview["lag"] | null = null;
  deadLetters = 0;
  health: StoreHealth | null = null;
  /** Newest event time seen; a replayed day has its own clock. */
  asOf: string | null = null;
  link: LinkState = "connecting";
  error: string | null = null;
  loaded = false;
  /** Wall clock of the last event that changed anything. */
  updated = 0;
  postsSeen = 0;

  private readonly listeners = new Map<Topic, Set<Listener>>();
  private readonly signalListeners = new Set<(s: Signal) => void>();
  private readonly postListeners = new Set<(p: Post) => void>();
  private snapshotAbort: AbortController | null = null;
  private readonly refreshOverview = throttled("overview-refresh", 5000, () => void this.loadOverview());
  readonly stream = new Stream(
    (event, data) => this.apply(event, data),
    (state) => this.setLink(state),
    () => void this.reload(),
  );

  /** Subscribes; the returned function ends it. */
  on(topic: Topic, listener: Listener): () => void {
    let set = this.listeners.get(topic);
    if (!set) this.listeners.set(topic, (set = new Set()));
    set.add(listener);
    return () => set.delete(listener);
  }
  onSignal(listener: (s: Signal) => void): () => void {
    this.signalListeners.add(listener);
    return () => this.signalListeners.delete(listener);
  }
  onPost(listener: (p: Post) => void): () => void {
    this.postListeners.add(listener);
    return () => this.postListeners.delete(listener);
  }
  private emit(topic: Topic): void {
    for (const listener of this.listeners.get(topic) ?? []) listener();
  }

  start(): void {
    void this.reload();
    this.stream.open(`/v1/stream?window=${this.window}`);
    window.setInterval(() => !document.hidden && this.refreshOverview(), 10_000);
  }

  setWindow(window: WindowName): void {
    if (window === this.window) return;
    this.window = window;
    try {
      localStorage.setItem("cashtag-window", window);
    } catch {
      // Storage may be forbidden.
    }
    this.tickers.clear();
    this.sectors.clear();
    this.market = null;
    this.loaded = false;
    this.emit("window");
    void this.reload();
    this.stream.open(`/v1/stream?window=${window}`);
  }

  private setLink(state: LinkState): void {
    if (state === this.link) return;
    this.link = state;
    this.emit("link");
  }

  /** All snapshots anew: at the start, on another window, and when the server says `resync`. */
  async reload(): Promise<void> {
    this.snapshotAbort?.abort();
    const abort = (this.snapshotAbort = new AbortController());
    const window = this.window;
    try {
      const [overview, tickers, posts, alerts] = await Promise.all([
        api.overview(window, abort.signal),
        api.signals(window, "ticker", abort.signal),
        api.posts({ limit: 100 }, abort.signal),
        api.alerts(abort.signal).catch(() => [] as Alert[]),
      ]);
      if (abort.signal.aborted) return;
      this.takeOverview(overview);
      for (const s of tickers) this.takeSignal(s);
      this.posts = posts.posts.slice(0, MAX_POSTS);
      this.alerts = alerts.slice(0, MAX_ALERTS);
      this.loaded = true;
      this.error = null;
      this.touch();
      for (const topic of ["market", "sectors", "tickers", "posts", "sources", "alerts", "snapshot"] as const) this.emit(topic);
    } catch (error) {
      if (abort.signal.aborted) return;
      this.error = error instanceof Error ? error.message : String(error);
      this.emit("link");
      // Tried again while the page is open; the stream has its own back-off.
      globalThis.setTimeout(() => abort === this.snapshotAbort && void this.reload(), 4000);
    }
  }

  /** Lag, sources, model and dead letters are not all events; they are asked for now and then. */
  private async loadOverview(): Promise<void> {
    const window = this.window;
    try {
      const overview = await api.overview(window);
      if (window !== this.window) return;
      this.takeOverview(overview);
      for (const topic of ["market", "sectors", "sources"] as const) this.emit(topic);
    } catch {
      // The stream's state already tells that the server is away.
    }
  }

  private takeOverview(o: Overview): void {
    if (o.market) this.takeSignal(o.market);
    for (const s of o.sectors ?? []) this.takeSignal(s);
    for (const s of o.movers ?? []) this.takeSignal(s);
    for (const s of o.sources ?? []) this.sources.set(s.name, s);
    this.takeHealth(o.store ?? null);
    this.lag = o.lag ?? null;
    this.model = o.model ?? null;
    this.deadLetters = o.dead_letters ?? 0;
    this.clock(o.as_of);
  }

  private takeHealth(health: StoreHealth | null): void {
    const before = this.health?.state;
    this.health = health;
    // What could not be read while the store was away is read now.
    if (before === "unavailable" && health?.state === "connected") void this.reload();
    if (before !== health?.state) this.emit("link");
  }

  /** Whether a window is the newest or the one before: an older one says what was, not what is. */
  isCurrent(s: Signal): boolean {
    const now = time(this.asOf);
    const start = time(s.start);
    const end = time(s.end);
    return now === null || start === null || end === null || now < end + (end - start);
  }

  private clock(iso: string | null | undefined): void {
    if (iso && (!this.asOf || Date.parse(iso) > Date.parse(this.asOf))) this.asOf = iso;
  }
  private touch(): void {
    this.updated = Date.now();
  }

  /** Newer windows replace older ones; of one window the higher revision wins. */
  private takeSignal(s: Signal): boolean {
    if (s.window !== this.window) return false;
    const map = s.scope === "ticker" ? this.tickers : s.scope === "sector" ? this.sectors : null;
    const known = map ? map.get(s.key) : this.market;
    if (known) {
      if (s.start < known.start || (s.start === known.start && (s.revision ?? 0) < (known.revision ?? 0))) return false;
    }
    if (map) {
      if (!known && map.size >= MAX_TICKERS) return false;
      map.set(s.key, s);
    } else this.market = s;
    return true;
  }

  private apply(event: string, data: unknown): void {
    this.touch();
    switch (event) {
      case "signal": {
        const s = data as Signal;
        for (const listener of this.signalListeners) listener(s);
        if (this.takeSignal(s)) this.emit(s.scope === "ticker" ? "tickers" : s.scope === "sector" ? "sectors" : "market");
        break;
      }
      case "post": {
        const p = data as Post;
        this.postsSeen += 1;
        this.posts.unshift(p);
        if (this.posts.length > MAX_POSTS + 100) this.posts.length = MAX_POSTS;
        this.clock(p.event_time);
        for (const listener of this.postListeners) listener(p);
        this.emit("posts");
        break;
      }
      case "source": {
        const s = data as Source;
        this.sources.set(s.name, s);
        this.emit("sources");
        break;
      }
      case "store":
        this.takeHealth(data as StoreHealth);
        break;
      case "alert":
        this.alerts = [data as Alert, ...this.alerts].slice(0, MAX_ALERTS);
        this.emit("alerts");
        break;
      default:
        // A newer server may say more than this page understands.
        break;
    }
  }
}

export const store = new Store();

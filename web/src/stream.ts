// Server-sent events over fetch, because EventSource cannot send a key. Resumes with Last-Event-ID, notices a dead line
// (the server sends a comment every 10 s), backs off with jitter, and says what state it is in.
import { authorized } from "./api.ts";

export type LinkState = "connecting" | "live" | "stale" | "offline";
export interface StreamEvent { id: string | null; event: string; data: string }

const SILENCE_MS = 25_000;
const STALE_MS = 12_500;
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 30_000;
/** A line longer than this is no event of ours; the connection is dropped rather than buffered. */
const MAX_BUFFER = 4 << 20;

/** The line protocol alone: feed it text in any pieces, get whole events. */
export class EventParser {
  private buffer = "";
  private event = "";
  private data: string[] = [];
  private id: string | null = null;

  feed(chunk: string, emit: (event: StreamEvent) => void): void {
    this.buffer += chunk;
    if (this.buffer.length > MAX_BUFFER) throw new Error("an event of more than 4 MB");
    let from = 0;
    for (;;) {
      const newline = this.buffer.indexOf("\n", from);
      if (newline < 0) break;
      const end = newline > from && this.buffer[newline - 1] === "\r" ? newline - 1 : newline;
      this.line(this.buffer.slice(from, end), emit);
      from = newline + 1;
    }
    this.buffer = this.buffer.slice(from);
  }

  private line(line: string, emit: (event: StreamEvent) => void): void {
    if (line === "") {
      if (this.data.length > 0) emit({ id: this.id, event: this.event || "message", data: this.data.join("\n") });
      this.event = "";
      this.data = [];
      return;
    }
    if (line.startsWith(":")) return;
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (field === "event") this.event = value;
    else if (field === "data") this.data.push(value);
    else if (field === "id" && !value.includes("\0")) this.id = value;
  }
}

export class Stream {
  private abort: AbortController | null = null;
  private lastId: string | null = null;
  private retry = FIRST_RETRY_MS;
  private timer = 0;
  private watch = 0;
  private heard = performance.now();
  private generation = 0;

  constructor(
    private readonly onEvent: (event: string, data: unknown) => void,
    private readonly onState: (state: LinkState) => void,
    /** The line was cut and cannot be resumed by id, or the server said so. */
    private readonly onResync: () => void,
  ) {
    window.addEventListener("online", () => this.path && this.reconnect(0));
    this.watch = window.setInterval(() => this.checkSilence(), 1000);
  }

  private path: string | null = null;

  /** Milliseconds since anything arrived, a keep-alive included. */
  silence(): number {
    return performance.now() - this.heard;
  }

  open(path: string): void {
    // Ids of one window's stream mean nothing to another's.
    if (path !== this.path) this.lastId = null;
    this.path = path;
    this.retry = FIRST_RETRY_MS;
    this.reconnect(0);
  }

  close(): void {
    window.clearInterval(this.watch);
    this.path = null;
    this.generation += 1;
    this.abort?.abort();
  }

  private reconnect(after: number): void {
    this.generation += 1;
    this.abort?.abort();
    window.clearTimeout(this.timer);
    const generation = this.generation;
    this.timer = window.setTimeout(() => void this.run(generation), after);
  }

  private async run(generation: number): Promise<void> {
    if (!this.path) return;
    const abort = (this.abort = new AbortController());
    this.heard = performance.now();
    this.onState("connecting");
    try {
      const headers: Record<string, string> = { Accept: "text/event-stream" };
      if (this.lastId !== null) headers["Last-Event-ID"] = this.lastId;
      const response = await authorized(this.path, { headers, signal: abort.signal });
      if (!response.ok || !response.body) throw new Error(`stream: ${response.status}`);
      this.heard = performance.now();
      this.onState("live");
      const parser = new EventParser();
      const decoder = new TextDecoder();
      const reader = response.body.getReader();
      for (;;) {
        const { done, value } = await reader.read();
        if (generation !== this.generation) return;
        if (done) break;
        this.heard = performance.now();
        this.retry = FIRST_RETRY_MS;
        parser.feed(decoder.decode(value, { stream: true }), (event) => this.take(event));
      }
    } catch {
      // Whatever it was, the remedy is the same: try again, later each time.
    }
    if (generation !== this.generation) return;
    this.onState("offline");
    const wait = this.retry * (0.75 + 0.5 * Math.random());
    this.retry = Math.min(2 * this.retry, LAST_RETRY_MS);
    this.reconnect(wait);
  }

  private take(event: StreamEvent): void {
    if (event.id !== null && event.id !== "") this.lastId = event.id;
    if (event.event === "resync") {
      this.onResync();
      return;
    }
    try {
      this.onEvent(event.event, JSON.parse(event.data));
    } catch (error) {
      console.warn(`an event that is not JSON: ${event.event}`, error);
    }
  }

  private checkSilence(): void {
    if (!this.path || document.hidden) return;
    const silence = this.silence();
    if (silence > SILENCE_MS) this.reconnect(0);
    else if (silence > STALE_MS) this.onState("stale");
  }
}

// What the router asks of a view.
export interface View {
  title: string;
  node: HTMLElement;
  /** Ends subscriptions, timers and requests. */
  destroy: () => void;
}

/** Collects what has to be undone when a view goes. */
export class Scope {
  private readonly undo: (() => void)[] = [];
  readonly abort = new AbortController();
  add(...undo: (() => void)[]): void {
    this.undo.push(...undo);
  }
  end(): void {
    this.abort.abort();
    for (const f of this.undo.splice(0)) f();
  }
}

// Requests to the server this page came from. The key, if the server wants one, is asked for once and kept for this tab
// only (sessionStorage). Concurrent requests that are refused wait for the same question.
import type { Classified, DeadLetter, Alert, Overview, Post, Quality, Scope, Signal, WindowName } from "./types.ts";

const KEY = "cashtag-key";
let asking: Promise<void> | null = null;
let askForKey: (wrong: boolean) => Promise<string> = () => Promise.reject(new Error("no key"));

export class ApiError extends Error {
  constructor(readonly status: number, message: string) {
    super(message);
  }
}

/** Who shows the question for a key. */
export function setKeyPrompt(prompt: (wrong: boolean) => Promise<string>): void {
  askForKey = prompt;
}

function stored(): string | null {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}
export function forgetKey(): void {
  sessionStorage.removeItem(KEY);
}

/** `fetch` with the key; on 401 asks for one and tries again. */
export async function authorized(path: string, init: RequestInit = {}): Promise<Response> {
  for (;;) {
    const key = stored();
    const headers = new Headers(init.headers);
    if (key) headers.set("Authorization", `Bearer ${key}`);
    const response = await fetch(path, { ...init, headers, cache: "no-store" });
    if (response.status !== 401) return response;
    // Another request may have been given the key meanwhile.
    if (stored() === key) {
      asking ??= askForKey(key !== null)
        .then((answer) => sessionStorage.setItem(KEY, answer))
        .finally(() => (asking = null));
      await asking;
    }
  }
}

async function json<T>(path: string, init: RequestInit = {}): Promise<T> {
  const response = await authorized(path, init);
  if (!response.ok) {
    let message = `${response.status} ${response.statusText}`;
    try {
      const body = (await response.json()) as { error?: { message?: string } };
      if (body.error?.message) message = body.error.message;
    } catch {
      // A proxy's page: the status says enough.
    }
    throw new ApiError(response.status, message);
  }
  return (await response.json()) as T;
}

const list = <T>(value: unknown): T[] => (Array.isArray(value) ? (value as T[]) : []);

export const api = {
  overview: (window: WindowName, signal?: AbortSignal): Promise<Overview> =>
    json<Overview>(`/v1/overview?window=${window}`, { signal }),

  /** Every key of a scope, page by page. */
  async signals(window: WindowName, scope: Scope, signal?: AbortSignal): Promise<Signal[]> {
    const all: Signal[] = [];
    for (;;) {
      const page = await json<{ count: number; signals: Signal[] }>(
        `/v1/signals?window=${window}&scope=${scope}&limit=500&offset=${all.length}`, { signal });
      const rows = list<Signal>(page.signals);
      all.push(...rows);
      if (rows.length === 0 || all.length >= page.count || all.length >= 20_000) return all;
    }
  },

  async history(key: string, scope: Scope, window: WindowName, limit: number, signal?: AbortSignal): Promise<Signal[]> {
    const page = await json<{ signals: Signal[] }>(
      `/v1/signals/${encodeURIComponent(key)}?scope=${scope}&window=${window}&limit=${limit}`, { signal });
    return list<Signal>(page.signals);
  },

  async posts(query: { ticker?: string; sector?: string; before?: number; limit?: number }, signal?: AbortSignal):
    Promise<{ posts: Post[]; next_before: number | null }> {
    const search = new URLSearchParams({ limit: String(query.limit ?? 50) });
    if (query.ticker) search.set("ticker", query.ticker);
    if (query.sector) search.set("sector", query.sector);
    if (query.before !== undefined) search.set("before", String(query.before));
    const page = await json<{ posts: Post[]; next_before: number | null }>(`/v1/posts?${search}`, { signal });
    return { posts: list<Post>(page.posts), next_before: page.next_before ?? null };
  },

  alerts: async (signal?: AbortSignal): Promise<Alert[]> => {
    const page = await json<Record<string, unknown>>("/v1/alerts?limit=50", { signal });
    return list<Alert>(page["items"] ?? page["alerts"]);
  },
  deadLetters: async (signal?: AbortSignal): Promise<DeadLetter[]> =>
    list<DeadLetter>((await json<{ items: DeadLetter[] }>("/v1/dead-letters?limit=50", { signal })).items),
  quality: (signal?: AbortSignal): Promise<Quality> => json<Quality>("/v1/quality", { signal }),

  async classify(text: string, signal?: AbortSignal): Promise<{ result: Classified; ms: number }> {
    const started = performance.now();
    const body = await json<{ data: Classified[] }>("/v1/classify", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ input: text }), signal });
    const result = list<Classified>(body.data)[0];
    if (!result) throw new ApiError(502, "the answer has no result");
    return { result, ms: performance.now() - started };
  },
};

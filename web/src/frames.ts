// One place that touches the DOM: jobs are coalesced by key and run together in the next animation frame, within a
// budget, so 100 posts a second cost as many layouts as one. A hidden tab gets no frames; then jobs wait, and because
// they are keyed, they do not pile up.

const BUDGET_MS = 6;
const jobs = new Map<string, () => void>();
let scheduled = false;

/** Runs `job` in the next frame; a later job of the same key replaces it. */
export function onFrame(key: string, job: () => void): void {
  jobs.set(key, job);
  if (!scheduled) {
    scheduled = true;
    requestAnimationFrame(run);
  }
}

function run(): void {
  scheduled = false;
  const started = performance.now();
  for (const [key, job] of jobs) {
    jobs.delete(key);
    try {
      job();
    } catch (error) {
      // One broken panel must not stop the others.
      console.error(`drawing ${key}`, error);
    }
    if (performance.now() - started > BUDGET_MS) break;
  }
  if (jobs.size > 0 && !scheduled) {
    scheduled = true;
    requestAnimationFrame(run);
  }
}

/** At most once per `ms`, and the last call is never lost. */
export function throttled(key: string, ms: number, job: () => void): () => void {
  let last = -Infinity;
  let timer = 0;
  return () => {
    if (timer) return;
    const wait = last + ms - performance.now();
    const fire = (): void => {
      timer = 0;
      last = performance.now();
      onFrame(key, job);
    };
    if (wait <= 0) fire();
    else timer = window.setTimeout(fire, wait);
  };
}

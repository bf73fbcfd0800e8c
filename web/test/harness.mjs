// What the browser tests share: a server on a free port, a browser, and checks that collect instead of stopping at the
// first failure.
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { delimiter, dirname, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const here = dirname(fileURLToPath(import.meta.url));
// playwright takes a path, not a name that is looked for.
const named = process.env.CHROMIUM ? [process.env.CHROMIUM] : ["chromium", "chromium-browser", "google-chrome"];
const CHROMIUM = named
  .flatMap((name) => (name.includes("/") ? [name] : (process.env.PATH ?? "").split(delimiter).map((folder) => join(folder, name))))
  .find(existsSync);

export function chromiumOrSkip(needed = false) {
  if (CHROMIUM) return;
  if (needed) {
    console.error("error: there is no Chromium\nhint: apt install chromium, or set CHROMIUM");
    process.exit(1);
  }
  console.log("skipped: no Chromium (apt install chromium, or set CHROMIUM)");
  process.exit(0);
}

// A failed check leaves its server behind, and a server that lives keeps this process alive: `finish` ends them all.
const servers = new Set();

/** The development server with these arguments; resolves when it listens. */
export function serve(...args) {
  return new Promise((resolve, reject) => {
    const child = spawn(process.execPath, [join(here, "../dev/server.mjs"), "--port", "0", ...args], { stdio: ["ignore", "pipe", "inherit"] });
    servers.add(child);
    child.stdout.on("data", (data) => {
      const found = /http:\/\/[\d.:]+/.exec(String(data));
      if (found) resolve({ url: found[0], stop: () => child.kill() });
    });
    child.on("exit", (code) => servers.delete(child) && reject(new Error(`the development server ended with ${code}`)));
  });
}

let browser;
export async function open(options = {}) {
  // As root, in containers, Chromium refuses its sandbox.
  browser ??= await chromium.launch({ executablePath: CHROMIUM, args: process.getuid?.() === 0 ? ["--no-sandbox"] : [] });
  const context = await browser.newContext({ viewport: { width: 1280, height: 860 }, ...options });
  const page = await context.newPage();
  const problems = [];
  page.on("pageerror", (error) => problems.push(`error: ${error.message}`));
  page.on("console", (m) => m.type() === "error" && !/Failed to load resource/.test(m.text()) && problems.push(m.text()));
  await page.addInitScript(() => {
    window.violations = [];
    document.addEventListener("securitypolicyviolation", (e) => window.violations.push(`${e.violatedDirective} ${e.blockedURI} ${e.sample}`));
  });
  return { page, problems, close: () => context.close() };
}
export async function finish() {
  for (const server of servers) server.kill();
  await Promise.race([browser?.close(), sleep(5000, undefined, { ref: false })]);
}

// What waits inside the page has no limit of its own.
const LIMIT = 120_000;
const failures = [];
export async function test(name, body) {
  const started = performance.now();
  const late = new AbortController();
  try {
    await Promise.race([
      body(),
      sleep(LIMIT, undefined, { signal: late.signal }).then(() => Promise.reject(new Error(`not finished after ${LIMIT / 1000} s`))),
    ]);
    console.log(`ok      ${name} (${((performance.now() - started) / 1000).toFixed(1)} s)`);
  } catch (error) {
    failures.push(name);
    console.log(`FAILED  ${name}\n        ${String(error?.message ?? error).split("\n").slice(0, 12).join("\n        ")}`);
  } finally {
    late.abort();
  }
}
export function check(condition, message) {
  if (!condition) throw new Error(message);
}
export function equal(found, expected, what) {
  check(JSON.stringify(found) === JSON.stringify(expected), `${what}: expected ${JSON.stringify(expected)}, found ${JSON.stringify(found)}`);
}
export function summary() {
  console.log(failures.length ? `\n${failures.length} failed: ${failures.join(", ")}` : "\nall passed");
  process.exit(failures.length ? 1 : 0);
}

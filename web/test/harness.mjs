// What the browser tests share: a server on a free port, a browser, and checks that collect instead of stopping at the
// first failure.
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const here = dirname(fileURLToPath(import.meta.url));
const CHROMIUM = process.env.CHROMIUM ?? ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);

export function chromiumOrSkip() {
  if (CHROMIUM) return;
  console.log("skipped: no Chromium (apt install chromium, or set CHROMIUM)");
  process.exit(0);
}

/** The development server with these arguments; resolves when it listens. */
export function serve(...args) {
  return new Promise((resolve, reject) => {
    const child = spawn(process.execPath, [join(here, "../dev/server.mjs"), "--port", "0", ...args], { stdio: ["ignore", "pipe", "inherit"] });
    child.stdout.on("data", (data) => {
      const found = /http:\/\/[\d.:]+/.exec(String(data));
      if (found) resolve({ url: found[0], stop: () => child.kill() });
    });
    child.on("exit", (code) => reject(new Error(`the development server ended with ${code}`)));
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
export const finish = () => browser?.close();

const failures = [];
export async function test(name, body) {
  const started = performance.now();
  try {
    await body();
    console.log(`ok      ${name} (${((performance.now() - started) / 1000).toFixed(1)} s)`);
  } catch (error) {
    failures.push(name);
    console.log(`FAILED  ${name}\n        ${String(error?.message ?? error).split("\n").slice(0, 12).join("\n        ")}`);
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
  process.exitCode = failures.length ? 1 : 0;
}

// Screenshots for looking at:
//
//   node dev/shoot.mjs URL FOLDER [ticker]            every view, light, dark and on a phone
//   node dev/shoot.mjs URL ../docs/images --readme    the three pictures of the README, from a running cashtag live --demo
import { chromium } from "playwright-core";
import { existsSync, mkdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";

const { values: args, positionals } = parseArgs({ allowPositionals: true, options: { readme: { type: "boolean", default: false } } });
const [url = "http://127.0.0.1:8600", folder = "shots", symbol = "HLXN"] = positionals;
const executablePath = process.env.CHROMIUM ?? ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);
mkdirSync(folder, { recursive: true });
const browser = await chromium.launch({ executablePath, args: process.getuid?.() === 0 ? ["--no-sandbox"] : [] });
const light = { viewport: { width: 1360, height: 900 }, colorScheme: "light" };
const dark = { ...light, colorScheme: "dark" };
const phone = { viewport: { width: 390, height: 844 }, colorScheme: "light", deviceScaleFactor: 1.5, isMobile: true, hasTouch: true };

async function visit(name, options) {
  const page = await (await browser.newContext(options)).newPage();
  page.on("console", (m) => ["error", "warning"].includes(m.type()) && console.log(name, m.text()));
  page.on("pageerror", (e) => console.log(name, e.message));
  return page;
}

if (args.readme) {
  for (const [file, options, hash] of [
    ["overview-light", light, "#/"],
    ["overview-dark", dark, "#/"],
    ["ticker-light", light, `#/ticker/${symbol}`],
  ]) {
    const page = await visit(file, options);
    await page.goto(`${url}/?window=1h${hash}`);
    await page.waitForFunction(() => document.querySelector(".score-value")?.textContent);
    await page.waitForTimeout(3500);
    const path = join(folder, `${file}.png`);
    await page.screenshot({ path });
    console.log(`${path}: ${Math.round(statSync(path).size / 1024)} kB`);
    await page.context().close();
  }
} else {
  const views = [["overview", "#/"], ["ticker", `#/ticker/${symbol}`], ["tickers", "#/tickers"], ["try", "#/try"], ["quality", "#/quality"]];
  const only = process.env.ONLY?.split(",");
  for (const [name, options] of [["light", light], ["dark", dark], ["phone", phone]]) {
    if (only && !only.includes(name)) continue;
    const page = await visit(name, options);
    for (const [view, hash] of views) {
      await page.goto(`${url}/?window=1h${hash}`);
      await page.waitForTimeout(view === "overview" ? 3500 : 2000);
      if (view === "try") {
        await page.getByRole("button", { name: /amazing uptime/ }).click();
        await page.waitForTimeout(1500);
      }
      await page.screenshot({ path: join(folder, `${name}-${view}.png`), fullPage: view !== "tickers" && name !== "phone" });
    }
  }
}
await browser.close();

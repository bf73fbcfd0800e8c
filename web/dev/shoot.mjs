// Screenshots of every view for looking at: node dev/shoot.mjs URL FOLDER [ticker]
import { chromium } from "playwright-core";
import { existsSync, mkdirSync } from "node:fs";
import { join } from "node:path";

const [url = "http://127.0.0.1:8600", folder = "shots", symbol = "HLXN"] = process.argv.slice(2);
const executablePath = process.env.CHROMIUM ?? ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);
mkdirSync(folder, { recursive: true });
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const views = [["overview", "#/"], ["ticker", `#/ticker/${symbol}`], ["tickers", "#/tickers"], ["try", "#/try"], ["quality", "#/quality"]];
const only = process.env.ONLY?.split(",");
for (const [name, options] of [
  ["light", { viewport: { width: 1360, height: 900 }, colorScheme: "light" }],
  ["dark", { viewport: { width: 1360, height: 900 }, colorScheme: "dark" }],
  ["phone", { viewport: { width: 360, height: 760 }, colorScheme: "light", deviceScaleFactor: 2, isMobile: true, hasTouch: true }],
]) {
  if (only && !only.includes(name)) continue;
  const page = await (await browser.newContext(options)).newPage();
  page.on("console", (m) => ["error", "warning"].includes(m.type()) && console.log(name, m.text()));
  page.on("pageerror", (e) => console.log(name, e.message));
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
await browser.close();

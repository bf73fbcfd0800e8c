// A server for working on the page without building the binary. FOR DEVELOPMENT ONLY, and honest about it: it replays
// the demo day (or makes load) in the shapes of docs/live-api.md, but its "probabilities" come from a short list of
// words, not from a model, and its windows are counted in the simplest way. Never take a figure from it.
//
//   node dev/server.mjs                       the demo day at 60 times its speed, on http://127.0.0.1:8600
//   node dev/server.mjs --speed 600 --start 12:20
//   node dev/server.mjs --load 100 --tickers 500     100 posts/s over 500 tickers
//   node dev/server.mjs --api http://127.0.0.1:8080   the page from here, everything else from a running cashtag live
//   node dev/server.mjs --key secret          requests need "Authorization: Bearer secret"
//   node dev/server.mjs --metrics FILE        a metrics.json for the view of the model; "drawn" for invented numbers
//   node dev/server.mjs --outage 3           the store is away from the third second on, for five seconds
//   node dev/server.mjs --cut 20              every stream is cut after 20 s; --mute 15: silent from then on
import { createReadStream, existsSync, readFileSync } from "node:fs";
import { createServer, request as ask } from "node:http";
import { dirname, extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { CSP } from "./headers.mjs";
import { drawnMetrics } from "./metrics.mjs";
import { Pipeline } from "./pipeline.mjs";

const here = dirname(fileURLToPath(import.meta.url));
const { values: args } = parseArgs({ options: {
  port: { type: "string", default: "8600" }, speed: { type: "string", default: "60" }, start: { type: "string", default: "11:00" },
  load: { type: "string" }, tickers: { type: "string", default: "500" }, key: { type: "string" }, cut: { type: "string" },
  mute: { type: "string" }, metrics: { type: "string" }, hostile: { type: "boolean", default: false }, api: { type: "string" },
  outage: { type: "string" },
} });

const TYPES = { ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml" };
const pipeline = new Pipeline();
const streams = new Set();
/** Enough to resume from for a while; older ids get `resync`. */
const ring = [];
let eventId = 0;

function publish(window, event, data) {
  eventId += 1;
  const entry = { id: eventId, window, text: `id: ${eventId}\nevent: ${event}\ndata: ${JSON.stringify(data)}\n\n` };
  ring.push(entry);
  if (ring.length > 5000) ring.splice(0, 1000);
  for (const s of streams) if (!window || s.window === window) s.send(entry.text);
}
pipeline.onEvent = publish;

/** As `store` of the overview. */
let store = { kind: "postgres", state: "connected", since: null, detail: "" };
function setStore(state, detail) {
  store = { kind: "postgres", state, since: state === "connected" ? null : new Date().toISOString(), detail };
  publish(null, "store", store);
}
if (args.outage) {
  setTimeout(() => setStore("unavailable", "error connecting to server: Connection refused"), 1000 * Number(args.outage));
  setTimeout(() => setStore("connected", ""), 1000 * (Number(args.outage) + 5));
}

function stream(request, response, url) {
  const window = url.searchParams.get("window") ?? "5m";
  response.writeHead(200, { "Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no" });
  let muted = false;
  const client = { window, send: (text) => muted || response.write(text) };
  const last = Number(request.headers["last-event-id"]);
  if (Number.isFinite(last) && last > 0) {
    if (ring.length && ring[0].id > last + 1) client.send(`id: ${eventId}\nevent: resync\ndata: {}\n\n`);
    else for (const e of ring) if (e.id > last && (!e.window || e.window === window)) client.send(e.text);
  } else client.send(": hello\n\n");
  streams.add(client);
  const beat = setInterval(() => client.send(": keep-alive\n\n"), 10_000);
  const cut = args.cut && setTimeout(() => response.destroy(), 1000 * Number(args.cut));
  const mute = args.mute && setTimeout(() => (muted = true), 1000 * Number(args.mute));
  request.on("close", () => {
    streams.delete(client);
    clearInterval(beat);
    clearTimeout(cut);
    clearTimeout(mute);
  });
}

function asset(path, response) {
  const root = join(here, "..", "dist");
  const file = normalize(join(root, path === "/" ? "index.html" : path));
  if (!file.startsWith(root) || !existsSync(file) || !TYPES[extname(file)]) return fail(response, 404, "no such page");
  response.writeHead(200, { "Content-Type": TYPES[extname(file)], "Content-Security-Policy": CSP, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache" });
  createReadStream(file).pipe(response);
}

function fail(response, status, message) {
  response.writeHead(status, { "Content-Type": "application/json" });
  response.end(JSON.stringify({ error: { message, type: "invalid_request_error", code: status } }));
}
const reply = (response, value) => {
  response.writeHead(200, { "Content-Type": "application/json", "Cache-Control": "no-store" });
  response.end(JSON.stringify(value));
};

/** Hands a request on to a real pipeline; streams stay streams. */
function forward(request, response) {
  const target = new URL(request.url, args.api);
  const onward = ask(target, { method: request.method, headers: { ...request.headers, host: target.host } }, (answer) => {
    response.writeHead(answer.statusCode, answer.headers);
    answer.pipe(response);
  });
  onward.on("error", (error) => response.headersSent ? response.destroy() : fail(response, 502, error.message));
  response.on("close", () => onward.destroy());
  request.pipe(onward);
}

createServer((request, response) => {
  const url = new URL(request.url, "http://localhost");
  const path = url.pathname;
  const q = Object.fromEntries(url.searchParams);
  if (!path.startsWith("/v1/")) return asset(path, response);
  if (args.api) return forward(request, response);
  if (args.key && request.headers.authorization !== `Bearer ${args.key}`) return fail(response, 401, "a key is needed");
  const window = q.window ?? "5m";
  if (path === "/v1/stream") return stream(request, response, url);
  if (path === "/v1/overview") return reply(response, { ...pipeline.overview(window), store });
  if (path === "/v1/signals") return reply(response, pipeline.signals(window, q.scope ?? "ticker", Number(q.limit ?? 100), Number(q.offset ?? 0)));
  if (path.startsWith("/v1/signals/")) {
    const found = pipeline.history(decodeURIComponent(path.slice(12)), q.scope ?? "ticker", window, Number(q.limit ?? 500));
    return found ? reply(response, found) : fail(response, 404, "unknown key");
  }
  if (path === "/v1/posts") return reply(response, pipeline.posts(q));
  if (path === "/v1/alerts") return reply(response, { items: pipeline.alerts });
  if (path === "/v1/dead-letters") return reply(response, { items: pipeline.deadLetters });
  if (path === "/v1/quality") return reply(response, args.metrics === "drawn" ? drawnMetrics() : args.metrics ? JSON.parse(readFileSync(args.metrics, "utf8")) : {});
  if (path === "/v1/classify" && request.method === "POST") {
    let body = "";
    request.on("data", (c) => (body += c).length > 1e5 && request.destroy());
    request.on("end", () => reply(response, pipeline.classify(JSON.parse(body).input)));
    return undefined;
  }
  return fail(response, 404, "no such path");
}).listen(Number(args.port), "127.0.0.1", function () {
  console.log(`FOR DEVELOPMENT, ${args.api ? `with ${args.api}` : "word-list scores"}: http://127.0.0.1:${this.address().port}`);
});

if (args.api) pipeline.stop();
else if (args.load) pipeline.load(Number(args.load), Number(args.tickers), args.hostile);
else pipeline.replay(join(here, "../../crates/live/demo"), Number(args.speed), args.start);

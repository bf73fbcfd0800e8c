// Builds web/dist: one script, one stylesheet, the page, each with its gzip and brotli form beside it. What the binary
// embeds is this folder as it is, so everything that costs time (minifying, compressing, hashing) happens here, once.
import { build, context } from "esbuild";
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { brotliCompressSync, constants, gzipSync } from "node:zlib";

const here = dirname(fileURLToPath(import.meta.url));
const dist = join(here, "dist");
const watch = process.argv.includes("--watch");

const options = {
  absWorkingDir: here,
  entryPoints: ["src/main.ts", "src/style.css"],
  outdir: "dist/assets",
  bundle: true,
  format: "esm",
  target: ["chrome105", "firefox110", "safari16.4"],
  minify: !watch,
  sourcemap: watch ? "linked" : false,
  write: false,
  legalComments: "none",
  charset: "utf8",
  logLevel: "warning",
};

/** A content hash in the name lets a browser keep the file for ever; the page itself is asked for each time. */
function emit(result) {
  clean();
  mkdirSync(join(dist, "assets"), { recursive: true });
  const names = {};
  for (const file of result.outputFiles) {
    const base = file.path.split(/[\\/]/).pop();
    const [stem, ...extension] = base.split(".");
    const hash = createHash("sha256").update(file.contents).digest("hex").slice(0, 10);
    const name = `assets/${stem}-${hash}.${extension.join(".")}`;
    names[base] = `/${name}`;
    put(name, file.contents);
  }
  const icon = readFileSync(join(here, "src/icon.svg"));
  names["icon.svg"] = `/assets/icon-${createHash("sha256").update(icon).digest("hex").slice(0, 10)}.svg`;
  put(names["icon.svg"].slice(1), icon);
  const page = readFileSync(join(here, "src/index.html"), "utf8").replace(/%([a-z.]+)%/g, (whole, name) => {
    if (!names[name]) throw new Error(`src/index.html asks for ${whole}, and the build has ${Object.keys(names)}`);
    return names[name];
  });
  put("index.html", Buffer.from(page));
}

function put(name, contents) {
  const path = join(dist, name);
  writeFileSync(path, contents);
  if (watch) return;
  const bytes = Buffer.from(contents);
  writeFileSync(`${path}.gz`, gzipSync(bytes, { level: 9 }));
  writeFileSync(`${path}.br`, brotliCompressSync(bytes, { params: { [constants.BROTLI_PARAM_QUALITY]: 11 } }));
}

/** The folder itself and its .gitkeep stay: cargo watches the folder. */
function clean() {
  mkdirSync(dist, { recursive: true });
  for (const name of readdirSync(dist)) if (name !== ".gitkeep") rmSync(join(dist, name), { recursive: true });
}

if (watch) {
  const plugin = { name: "emit", setup: (b) => b.onEnd((r) => r.outputFiles?.length && emit(r)) };
  await (await context({ ...options, plugins: [plugin] })).watch();
} else {
  emit(await build(options));
}

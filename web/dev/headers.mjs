// The policy that the binary sends is a constant of crates/web-assets; it is read from there so that the two are one.
import { readFileSync } from "node:fs";

const source = readFileSync(new URL("../../crates/web-assets/src/lib.rs", import.meta.url), "utf8");
const found = /CONTENT_SECURITY_POLICY: &str = "([^"]+)";/.exec(source.replace(/\\\n\s*/g, ""));
if (!found) throw new Error("crates/web-assets/src/lib.rs has no CONTENT_SECURITY_POLICY that this script can read");
export const CSP = found[1];

//! Lists the files of `web/dist` as a Rust table. The folder may be empty: then the table is, and the library answers with
//! a page that says how to build the real one. Nothing is fetched or compiled here; that is `make web`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

use sha2::{Digest, Sha256};

/// Endings that a page consists of, and their types. Anything else in the folder is a mistake worth stopping for.
const TYPES: &[(&str, &str)] = &[
    ("html", "text/html; charset=utf-8"),
    ("js", "text/javascript; charset=utf-8"),
    ("css", "text/css; charset=utf-8"),
    ("svg", "image/svg+xml"),
    ("png", "image/png"),
    ("txt", "text/plain; charset=utf-8"),
];

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let dist = here.join("../../web/dist");
    // The folder is in the repository (with a .gitkeep), so that cargo has something to watch before the first build of
    // the page. A missing one would make cargo run this each time.
    println!("cargo::rerun-if-changed={}", dist.display());
    println!("cargo::rerun-if-changed=build.rs");
    let mut files = Vec::new();
    collect(&dist, &mut files);
    files.sort();
    let mut table = String::from("pub(crate) static BUILT: &[Asset] = &[\n");
    if files.iter().any(|f| f == Path::new("index.html")) {
        for file in files.iter().filter(|f| !is(f, "gz") && !is(f, "br")) {
            write_asset(&mut table, &dist, file);
        }
    }
    table.push_str("];\n");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("assets.rs");
    fs::write(&out, table).unwrap_or_else(|e| panic!("{}: {e}", out.display()));
}

/// Files below `folder`, relative to it; a folder that cannot be read has none.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    let mut open = vec![folder.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if !entry.file_name().to_string_lossy().starts_with('.') {
                files.push(path.strip_prefix(folder).expect("found below it").to_path_buf());
            }
        }
    }
}

fn is(file: &Path, extension: &str) -> bool {
    file.extension().is_some_and(|e| e == extension)
}

fn write_asset(table: &mut String, dist: &Path, file: &Path) {
    let name = file.to_str().expect("names of built files are ASCII").replace('\\', "/");
    let content_type = TYPES
        .iter()
        .find(|(extension, _)| is(file, extension))
        .unwrap_or_else(|| panic!("web/dist/{name}: no content type for this ending; add it to TYPES in build.rs"))
        .1;
    let path = dist.join(file);
    let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let digest = Sha256::digest(&bytes);
    let etag: String = digest.iter().take(10).fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    let embed = |extension: &str| {
        let packed = PathBuf::from(format!("{}.{extension}", path.display()));
        if packed.exists() { format!("Some(include_bytes!({:?}))", absolute(&packed)) } else { "None".to_string() }
    };
    let (gzip, brotli) = (embed("gz"), embed("br"));
    let _ = writeln!(
        table,
        "    Asset {{ path: {:?}, content_type: {content_type:?}, etag: {etag:?}, immutable: {}, identity: include_bytes!({:?}), \
         gzip: {gzip}, brotli: {brotli} }},",
        if name == "index.html" { "/".to_string() } else { format!("/{name}") },
        // Names below assets/ carry a hash of the content.
        name.starts_with("assets/"),
        absolute(&path),
    );
}

fn absolute(path: &Path) -> String {
    fs::canonicalize(path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        .to_str()
        .expect("a UTF-8 path")
        .to_string()
}

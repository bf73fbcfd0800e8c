//! Finding and opening NVIDIA's libraries at run time.
//!
//! Nothing of CUDA is linked. A library is looked for in this order: the folders of `CASHTAG_CUDA_LIBS`, the loader's own path, toolkits
//! under `/usr/local`, and the `nvidia-*` wheels in Python's site-packages. It is opened by its absolute path with its symbols global; the
//! bindings then find it by its soname. Opened libraries are never closed.
//!
//! The bindings panic when a library is missing, so nothing else in this crate may call one that was not opened here first.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::{cublaslt, driver, nvrtc};
use libloading::os::unix::{Library as Handle, RTLD_GLOBAL, RTLD_NOW};
use serde::Serialize;

/// A library that was opened.
#[derive(Clone, Debug, Serialize)]
pub struct Library {
    /// Where it was found; the bare name if the loader found it.
    pub path: PathBuf,
    /// As the library itself reports it: "13.0".
    pub version: String,
}

/// The driver's library and the highest CUDA version that it speaks, as (major, minor).
type Driver = (Library, (u32, u32));

pub(crate) fn cuda() -> Result<&'static Driver, String> {
    static CUDA: OnceLock<Result<Driver, String>> = OnceLock::new();
    CUDA.get_or_init(|| {
        let hint = "no NVIDIA driver (libcuda.so.1) was found\n  hint: install NVIDIA's driver for this card; in a container, start it with the GPUs \
                    (docker run --gpus all)";
        let path = open("libcuda.so", &["1"], &[]).ok_or(hint)?;
        // SAFETY: probes the loader only.
        if !unsafe { driver::sys::is_culib_present() } {
            return Err(hint.into());
        }
        let mut version = 0;
        // SAFETY: the library is open; the pointer is to a local.
        unsafe { driver::sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| format!("libcuda: {e}"))?;
        let version = (version as u32 / 1000, version as u32 % 1000 / 10);
        Ok((Library { path, version: format!("CUDA {}.{}", version.0, version.1) }, version))
    })
    .as_ref()
    .map_err(Clone::clone)
}

/// The run-time compiler. Where there is a driver, no newer major version than the driver's: it refuses newer machine code.
pub(crate) fn nvrtc() -> Result<&'static Library, String> {
    static NVRTC: OnceLock<Result<Library, String>> = OnceLock::new();
    NVRTC
        .get_or_init(|| {
            let majors = majors();
            let hint = format!(
                "the run-time compiler libnvrtc.so.{0} was not found\n  hint: pip install {1}, or install the CUDA toolkit {0}",
                majors[0],
                if majors[0] == "12" { "nvidia-cuda-nvrtc-cu12" } else { "nvidia-cuda-nvrtc" }
            );
            let path = open("libnvrtc.so", &majors, &["libnvrtc-builtins.so"]).ok_or_else(|| hint.clone())?;
            // SAFETY: probes the loader only.
            if !unsafe { nvrtc::sys::is_culib_present() } {
                return Err(hint);
            }
            let (mut major, mut minor) = (0, 0);
            // SAFETY: the library is open; the pointers are to locals.
            unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|e| format!("libnvrtc: {e}"))?;
            Ok(Library { path, version: format!("{major}.{minor}") })
        })
        .as_ref()
        .map_err(Clone::clone)
}

/// Matrix products.
pub(crate) fn cublaslt() -> Result<&'static Library, String> {
    static CUBLASLT: OnceLock<Result<Library, String>> = OnceLock::new();
    CUBLASLT
        .get_or_init(|| {
            let majors = majors();
            let hint = format!(
                "the matrix library libcublasLt.so.{0} was not found\n  hint: pip install {1}, or install the CUDA toolkit {0}",
                majors[0],
                if majors[0] == "12" { "nvidia-cublas-cu12" } else { "nvidia-cublas" }
            );
            let path = open("libcublasLt.so", &majors, &[]).ok_or_else(|| hint.clone())?;
            // SAFETY: probes the loader only.
            if !unsafe { cublaslt::sys::is_culib_present() } {
                return Err(hint);
            }
            // SAFETY: the library is open.
            let v = unsafe { cublaslt::sys::cublasLtGetVersion() };
            let version = if v >= 100_000 { (v / 10_000, v / 100 % 100, v % 100) } else { (v / 1000, v / 100 % 10, v % 100) };
            Ok(Library { path, version: format!("{}.{}.{}", version.0, version.1, version.2) })
        })
        .as_ref()
        .map_err(Clone::clone)
}

/// Sums over several cards. Only looked for when there are several.
pub(crate) fn nccl() -> Result<&'static Library, String> {
    static NCCL: OnceLock<Result<Library, String>> = OnceLock::new();
    NCCL.get_or_init(|| {
        let hint = "the library libnccl.so.2 was not found\n  hint: pip install nvidia-nccl-cu13";
        let path = open("libnccl.so", &["2"], &[]).ok_or(hint)?;
        // SAFETY: probes the loader only.
        if !unsafe { cudarc::nccl::sys::is_culib_present() } {
            return Err(hint.into());
        }
        let mut v = 0;
        // SAFETY: the library is open; the pointer is to a local.
        let result = unsafe { cudarc::nccl::sys::ncclGetVersion(&mut v) };
        if result != cudarc::nccl::sys::ncclResult_t::ncclSuccess {
            return Err(format!("libnccl.so.2 does not say its version ({result:?})"));
        }
        Ok(Library { path, version: format!("{}.{}.{}", v / 10_000, v / 100 % 100, v % 100) })
    })
    .as_ref()
    .map_err(Clone::clone)
}

/// Major versions that may be used, the best first.
fn majors() -> Vec<&'static str> {
    match cuda() {
        Ok((_, (major, _))) if *major < 13 => vec!["12"],
        _ => vec!["13", "12"],
    }
}

/// Opens `stem.major` for the first major that can be found; `before` are libraries that must be open first and lie in the same folder.
fn open(stem: &str, majors: &[&str], before: &[&str]) -> Option<PathBuf> {
    static OPEN: Mutex<BTreeMap<PathBuf, Handle>> = Mutex::new(BTreeMap::new());
    let mut opened = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut try_open = |path: &Path| -> bool {
        if opened.contains_key(path) {
            return true;
        }
        // SAFETY: NVIDIA's libraries have no initialisers with preconditions; the handle is kept for ever.
        match unsafe { Handle::open(Some(path), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(handle) => {
                opened.insert(path.to_path_buf(), handle);
                true
            }
            Err(_) => false,
        }
    };
    let (given, found): (Vec<_>, Vec<_>) = (given_folders(), found_folders());
    for major in majors {
        let name = format!("{stem}.{major}");
        let in_folders = |folders: &[PathBuf], try_open: &mut dyn FnMut(&Path) -> bool| {
            folders.iter().map(|f| (f, f.join(&name))).filter(|(_, p)| p.exists()).find_map(|(folder, path)| {
                for b in before {
                    // The wheel of the compiler does not say where its builtins lie.
                    for file in list(folder).into_iter().filter(|f| is_library(f, b)) {
                        try_open(&file);
                    }
                }
                try_open(&path).then_some(path)
            })
        };
        let path = in_folders(&given, &mut try_open)
            .or_else(|| try_open(Path::new(&name)).then(|| PathBuf::from(&name)))
            .or_else(|| in_folders(&found, &mut try_open));
        if path.is_some() {
            return path;
        }
    }
    None
}

/// Whether `path` is `stem` with a version behind it (`libnvrtc-builtins.so.13.0`).
fn is_library(path: &Path, stem: &str) -> bool {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    name.strip_prefix(stem).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn given_folders() -> Vec<PathBuf> {
    std::env::var_os("CASHTAG_CUDA_LIBS").map(|v| std::env::split_paths(&v).collect()).unwrap_or_default()
}

/// Folders that may hold NVIDIA's libraries although the loader does not look there.
fn found_folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        ["/usr/local/nvidia/lib64", "/usr/lib/wsl/lib", "/usr/local/cuda/lib64"].iter().map(PathBuf::from).collect();
    let mut toolkits: Vec<PathBuf> = list(Path::new("/usr/local"))
        .into_iter()
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("cuda-")))
        .map(|p| p.join("lib64"))
        .collect();
    toolkits.sort();
    folders.extend(toolkits.into_iter().rev());
    for prefix in python_prefixes() {
        folders.push(prefix.join("lib"));
        for python in list(&prefix.join("lib")).into_iter().filter(|p| is_python(p)) {
            for packages in ["site-packages", "dist-packages"] {
                for wheel in list(&python.join(packages).join("nvidia")) {
                    folders.push(wheel.join("lib"));
                }
            }
        }
    }
    folders.retain(|f| f.is_dir());
    folders
}

fn is_python(path: &Path) -> bool {
    path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3"))
}

/// Installation prefixes of the Pythons that a user means: the active environments and every `python3` of the PATH.
fn python_prefixes() -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    for folder in std::env::var_os("PATH").iter().flat_map(std::env::split_paths) {
        let python = folder.join("python3");
        for path in [Some(python.clone()), python.canonicalize().ok()].into_iter().flatten().filter(|p| p.exists()) {
            prefixes.extend(path.parent().and_then(Path::parent).map(Path::to_path_buf));
        }
    }
    prefixes.extend(std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".local")));
    let mut seen = std::collections::BTreeSet::new();
    prefixes.retain(|p| seen.insert(p.clone()));
    prefixes
}

fn list(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().filter_map(|e| Some(e.ok()?.path())).collect();
    entries.sort();
    entries
}

/// The driver's own words for an error.
pub(crate) fn describe(e: driver::DriverError) -> String {
    let text = |r: Result<&CStr, _>| r.map(|c: &CStr| c.to_string_lossy().into_owned()).unwrap_or_default();
    format!("{} ({})", text(e.error_string()), text(e.error_name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_behind_a_stem_are_recognised() {
        let is = |name: &str| is_library(Path::new(name), "libnvrtc-builtins.so");
        assert!(is("/x/libnvrtc-builtins.so.13.0") && is("libnvrtc-builtins.so"));
        assert!(!is("libnvrtc-builtins.alt.so.13.0") && !is("libnvrtc.so.13"));
    }

    #[test]
    fn a_missing_library_is_a_line_not_a_crash() {
        for result in [cuda().map(|c| &c.0), nvrtc(), cublaslt()] {
            if let Err(e) = result {
                assert!(e.contains("hint: "), "{e}");
            }
        }
    }
}

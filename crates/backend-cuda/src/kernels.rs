//! The kernels: sources inside the binary, compiled by NVRTC for the card's own architecture at first use, and kept on disk.
//!
//! A module is one `.cu` file with its dtypes (and, for attention, the head dimension) as macros. The cache's file name is a hash of
//! everything that decides the machine code, and the file holds a hash of its own contents, so that a file that was cut off or
//! changed is compiled anew. A cache that cannot be written costs time, never an error.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use cashtag_backend::{Dtype, Result};
use cudarc::driver::{result, sys as driver};
use cudarc::nvrtc::sys as nvrtc;
use sha2::{Digest, Sha256};

use crate::driver::{Device, Function};
use crate::libraries::{self, describe};

/// A kernel family: one `.cu` file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Family {
    Adamw,
    Adamw8,
    Attention,
    AttentionAny,
    Dora,
    Dropout,
    Elementwise,
    Lora,
    Loss,
    Nf4,
    Norm,
    Reduce,
    Rope,
    Swiglu,
}

const HEADERS: [(&CStr, &str); 5] = [
    (c"ptx.cuh", include_str!("../kernels/ptx.cuh")),
    (c"philox.cuh", include_str!("../kernels/philox.cuh")),
    (c"tile.cuh", include_str!("../kernels/tile.cuh")),
    (c"common.cuh", include_str!("../kernels/common.cuh")),
    (c"attention.cuh", include_str!("../kernels/attention.cuh")),
];

impl Family {
    #[cfg(test)]
    pub(crate) const ALL: [Family; 14] = [
        Family::Adamw,
        Family::Adamw8,
        Family::Attention,
        Family::AttentionAny,
        Family::Dora,
        Family::Dropout,
        Family::Elementwise,
        Family::Lora,
        Family::Loss,
        Family::Nf4,
        Family::Norm,
        Family::Reduce,
        Family::Rope,
        Family::Swiglu,
    ];

    fn source(self) -> (&'static str, &'static str) {
        match self {
            Family::Adamw => ("adamw.cu", include_str!("../kernels/adamw.cu")),
            Family::Adamw8 => ("adamw8.cu", include_str!("../kernels/adamw8.cu")),
            Family::Attention => ("attention.cu", include_str!("../kernels/attention.cu")),
            Family::AttentionAny => ("attention_any.cu", include_str!("../kernels/attention_any.cu")),
            Family::Dora => ("dora.cu", include_str!("../kernels/dora.cu")),
            Family::Dropout => ("dropout.cu", include_str!("../kernels/dropout.cu")),
            Family::Elementwise => ("elementwise.cu", include_str!("../kernels/elementwise.cu")),
            Family::Lora => ("lora.cu", include_str!("../kernels/lora.cu")),
            Family::Loss => ("loss.cu", include_str!("../kernels/loss.cu")),
            Family::Nf4 => ("nf4.cu", include_str!("../kernels/nf4.cu")),
            Family::Norm => ("norm.cu", include_str!("../kernels/norm.cu")),
            Family::Reduce => ("reduce.cu", include_str!("../kernels/reduce.cu")),
            Family::Rope => ("rope.cu", include_str!("../kernels/rope.cu")),
            Family::Swiglu => ("swiglu.cu", include_str!("../kernels/swiglu.cu")),
        }
    }
}

/// A family with its macros: S (source dtype), D (destination dtype), T (compute dtype), HD (head dimension), RP (padded
/// rank).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    pub(crate) family: Family,
    pub(crate) s: Option<Dtype>,
    pub(crate) d: Option<Dtype>,
    pub(crate) t: Option<Dtype>,
    pub(crate) head_dim: Option<u32>,
    pub(crate) rank: Option<u32>,
}

impl Variant {
    pub(crate) const fn plain(family: Family) -> Self {
        Self { family, s: None, d: None, t: None, head_dim: None, rank: None }
    }

    pub(crate) const fn of(family: Family, t: Dtype) -> Self {
        Self { t: Some(t), ..Self::plain(family) }
    }

    pub(crate) const fn from_to(family: Family, s: Dtype, t: Dtype) -> Self {
        Self { s: Some(s), t: Some(t), ..Self::plain(family) }
    }

    fn macros(&self) -> Vec<String> {
        let dtype = |name: &str, d: Option<Dtype>| {
            let name_of = |d| match d {
                Dtype::F32 => "f32",
                Dtype::F16 => "f16",
                Dtype::Bf16 => "bf16",
                Dtype::U32 => "u32",
            };
            d.map(|d| format!("-D{name}={}", name_of(d)))
        };
        let number = |name: &str, n: Option<u32>| n.map(|n| format!("-D{name}={n}"));
        [
            dtype("S", self.s),
            dtype("D", self.d),
            dtype("T", self.t),
            number("HD", self.head_dim),
            number("RP", self.rank),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// What machine code is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Machine code of one architecture, 90 for sm_90.
    Cubin(u32),
    /// PTX that the driver finishes: for cards that are newer than the compiler.
    Ptx(u32),
}

impl Target {
    /// The best that the compiler at hand can do for a card.
    fn for_card(sm: u32) -> Result<Self, String> {
        libraries::nvrtc()?;
        let mut count = 0;
        // SAFETY: the library is open; the pointer is to a local.
        unsafe { nvrtc::nvrtcGetNumSupportedArchs(&mut count) }.result().map_err(|e| e.to_string())?;
        let mut archs = vec![0; count.max(0) as usize];
        // SAFETY: `archs` has the room that the library asked for.
        unsafe { nvrtc::nvrtcGetSupportedArchs(archs.as_mut_ptr()) }.result().map_err(|e| e.to_string())?;
        if archs.contains(&(sm as i32)) {
            return Ok(Target::Cubin(sm));
        }
        let below = archs.iter().filter(|&&a| a > 0 && (a as u32) < sm).max();
        below.map(|&a| Target::Ptx(a as u32)).ok_or_else(|| {
            format!("libnvrtc cannot compile for this card (sm_{sm})\n  hint: the card is too old, or libnvrtc much too new for it")
        })
    }

    fn option(self) -> String {
        match self {
            Target::Cubin(a) => format!("--gpu-architecture=sm_{a}"),
            Target::Ptx(a) => format!("--gpu-architecture=compute_{a}"),
        }
    }
}

const OPTIONS: [&str; 2] = ["--std=c++17", "--ftz=true"];

/// A compiled module and the compiler's log.
pub(crate) struct Compiled {
    pub(crate) image: Vec<u8>,
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) log: String,
}

/// Compiles a variant; `extra` are further options.
///
/// # Errors
/// No compiler, or its log.
pub(crate) fn compile(variant: Variant, target: Target, extra: &[&str]) -> Result<Compiled, String> {
    libraries::nvrtc()?;
    let (name, source) = variant.family.source();
    let text = |s: &str| CString::new(s).map_err(|e| format!("{name}: {e}"));
    let source = text(source)?;
    let file = text(name)?;
    let headers = HEADERS.iter().map(|(_, h)| text(h)).collect::<Result<Vec<_>, _>>()?;
    let header_pointers: Vec<*const c_char> = headers.iter().map(|h| h.as_ptr()).collect();
    let header_names: Vec<*const c_char> = HEADERS.iter().map(|(n, _)| n.as_ptr()).collect();
    let mut options: Vec<String> = OPTIONS.iter().chain(extra).map(|s| s.to_string()).collect();
    options.push(target.option());
    options.extend(variant.macros());
    let options = options.iter().map(|o| text(o)).collect::<Result<Vec<_>, _>>()?;
    let option_pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();

    struct Program(nvrtc::nvrtcProgram);
    impl Drop for Program {
        fn drop(&mut self) {
            // SAFETY: made below, destroyed once.
            let _ = unsafe { nvrtc::nvrtcDestroyProgram(&mut self.0) };
        }
    }
    let fail = |e: cudarc::nvrtc::result::NvrtcError| format!("{name}: {e}");
    // SAFETY: all pointers are to NUL-terminated strings that outlive the program, and sizes are asked for before each copy.
    unsafe {
        let mut program = Program(std::ptr::null_mut());
        nvrtc::nvrtcCreateProgram(
            &mut program.0,
            source.as_ptr(),
            file.as_ptr(),
            headers.len() as i32,
            header_pointers.as_ptr(),
            header_names.as_ptr(),
        )
        .result()
        .map_err(fail)?;
        let compiled =
            nvrtc::nvrtcCompileProgram(program.0, option_pointers.len() as i32, option_pointers.as_ptr()).result();
        let mut size = 0;
        nvrtc::nvrtcGetProgramLogSize(program.0, &mut size).result().map_err(fail)?;
        let mut log = vec![0u8; size];
        nvrtc::nvrtcGetProgramLog(program.0, log.as_mut_ptr().cast()).result().map_err(fail)?;
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_string();
        compiled.map_err(|e| format!("{name} for {target:?}, {:?}: {e}\n{log}", variant.macros()))?;
        let image = match target {
            Target::Cubin(_) => {
                nvrtc::nvrtcGetCUBINSize(program.0, &mut size).result().map_err(fail)?;
                let mut image = vec![0u8; size];
                nvrtc::nvrtcGetCUBIN(program.0, image.as_mut_ptr().cast()).result().map_err(fail)?;
                image
            }
            Target::Ptx(_) => {
                nvrtc::nvrtcGetPTXSize(program.0, &mut size).result().map_err(fail)?;
                let mut image = vec![0u8; size];
                nvrtc::nvrtcGetPTX(program.0, image.as_mut_ptr().cast()).result().map_err(fail)?;
                image
            }
        };
        Ok(Compiled { image, log })
    }
}

/// Where compiled kernels are kept: `$CASHTAG_CACHE/kernels`, else `$XDG_CACHE_HOME/cashtag/kernels`, else `~/.cache/cashtag/kernels`.
pub fn cache_folder() -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = var("CASHTAG_CACHE").or_else(|| {
        let base = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|h| h.join(".cache")));
        base.map(|b| b.join("cashtag"))
    });
    cache.map(|c| c.join("kernels"))
}

/// The file of a variant for a card. The compiler's version is left out: its machine code runs whatever compiled it, and a card without
/// a compiler beside it can still use the cache.
fn cache_file(folder: &Path, variant: Variant, sm: u32) -> PathBuf {
    let (name, source) = variant.family.source();
    let mut hash = Sha256::new();
    for part in HEADERS.iter().map(|h| h.1).chain([source]).chain(OPTIONS) {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.update(variant.macros().join(" "));
    let name = name.trim_end_matches(".cu");
    folder.join(format!("{name}-sm{sm}-{}.kernel", hex(&hash.finalize()[..10])))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

const MAGIC: &[u8; 8] = b"cashtagK";

/// The module in a cache file, if it is whole.
fn read_cache(file: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(file).ok()?;
    let rest = bytes.strip_prefix(MAGIC)?;
    let (hash, image) = rest.split_at_checked(32)?;
    (Sha256::digest(image).as_slice() == hash && !image.is_empty()).then(|| image.to_vec())
}

/// Writes beside the target and renames, so that no reader ever sees half a file.
fn write_cache(file: &Path, image: &[u8]) {
    let Some(folder) = file.parent() else { return };
    let temporary = file.with_extension(format!("{}.tmp", std::process::id()));
    let contents = [MAGIC.as_slice(), Sha256::digest(image).as_slice(), image].concat();
    let written = std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&temporary, contents))
        .and_then(|()| std::fs::rename(&temporary, file));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
}

/// The loaded modules of one device.
pub(crate) struct Kernels {
    device: Arc<Device>,
    folder: Option<PathBuf>,
    functions: RwLock<HashMap<(Variant, &'static str), Function>>,
    modules: Mutex<HashMap<Variant, driver::CUmodule>>,
}

// SAFETY: modules are handles of the driver and are only touched with the context current.
unsafe impl Send for Kernels {}
unsafe impl Sync for Kernels {}

impl Kernels {
    pub(crate) fn new(device: &Arc<Device>, folder: Option<PathBuf>) -> Self {
        Self { device: Arc::clone(device), folder, functions: RwLock::default(), modules: Mutex::default() }
    }

    /// A kernel, compiled and loaded on first use. A kernel that was given more than 48 KiB of shared memory once keeps the permission.
    pub(crate) fn get(&self, variant: Variant, name: &'static str) -> Result<Function> {
        if let Some(&f) = self.functions.read().unwrap_or_else(PoisonError::into_inner).get(&(variant, name)) {
            return Ok(f);
        }
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        self.device.bind()?;
        let module = match modules.get(&variant) {
            Some(&m) => m,
            None => {
                let m = self.load(variant)?;
                modules.insert(variant, m);
                m
            }
        };
        let symbol = CString::new(name).map_err(|e| self.device.error(e.to_string()))?;
        // SAFETY: the module is loaded and never unloaded.
        let raw = self.device.check(unsafe { result::module::get_function(module, symbol) })?;
        let most = self.device.facts.shared_memory as i32;
        let attribute = driver::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        if matches!(variant.family, Family::Attention | Family::Lora) {
            // SAFETY: the function is valid.
            self.device.check(unsafe { result::function::set_function_attribute(raw, attribute, most) })?;
        }
        let function = Function { raw, name };
        self.functions.write().unwrap_or_else(PoisonError::into_inner).insert((variant, name), function);
        Ok(function)
    }

    fn load(&self, variant: Variant) -> Result<driver::CUmodule> {
        let sm = self.device.facts.sm;
        let file = self.folder.as_deref().map(|f| cache_file(f, variant, sm));
        if let Some(image) = file.as_deref().and_then(read_cache)
            && let Ok(module) = load_image(&image)
        {
            return Ok(module);
        }
        let target = Target::for_card(sm).map_err(|e| self.device.error(e))?;
        let image = compile(variant, target, &[]).map_err(|e| self.device.error(e))?.image;
        let module = load_image(&image).map_err(|e| self.device.error(e))?;
        if let Some(file) = &file {
            write_cache(file, &image);
        }
        Ok(module)
    }
}

fn load_image(image: &[u8]) -> Result<driver::CUmodule, String> {
    // PTX must end in a NUL; machine code does not mind one.
    let mut image = image.to_vec();
    image.push(0);
    // SAFETY: the image is a whole cubin or NUL-terminated PTX: from the compiler, or from a cache file whose hash was right.
    unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(describe)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

    fn variants(family: Family) -> Vec<Variant> {
        let of = |t| Variant::of(family, t);
        match family {
            Family::Reduce => vec![Variant::plain(family)],
            Family::Elementwise => FLOATS
                .iter()
                .flat_map(|&s| FLOATS.map(|d| Variant { s: Some(s), d: Some(d), ..Variant::plain(family) }))
                .collect(),
            Family::Norm | Family::Nf4 => {
                FLOATS.iter().flat_map(|&s| FLOATS.map(|t| Variant::from_to(family, s, t))).collect()
            }
            Family::Attention => [Dtype::F16, Dtype::Bf16]
                .iter()
                .flat_map(|&t| [64, 128].map(|h| Variant { head_dim: Some(h), ..of(t) }))
                .collect(),
            Family::Lora => [Dtype::F16, Dtype::Bf16]
                .iter()
                .flat_map(|&t| [64, 128, 192].map(|r| Variant { rank: Some(r), ..of(t) }))
                .collect(),
            _ => FLOATS.map(of).to_vec(),
        }
    }

    /// Every kernel for every architecture that cashtag names, on a machine without a GPU. A spilled register is a failure: it is
    /// memory traffic that nobody counted.
    #[test]
    fn every_kernel_compiles_without_spills() {
        if let Err(e) = libraries::nvrtc() {
            println!("skipped: {e}");
            return;
        }
        let jobs: Vec<(Variant, u32)> = Family::ALL
            .into_iter()
            .flat_map(variants)
            .flat_map(|v| [75, 80, 86, 89, 90].map(|sm| (v, sm)))
            // Only the bf16 matrix instructions are missing from sm_75.
            .filter(|(v, sm)| {
                *sm >= 80 || v.t != Some(Dtype::Bf16) || !matches!(v.family, Family::Attention | Family::Lora)
            })
            .collect();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let kernels: usize = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|t| {
                    scope.spawn({
                        let jobs = &jobs;
                        move || jobs[t..].iter().step_by(threads).map(|&(v, sm)| no_spills(v, sm)).sum::<usize>()
                    })
                })
                .collect();
            workers.into_iter().map(|w| w.join().unwrap()).sum()
        });
        println!("{kernels} kernels compiled");
    }

    /// Compiles a variant and looks at the compiler's report of each of its kernels; returns how many there are.
    fn no_spills(variant: Variant, sm: u32) -> usize {
        let compiled = compile(variant, Target::Cubin(sm), &["--ptxas-options=-v"]).unwrap();
        let reports: Vec<&str> = compiled.log.lines().filter(|l| l.contains("bytes spill stores")).collect();
        assert!(!reports.is_empty(), "no resource report for {variant:?}:\n{}", compiled.log);
        for line in &reports {
            assert!(
                line.contains("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"),
                "{variant:?} on sm_{sm} spills:\n{}",
                compiled.log
            );
        }
        reports.len()
    }

    #[test]
    fn a_damaged_cache_file_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let variant = Variant::of(Family::Rope, Dtype::F16);
        let file = cache_file(folder.path(), variant, 90);
        assert_ne!(file, cache_file(folder.path(), Variant::of(Family::Rope, Dtype::F32), 90));
        assert_eq!(read_cache(&file), None);
        write_cache(&file, b"machine code");
        assert_eq!(read_cache(&file).as_deref(), Some(b"machine code".as_slice()));
        let whole = std::fs::read(&file).unwrap();
        std::fs::write(&file, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(read_cache(&file), None);
        let mut changed = whole.clone();
        changed[50] ^= 1;
        std::fs::write(&file, changed).unwrap();
        assert_eq!(read_cache(&file), None);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

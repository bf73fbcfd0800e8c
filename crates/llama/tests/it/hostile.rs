//! Damaged and hostile files: never a panic, never memory out of proportion. Fuzz targets as plain tests: real files are
//! cut, flipped and given absurd numbers, and whatever still opens is read to the end.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Read;
use std::path::Path;
use std::sync::OnceLock;

use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::gguf::Gguf;
use cashtag_llama::tokenizer::Tokenizer;
use proptest::prelude::*;

use crate::{fixture, model};

/// Counts what the current thread holds, so that tests beside this one do not matter.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that is ending has no counters any more.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call is handed on to the system's allocator unchanged; the counters are plain thread-local numbers.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `work` and checks that it never held more than 64 MB beyond what was held before.
fn bounded(work: impl FnOnce()) {
    let before = HELD.with(Cell::get);
    PEAK.with(|peak| peak.set(before));
    work();
    let extra = PEAK.with(Cell::get) - before;
    assert!(extra < 64 << 20, "{extra} bytes");
}

/// One piece of damage, at a place given as a fraction of the file.
#[derive(Clone, Debug)]
enum Damage {
    Truncate(f64),
    Flip(f64, u8),
    /// Eight bytes overwritten by a number: a count, a length or an offset if it hits one.
    Number(f64, u64),
    Insert(f64, Vec<u8>),
}

fn damage(head: f64) -> impl Strategy<Value = Damage> {
    // Mostly in the head, where the structure is.
    let place = prop_oneof![4 => 0.0..head, 1 => 0.0..1.0];
    let number = prop_oneof![
        Just(u64::MAX),
        Just(u64::MAX / 2),
        Just(1 << 62),
        Just(1 << 40),
        Just(1 << 32),
        Just((1 << 31) - 1),
        0u64..300,
        any::<u64>(),
    ];
    prop_oneof![
        place.clone().prop_map(Damage::Truncate),
        (place.clone(), any::<u8>()).prop_map(|(at, byte)| Damage::Flip(at, byte)),
        (place.clone(), number).prop_map(|(at, number)| Damage::Number(at, number)),
        (place, prop::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
    ]
}

fn apply(bytes: &mut Vec<u8>, all: &[Damage]) {
    for damage in all {
        let place = |at: f64| ((bytes.len() as f64 * at) as usize).min(bytes.len());
        match damage {
            Damage::Truncate(at) => bytes.truncate(place(*at)),
            Damage::Flip(at, with) => {
                let at = place(*at);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= with;
                }
            }
            Damage::Number(at, number) => {
                let at = place(*at);
                if let Some(there) = bytes.get_mut(at..at + 8) {
                    there.copy_from_slice(&number.to_le_bytes());
                }
            }
            Damage::Insert(at, new) => {
                let at = place(*at);
                bytes.splice(at..at, new.iter().copied());
            }
        }
    }
}

/// Reads everything that a checkpoint offers.
fn exhaust(path: &Path) {
    let Ok(checkpoint) = Checkpoint::open(path) else { return };
    let mut row = Vec::new();
    for name in checkpoint.tensor_names() {
        if let Ok(weight) = checkpoint.weight(&name) {
            let _ = weight.raw();
            row.resize(weight.cols(), 0.0);
            for at in 0..weight.rows() {
                let _ = weight.read_rows(at..at + 1, &mut row);
            }
        }
        let _ = checkpoint.vector(&name);
    }
    let _ = checkpoint.describe();
    let _ = checkpoint.chat_template();
    if let Ok(tokenizer) = checkpoint.tokenizer() {
        use_tokenizer(&tokenizer);
    }
}

fn use_tokenizer(tokenizer: &Tokenizer) {
    let ids = tokenizer.encode("  $TSLA to the 🚀\n日本 <s></s> 123\u{0}");
    let _ = tokenizer.decode(&ids, true);
    let all: Vec<u32> = (0..tokenizer.vocab_size() as u32 + 2).collect();
    let _ = tokenizer.decode(&all, false);
}

fn mutated(name: &str, all: &[Damage], file: &str, others: &[&str]) {
    let mut bytes = std::fs::read(fixture(name)).unwrap();
    apply(&mut bytes, all);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(file), bytes).unwrap();
    for other in others {
        let other = fixture(other);
        std::fs::copy(&other, dir.path().join(other.file_name().unwrap())).unwrap();
    }
    let path = if file.ends_with(".gguf") { dir.path().join(file) } else { dir.path().to_owned() };
    bounded(|| {
        exhaust(&path);
        if let Ok(gguf) = Gguf::open(&path)
            && let Ok(tokenizer) = Tokenizer::from_gguf(&gguf)
        {
            use_tokenizer(&tokenizer);
        }
        if path.is_dir()
            && let Ok(tokenizer) = Tokenizer::from_hf_dir(&path)
        {
            use_tokenizer(&tokenizer);
        }
    });
}

fn some(head: f64) -> impl Strategy<Value = Vec<Damage>> {
    prop::collection::vec(damage(head), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn gguf_models(all in some(0.1)) {
        mutated("tiny.gguf", &all, "m.gguf", &[]);
    }

    #[test]
    fn gguf_tokenizers(all in some(0.9)) {
        mutated("spm/tokenizer.gguf", &all, "m.gguf", &[]);
    }

    #[test]
    fn sentencepiece_models(all in some(0.9)) {
        mutated("spm/tokenizer.model", &all, "tokenizer.model", &["spm/tokenizer_config.json"]);
    }

    #[test]
    fn safetensors(all in some(0.05)) {
        mutated("tiny-tied/model.safetensors", &all, "model.safetensors", &["tiny-tied/config.json"]);
    }

    #[test]
    fn nf4(all in some(0.1)) {
        mutated("tiny-nf4/model.safetensors", &all, "model.safetensors", &["tiny-nf4/config.json"]);
    }

    #[test]
    fn configs(all in some(0.9)) {
        mutated("tiny-tied/config.json", &all, "config.json", &["tiny-tied/model.safetensors"]);
    }

    #[test]
    fn tokenizer_json(all in some(0.9)) {
        mutated("spm/tokenizer.json", &all, "tokenizer.json", &["spm/tokenizer_config.json"]);
    }

    #[test]
    fn byte_level_tokenizer_json(all in some(0.9)) {
        mutated("bpe/tokenizer.json", &all, "tokenizer.json", &[]);
    }

    #[test]
    fn tokenizer_configs(all in some(0.9)) {
        mutated("spm/tokenizer_config.json", &all, "tokenizer_config.json", &["spm/tokenizer.json"]);
    }

    #[test]
    fn noise(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut gguf = b"GGUF\x03\0\0\0".to_vec();
        gguf.extend(&bytes);
        bounded(|| drop(Gguf::from_bytes(Path::new("noise"), gguf)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// The real model's metadata and directory, without its data.
    #[test]
    fn the_real_header(all in some(0.98)) {
        let mut bytes = real_header().to_vec();
        apply(&mut bytes, &all);
        bounded(|| {
            if let Ok(gguf) = Gguf::from_bytes(Path::new("real"), bytes)
                && let Ok(tokenizer) = Tokenizer::from_gguf(&gguf)
            {
                use_tokenizer(&tokenizer);
            }
        });
    }
}

/// The head of the real file as a file of its own that announces no tensors.
fn real_header() -> &'static [u8] {
    static HEADER: OnceLock<Vec<u8>> = OnceLock::new();
    HEADER.get_or_init(|| {
        let mut bytes = vec![0; 1_800_000];
        std::fs::File::open(model()).unwrap().read_exact(&mut bytes).unwrap();
        bytes[8..16].copy_from_slice(&0u64.to_le_bytes());
        assert!(Gguf::from_bytes(Path::new("real"), bytes.clone()).is_ok());
        bytes
    })
}

/// A million metadata pairs, tensors or entries that would each fit the file still end in an error, soon.
#[test]
fn floods() {
    let mut gguf = b"GGUF\x03\0\0\0".to_vec();
    gguf.extend((1u64 << 20).to_le_bytes());
    gguf.extend(0u64.to_le_bytes());
    gguf.resize(64 << 20, 0);
    bounded(|| assert!(Gguf::from_bytes(Path::new("flood"), gguf).is_err()));

    let dir = tempfile::tempdir().unwrap();
    let config = std::fs::read(fixture("tiny-tied/config.json")).unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    let mut header = String::from("{");
    while header.len() < 8_300_000 {
        header.push_str(&format!("\"{:x}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}},", header.len()));
    }
    header.pop();
    header.push('}');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    bounded(|| assert!(Checkpoint::open(dir.path()).is_err()));

    let deep = "[".repeat(200_000);
    let wide = format!("[{}[]]", "[],".repeat(2_700_000));
    let objects = format!("[{}0]", "{\"a\":0},".repeat(1_000_000));
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        for text in [&deep, &wide, &objects] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(file), text).unwrap();
            bounded(|| {
                assert!(Checkpoint::open(dir.path()).is_err());
                assert!(Tokenizer::from_hf_dir(dir.path()).is_err());
            });
        }
    }
}

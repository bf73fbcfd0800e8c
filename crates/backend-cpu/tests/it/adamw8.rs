//! 8-bit AdamW against bitsandbytes: `adamw8.json`, made by `make_adamw8.py`.

use cashtag_backend::{AdamW, BLOCK_8BIT, Backend, Dtype, Moments8, dynamic_map, philox};
use cashtag_backend_cpu::{CpuBackend, CpuBuffer, Precision};
use serde_json::Value;

fn uniform(n: usize, stream: u32) -> Vec<f32> {
    (0..n as u32)
        .map(|i| (philox::philox4x32([i, stream, 0, 0], [1, 0])[0] >> 8) as f32 / (1u32 << 23) as f32 - 1.0)
        .collect()
}

fn base64(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut held) = (Vec::new(), 0u32, 0);
    for c in text.bytes().filter(|c| *c != b'=') {
        bits = bits << 6 | ALPHABET.iter().position(|a| *a == c).unwrap() as u32;
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    bytes
}

fn floats(v: &Value) -> Vec<f32> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

fn read(b: &CpuBackend, buffer: &CpuBuffer) -> Vec<f32> {
    let mut values = vec![0.0; b.len(buffer)];
    b.download(buffer, 0, &mut values).unwrap();
    values
}

fn codes(b: &CpuBackend, buffer: &CpuBuffer, n: usize) -> Vec<u8> {
    let mut words = vec![0u32; n.div_ceil(4)];
    b.download_u32(buffer, &mut words).unwrap();
    words.into_iter().flat_map(u32::to_le_bytes).take(n).collect()
}

#[test]
fn as_bitsandbytes() {
    let golden: Value = serde_json::from_str(include_str!("adamw8.json")).unwrap();
    assert_eq!(floats(&golden["signed"]), dynamic_map::SIGNED);
    assert_eq!(floats(&golden["unsigned"]), dynamic_map::UNSIGNED);
    let b = CpuBackend::new(Precision::F32, 2).unwrap();
    let sizes: Vec<usize> = golden["sizes"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
    let len: usize = sizes.iter().sum();
    // One flat buffer, as the adapter's: the large tensor in codes, the small one in f32.
    let (mut table, mut first) = (Vec::new(), 0);
    for (i, &size) in sizes.iter().enumerate() {
        for start in (0..size).step_by(BLOCK_8BIT) {
            table.extend([first, BLOCK_8BIT.min(size - start) as u32, if i == 0 { u32::MAX } else { start as u32 }]);
            first += BLOCK_8BIT.min(size - start) as u32;
        }
    }
    let blocks = table.len() / 3;
    let mut table_buffer = b.zeros(Dtype::U32, table.len()).unwrap();
    b.upload_u32(&table, &mut table_buffer).unwrap();
    let zeros = |n| b.zeros(Dtype::F32, n).unwrap();
    let words = || b.zeros(Dtype::U32, len.div_ceil(4)).unwrap();
    let (mut m, mut v, mut absmax) = (words(), words(), zeros(2 * blocks));
    let (mut m32, mut v32) = (zeros(sizes[1]), zeros(sizes[1]));
    let (mut parameter, mut gradient, mut compute) = (zeros(len), zeros(len), zeros(len));
    let start: Vec<f32> =
        sizes.iter().enumerate().flat_map(|(i, &n)| uniform(n, i as u32)).map(|u| 0.02f32 * u).collect();
    b.upload(&start, &mut parameter, 0).unwrap();
    let mut checked = 0;
    for step in 0..10u32 {
        let g: Vec<f32> = sizes
            .iter()
            .enumerate()
            .flat_map(|(i, &n)| uniform(n, 100 + 10 * step + i as u32))
            .map(|u| u * u * u)
            .collect();
        // Scaled here and back by the optimizer.
        b.upload(&g.iter().map(|g| g * 4.0).collect::<Vec<_>>(), &mut gradient, 0).unwrap();
        let hyper = AdamW {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            step: step + 1,
            gradient_scale: 0.25,
        };
        let moments = Moments8 {
            table: &table_buffer,
            blocks,
            m: &mut m,
            v: &mut v,
            absmax: &mut absmax,
            m32: &mut m32,
            v32: &mut v32,
        };
        b.adamw_8bit(hyper, &mut parameter, &gradient, moments, &mut compute).unwrap();
        let Some(expected) = golden["steps"].as_array().unwrap().iter().find(|s| s["step"] == step + 1) else {
            continue;
        };
        checked += 1;
        // bitsandbytes' CPU code finds a level through a table of about 32,768 steps: what is smaller against its absmax it keeps
        // too coarsely, and near the middle between two levels it may take the other one. Ours is the nearest.
        let coarse = 1e-3f32;
        for (name, buffer, map) in [("m", &m, &dynamic_map::SIGNED), ("v", &v, &dynamic_map::UNSIGNED)] {
            let (found, expected) = (codes(&b, buffer, sizes[0]), base64(expected[name].as_str().unwrap()));
            assert_eq!(found.len(), expected.len());
            let level = |code: &u8| map[usize::from(*code)].abs();
            let clear: Vec<(&u8, &u8)> =
                found.iter().zip(&expected).filter(|(a, b)| level(a).max(level(b)) > coarse).collect();
            let differing = clear.iter().filter(|(a, b)| a != b).count();
            let far = clear.iter().map(|(a, b)| a.abs_diff(**b)).max().unwrap();
            println!(
                "step {}: {differing} of {} clear codes of {name} differ, by {far} at most",
                step + 1,
                clear.len()
            );
            // Later steps start from what was kept, coarsely or not.
            if step == 0 {
                assert!(clear.len() > found.len() * 2 / 3 && differing <= clear.len() / 50 && far <= 1, "{name}");
            }
        }
        let of_large = sizes[0].div_ceil(BLOCK_8BIT);
        let absmax = read(&b, &absmax);
        for (name, found) in [("absmax_m", &absmax[..of_large]), ("absmax_v", &absmax[blocks..blocks + of_large])] {
            for (found, expected) in found.iter().zip(floats(&expected[name])) {
                // 1 - β₂ is 1.3e-5 more in f32 than it is.
                assert!(step > 0 || (found / expected - 1.0).abs() < 3e-5, "{name}: {found} for {expected}");
            }
        }
        let found = read(&b, &parameter);
        for (i, part) in [&found[..sizes[0]], &found[sizes[0]..]].into_iter().enumerate() {
            let expected = floats(&expected["parameters"][i]);
            let far = part.iter().step_by(37).zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            println!("step {}: parameters of tensor {i} differ by {far:.1e} at most", step + 1);
            // The first step does not read what was kept, and the small tensor keeps everything.
            if step == 0 || i == 1 {
                assert!(far < 2e-6, "tensor {i}: {far}");
            }
        }
    }
    assert_eq!(checked, 2);
}

/// What is tiny against its block keeps its direction, and a block of zeros stays one.
#[test]
fn signs_survive() {
    let b = CpuBackend::new(Precision::F32, 1).unwrap();
    let zeros = |n| b.zeros(Dtype::F32, n).unwrap();
    let mut table = b.zeros(Dtype::U32, 6).unwrap();
    b.upload_u32(&[0, 4, u32::MAX, 4, 3, u32::MAX], &mut table).unwrap();
    let (mut m, mut v) = (b.zeros(Dtype::U32, 2).unwrap(), b.zeros(Dtype::U32, 2).unwrap());
    let (mut absmax, mut m32, mut v32) = (zeros(4), zeros(1), zeros(1));
    let (mut p, mut g, mut c) = (zeros(7), zeros(7), zeros(7));
    b.upload(&[1.0, -1e-9, 1e-9, -1.0, 0.0, 0.0, 0.0], &mut g, 0).unwrap();
    let hyper = AdamW {
        learning_rate: 0.1,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
        step: 1,
        gradient_scale: 1.0,
    };
    let moments =
        Moments8 { table: &table, blocks: 2, m: &mut m, v: &mut v, absmax: &mut absmax, m32: &mut m32, v32: &mut v32 };
    b.adamw_8bit(hyper, &mut p, &g, moments, &mut c).unwrap();
    let levels: Vec<f32> = codes(&b, &m, 7).into_iter().map(|c| dynamic_map::SIGNED[usize::from(c)]).collect();
    assert!(levels[0] == 1.0 && levels[1] < 0.0 && levels[2] >= 0.0 && levels[3] < -0.99, "{levels:?}");
    let p = read(&b, &p);
    assert!(p[0] < -0.09 && p[3] > 0.09 && p[4..].iter().all(|p| *p == 0.0), "{p:?}");
    assert_eq!(read(&b, &absmax)[1], 0.0);
    assert_eq!(read(&b, &c), p);
}

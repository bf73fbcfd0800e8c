//! Times every operation at Llama-2-7B's shapes on the GPU, beside the time that its bytes or its multiplications need at least, and adds
//! them up to a training step: what the operations allow, before anyone's model code.
//!
//!     cargo run --release -p cashtag-backend-cuda --example ops_bench [-- ROWS] [--resident nf4|bf16] [--filter TEXT]
//!
//! Inputs are random. Each operation walks over several sets of buffers, so that it does not find its inputs in the second-level cache
//! unless it would find them there in a model too; products walk over four layers' weights.

use std::error::Error;
use std::time::Instant;

use cashtag_backend::{AdamW, AttentionLayout, Backend, CrossEntropy, Dropout, Dtype, Rope, WeightSource};
use cashtag_backend_cuda::{CudaBackend, CudaBuffer, CudaWeight, Options, Resident};

mod shared;

use shared::*;

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Sets of buffers and weights that each operation walks over.
const SETS: usize = 4;

struct Line {
    name: &'static str,
    /// Calls in one layer's forward and backward: by the trait's operations alone, and with the fused ones beside it.
    calls: (usize, usize),
    us: f64,
    floor_us: f64,
    rate: String,
}

struct Bench {
    gpu: CudaBackend,
    random: Random,
    filter: String,
    lines: Vec<Line>,
    n: usize,
}

/// Measured ceilings of the card the targets are set on: bytes a microsecond and operations a microsecond.
const BYTES_PER_US: f64 = 3.0e6;
const FLOP_PER_US: f64 = 780e6;

impl Bench {
    fn buffer(&mut self, dtype: Dtype, len: usize) -> Result<CudaBuffer> {
        Ok(self.random.buffer(&self.gpu, dtype, len)?)
    }

    fn sets(&mut self, dtype: Dtype, len: usize) -> Result<Vec<CudaBuffer>> {
        (0..SETS).map(|_| self.buffer(dtype, len)).collect()
    }

    /// Microseconds of the card for a call, and of the host to queue it. The card's are those of a recorded sequence, so that the host
    /// cannot slow it down; work that cannot be recorded is timed as it is.
    fn time(&self, mut f: impl FnMut(&CudaBackend, usize) -> Result<()>) -> Result<(f64, f64)> {
        let timer = self.gpu.timer()?;
        let mut run = |calls: usize| -> Result<f64> {
            let started = Instant::now();
            timer.start()?;
            for i in 0..calls {
                f(&self.gpu, i % SETS)?;
            }
            let host = started.elapsed().as_secs_f64() * 1e6 / calls as f64;
            timer.stop()?;
            timer.milliseconds()?;
            Ok(host)
        };
        run(SETS)?;
        let host = run(2 * SETS)?;
        let once = f64::from(timer.milliseconds()?) * 1e3 / (2 * SETS) as f64;
        let calls = ((3e3 / once) as usize).clamp(SETS, 200).next_multiple_of(SETS);
        let recorded = self.gpu.capture(|| {
            for i in 0..calls {
                // Errors of the example's own kind cannot pass through here; the backend's are all there are.
                f(&self.gpu, i % SETS)
                    .map_err(|e| cashtag_backend::Error::Device { device: "cuda:0".into(), what: e.to_string() })?;
            }
            Ok(())
        });
        let mut times = Vec::new();
        for _ in 0..7 {
            timer.start()?;
            match &recorded {
                // SAFETY: the buffers belong to the caller of `line`, which outlives this.
                Ok(graph) => unsafe { graph.launch()? },
                Err(_) => {
                    for i in 0..calls {
                        f(&self.gpu, i % SETS)?;
                    }
                }
            }
            timer.stop()?;
            times.push(f64::from(timer.milliseconds()?) * 1e3 / calls as f64);
        }
        times.remove(0);
        times.sort_by(f64::total_cmp);
        Ok((times[2], host))
    }

    fn line(
        &mut self,
        name: &'static str,
        calls: (usize, usize),
        bytes: usize,
        flop: usize,
        f: impl FnMut(&CudaBackend, usize) -> Result<()>,
    ) -> Result<()> {
        if !name.contains(&self.filter) {
            return Ok(());
        }
        let (us, host) = self.time(f)?;
        let (by_bytes, by_flop) = (bytes as f64 / BYTES_PER_US, flop as f64 / FLOP_PER_US);
        let rate = if by_flop > by_bytes {
            format!("{:.0} TFLOP/s", flop as f64 / us / 1e6)
        } else {
            format!("{:.0} GB/s", bytes as f64 / us / 1e3)
        };
        println!("{name:<38} {us:>8.1} us   floor {:>7.1}   {rate:<14} host {host:.1} us", by_bytes.max(by_flop));
        self.lines.push(Line { name, calls, us, floor_us: by_bytes.max(by_flop), rate });
        Ok(())
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |flag: &str| arguments.iter().position(|a| a == flag).and_then(|i| arguments.get(i + 1)).cloned();
    let n = arguments.first().and_then(|a| a.parse().ok()).unwrap_or(1740);
    let resident = if value("--resident").as_deref() == Some("nf4") { Resident::Nf4 } else { Resident::Bf16 };
    let started = Instant::now();
    let gpu = CudaBackend::new(0, Options { resident, lora_r: RANK, ..Options::default() })?;
    println!("{}\nopened in {:.2} s", cashtag_backend_cuda::probe(), started.elapsed().as_secs_f64());
    let mut b = Bench { gpu, random: Random(7), filter: value("--filter").unwrap_or_default(), lines: Vec::new(), n };
    rows(&mut b)?;
    attention(&mut b)?;
    loss_and_optimizer(&mut b)?;
    products(&mut b)?;
    summary(&b);
    Ok(())
}

fn rows(b: &mut Bench) -> Result<()> {
    let n = b.n;
    let t = b.gpu.compute_dtype();
    let x32 = b.sets(Dtype::F32, n * D)?;
    let mut dx32 = b.sets(Dtype::F32, n * D)?;
    let x = b.sets(t, n * D)?;
    let mut y = b.sets(t, n * D)?;
    let mut y2 = b.sets(t, n * D)?;
    let w = b.buffer(Dtype::F32, D)?;
    let mut inv = b.buffer(Dtype::F32, n)?;
    let nd = n * D;
    b.line(
        "copy f32 [n, d]",
        (2, 0),
        nd * 8,
        0,
        |g, i| Ok(g.copy(view(&x32[i], n, D), view_mut(&mut dx32[i], n, D))?),
    )?;
    let d = Dropout { p: 0.1, seed: 1, step: 1, site: 1 };
    b.line("rms_norm, y and dropout(y)", (0, 2), nd * 8, 0, |g, i| {
        let (y, dropped) = (view_mut(&mut y[i], n, D), view_mut(&mut y2[i], n, D));
        Ok(g.rms_norm_dropout(view(&x32[i], n, D), &w, 1e-5, Some(y), (d, dropped), &mut inv)?)
    })?;
    b.line("rms_norm, dropout(y)", (0, 2), nd * 6, 0, |g, i| {
        Ok(g.rms_norm_dropout(view(&x32[i], n, D), &w, 1e-5, None, (d, view_mut(&mut y[i], n, D)), &mut inv)?)
    })?;
    b.line("rms_norm", (4, 0), nd * 6, 0, |g, i| {
        Ok(g.rms_norm(view(&x32[i], n, D), &w, 1e-5, view_mut(&mut y[i], n, D), &mut inv)?)
    })?;
    b.line("rms_norm_backward", (2, 0), nd * 14, 0, |g, i| {
        Ok(g.rms_norm_backward(view(&x[i], n, D), view(&x32[i], n, D), &w, &inv, view_mut(&mut dx32[i], n, D))?)
    })?;
    b.line("rms_norm_backward, copy", (0, 2), nd * 16, 0, |g, i| {
        let (dx, copy) = (view_mut(&mut dx32[i], n, D), view_mut(&mut y[i], n, D));
        Ok(g.rms_norm_backward_copy(view(&x[i], n, D), view(&x32[i], n, D), &w, &inv, dx, copy)?)
    })?;
    b.line("copy f32 to T [n, d]", (2, 0), nd * 6, 0, |g, i| {
        Ok(g.copy(view(&x32[i], n, D), view_mut(&mut y[i], n, D))?)
    })?;
    b.line("dropout [n, d]", (6, 2), nd * 4, 0, |g, i| {
        Ok(g.dropout(view(&x[i], n, D), d, false, view_mut(&mut y[i], n, D))?)
    })?;
    b.line("dropout accumulate [n, d]", (3, 0), nd * 6, 0, |g, i| {
        Ok(g.dropout(view(&x[i], n, D), d, true, view_mut(&mut y[i], n, D))?)
    })?;
    let nf = n * F;
    let gate_up = b.sets(t, 2 * nf)?;
    let mut d_gate_up = b.sets(t, 2 * nf)?;
    let h = b.sets(t, nf)?;
    let mut h2 = b.sets(t, nf)?;
    let mut h3 = b.sets(t, nf)?;
    b.line("dropout [n, f]", (2, 0), nf * 4, 0, |g, i| {
        Ok(g.dropout(view(&h[i], n, F), d, false, view_mut(&mut h2[i], n, F))?)
    })?;
    b.line("dropout accumulate [n, f]", (1, 0), nf * 6, 0, |g, i| {
        Ok(g.dropout(view(&h[i], n, F), d, true, view_mut(&mut h2[i], n, F))?)
    })?;
    b.line("swiglu, h and dropout(h)", (0, 1), nf * 8, 0, |g, i| {
        let (h, dropped) = (view_mut(&mut h2[i], n, F), view_mut(&mut h3[i], n, F));
        Ok(g.swiglu_dropout(view(&gate_up[i], n, 2 * F), Some(h), (d, dropped))?)
    })?;
    b.line("swiglu, dropout(h)", (0, 1), nf * 6, 0, |g, i| {
        Ok(g.swiglu_dropout(view(&gate_up[i], n, 2 * F), None, (d, view_mut(&mut h2[i], n, F)))?)
    })?;
    b.line("swiglu", (2, 0), nf * 6, 0, |g, i| Ok(g.swiglu(view(&gate_up[i], n, 2 * F), view_mut(&mut h2[i], n, F))?))?;
    b.line("swiglu_backward", (1, 1), nf * 10, 0, |g, i| {
        Ok(g.swiglu_backward(view(&h[i], n, F), view(&gate_up[i], n, 2 * F), view_mut(&mut d_gate_up[i], n, 2 * F))?)
    })?;
    let mut qkv = b.sets(t, n * 3 * D)?;
    let tables = [b.buffer(Dtype::F32, 512 * HEAD_DIM / 2)?, b.buffer(Dtype::F32, 512 * HEAD_DIM / 2)?];
    let mut positions = b.gpu.uninit(Dtype::U32, n)?;
    b.gpu.upload_u32(&(0..n as u32).map(|i| i % 512).collect::<Vec<_>>(), &mut positions)?;
    b.line("rope of q and k", (2, 2), nd * 2 * 4, 0, |g, i| {
        let rope = Rope { head_dim: HEAD_DIM, cos: &tables[0], sin: &tables[1], positions: &positions };
        Ok(g.rope(rope, false, view_mut(&mut qkv[i], n, 3 * D).columns(0, 2 * D))?)
    })
}

fn attention(b: &mut Bench) -> Result<()> {
    let t = b.gpu.compute_dtype();
    for (name, calls, layout) in [
        (["attention", "attention_backward"], 1, packed(b.n)),
        (["attention, one of 4096", "attention_backward, one of 4096"], 0, AttentionLayout::packed(0, &[0], &[4096])),
    ] {
        let n = layout.q_rows();
        let qkv = b.sets(t, n * 3 * D)?;
        let mut o = b.sets(t, n * D)?;
        let d_o = b.sets(t, n * D)?;
        let mut d_qkv = b.sets(t, n * 3 * D)?;
        let mut lse = b.gpu.zeros(Dtype::F32, n * HEADS)?;
        let flop = layout.pairs() * HEADS * HEAD_DIM * 4;
        b.line(name[0], (calls, calls), n * D * 8, flop, |g, i| {
            let all = view(&qkv[i], n, 3 * D);
            let (q, k, v) = (all.columns(0, D), all.columns(D, D), all.columns(2 * D, D));
            Ok(g.attention(&layout, HEAD_DIM, q, k, v, view_mut(&mut o[i], n, D), &mut lse)?)
        })?;
        b.line(name[1], (calls, calls), n * D * 16, flop * 5 / 2, |g, i| {
            let (qkv, o, d_o) = (view(&qkv[i], n, 3 * D), view(&o[i], n, D), view(&d_o[i], n, D));
            Ok(g.attention_backward(&layout, HEAD_DIM, HEADS, qkv, o, &lse, d_o, view_mut(&mut d_qkv[i], n, 3 * D))?)
        })?;
    }
    Ok(())
}

fn loss_and_optimizer(b: &mut Bench) -> Result<()> {
    let t = b.gpu.compute_dtype();
    let n = 3 * EXAMPLES;
    let logits = b.sets(Dtype::F32, n * VOCAB)?;
    let mut d = b.sets(t, n * VOCAB)?;
    let mut targets = b.gpu.uninit(Dtype::U32, n)?;
    b.gpu.upload_u32(&vec![17; n], &mut targets)?;
    let weights = b.buffer(Dtype::F32, n)?;
    let mut loss = b.gpu.zeros(Dtype::F32, n)?;
    b.line("cross_entropy, 96 rows", (0, 0), n * VOCAB * 6, 0, |g, i| {
        let e = CrossEntropy { targets: &targets, weights: &weights, label_smoothing: 0.0, gradient_scale: 1.0 };
        Ok(g.cross_entropy(view(&logits[i], n, VOCAB), e, &mut loss, Some(view_mut(&mut d[i], n, VOCAB)))?)
    })?;
    let len = 40_000_000;
    let (mut p, gradient) = (b.buffer(Dtype::F32, len)?, b.buffer(Dtype::F32, len)?);
    let (mut m, mut v) = (b.gpu.zeros(Dtype::F32, len)?, b.gpu.zeros(Dtype::F32, len)?);
    let mut compute = b.gpu.zeros(t, len)?;
    b.line("adamw, 40 M", (0, 0), len * 30, 0, |g, _| {
        let h = AdamW {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            step: 1,
            gradient_scale: 1.0,
        };
        Ok(g.adamw(h, &mut p, &gradient, &mut m, &mut v, &mut compute)?)
    })?;
    b.line("sum_of_squares, 40 M (waits)", (0, 0), len * 4, 0, |g, _| {
        g.sum_of_squares(&gradient)?;
        Ok(())
    })?;
    b.line("fill_zero, 40 M", (0, 0), len * 4, 0, |g, _| Ok(g.fill_zero(&mut m)?))
}

fn products(b: &mut Bench) -> Result<()> {
    for site in &SITES {
        frozen(b, site)?;
        lora(b, site)?;
    }
    Ok(())
}

fn frozen(b: &mut Bench, &Site { name: site, count, out, inner, residual }: &Site) -> Result<()> {
    let (n, t) = (b.n, b.gpu.compute_dtype());
    let (all, rank) = (count * out, count * RANK);
    let sources: Vec<Vec<Source>> =
        (0..SETS).map(|_| (0..count).map(|_| b.random.weight(out, inner)).collect()).collect();
    let started = Instant::now();
    let load = |stack: &Vec<Source>| -> Result<CudaWeight> {
        let stack: Vec<&dyn WeightSource> = stack.iter().map(|s| s as &dyn WeightSource).collect();
        Ok(b.gpu.weight(&stack)?)
    };
    let weights = sources.iter().map(load).collect::<Result<Vec<CudaWeight>>>()?;
    b.gpu.synchronize()?;
    println!("{site}: four weights loaded in {:.2} s", started.elapsed().as_secs_f64());
    let name = |what: &str| -> &'static str { format!("{what} {site}").leak() };
    let x = b.sets(t, n * (inner + rank))?;
    let mut dx = b.sets(t, n * (inner + rank))?;
    let mut y = b.sets(t, n * all)?;
    let dy = b.sets(t, n * all)?;
    let mut y32 = b.sets(Dtype::F32, if residual { n * all } else { 1 })?;
    let up = b.sets(t, count * out * RANK)?;
    let flop = 2 * n * all * inner;
    let extra = 2 * n * all * rank;
    let bytes = (n * (all + inner) + all * inner) * 2;
    b.line(name("linear"), (usize::from(!residual), 0), bytes, flop, |g, i| {
        Ok(g.linear(view(&x[i], n, inner), &weights[i], false, view_mut(&mut y[i], n, all))?)
    })?;
    if residual {
        b.line(name("linear, added to f32"), (1, 0), bytes + n * all * 6, flop, |g, i| {
            Ok(g.linear(view(&x[i], n, inner), &weights[i], true, view_mut(&mut y32[i], n, all))?)
        })?;
    }
    b.line(name("linear_backward"), (1, 0), bytes, flop, |g, i| {
        Ok(g.linear_backward(view(&dy[i], n, all), &weights[i], false, view_mut(&mut dx[i], n, inner))?)
    })?;
    // The work to be done counts without the zeros of the stack.
    let useful = flop + extra / count;
    b.line(name("linear_lora"), (0, 1), bytes, useful, |g, i| {
        let factors: Vec<_> =
            (0..count).map(|j| (j * out, view(&up[i], count * out, RANK).rows(j * out, out))).collect();
        let y = if residual { &mut y32[i] } else { &mut y[i] };
        Ok(g.linear_lora(view(&x[i], n, inner + rank), &weights[i], &factors, 0.25, residual, view_mut(y, n, all))?)
    })?;
    b.line(name("linear_lora_backward"), (0, 1), bytes, useful, |g, i| {
        let factors: Vec<_> =
            (0..count).map(|j| (j * out, view(&up[i], count * out, RANK).rows(j * out, out))).collect();
        let dx_du = view_mut(&mut dx[i], n, inner + rank);
        Ok(g.linear_lora_backward(view(&dy[i], n, all), &weights[i], &factors, 0.25, dx_du)?)
    })?;
    for few in [1, 16, 64, 256] {
        let name: &'static str = format!("linear {site}, {few} rows").leak();
        b.line(name, (0, 0), (few * (all + inner) + all * inner) * 2, 2 * few * all * inner, |g, i| {
            Ok(g.linear(view(&x[i], few, inner), &weights[i], false, view_mut(&mut y[i], few, all))?)
        })?;
    }
    Ok(())
}

fn lora(b: &mut Bench, &Site { name: site, count, out, inner, residual }: &Site) -> Result<()> {
    let (n, t) = (b.n, b.gpu.compute_dtype());
    let r = count * RANK;
    let x = b.sets(t, n * inner)?;
    let mut dx = b.sets(t, n * inner)?;
    let a = b.sets(t, r * inner)?;
    let mut u = b.sets(t, n * r)?;
    let up = b.sets(t, out * RANK)?;
    let mut y = b.sets(t, n * count * out)?;
    let mut y32 = b.sets(Dtype::F32, if residual { n * out } else { 1 })?;
    let mut grad_a = b.sets(Dtype::F32, r * inner)?;
    let mut grad_b = b.sets(Dtype::F32, out * RANK)?;
    let mut scratch = b.gpu.uninit(t, n * inner)?;
    let d = Some(Dropout { p: 0.1, seed: 1, step: 1, site: 1 });
    let name = |what: &str| -> &'static str { format!("lora {site}: {what}").leak() };
    let (wide, thin) = (n * (inner + r) + r * inner, n * (out + RANK) + out * RANK);
    let (wide_flop, thin_flop) = (2 * n * r * inner, 2 * n * out * RANK);
    b.line(name("u = x·Aᵀ"), (1, 1), wide * 2, wide_flop, |g, i| {
        Ok(g.matmul_nt(1.0, view(&x[i], n, inner), view(&a[i], r, inner), 0.0, view_mut(&mut u[i], n, r))?)
    })?;
    let up_bytes = thin * 2 + n * out * if residual { 6 } else { 2 };
    b.line(name("y += s·u·Bᵀ"), (count, 0), up_bytes, thin_flop, |g, i| {
        let c =
            if residual { view_mut(&mut y32[i], n, out) } else { view_mut(&mut y[i], n, count * out).columns(0, out) };
        Ok(g.matmul_nt(0.5, view(&u[i], n, r).columns(0, RANK), view(&up[i], out, RANK), 1.0, c)?)
    })?;
    b.line(name("du = s·dy·B"), (count, 0), thin * 2, thin_flop, |g, i| {
        let dy = view(&y[i], n, count * out).columns(0, out);
        Ok(g.matmul_nn(0.5, dy, view(&up[i], out, RANK), 0.0, view_mut(&mut u[i], n, r).columns(0, RANK))?)
    })?;
    b.line(name("dB += dyᵀ·u"), (count, count), thin * 2 + out * RANK * 6, thin_flop, |g, i| {
        let dy = view(&y[i], n, count * out).columns(0, out);
        Ok(g.matmul_tn(0.5, dy, view(&u[i], n, r).columns(0, RANK), 1.0, view_mut(&mut grad_b[i], out, RANK))?)
    })?;
    b.line(name("dA += duᵀ·x"), (1, 1), wide * 2 + r * inner * 6, wide_flop, |g, i| {
        Ok(g.matmul_tn(1.0, view(&u[i], n, r), view(&x[i], n, inner), 1.0, view_mut(&mut grad_a[i], r, inner))?)
    })?;
    b.line(name("dx = du·A"), (1, 0), wide * 2, wide_flop, |g, i| {
        Ok(g.matmul_nn(1.0, view(&u[i], n, r), view(&a[i], r, inner), 0.0, view_mut(&mut dx[i], n, inner))?)
    })?;
    let mut dx_du = b.sets(t, n * (inner + r))?;
    b.line(name("dx += dropout(du·A)"), (0, 1), (wide + n * inner) * 2, wide_flop, |g, i| {
        Ok(g.lora_backward(view(&a[i], r, inner), d, &mut scratch, view_mut(&mut dx_du[i], n, inner + r))?)
    })
}

fn summary(b: &Bench) {
    for (title, calls) in [("the trait's operations", 0), ("with the fused ones", 1)] {
        let calls = |l: &Line| LAYERS * if calls == 0 { l.calls.0 } else { l.calls.1 };
        let mut lines: Vec<&Line> = b.lines.iter().filter(|l| calls(l) > 0).collect();
        lines.sort_by(|x, y| (calls(y) as f64 * y.us).total_cmp(&(calls(x) as f64 * x.us)));
        println!(
            "\none step of 32 layers, {title}\n{:<38} {:>5} {:>8} {:>8} {:>8}",
            "", "calls", "ms", "floor", "us each"
        );
        let (mut total, mut floor) = (0.0, 0.0);
        for l in lines {
            let (ms, floor_ms) = (calls(l) as f64 * l.us / 1e3, calls(l) as f64 * l.floor_us / 1e3);
            println!("{:<38} {:>5} {ms:>8.2} {floor_ms:>8.2} {:>8.1}   {}", l.name, calls(l), l.us, l.rate);
            total += ms;
            floor += floor_ms;
        }
        println!("{:<38} {:>5} {total:>8.2} {floor:>8.2}", "sum", "");
        let rate = EXAMPLES as f64 / total * 1e3;
        println!("{EXAMPLES} examples of {} rows together: {rate:.0} examples/s without loss and optimizer", b.n);
    }
}

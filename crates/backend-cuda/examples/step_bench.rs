//! The operations of one training step of Llama-2-7B (32 layers, LoRA r 64 on all linear layers with dropout, a shared prefix) in their
//! order, twice: by the trait's operations alone, and with the CUDA backend's fused ones. Unlike the sum of single operations this runs as
//! long and as hot as training does, so the card's power limit and the host's time to queue the work are in it. Loss and optimizer are not.
//!
//!     cargo run --release -p cashtag-backend-cuda --example step_bench [-- ROWS] [--resident nf4|bf16] [--steps N]
//!
//! Activations are random and do not flow from operation to operation where that would let them grow; the bytes and products are the model's.

use std::error::Error;
use std::time::Instant;

use cashtag_backend::{AttentionLayout, Backend, Dropout, Dtype, Mat, MatMut, Rope, WeightSource};
use cashtag_backend_cuda::{CudaBackend, CudaBuffer, CudaWeight, Options, Resident};

mod shared;

use shared::*;

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Distinct layers of weights: more than the second-level cache holds, as in a model.
const DISTINCT: usize = 3;
const SCALE: f32 = 0.25;

/// One site's weights of one layer and its adapter.
struct Weights {
    w: CudaWeight,
    a: CudaBuffer,
    b: Vec<CudaBuffer>,
    grad_a: CudaBuffer,
    grad_b: Vec<CudaBuffer>,
}

struct Step {
    gpu: CudaBackend,
    n: usize,
    layout: AttentionLayout,
    layers: Vec<Vec<Weights>>,
    norm: CudaBuffer,
    inv: CudaBuffer,
    tables: [CudaBuffer; 2],
    positions: CudaBuffer,
    lse: CudaBuffer,
    /// f32 `[n, d]`: the residual stream and its gradient as they are read, and as they are added to.
    x: CudaBuffer,
    dx: CudaBuffer,
    x_sum: CudaBuffer,
    dx_sum: CudaBuffer,
    x_copy: CudaBuffer,
    /// T: `[n, width + rank]` for each site: its input (and u behind it), its gradient (and du behind it), the input under dropout.
    inputs: Vec<CudaBuffer>,
    d_inputs: Vec<CudaBuffer>,
    dropped: Vec<CudaBuffer>,
    /// T: u and du on their own.
    u: CudaBuffer,
    du: CudaBuffer,
    /// T: `[n, 3d]` and its gradient, `[n, 2f]` and its gradient, `[n, d]` in T.
    qkv: CudaBuffer,
    d_qkv: CudaBuffer,
    gate_up: CudaBuffer,
    d_gate_up: CudaBuffer,
    dt: CudaBuffer,
}

fn load(gpu: &CudaBackend, random: &mut Random, site: &Site) -> Result<Weights> {
    let &Site { count, out, inner, .. } = site;
    let t = gpu.compute_dtype();
    let sources: Vec<Source> = (0..count).map(|_| random.weight(out, inner)).collect();
    let stack: Vec<&dyn WeightSource> = sources.iter().map(|s| s as &dyn WeightSource).collect();
    Ok(Weights {
        w: gpu.weight(&stack)?,
        a: random.buffer(gpu, t, count * RANK * inner)?,
        b: (0..count).map(|_| random.buffer(gpu, t, out * RANK)).collect::<Result<_, _>>()?,
        grad_a: gpu.zeros(Dtype::F32, count * RANK * inner)?,
        grad_b: (0..count).map(|_| gpu.zeros(Dtype::F32, out * RANK)).collect::<Result<_, _>>()?,
    })
}

fn dropout(layer: usize, site: usize) -> Dropout {
    Dropout { p: 0.1, seed: 1, step: 1, site: (layer * 4 + site) as u32 }
}

/// (first column, B) of each factor.
fn factors<'a>(b: &'a [CudaBuffer], site: &Site) -> Vec<(usize, Mat<'a, CudaBuffer>)> {
    b.iter().enumerate().map(|(j, b)| (j * site.out, Mat::new(b, site.out, RANK))).collect()
}

impl Step {
    fn new(gpu: CudaBackend, n: usize) -> Result<Self> {
        let mut random = Random(7);
        let t = gpu.compute_dtype();
        let layers = (0..DISTINCT)
            .map(|_| SITES.iter().map(|s| load(&gpu, &mut random, s)).collect::<Result<Vec<_>>>())
            .collect::<Result<Vec<_>>>()?;
        let mut positions = gpu.uninit(Dtype::U32, n)?;
        gpu.upload_u32(&packed(n).positions(), &mut positions)?;
        let mut f32s = |len| random.buffer(&gpu, Dtype::F32, len);
        let (norm, inv) = (f32s(D)?, f32s(n)?);
        let tables = [f32s(512 * HEAD_DIM / 2)?, f32s(512 * HEAD_DIM / 2)?];
        let (x, dx, x_sum, dx_sum, x_copy) = (f32s(n * D)?, f32s(n * D)?, f32s(n * D)?, f32s(n * D)?, f32s(n * D)?);
        let lse = gpu.zeros(Dtype::F32, n * HEADS)?;
        let mut ts = |len| random.buffer(&gpu, t, len);
        let mut wide = || SITES.iter().map(|s| ts(n * (s.inner + s.count * RANK))).collect::<Result<Vec<_>, _>>();
        let (inputs, d_inputs, dropped) = (wide()?, wide()?, wide()?);
        Ok(Self {
            layout: packed(n),
            layers,
            norm,
            inv,
            tables,
            positions,
            lse,
            x,
            dx,
            x_sum,
            dx_sum,
            x_copy,
            inputs,
            d_inputs,
            dropped,
            u: ts(n * 3 * RANK)?,
            du: ts(n * 3 * RANK)?,
            qkv: ts(n * 3 * D)?,
            d_qkv: ts(n * 3 * D)?,
            gate_up: ts(n * 2 * F)?,
            d_gate_up: ts(n * 2 * F)?,
            dt: ts(n * D)?,
            gpu,
            n,
        })
    }

    fn rope(&mut self, gradient: bool) -> Result<()> {
        let x = if gradient { &mut self.d_qkv } else { &mut self.qkv };
        let rope = Rope { head_dim: HEAD_DIM, cos: &self.tables[0], sin: &self.tables[1], positions: &self.positions };
        Ok(self.gpu.rope(rope, gradient, MatMut::new(x, self.n, 3 * D).columns(0, 2 * D))?)
    }

    /// `stride`: columns of a row of the attention output's buffer.
    fn attention(&mut self, stride: usize) -> Result<()> {
        let n = self.n;
        let qkv = Mat::new(&self.qkv, n, 3 * D);
        let (q, k, v) = (qkv.columns(0, D), qkv.columns(D, D), qkv.columns(2 * D, D));
        let o = MatMut::new(&mut self.inputs[1], n, stride).columns(0, D);
        Ok(self.gpu.attention(&self.layout, HEAD_DIM, q, k, v, o, &mut self.lse)?)
    }

    fn attention_backward(&mut self, stride: usize) -> Result<()> {
        let n = self.n;
        let qkv = Mat::new(&self.qkv, n, 3 * D);
        let o = Mat::new(&self.inputs[1], n, stride).columns(0, D);
        let d_o = Mat::new(&self.d_inputs[1], n, stride).columns(0, D);
        let d_qkv = MatMut::new(&mut self.d_qkv, n, 3 * D);
        Ok(self.gpu.attention_backward(&self.layout, HEAD_DIM, HEADS, qkv, o, &self.lse, d_o, d_qkv)?)
    }

    /// The gradients of the factors that every variant computes alike: dB from u, dA from the dropped-out input.
    fn factor_gradients(&mut self, layer: usize, s: usize, u_stride: usize, u_first: usize, fused: bool) -> Result<()> {
        let (n, site) = (self.n, &SITES[s]);
        let rank = site.count * RANK;
        let weights = &mut self.layers[layer % DISTINCT][s];
        let (dy, width): (&CudaBuffer, usize) = match s {
            0 => (&self.d_qkv, 3 * D),
            2 => (&self.d_gate_up, 2 * F),
            _ => (&self.dt, D),
        };
        let (u, du) = if fused {
            (Mat::new(&self.inputs[s], n, u_stride), Mat::new(&self.d_inputs[s], n, u_stride).columns(u_first, rank))
        } else {
            (Mat::new(&self.u, n, rank), Mat::new(&self.du, n, rank))
        };
        for (j, grad) in weights.grad_b.iter_mut().enumerate() {
            let dy = Mat::new(dy, n, width).columns(j * site.out, site.out);
            let u = u.columns(u_first + j * RANK, RANK);
            self.gpu.matmul_tn(SCALE, dy, u, 1.0, MatMut::new(grad, site.out, RANK))?;
        }
        let x = Mat::new(&self.dropped[s], n, site.inner);
        Ok(self.gpu.matmul_tn(1.0, du, x, 1.0, MatMut::new(&mut weights.grad_a, rank, site.inner))?)
    }

    // --- by the trait's operations -----------------------------------------------------------------------------------

    fn plain_forward_site(&mut self, layer: usize, s: usize) -> Result<()> {
        let (n, site, g) = (self.n, &SITES[s], &self.gpu);
        let rank = site.count * RANK;
        let weights = &self.layers[layer % DISTINCT][s];
        let x = Mat::new(&self.inputs[s], n, site.inner);
        let (out, y) = match s {
            0 => (3 * D, &mut self.qkv),
            2 => (2 * F, &mut self.gate_up),
            _ => (D, &mut self.x_sum),
        };
        g.linear(x, &weights.w, site.residual, MatMut::new(y, n, out))?;
        g.dropout(x, dropout(layer, s), false, MatMut::new(&mut self.dropped[s], n, site.inner))?;
        let dropped = Mat::new(&self.dropped[s], n, site.inner);
        g.matmul_nt(1.0, dropped, Mat::new(&weights.a, rank, site.inner), 0.0, MatMut::new(&mut self.u, n, rank))?;
        for (j, (first, b)) in factors(&weights.b, site).into_iter().enumerate() {
            let u = Mat::new(&self.u, n, rank).columns(j * RANK, RANK);
            g.matmul_nt(SCALE, u, b, 1.0, MatMut::new(y, n, out).columns(first, site.out))?;
        }
        Ok(())
    }

    fn plain_backward_site(&mut self, layer: usize, s: usize) -> Result<()> {
        let (n, site) = (self.n, &SITES[s]);
        let rank = site.count * RANK;
        {
            let weights = &self.layers[layer % DISTINCT][s];
            let (dy, width) = match s {
                0 => (&self.d_qkv, 3 * D),
                2 => (&self.d_gate_up, 2 * F),
                _ => (&self.dt, D),
            };
            let dy = Mat::new(dy, n, width);
            let g = &self.gpu;
            g.linear_backward(dy, &weights.w, false, MatMut::new(&mut self.d_inputs[s], n, site.inner))?;
            for (j, (first, b)) in factors(&weights.b, site).into_iter().enumerate() {
                let du = MatMut::new(&mut self.du, n, rank).columns(j * RANK, RANK);
                g.matmul_nn(SCALE, dy.columns(first, site.out), b, 0.0, du)?;
            }
            let x = Mat::new(&self.inputs[s], n, site.inner);
            g.dropout(x, dropout(layer, s), false, MatMut::new(&mut self.dropped[s], n, site.inner))?;
        }
        self.factor_gradients(layer, s, rank, 0, false)?;
        let (weights, g) = (&self.layers[layer % DISTINCT][s], &self.gpu);
        let (du, a) = (Mat::new(&self.du, n, rank), Mat::new(&weights.a, rank, site.inner));
        g.matmul_nn(1.0, du, a, 0.0, MatMut::new(&mut self.dropped[s], n, site.inner))?;
        let dx = MatMut::new(&mut self.d_inputs[s], n, site.inner);
        Ok(g.dropout(Mat::new(&self.dropped[s], n, site.inner), dropout(layer, s), true, dx)?)
    }

    fn plain_norm(&mut self, s: usize) -> Result<()> {
        let n = self.n;
        let y = MatMut::new(&mut self.inputs[s], n, D);
        Ok(self.gpu.rms_norm(Mat::new(&self.x, n, D), &self.norm, 1e-5, y, &mut self.inv)?)
    }

    fn plain_swiglu(&mut self) -> Result<()> {
        let n = self.n;
        Ok(self.gpu.swiglu(Mat::new(&self.gate_up, n, 2 * F), MatMut::new(&mut self.inputs[3], n, F))?)
    }

    fn plain_norm_backward(&mut self, s: usize) -> Result<()> {
        let n = self.n;
        let (dy, x) = (Mat::new(&self.d_inputs[s], n, D), Mat::new(&self.x, n, D));
        Ok(self.gpu.rms_norm_backward(dy, x, &self.norm, &self.inv, MatMut::new(&mut self.dx_sum, n, D))?)
    }

    fn plain_copies(&mut self, gradient: bool) -> Result<()> {
        let n = self.n;
        if gradient {
            return Ok(self.gpu.copy(Mat::new(&self.dx, n, D), MatMut::new(&mut self.dt, n, D))?);
        }
        Ok(self.gpu.copy(Mat::new(&self.x, n, D), MatMut::new(&mut self.x_copy, n, D))?)
    }

    fn plain(&mut self) -> Result<()> {
        for layer in 0..LAYERS {
            self.plain_copies(false)?;
            self.plain_norm(0)?;
            self.plain_forward_site(layer, 0)?;
            self.rope(false)?;
            self.attention(D)?;
            self.plain_forward_site(layer, 1)?;
            self.plain_copies(false)?;
            self.plain_norm(2)?;
            self.plain_forward_site(layer, 2)?;
            self.plain_swiglu()?;
            self.plain_forward_site(layer, 3)?;
        }
        for layer in (0..LAYERS).rev() {
            self.plain_copies(true)?;
            self.plain_swiglu()?;
            self.plain_backward_site(layer, 3)?;
            let (n, g) = (self.n, &self.gpu);
            let dh = Mat::new(&self.d_inputs[3], n, F);
            g.swiglu_backward(dh, Mat::new(&self.gate_up, n, 2 * F), MatMut::new(&mut self.d_gate_up, n, 2 * F))?;
            self.plain_norm(2)?;
            self.plain_backward_site(layer, 2)?;
            self.plain_norm_backward(2)?;
            self.plain_copies(true)?;
            self.plain_backward_site(layer, 1)?;
            self.attention_backward(D)?;
            self.rope(true)?;
            self.plain_norm(0)?;
            self.plain_backward_site(layer, 0)?;
            self.plain_norm_backward(0)?;
        }
        Ok(())
    }

    // --- with the fused operations -----------------------------------------------------------------------------------

    fn width(s: usize) -> usize {
        SITES[s].inner + SITES[s].count * RANK
    }

    fn fused_forward_site(&mut self, layer: usize, s: usize) -> Result<()> {
        let (n, site, g) = (self.n, &SITES[s], &self.gpu);
        let (rank, width) = (site.count * RANK, Self::width(s));
        let weights = &self.layers[layer % DISTINCT][s];
        let dropped = Mat::new(&self.dropped[s], n, site.inner);
        let u = MatMut::new(&mut self.inputs[s], n, width).columns(site.inner, rank);
        g.matmul_nt(1.0, dropped, Mat::new(&weights.a, rank, site.inner), 0.0, u)?;
        let (out, y) = match s {
            0 => (3 * D, &mut self.qkv),
            2 => (2 * F, &mut self.gate_up),
            _ => (D, &mut self.x_sum),
        };
        let x_u = Mat::new(&self.inputs[s], n, width);
        Ok(g.linear_lora(x_u, &weights.w, &factors(&weights.b, site), SCALE, site.residual, MatMut::new(y, n, out))?)
    }

    fn fused_backward_site(&mut self, layer: usize, s: usize) -> Result<()> {
        let (n, site) = (self.n, &SITES[s]);
        let (rank, width) = (site.count * RANK, Self::width(s));
        {
            let weights = &self.layers[layer % DISTINCT][s];
            let (dy, out) = match s {
                0 => (&self.d_qkv, 3 * D),
                2 => (&self.d_gate_up, 2 * F),
                _ => (&self.dt, D),
            };
            let dx_du = MatMut::new(&mut self.d_inputs[s], n, width);
            let factors = factors(&weights.b, site);
            self.gpu.linear_lora_backward(Mat::new(dy, n, out), &weights.w, &factors, SCALE, dx_du)?;
        }
        self.factor_gradients(layer, s, width, site.inner, true)?;
        let weights = &self.layers[layer % DISTINCT][s];
        let a = Mat::new(&weights.a, rank, site.inner);
        let dx_du = MatMut::new(&mut self.d_inputs[s], n, width);
        Ok(self.gpu.lora_backward(a, Some(dropout(layer, s)), &mut self.u, dx_du)?)
    }

    fn fused_norm(&mut self, layer: usize, s: usize, both: bool) -> Result<()> {
        let n = self.n;
        let y = both.then(|| MatMut::new(&mut self.inputs[s], n, Self::width(s)).columns(0, D));
        let dropped = (dropout(layer, s), MatMut::new(&mut self.dropped[s], n, D));
        Ok(self.gpu.rms_norm_dropout(Mat::new(&self.x, n, D), &self.norm, 1e-5, y, dropped, &mut self.inv)?)
    }

    fn fused_swiglu(&mut self, layer: usize, both: bool) -> Result<()> {
        let n = self.n;
        let h = both.then(|| MatMut::new(&mut self.inputs[3], n, Self::width(3)).columns(0, F));
        let dropped = (dropout(layer, 3), MatMut::new(&mut self.dropped[3], n, F));
        Ok(self.gpu.swiglu_dropout(Mat::new(&self.gate_up, n, 2 * F), h, dropped)?)
    }

    fn fused_norm_backward(&mut self, s: usize) -> Result<()> {
        let n = self.n;
        let dy = Mat::new(&self.d_inputs[s], n, Self::width(s)).columns(0, D);
        let (dx, copy) = (MatMut::new(&mut self.dx_sum, n, D), MatMut::new(&mut self.dt, n, D));
        Ok(self.gpu.rms_norm_backward_copy(dy, Mat::new(&self.x, n, D), &self.norm, &self.inv, dx, copy)?)
    }

    fn drop_attention_output(&mut self, layer: usize) -> Result<()> {
        let n = self.n;
        let o = Mat::new(&self.inputs[1], n, Self::width(1)).columns(0, D);
        Ok(self.gpu.dropout(o, dropout(layer, 1), false, MatMut::new(&mut self.dropped[1], n, D))?)
    }

    fn fused(&mut self) -> Result<()> {
        for layer in 0..LAYERS {
            self.fused_norm(layer, 0, true)?;
            self.fused_forward_site(layer, 0)?;
            self.rope(false)?;
            self.attention(Self::width(1))?;
            self.drop_attention_output(layer)?;
            self.fused_forward_site(layer, 1)?;
            self.fused_norm(layer, 2, true)?;
            self.fused_forward_site(layer, 2)?;
            self.fused_swiglu(layer, true)?;
            self.fused_forward_site(layer, 3)?;
        }
        for layer in (0..LAYERS).rev() {
            self.fused_swiglu(layer, false)?;
            self.fused_backward_site(layer, 3)?;
            let (n, g) = (self.n, &self.gpu);
            let dh = Mat::new(&self.d_inputs[3], n, Self::width(3)).columns(0, F);
            g.swiglu_backward(dh, Mat::new(&self.gate_up, n, 2 * F), MatMut::new(&mut self.d_gate_up, n, 2 * F))?;
            self.fused_norm(layer, 2, false)?;
            self.fused_backward_site(layer, 2)?;
            self.fused_norm_backward(2)?;
            self.drop_attention_output(layer)?;
            self.fused_backward_site(layer, 1)?;
            self.attention_backward(Self::width(1))?;
            self.rope(true)?;
            self.fused_norm(layer, 0, false)?;
            self.fused_backward_site(layer, 0)?;
            self.fused_norm_backward(0)?;
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |flag: &str| arguments.iter().position(|a| a == flag).and_then(|i| arguments.get(i + 1)).cloned();
    let n = arguments.first().and_then(|a| a.parse().ok()).unwrap_or(1740);
    let steps: usize = value("--steps").and_then(|s| s.parse().ok()).unwrap_or(12);
    let resident = if value("--resident").as_deref() == Some("nf4") { Resident::Nf4 } else { Resident::Bf16 };
    let gpu = CudaBackend::new(0, Options { resident, lora_r: RANK, ..Options::default() })?;
    println!("{}", cashtag_backend_cuda::probe());
    let mut step = Step::new(gpu, n)?;
    let timer = step.gpu.timer()?;
    for (name, run) in [
        ("the trait's operations", Step::plain as fn(&mut Step) -> Result<()>),
        ("with the fused ones", Step::fused),
        ("the trait's operations", Step::plain),
        ("with the fused ones", Step::fused),
    ] {
        run(&mut step)?;
        step.gpu.synchronize()?;
        let (mut times, mut host) = (Vec::new(), Vec::new());
        for _ in 0..steps {
            let started = Instant::now();
            timer.start()?;
            run(&mut step)?;
            timer.stop()?;
            host.push(started.elapsed().as_secs_f64() * 1e3);
            times.push(f64::from(timer.milliseconds()?));
        }
        times.sort_by(f64::total_cmp);
        host.sort_by(f64::total_cmp);
        let ms = times[steps / 2];
        println!(
            "{name:<24} {ms:.1} ms a step (first and last of {steps} sorted: {:.1}, {:.1}), {:.0} examples/s without loss and \
             optimizer; the host queued it in {:.1} ms",
            times[0],
            times[steps - 1],
            EXAMPLES as f64 / ms * 1e3,
            host[steps / 2]
        );
    }
    let (now, peak) = step.gpu.memory();
    println!("{:.2} GiB held, {:.2} at most", now as f64 / (1u64 << 30) as f64, peak as f64 / (1u64 << 30) as f64);
    Ok(())
}

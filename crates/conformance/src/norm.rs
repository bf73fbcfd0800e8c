//! RMSNorm, rotary embedding and SwiGLU, with their backward.

use cashtag_backend::{Backend, Result, Rope};

use crate::harness::{Harness, Kind, Lie};

pub(crate) fn run<A: Backend, B: Backend>(h: &mut Harness<'_, A, B>) -> Result<()> {
    let n = h.random.between(1, 50);
    let d = h.random.pick(&[8, 60, 576, 2048, 4096]);
    let allowed = h.tolerance.rounding;
    for lie in Lie::ALL {
        for kind in [Kind::F32, Kind::T] {
            let what = format!("{kind:?}, {lie:?}");
            let x = h.input(kind, n, d, lie, 2.0)?;
            let values: Vec<f32> = (0..d).map(|_| h.random.normal()).collect();
            let w = h.vector(&values)?;
            let mut y = h.output(Kind::T, n, d, lie)?;
            let mut inv = h.output(Kind::F32, 1, n, Lie::Dense)?;
            h.a.rms_norm(x.in_a(), &w.a, 1e-5, y.out_a(), &mut inv.a)?;
            h.b.rms_norm(x.in_b(), &w.b, 1e-5, y.out_b(), &mut inv.b)?;
            h.check("rms_norm", &what, &y, allowed)?;
            h.check("rms_norm, inv_rms", &what, &inv, h.tolerance.single)?;

            let dy = h.input(Kind::T, n, d, lie, 1.0)?;
            let mut dx = h.input(Kind::F32, n, d, lie, 1.0)?;
            h.a.rms_norm_backward(dy.in_a(), x.in_a(), &w.a, &inv.a, dx.out_a())?;
            h.b.rms_norm_backward(dy.in_b(), x.in_b(), &w.b, &inv.b, dx.out_b())?;
            h.check("rms_norm_backward", &what, &dx, h.tolerance.single)?;
        }

        let (heads, head_dim) = (h.random.between(1, 9), h.random.pick(&[4, 32, 64, 128]));
        let table = 300;
        let angles: Vec<f32> = (0..table * head_dim / 2).map(|i| i as f32 * 0.37).collect();
        let cos = h.vector(&angles.iter().map(|x| x.cos()).collect::<Vec<_>>())?;
        let sin = h.vector(&angles.iter().map(|x| x.sin()).collect::<Vec<_>>())?;
        let list: Vec<u32> = (0..n).map(|_| h.random.up_to(table - 1) as u32).collect();
        let positions = h.words(&list)?;
        for inverse in [false, true] {
            let mut x = h.input(Kind::T, n, heads * head_dim, lie, 1.0)?;
            let (ra, rb) = (
                Rope { head_dim, cos: &cos.a, sin: &sin.a, positions: &positions.0 },
                Rope { head_dim, cos: &cos.b, sin: &sin.b, positions: &positions.1 },
            );
            h.a.rope(ra, inverse, x.out_a())?;
            h.b.rope(rb, inverse, x.out_b())?;
            h.check("rope", &format!("inverse {inverse}, {lie:?}"), &x, allowed)?;
        }

        let f = h.random.pick(&[8, 90, 1536]);
        let gate_up = h.input(Kind::T, n, 2 * f, lie, 3.0)?;
        let mut y = h.output(Kind::T, n, f, lie)?;
        h.a.swiglu(gate_up.in_a(), y.out_a())?;
        h.b.swiglu(gate_up.in_b(), y.out_b())?;
        h.check("swiglu", &format!("{lie:?}"), &y, allowed)?;
        let dh = h.input(Kind::T, n, f, lie, 1.0)?;
        let mut d = h.output(Kind::T, n, 2 * f, lie)?;
        h.a.swiglu_backward(dh.in_a(), gate_up.in_a(), d.out_a())?;
        h.b.swiglu_backward(dh.in_b(), gate_up.in_b(), d.out_b())?;
        h.check("swiglu_backward", &format!("{lie:?}"), &d, allowed)?;
    }
    Ok(())
}

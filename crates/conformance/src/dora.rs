//! DoRA: scaled columns, the gradient of the magnitudes, norms of adapted rows.

use cashtag_backend::{Backend, Result, WeightSource};

use crate::harness::{Harness, Kind, Lie};
use crate::linear::{Offer, source, stack};

pub(crate) fn run<A: Backend, B: Backend>(h: &mut Harness<'_, A, B>) -> Result<()> {
    let rows = h.random.between(1, 90);
    let cols = h.random.pick(&[1, 7, 8, 31, 64, 129, 576, 1000]);
    // Places in front and behind belong to other modules.
    let (offset, behind) = (h.random.up_to(9), h.random.up_to(5));
    let scale: Vec<f32> = (0..offset + cols + behind).map(|_| 1.0 + 0.3 * h.random.normal()).collect();
    let scale = h.vector(&scale)?;
    for lie in Lie::ALL {
        let what = format!("offset {offset}, {lie:?}");
        let mut x = h.input(Kind::T, rows, cols, lie, 1.0)?;
        h.a.scale_columns(&scale.a, offset, x.out_a())?;
        h.b.scale_columns(&scale.b, offset, x.out_b())?;
        let allowed = h.tolerance.rounding;
        h.check("scale_columns", &what, &x, allowed)?;

        let a = h.input(Kind::T, rows, cols, lie, 1.0)?;
        let b = h.input(Kind::T, rows, cols, lie, 1.0)?;
        // Far from what is added, so that no sum is next to nothing and its rounding next to everything.
        let begin: Vec<f32> = (0..offset + cols + behind).map(|_| 50.0 + h.random.normal()).collect();
        let mut out = h.vector(&begin)?;
        h.a.column_dots(a.in_a(), b.in_a(), &scale.a, offset, &mut out.a)?;
        h.b.column_dots(a.in_b(), b.in_b(), &scale.b, offset, &mut out.b)?;
        // Operands are equal on both sides, so only the order of the sum differs.
        let allowed = h.tolerance.single;
        h.check("column_dots", &what, &out, allowed)?;
        let found = h.read_b(&out)?;
        let untouched = |i: &usize| *i < offset || *i >= offset + cols;
        if (0..begin.len()).filter(untouched).any(|i| found[i] != begin[i]) {
            h.fail(format!("column_dots ({what}): places of other modules were changed"));
        }
    }

    for offer in [Offer::Rows, Offer::F32, Offer::Nf4] {
        let (inner, sources) = stack(h, offer, &[64, 192, 576]);
        let list: Vec<&dyn WeightSource> = sources.iter().map(|s| s as &dyn WeightSource).collect();
        norms(h, &list, inner, list.iter().map(|s| s.rows()).sum(), &format!("{offer:?}"))?;
    }
    let odd = source(h, 37, 90, Offer::Rows);
    norms(h, &[&odd], 90, 37, "odd columns")
}

fn norms<A: Backend, B: Backend>(
    h: &mut Harness<'_, A, B>,
    sources: &[&dyn WeightSource],
    inner: usize,
    out: usize,
    what: &str,
) -> Result<()> {
    let (wa, wb) = (h.a.weight(sources)?, h.b.weight(sources)?);
    let r = h.random.pick(&[1, 4, 8, 16, 33]);
    let first = h.random.up_to(out - 1);
    let rows = h.random.between(1, out - first);
    for lie in Lie::ALL {
        let a = h.input(Kind::T, r, inner, lie, 0.2)?;
        let b = h.input(Kind::T, rows, r, lie, 0.2)?;
        let expected = h.a.adapted_row_norms(&wa, first, 0.5, a.in_a(), b.in_a())?;
        let found = h.b.adapted_row_norms(&wb, first, 0.5, a.in_b(), b.in_b())?;
        let case = format!("adapted_row_norms ({what}, {rows} of {out} rows, in {inner}, r {r}, {lie:?})");
        if found.len() != rows {
            h.fail(format!("{case}: {} norms", found.len()));
            continue;
        }
        let worst = expected.iter().zip(&found).map(|(e, f)| f64::from((f - e).abs() / e.abs().max(1e-6)));
        let worst = worst.fold(0f64, |worst, e| if e.is_nan() { f64::NAN } else { worst.max(e) });
        let allowed = h.tolerance.single * 10.0;
        h.record("adapted_row_norms", case, worst, allowed);
    }
    Ok(())
}

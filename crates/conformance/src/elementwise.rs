//! Copies, sums, gathers, scatters and dropout.

use cashtag_backend::{Backend, Dropout, Result};

use crate::harness::{Harness, Kind, Lie};

pub(crate) fn run<A: Backend, B: Backend>(h: &mut Harness<'_, A, B>) -> Result<()> {
    let rows = h.random.between(1, 40);
    let cols = h.random.pick(&[1, 7, 8, 64, 96, 129, 576, 1000]);
    for lie in Lie::ALL {
        for (from, to) in [(Kind::F32, Kind::F32), (Kind::F32, Kind::T), (Kind::T, Kind::F32), (Kind::T, Kind::T)] {
            let allowed = if to == Kind::T { h.tolerance.rounding } else { h.tolerance.single };
            let what = format!("{from:?} to {to:?}, {lie:?}");
            let src = h.input(from, rows, cols, lie, 1.0)?;

            let mut dst = h.output(to, rows, cols, lie)?;
            h.a.copy(src.in_a(), dst.out_a())?;
            h.b.copy(src.in_b(), dst.out_b())?;
            h.check("copy", &what, &dst, 0.0)?;

            let mut dst = h.input(to, rows, cols, lie, 1.0)?;
            h.a.add(src.in_a(), dst.out_a())?;
            h.b.add(src.in_b(), dst.out_b())?;
            h.check("add", &what, &dst, allowed)?;

            let picked = h.random.between(1, 50);
            let list: Vec<u32> = (0..picked).map(|_| h.random.up_to(rows - 1) as u32).collect();
            let ids = h.words(&list)?;
            let mut out = h.output(to, picked, cols, lie)?;
            h.a.gather_rows(src.in_a(), &ids.0, out.out_a())?;
            h.b.gather_rows(src.in_b(), &ids.1, out.out_b())?;
            h.check("gather_rows", &what, &out, 0.0)?;

            // Every second row of a larger matrix, backwards.
            let list: Vec<u32> = (0..rows).rev().map(|i| 2 * i as u32).collect();
            let ids = h.words(&list)?;
            let mut dst = h.input(to, 2 * rows, cols, lie, 1.0)?;
            h.a.scatter_add_rows(src.in_a(), &ids.0, dst.out_a())?;
            h.b.scatter_add_rows(src.in_b(), &ids.1, dst.out_b())?;
            h.check("scatter_add_rows", &what, &dst, allowed)?;
        }
        let allowed = h.tolerance.rounding;
        let p = h.random.pick(&[0.0, 0.05, 0.1, 0.5]);
        let dropout =
            Dropout { p, seed: h.random.next(), step: h.random.up_to(1000) as u32, site: h.random.up_to(127) as u32 };
        let x = h.input(Kind::T, rows, cols, lie, 1.0)?;
        let mut out = h.output(Kind::T, rows, cols, lie)?;
        h.a.dropout(x.in_a(), dropout, false, out.out_a())?;
        h.b.dropout(x.in_b(), dropout, false, out.out_b())?;
        h.check("dropout", &format!("p {p}, {lie:?}"), &out, allowed)?;
        let mut out = h.input(Kind::T, rows, cols, lie, 1.0)?;
        h.a.dropout(x.in_a(), dropout, true, out.out_a())?;
        h.b.dropout(x.in_b(), dropout, true, out.out_b())?;
        h.check("dropout, accumulated", &format!("p {p}, {lie:?}"), &out, allowed)?;
    }
    let mut zero = h.input(Kind::T, rows, cols, Lie::Dense, 1.0)?;
    // fill_zero takes whole buffers, so there is no poison left to look at: read it directly.
    h.b.fill_zero(&mut zero.b)?;
    if h.read_b(&zero)?.iter().any(|&x| x != 0.0) {
        h.fail("fill_zero leaves something".into());
    }
    Ok(())
}

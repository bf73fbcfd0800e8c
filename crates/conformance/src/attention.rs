//! Attention over packed batches, cached prefixes, branches and single new tokens; its backward over packed batches.

use cashtag_backend::{AttentionLayout, Backend, Result, Segment, Span};

use crate::harness::{Harness, Kind, Lie, Pair};

pub(crate) fn run<A: Backend, B: Backend>(h: &mut Harness<'_, A, B>) -> Result<()> {
    for head_dim in [64, 128, 32] {
        let (heads, kv_heads) = h.random.pick(&[(1, 1), (2, 2), (3, 1), (4, 2), (9, 3)]);
        let layouts = [packed(h, 0, 3), packed(h, 5, 4), packed(h, 105, 6), packed(h, 200, 2), single(h)];
        for (i, layout) in layouts.iter().enumerate() {
            for lie in [Lie::Strided, Lie::Dense] {
                backward(h, layout, head_dim, heads, kv_heads, lie, i)?;
            }
        }
        // Views that no vector load can read.
        backward(h, &layouts[1], head_dim, heads, kv_heads, Lie::Odd, 9)?;
        let layout = branches(h);
        for lie in Lie::ALL {
            forward(h, &layout, head_dim, heads, kv_heads, lie)?;
        }
    }
    Ok(())
}

/// A prefix (if any) and examples, some of which leave it early and some of which have one token.
fn packed<A: Backend, B: Backend>(h: &mut Harness<'_, A, B>, prefix: usize, examples: usize) -> AttentionLayout {
    let mut lens: Vec<usize> = (0..examples).map(|_| h.random.between(1, 100)).collect();
    lens[examples / 2] = 1;
    let shared: Vec<usize> = (0..examples).map(|i| if i % 3 == 2 { h.random.up_to(prefix) } else { prefix }).collect();
    AttentionLayout::packed(prefix, &shared, &lens)
}

/// One long example: many tiles on both sides.
fn single<A: Backend, B: Backend>(h: &mut Harness<'_, A, B>) -> AttentionLayout {
    AttentionLayout::packed(0, &[0], &[h.random.between(300, 400)])
}

/// Tweets behind a cached prefix, each with branches of label words, and a new token behind a long past.
fn branches<A: Backend, B: Backend>(h: &mut Harness<'_, A, B>) -> AttentionLayout {
    let prefix = Span { start: h.random.up_to(20), len: h.random.between(1, 110) };
    let (mut q, mut kv) = (0, prefix.start + prefix.len + h.random.up_to(5));
    let mut segments = Vec::new();
    for _ in 0..3 {
        let len = h.random.between(1, 70);
        let tweet = Span { start: kv, len };
        segments.push(Segment { q_start: q, len, kv_start: kv, context: [prefix, Span::default()] });
        (q, kv) = (q + len, kv + len);
        for _ in 0..2 {
            let len = h.random.between(1, 3);
            segments.push(Segment { q_start: q, len, kv_start: kv, context: [prefix, tweet] });
            (q, kv) = (q + len, kv + len);
        }
    }
    segments.push(Segment {
        q_start: q,
        len: 1,
        kv_start: kv,
        context: [prefix, Span { start: prefix.start + prefix.len, len: kv - prefix.start - prefix.len }],
    });
    AttentionLayout::new(segments, kv + 1 + h.random.up_to(4)).expect("a sound layout")
}

fn forward<A: Backend, B: Backend>(
    h: &mut Harness<'_, A, B>,
    layout: &AttentionLayout,
    head_dim: usize,
    heads: usize,
    kv_heads: usize,
    lie: Lie,
) -> Result<()> {
    let (n, kv) = (layout.q_rows(), layout.kv_rows());
    let what = format!("{heads}/{kv_heads} heads of {head_dim}, branches, {lie:?}");
    let q = h.input(Kind::T, n, heads * head_dim, lie, 1.0)?;
    let k = h.input(Kind::T, kv, kv_heads * head_dim, lie, 1.0)?;
    let v = h.input(Kind::T, kv, kv_heads * head_dim, lie, 1.0)?;
    let mut o = h.output(Kind::T, n, heads * head_dim, lie)?;
    let mut lse = h.output(Kind::F32, n, heads, Lie::Dense)?;
    h.a.attention(layout, head_dim, q.in_a(), k.in_a(), v.in_a(), o.out_a(), &mut lse.a)?;
    h.b.attention(layout, head_dim, q.in_b(), k.in_b(), v.in_b(), o.out_b(), &mut lse.b)?;
    h.check("attention", &what, &o, h.tolerance.product)?;
    h.check("attention, lse", &what, &lse, h.tolerance.rounding)
}

fn backward<A: Backend, B: Backend>(
    h: &mut Harness<'_, A, B>,
    layout: &AttentionLayout,
    head_dim: usize,
    heads: usize,
    kv_heads: usize,
    lie: Lie,
    case: usize,
) -> Result<()> {
    let n = layout.q_rows();
    let what = format!("{heads}/{kv_heads} heads of {head_dim}, layout {case}, {lie:?}");
    let (q_cols, kv_cols) = (heads * head_dim, kv_heads * head_dim);
    let qkv = h.input(Kind::T, n, q_cols + 2 * kv_cols, lie, 1.0)?;
    let mut o = h.output(Kind::T, n, q_cols, lie)?;
    let mut lse = h.output(Kind::F32, n, heads, Lie::Dense)?;
    let parts = |p: &Pair<A, B>| {
        let (a, b) = (p.in_a(), p.in_b());
        (
            [a.columns(0, q_cols), a.columns(q_cols, kv_cols), a.columns(q_cols + kv_cols, kv_cols)]
                .map(|m| (m.offset, m.cols)),
            b.stride,
        )
    };
    let ([q, k, v], _) = parts(&qkv);
    {
        let a = qkv.in_a();
        let part = |(offset, cols)| cashtag_backend::Mat { offset, cols, ..a };
        h.a.attention(layout, head_dim, part(q), part(k), part(v), o.out_a(), &mut lse.a)?;
        let b = qkv.in_b();
        let part = |(offset, cols)| cashtag_backend::Mat { offset, cols, ..b };
        h.b.attention(layout, head_dim, part(q), part(k), part(v), o.out_b(), &mut lse.b)?;
    }
    h.check("attention", &what, &o, h.tolerance.product)?;
    h.check("attention, lse", &what, &lse, h.tolerance.rounding)?;

    let d_o = h.input(Kind::T, n, q_cols, lie, 1.0)?;
    let mut d = h.output(Kind::T, n, q_cols + 2 * kv_cols, lie)?;
    h.a.attention_backward(layout, head_dim, kv_heads, qkv.in_a(), o.in_a(), &lse.a, d_o.in_a(), d.out_a())?;
    h.b.attention_backward(layout, head_dim, kv_heads, qkv.in_b(), o.in_b(), &lse.b, d_o.in_b(), d.out_b())?;
    // Each part by itself: dv is larger than dq and dk and would hide their errors.
    let (reference, candidate) = (h_read_a(h, &d)?, h.read_b(&d)?);
    h.check("attention_backward", &what, &d, h.tolerance.product)?;
    for (name, (offset, cols)) in ["dq", "dk", "dv"].into_iter().zip([q, k, v]) {
        // The parts stand in dqkv as they do in qkv, but from its own offset.
        let start = d.in_b().offset + offset - qkv.in_b().offset;
        let (mut error, mut norm) = (0f64, 0f64);
        for row in 0..n {
            for column in 0..cols {
                let i = start + row * d.in_b().stride + column;
                error += (f64::from(candidate[i]) - f64::from(reference[i])).powi(2);
                norm += f64::from(reference[i]).powi(2);
            }
        }
        let error = if norm > 0.0 { (error / norm).sqrt() } else { error };
        h.record(&format!("attention_backward, {name}"), format!("{name} ({what})"), error, 1.5 * h.tolerance.product);
    }

    let mut again = h.output(Kind::T, n, q_cols + 2 * kv_cols, Lie::Dense)?;
    let mut once_more = h.output(Kind::T, n, q_cols + 2 * kv_cols, Lie::Dense)?;
    for out in [&mut again, &mut once_more] {
        h.b.attention_backward(layout, head_dim, kv_heads, qkv.in_b(), o.in_b(), &lse.b, d_o.in_b(), out.out_b())?;
    }
    let (first, second) = (h.read_b(&again)?, h.read_b(&once_more)?);
    let len = n * (q_cols + 2 * kv_cols);
    h.same_bits("attention_backward", &first[..len], &second[..len]);
    Ok(())
}

fn h_read_a<A: Backend, B: Backend>(h: &Harness<'_, A, B>, pair: &Pair<A, B>) -> Result<Vec<f32>> {
    let mut all = vec![0.0; h.a.len(&pair.a)];
    h.a.download(&pair.a, 0, &mut all)?;
    Ok(all)
}

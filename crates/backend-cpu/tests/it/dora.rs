//! The operations of DoRA against finite differences in f64, and row norms against their definition.

use std::ops::Range;

use cashtag_backend::{Backend, Dtype, Mat, MatMut, Result, WeightSource};
use cashtag_backend_cpu::{CpuBackend, Precision};
use proptest::prelude::*;

use crate::finite_differences::{assert_close, backend, differences, download, upload, values};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// y = (m/n)∘z for constant norms n: dz is dy scaled by m/n, dm is Σ dy∘y / m.
    #[test]
    fn magnitudes(rows in 1usize..9, cols in 1usize..150, seed in 0u32..1000) {
        let b = backend();
        let z = values(rows * cols, seed);
        let dy = values(rows * cols, seed + 1);
        let m: Vec<f64> = values(cols, seed + 2).iter().map(|u| 1.5 + u).collect();
        let n: Vec<f64> = values(cols, seed + 3).iter().map(|u| 2.0 + u).collect();
        let forward = |m: &[f64], z: &[f64]| -> Vec<f64> {
            z.chunks(cols).flat_map(|row| (0..cols).map(|j| m[j] / n[j] * row[j]).collect::<Vec<_>>()).collect()
        };
        // Places in front and behind that belong to other modules.
        let padded = |v: Vec<f64>| upload(&b, &[vec![3.0; 5], v, vec![4.0; 2]].concat());
        let scale = padded((0..cols).map(|j| m[j] / n[j]).collect());
        let inverse = padded(m.iter().map(|m| 1.0 / m).collect());

        let mut y = upload(&b, &z);
        b.scale_columns(&scale, 5, MatMut::new(&mut y, rows, cols)).unwrap();
        assert_close(&download(&b, &y), &forward(&m, &z), "forward");

        let mut gradient = upload(&b, &vec![0.5; cols + 7]);
        let d = upload(&b, &dy);
        b.column_dots(Mat::new(&d, rows, cols), Mat::new(&y, rows, cols), &inverse, 5, &mut gradient).unwrap();
        let found = download(&b, &gradient);
        prop_assert!(found[..5].iter().chain(&found[5 + cols..]).all(|g| *g == 0.5));
        let found: Vec<f64> = found[5..5 + cols].iter().map(|g| g - 0.5).collect();
        assert_close(&found, &differences(&m, &dy, |m| forward(m, &z)), "dm");

        let mut d = d;
        b.scale_columns(&scale, 5, MatMut::new(&mut d, rows, cols)).unwrap();
        assert_close(&download(&b, &d), &differences(&z, &dy, |z| forward(&m, z)), "dz");
    }
}

pub(crate) struct Source(pub(crate) Vec<f32>, pub(crate) usize);

impl WeightSource for Source {
    fn name(&self) -> &str {
        "w"
    }
    fn rows(&self) -> usize {
        self.0.len() / self.1
    }
    fn cols(&self) -> usize {
        self.1
    }
    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(&self.0[rows.start * self.1..rows.end * self.1]);
        Ok(())
    }
}

#[test]
fn norms_of_adapted_rows() {
    for precision in [Precision::F32, Precision::Bf16] {
        let b = CpuBackend::new(precision, 2).unwrap();
        let (out, inner, r, first, rows, scale) = (75, 70, 6, 3, 67, 0.5f32);
        // Sixteenths: exact in bf16 too.
        let coarse = |n: usize, seed| values(n, seed).iter().map(|v| (v * 16.0).round() / 16.0).collect::<Vec<f64>>();
        let (w, a, factors) = (coarse(out * inner, 1), coarse(r * inner, 2), coarse(rows * r, 3));
        let weight = b.weight(&[&Source(w.iter().map(|v| *v as f32).collect(), inner)]).unwrap();
        let on_device = |v: &[f64]| {
            let v: Vec<f32> = v.iter().map(|x| *x as f32).collect();
            let mut buffer = b.zeros(b.compute_dtype(), v.len()).unwrap();
            b.upload(&v, &mut buffer, 0).unwrap();
            buffer
        };
        let (a_buffer, b_buffer) = (on_device(&a), on_device(&factors));
        let found = b
            .adapted_row_norms(&weight, first, scale, Mat::new(&a_buffer, r, inner), Mat::new(&b_buffer, rows, r))
            .unwrap();
        let expected: Vec<f64> = (0..rows)
            .map(|i| {
                let row = (0..inner).map(|k| {
                    let update: f64 = (0..r).map(|j| factors[i * r + j] * a[j * inner + k]).sum();
                    (w[(first + i) * inner + k] + f64::from(scale) * update).powi(2)
                });
                row.sum::<f64>().sqrt()
            })
            .collect();
        let found: Vec<f64> = found.into_iter().map(f64::from).collect();
        assert_close(&found, &expected, "norms");
        assert_eq!(b.dtype(&a_buffer), if precision == Precision::F32 { Dtype::F32 } else { Dtype::Bf16 });
    }
}

// DoRA (macro T: compute dtype): columns scaled by their magnitude, the gradient of the magnitudes, norms of adapted rows.
#include "common.cuh"

template <int V> DEVICE void scale_columns_(const float *scale, T *x, i64 stride, u32 cols, u32 chunks) {
    Place p = place<V>(chunks);
    if (p.column >= cols) return;
    float v[V];
    T *at = x + p.row * stride + p.column;
    Lane<V, T>::load(at, v);
    // `scale` begins in the middle of a buffer, so it is read one by one.
    for (int i = 0; i < V; i++) v[i] *= scale[p.column + i];
    Lane<V, T>::store(at, v);
}

extern "C" __global__ void scale_columns_8(const float *scale, T *x, i64 stride, u32 cols, u32 chunks) {
    scale_columns_<8>(scale, x, stride, cols, chunks);
}
extern "C" __global__ void scale_columns_1(const float *scale, T *x, i64 stride, u32 cols, u32 chunks) {
    scale_columns_<1>(scale, x, stride, cols, chunks);
}

// out[j] += scale[j] · Σ a[i][j]·b[i][j]. A block has 32 columns and 8 threads for each: rows i, i + 8, …, then the eight sums in
// order.
extern "C" __global__ void __launch_bounds__(256)
    column_dots(const T *a, i64 a_stride, const T *b, i64 b_stride, const float *scale, float *out, u32 rows, u32 cols) {
    __shared__ float sums[8][32];
    u32 lane = threadIdx.x % 32, part = threadIdx.x / 32;
    u32 column = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (column < cols)
        for (u32 i = part; i < rows; i += 8) sum += to_f32(a[i * a_stride + column]) * to_f32(b[i * b_stride + column]);
    sums[part][lane] = sum;
    __syncthreads();
    if (part > 0 || column >= cols) return;
    for (u32 i = 1; i < 8; i++) sum += sums[i][lane];
    out[column] += scale[column] * sum;
}

// norms[i] = ‖w[i] + update[i]‖, one block a row.
extern "C" __global__ void __launch_bounds__(256)
    adapted_row_norms(const T *w, i64 w_stride, const float *update, i64 update_stride, float *norms, u32 cols) {
    __shared__ float scratch[33];
    i64 row = blockIdx.x;
    float sum = 0.0f;
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        float v = to_f32(w[row * w_stride + c]) + update[row * update_stride + c];
        sum += v * v;
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) norms[row] = sqrtf(sum);
}

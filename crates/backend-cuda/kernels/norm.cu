// RMSNorm and its backward (macros S: dtype of x, T: compute dtype); the forward can leave a copy
// with dropout, the backward one of its result in T. One block of 256 threads a row; the second pass over
// the row finds it in the first-level cache.
#include "common.cuh"
#include "philox.cuh"

// y, and dropped = dropout(y); either may be null.
template <int V>
DEVICE void rms_norm_(const S *x, i64 x_stride, const float *w, float epsilon, T *y, i64 y_stride, T *dropped, i64 dropped_stride,
                      const Mask &mask, float scale, float *inv_rms, u32 cols) {
    __shared__ float scratch[33];
    i64 row = blockIdx.x;
    x += row * x_stride;
    float sum = 0.0f;
    for (u32 c = threadIdx.x * V; c < cols; c += blockDim.x * V) {
        float v[V];
        Lane<V, S>::load(x + c, v);
        for (int i = 0; i < V; i++) sum += v[i] * v[i];
    }
    float inv = 1.0f / sqrtf(block_sum(sum, scratch) / (float)cols + epsilon);
    for (u32 c = threadIdx.x * V; c < cols; c += blockDim.x * V) {
        float v[V], factor[V];
        Lane<V, S>::load(x + c, v);
        Lane<V, float>::load(w + c, factor);
        for (int i = 0; i < V; i++) v[i] = v[i] * inv * factor[i];
        if (y) Lane<V, T>::store(y + row * y_stride + c, v);
        if (dropped) {
            drop<T, V>(mask, scale, (u32)row, c, v);
            Lane<V, T>::store(dropped + row * dropped_stride + c, v);
        }
    }
    if (threadIdx.x == 0) inv_rms[row] = inv;
}

template <int V>
DEVICE void rms_norm_backward_(const T *dy, i64 dy_stride, const S *x, i64 x_stride, const float *w, const float *inv_rms, float *dx,
                               i64 dx_stride, T *copy, i64 copy_stride, u32 cols) {
    __shared__ float scratch[33];
    i64 row = blockIdx.x;
    dy += row * dy_stride, x += row * x_stride, dx += row * dx_stride;
    if (copy) copy += row * copy_stride;
    float sum = 0.0f;
    for (u32 c = threadIdx.x * V; c < cols; c += blockDim.x * V) {
        float g[V], v[V], scale[V];
        Lane<V, T>::load(dy + c, g);
        Lane<V, S>::load(x + c, v);
        Lane<V, float>::load(w + c, scale);
        for (int i = 0; i < V; i++) sum += g[i] * scale[i] * v[i];
    }
    float inv = inv_rms[row];
    float factor = block_sum(sum, scratch) * inv / (float)cols * inv;
    for (u32 c = threadIdx.x * V; c < cols; c += blockDim.x * V) {
        float g[V], v[V], scale[V], d[V];
        Lane<V, T>::load(dy + c, g);
        Lane<V, S>::load(x + c, v);
        Lane<V, float>::load(w + c, scale);
        Lane<V, float>::load(dx + c, d);
        for (int i = 0; i < V; i++) d[i] += inv * (g[i] * scale[i] - v[i] * factor);
        Lane<V, float>::store(dx + c, d);
        if (copy) Lane<V, T>::store(copy + c, d);
    }
}

#define KERNELS(V)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                                                         \
        rms_norm_##V(const S *x, i64 x_stride, const float *w, float epsilon, T *y, i64 y_stride, T *dropped,                 \
                     i64 dropped_stride, Mask mask, float scale, float *inv_rms, u32 cols) {                                  \
        rms_norm_<V>(x, x_stride, w, epsilon, y, y_stride, dropped, dropped_stride, mask, scale, inv_rms, cols);              \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                                         \
        rms_norm_backward_##V(const T *dy, i64 dy_stride, const S *x, i64 x_stride, const float *w, const float *inv_rms,     \
                              float *dx, i64 dx_stride, T *copy, i64 copy_stride, u32 cols) {                                 \
        rms_norm_backward_<V>(dy, dy_stride, x, x_stride, w, inv_rms, dx, dx_stride, copy, copy_stride, cols);                \
    }
KERNELS(8)
KERNELS(1)

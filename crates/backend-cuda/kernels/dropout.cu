// Inverted dropout with the mask of `cashtag_backend::philox`: one Philox call decides eight columns.
#include "common.cuh"
#include "philox.cuh"

template <int V, bool ACCUMULATE>
DEVICE void dropout_(const T *x, i64 x_stride, T *out, i64 out_stride, u32 cols, u32 chunks, const Mask &mask, float scale) {
    Place p = place<V>(chunks);
    if (p.column >= cols) return;
    float v[V], sum[V];
    Lane<V, T>::load(x + p.row * x_stride + p.column, v);
    if (ACCUMULATE) Lane<V, T>::load(out + p.row * out_stride + p.column, sum);
    drop<T, V>(mask, scale, (u32)p.row, p.column, v);
    if (ACCUMULATE)
        for (int i = 0; i < V; i++) v[i] += sum[i];
    Lane<V, T>::store(out + p.row * out_stride + p.column, v);
}

#define KERNELS(V)                                                                                                            \
    extern "C" __global__ void dropout_##V(const T *x, i64 x_stride, T *out, i64 out_stride, u32 cols, u32 chunks, Mask mask, \
                                           float scale) {                                                                     \
        dropout_<V, false>(x, x_stride, out, out_stride, cols, chunks, mask, scale);                                          \
    }                                                                                                                         \
    extern "C" __global__ void dropout_add_##V(const T *x, i64 x_stride, T *out, i64 out_stride, u32 cols, u32 chunks,        \
                                               Mask mask, float scale) {                                                      \
        dropout_<V, true>(x, x_stride, out, out_stride, cols, chunks, mask, scale);                                           \
    }
KERNELS(8)
KERNELS(1)

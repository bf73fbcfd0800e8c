// Copies, sums, gathers and scatters between views of any two float dtypes (macros S: source, D: destination).
#include "common.cuh"

template <int V> DEVICE void copy_(const S *src, i64 src_stride, D *dst, i64 dst_stride, u32 cols, u32 chunks) {
    Place p = place<V>(chunks);
    if (p.column >= cols) return;
    float v[V];
    Lane<V, S>::load(src + p.row * src_stride + p.column, v);
    Lane<V, D>::store(dst + p.row * dst_stride + p.column, v);
}

template <int V> DEVICE void add_(const S *src, i64 src_stride, D *dst, i64 dst_stride, u32 cols, u32 chunks) {
    Place p = place<V>(chunks);
    if (p.column >= cols) return;
    float v[V], sum[V];
    Lane<V, S>::load(src + p.row * src_stride + p.column, v);
    Lane<V, D>::load(dst + p.row * dst_stride + p.column, sum);
    for (int i = 0; i < V; i++) sum[i] += v[i];
    Lane<V, D>::store(dst + p.row * dst_stride + p.column, sum);
}

// Row `rows[i]` of `src`, or NaN where there is no such row: a bad index must not read foreign memory.
template <int V>
DEVICE void gather_(const S *src, i64 src_stride, const u32 *rows, u32 src_rows, D *dst, i64 dst_stride, u32 cols, u32 chunks) {
    Place p = place<V>(chunks);
    if (p.column >= cols) return;
    u32 from = rows[p.row];
    float v[V];
    if (from < src_rows) Lane<V, S>::load(src + (i64)from * src_stride + p.column, v);
    else
        for (int i = 0; i < V; i++) v[i] = not_a_number();
    Lane<V, D>::store(dst + p.row * dst_stride + p.column, v);
}

template <int V>
DEVICE void scatter_add_(const S *src, i64 src_stride, const u32 *rows, u32 dst_rows, D *dst, i64 dst_stride, u32 cols, u32 chunks) {
    Place p = place<V>(chunks);
    if (p.column >= cols) return;
    u32 to = rows[p.row];
    if (to >= dst_rows) return;
    float v[V], sum[V];
    Lane<V, S>::load(src + p.row * src_stride + p.column, v);
    D *target = dst + (i64)to * dst_stride + p.column;
    Lane<V, D>::load(target, sum);
    for (int i = 0; i < V; i++) sum[i] += v[i];
    Lane<V, D>::store(target, sum);
}

#define KERNELS(V)                                                                                                             \
    extern "C" __global__ void copy_##V(const S *src, i64 src_stride, D *dst, i64 dst_stride, u32 cols, u32 chunks) {          \
        copy_<V>(src, src_stride, dst, dst_stride, cols, chunks);                                                              \
    }                                                                                                                          \
    extern "C" __global__ void add_##V(const S *src, i64 src_stride, D *dst, i64 dst_stride, u32 cols, u32 chunks) {           \
        add_<V>(src, src_stride, dst, dst_stride, cols, chunks);                                                               \
    }                                                                                                                          \
    extern "C" __global__ void gather_##V(const S *src, i64 src_stride, const u32 *rows, u32 src_rows, D *dst, i64 dst_stride, \
                                          u32 cols, u32 chunks) {                                                              \
        gather_<V>(src, src_stride, rows, src_rows, dst, dst_stride, cols, chunks);                                            \
    }                                                                                                                          \
    extern "C" __global__ void scatter_add_##V(const S *src, i64 src_stride, const u32 *rows, u32 dst_rows, D *dst,            \
                                               i64 dst_stride, u32 cols, u32 chunks) {                                         \
        scatter_add_<V>(src, src_stride, rows, dst_rows, dst, dst_stride, cols, chunks);                                       \
    }
KERNELS(8)
KERNELS(1)

// SwiGLU, with a copy of its result under dropout, and its backward (macro T): gate in the first f columns of gate_up, up in the last f.
#include "common.cuh"
#include "philox.cuh"

// h, and dropped = dropout(h); either may be null.
template <int V>
DEVICE void swiglu_(const T *gate_up, i64 stride, T *h, i64 h_stride, T *dropped, i64 dropped_stride, const Mask &mask, float scale, u32 f,
                    u32 chunks) {
    Place p = place<V>(chunks);
    if (p.column >= f) return;
    const T *in = gate_up + p.row * stride + p.column;
    float g[V], u[V];
    Lane<V, T>::load(in, g);
    Lane<V, T>::load(in + f, u);
    for (int i = 0; i < V; i++) g[i] = g[i] * sigmoid(g[i]) * u[i];
    if (h) Lane<V, T>::store(h + p.row * h_stride + p.column, g);
    if (dropped) {
        drop<T, V>(mask, scale, (u32)p.row, p.column, g);
        Lane<V, T>::store(dropped + p.row * dropped_stride + p.column, g);
    }
}

template <int V>
DEVICE void swiglu_backward_(const T *dh, i64 dh_stride, const T *gate_up, i64 stride, T *out, i64 out_stride, u32 f, u32 chunks) {
    Place p = place<V>(chunks);
    if (p.column >= f) return;
    const T *in = gate_up + p.row * stride + p.column;
    float d[V], g[V], u[V];
    Lane<V, T>::load(dh + p.row * dh_stride + p.column, d);
    Lane<V, T>::load(in, g);
    Lane<V, T>::load(in + f, u);
    for (int i = 0; i < V; i++) {
        float s = sigmoid(g[i]), silu = g[i] * s;
        g[i] = d[i] * u[i] * (s + silu * (1.0f - s));
        u[i] = d[i] * silu;
    }
    T *to = out + p.row * out_stride + p.column;
    Lane<V, T>::store(to, g);
    Lane<V, T>::store(to + f, u);
}

#define KERNELS(V)                                                                                                           \
    extern "C" __global__ void swiglu_##V(const T *gate_up, i64 stride, T *h, i64 h_stride, T *dropped, i64 dropped_stride,   \
                                          Mask mask, float scale, u32 f, u32 chunks) {                                        \
        swiglu_<V>(gate_up, stride, h, h_stride, dropped, dropped_stride, mask, scale, f, chunks);                            \
    }                                                                                                                         \
    extern "C" __global__ void swiglu_backward_##V(const T *dh, i64 dh_stride, const T *gate_up, i64 stride, T *out,          \
                                                   i64 out_stride, u32 f, u32 chunks) {                                       \
        swiglu_backward_<V>(dh, dh_stride, gate_up, stride, out, out_stride, f, chunks);                                      \
    }
KERNELS(8)
KERNELS(1)

// Inverted dropout with the mask of `cashtag_backend::philox`: one Philox call decides eight columns.
#include "common.cuh"

struct Bits {
    u32 word[4];
};

DEVICE Bits philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        if (round > 0) k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
        u32 h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
        c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
    }
    Bits b = {{c0, c1, c2, c3}};
    return b;
}

template <int V, bool ACCUMULATE>
DEVICE void dropout_(const T *x, i64 x_stride, T *out, i64 out_stride, u32 cols, u32 chunks, u32 seed_low, u32 seed_high, u32 step,
                     u32 site, u32 threshold, float scale) {
    Place p = place<V>(chunks);
    if (p.column >= cols) return;
    float v[V], sum[V];
    Lane<V, T>::load(x + p.row * x_stride + p.column, v);
    if (ACCUMULATE) Lane<V, T>::load(out + p.row * out_stride + p.column, sum);
    Bits bits = philox(p.column / 8, (u32)p.row, site, step, seed_low, seed_high);
    for (int i = 0; i < V; i++) {
        u32 j = V == 8 ? i : p.column % 8;
        u32 word = j < 4 ? (j < 2 ? bits.word[0] : bits.word[1]) : (j < 6 ? bits.word[2] : bits.word[3]);
        u32 draw = j % 2 ? word >> 16 : word & 0xffffu;
        float kept = draw >= threshold ? v[i] * scale : 0.0f;
        v[i] = ACCUMULATE ? sum[i] + kept : kept;
    }
    Lane<V, T>::store(out + p.row * out_stride + p.column, v);
}

#define KERNELS(V)                                                                                                            \
    extern "C" __global__ void dropout_##V(const T *x, i64 x_stride, T *out, i64 out_stride, u32 cols, u32 chunks, u32 seed_low, \
                                           u32 seed_high, u32 step, u32 site, u32 threshold, float scale) {                   \
        dropout_<V, false>(x, x_stride, out, out_stride, cols, chunks, seed_low, seed_high, step, site, threshold, scale);    \
    }                                                                                                                         \
    extern "C" __global__ void dropout_add_##V(const T *x, i64 x_stride, T *out, i64 out_stride, u32 cols, u32 chunks,        \
                                               u32 seed_low, u32 seed_high, u32 step, u32 site, u32 threshold, float scale) { \
        dropout_<V, true>(x, x_stride, out, out_stride, cols, chunks, seed_low, seed_high, step, site, threshold, scale);     \
    }
KERNELS(8)
KERNELS(1)

// Rotary embedding in place (macro T). One block a row: a thread keeps its cosines and sines and walks over the heads.
// blockDim.x is a multiple of half / V.
#include "common.cuh"

template <int V>
DEVICE void rope_(T *x, i64 stride, u32 heads, u32 half, const float *cos, const float *sin, const u32 *positions, u32 max_position,
                  float sign) {
    u32 lanes = half / V, j = threadIdx.x % lanes * V;
    u32 position = positions[blockIdx.x];
    float c[V], s[V];
    if (position < max_position) {
        Lane<V, float>::load(cos + (i64)position * half + j, c);
        Lane<V, float>::load(sin + (i64)position * half + j, s);
    } else {
        for (int i = 0; i < V; i++) c[i] = s[i] = not_a_number();
    }
    T *row = x + (i64)blockIdx.x * stride + j;
    for (u32 head = threadIdx.x / lanes; head < heads; head += blockDim.x / lanes) {
        T *p = row + (i64)head * 2 * half;
        float a[V], b[V];
        Lane<V, T>::load(p, a);
        Lane<V, T>::load(p + half, b);
        for (int i = 0; i < V; i++) {
            float u = a[i], v = b[i], si = s[i] * sign;
            a[i] = u * c[i] - v * si;
            b[i] = v * c[i] + u * si;
        }
        Lane<V, T>::store(p, a);
        Lane<V, T>::store(p + half, b);
    }
}

#define KERNELS(V)                                                                                                            \
    extern "C" __global__ void rope_##V(T *x, i64 stride, u32 heads, u32 half, const float *cos, const float *sin,            \
                                        const u32 *positions, u32 max_position, float sign) {                                 \
        rope_<V>(x, stride, heads, half, cos, sin, positions, max_position, sign);                                            \
    }
KERNELS(8)
KERNELS(1)

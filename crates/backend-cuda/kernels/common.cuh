// What the kernel families share: vectors of eight elements, reductions, and the way a grid walks over the rows of a view.
//
// A view is (pointer to its first element, row stride in elements); its columns are contiguous. Kernels come in two widths:
// V = 8 needs pointers, strides and column counts that are multiples of eight elements (16-byte accesses), V = 1 takes
// anything. The host chooses.
#pragma once
#include "ptx.cuh"

template <typename T> DEVICE void load8(const T *p, float (&v)[8]) {
    uint4 w = *(const uint4 *)p;
    v[0] = low(w.x, T()), v[1] = high(w.x, T()), v[2] = low(w.y, T()), v[3] = high(w.y, T());
    v[4] = low(w.z, T()), v[5] = high(w.z, T()), v[6] = low(w.w, T()), v[7] = high(w.w, T());
}
template <> DEVICE void load8<float>(const float *p, float (&v)[8]) {
    float4 a = ((const float4 *)p)[0], b = ((const float4 *)p)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
template <typename T> DEVICE void store8(T *p, const float (&v)[8]) {
    uint4 w;
    w.x = pack(v[0], v[1], T()), w.y = pack(v[2], v[3], T()), w.z = pack(v[4], v[5], T()), w.w = pack(v[6], v[7], T());
    *(uint4 *)p = w;
}
template <> DEVICE void store8<float>(float *p, const float (&v)[8]) {
    ((float4 *)p)[0] = make_float4(v[0], v[1], v[2], v[3]);
    ((float4 *)p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

// V elements at once.
template <int V, typename T> struct Lane;
template <typename T> struct Lane<8, T> {
    static DEVICE void load(const T *p, float (&v)[8]) { load8(p, v); }
    static DEVICE void store(T *p, const float (&v)[8]) { store8(p, v); }
};
template <typename T> struct Lane<1, T> {
    static DEVICE void load(const T *p, float (&v)[1]) { v[0] = to_f32(*p); }
    static DEVICE void store(T *p, const float (&v)[1]) { from_f32(v[0], *p); }
};

// Where a thread stands in a grid that gives every row `chunks` blocks.
struct Place {
    i64 row;
    u32 column;
};
template <int V> DEVICE Place place(u32 chunks) {
    u32 row = blockIdx.x / chunks;
    Place p = {(i64)row, ((blockIdx.x - row * chunks) * blockDim.x + threadIdx.x) * V};
    return p;
}

DEVICE float warp_sum(float x) {
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}
DEVICE float warp_max(float x) {
    for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

// The sum over a block of whole warps, in every thread and always in the same order. `scratch` holds 33 floats and may be
// used again at once.
DEVICE float block_sum(float x, float *scratch) {
    x = warp_sum(x);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    if (warp == 0) {
        float y = lane < blockDim.x / 32 ? scratch[lane] : 0.0f;
        y = warp_sum(y);
        if (lane == 0) scratch[32] = y;
    }
    __syncthreads();
    x = scratch[32];
    __syncthreads();
    return x;
}

DEVICE float not_a_number() { return __uint_as_float(0x7fc00000u); }
DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2_fast(-1.44269504f * x)); }

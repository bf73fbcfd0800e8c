// Sums over a whole buffer in a fixed order: the grid depends on the length alone.
#include "common.cuh"

DEVICE double block_sum_f64(double x, double *scratch) {
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = 0.0;
    for (u32 i = 0; i < blockDim.x / 32; i++) x += scratch[i];
    return x;
}

// One partial sum a block, of the elements (SQUARES: of their squares) at block · 256 + thread, + grid, …
template <bool SQUARES> DEVICE void partial_(const float *x, u64 len, double *partials) {
    __shared__ double scratch[8];
    double total = 0.0;
    u64 step = (u64)gridDim.x * 1024;
    bool aligned = (u64)x % 16 == 0;
    for (u64 i = ((u64)blockIdx.x * 256 + threadIdx.x) * 4; i < len; i += step) {
        float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (aligned && i + 4 <= len) {
            float4 w = *(const float4 *)(x + i);
            v[0] = w.x, v[1] = w.y, v[2] = w.z, v[3] = w.w;
        } else {
            for (u32 j = 0; j < 4 && i + j < len; j++) v[j] = x[i + j];
        }
        float sum = SQUARES ? (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3]) : (v[0] + v[1]) + (v[2] + v[3]);
        total += (double)sum;
    }
    total = block_sum_f64(total, scratch);
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(256) sum_of_squares(const float *x, u64 len, double *partials) {
    partial_<true>(x, len, partials);
}
extern "C" __global__ void __launch_bounds__(256) sum(const float *x, u64 len, double *partials) { partial_<false>(x, len, partials); }

// The sum of `n` partials times `factor`; as f64 in `result` and rounded in `rounded`, where they are given. One block.
extern "C" __global__ void __launch_bounds__(256) finish_sum(const double *partials, u32 n, double factor, double *result, float *rounded) {
    __shared__ double scratch[8];
    double total = 0.0;
    for (u32 i = threadIdx.x; i < n; i += 256) total += partials[i];
    total = block_sum_f64(total, scratch) * factor;
    if (threadIdx.x == 0) {
        if (result) *result = total;
        if (rounded) *rounded = (float)total;
    }
}

// NF4 (QLoRA, Dettmers et al. 2023) in bitsandbytes' layout: blocks of 64 consecutive elements, two codes a byte, the first
// element in the high nibble, one f32 absmax a block; with double quantisation one byte a block, whose scale is shared by 256 blocks.
// Macros: S dtype of the values to quantise, T dtype of the dequantised values.
//
// Codes are those of bitsandbytes' CUDA kernel bit for bit: value · rcp.approx(absmax), denormals flushed, compared with
// the thresholds by strict >. A block of zeros gives 0 · ∞ = NaN, which exceeds no threshold: code 0.
#include "common.cuh"

__constant__ float LEVELS[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f,
    0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

DEVICE u32 nf4_code(float x) {
    // A search tree over the 15 thresholds; NaN goes left everywhere.
    if (x > 0.03979014977812767f) {
        if (x > 0.3893125355243683f) {
            if (x > 0.6427869200706482f) return x > 0.8614784178118011f ? 15 : 14;
            return x > 0.5016634166240692f ? 13 : 12;
        }
        if (x > 0.2035212516784668f) return x > 0.2920137718319893f ? 11 : 10;
        return x > 0.1202552504837513f ? 9 : 8;
    }
    if (x > -0.33967943489551544f) {
        if (x > -0.13791173323988914f) return x > -0.045525018125772476f ? 7 : 6;
        return x > -0.23460740596055984f ? 5 : 4;
    }
    if (x > -0.6106329262256622f) return x > -0.4599952697753906f ? 3 : 2;
    return x > -0.8480964004993439f ? 1 : 0;
}

// Eight elements a thread, eight threads a block of 64. `codes` and `absmax` start at the first of the `len` elements.
extern "C" __global__ void __launch_bounds__(256) nf4_quantize(const S *x, u64 len, u8 *codes, float *absmax) {
    u64 i = ((u64)blockIdx.x * 256 + threadIdx.x) * 8;
    float v[8];
    if (i + 8 <= len) load8(x + i, v);
    else
        for (int j = 0; j < 8; j++) v[j] = i + j < len ? to_f32(x[i + j]) : 0.0f;
    float max = 0.0f;
    for (int j = 0; j < 8; j++) max = fmaxf(max, fabsf(v[j]));
    for (int d = 1; d < 8; d <<= 1) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, d));
    if (i >= len) return;
    if (threadIdx.x % 8 == 0) absmax[i / 64] = max;
    float inverse = reciprocal_fast(max);
    u32 word = 0;
    for (int j = 0; j < 8; j++) word |= nf4_code(v[j] * inverse) << (j / 2 * 8 + (j % 2 ? 0 : 4));
    if (i + 8 <= len) *(u32 *)(codes + i / 2) = word;
    else
        for (u32 j = 0; i + 2 * j < len; j++) codes[i / 2 + j] = (u8)(word >> (8 * j));
}

// absmax of block `block`: as it is, or from its byte.
struct Scales {
    const float *absmax;
    const u8 *codes;
    const float *map;
    // One of each for 256 blocks.
    const float *nested;
    const float *offset;
};
DEVICE float scale_of(const Scales &s, u64 block) {
    if (!s.codes) return s.absmax[block];
    return s.map[s.codes[block]] * s.nested[block / 256] + s.offset[block / 256];
}

// Columns `column .. column + cols` of rows `row .. row + gridDim.x / chunks` of a matrix with `inner` columns, as T into `out`.
// Sixteen elements a thread; inner, column and cols are multiples of 16, so that no thread straddles two blocks of 64.
extern "C" __global__ void __launch_bounds__(256)
    nf4_dequantize_16(const u8 *codes, Scales scales, u64 inner, u64 row, u32 column, u32 cols, u32 chunks, T *out, i64 stride) {
    __shared__ float levels[16];
    if (threadIdx.x < 16) levels[threadIdx.x] = LEVELS[threadIdx.x];
    __syncthreads();
    Place p = place<16>(chunks);
    if (p.column >= cols) return;
    u64 i = (row + p.row) * inner + column + p.column;
    uint2 w = *(const uint2 *)(codes + i / 2);
    float scale = scale_of(scales, i / 64), v[8];
    T *to = out + p.row * stride + p.column;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 word = half ? w.y : w.x;
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = levels[word >> (j / 2 * 8 + (j % 2 ? 0 : 4)) & 15] * scale;
        store8(to + half * 8, v);
    }
}

// The same, one element a thread, for any shape.
extern "C" __global__ void __launch_bounds__(256)
    nf4_dequantize_1(const u8 *codes, Scales scales, u64 inner, u64 row, u32 column, u32 cols, u32 chunks, T *out, i64 stride) {
    Place p = place<1>(chunks);
    if (p.column >= cols) return;
    u64 i = (row + p.row) * inner + column + p.column;
    u32 code = codes[i / 2] >> (i % 2 ? 0 : 4) & 15;
    from_f32(LEVELS[code] * scale_of(scales, i / 64), out[p.row * stride + p.column]);
}

// Rows `ids[i]` as f32, rounded through T as every other use of the weight sees them; NaN where there is no such row.
extern "C" __global__ void __launch_bounds__(256)
    nf4_embed(const u8 *codes, Scales scales, u64 inner, u32 rows, const u32 *ids, float *out, i64 stride, u32 chunks) {
    Place p = place<1>(chunks);
    if (p.column >= inner) return;
    u32 id = ids[p.row];
    float value = not_a_number();
    if (id < rows) {
        u64 i = (u64)id * inner + p.column;
        T rounded;
        from_f32(LEVELS[codes[i / 2] >> (i % 2 ? 0 : 4) & 15] * scale_of(scales, i / 64), rounded);
        value = to_f32(rounded);
    }
    out[p.row * stride + p.column] = value;
}

// Double quantisation of the `blocks` absmax values of one tensor: subtract their mean, scale by the largest of 256, nearest entry of
// the sorted `map`. One block of 256 threads for 256 values.
extern "C" __global__ void __launch_bounds__(256)
    nf4_double_quantize(const float *absmax, u64 blocks, const float *mean, const float *map, u8 *codes, float *nested, float *offset) {
    __shared__ float levels[256];
    __shared__ float scratch[8];
    levels[threadIdx.x] = map[threadIdx.x];
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    float v = i < blocks ? absmax[i] - *mean : 0.0f;
    float max = warp_max(fabsf(v));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = max;
    __syncthreads();
    for (int w = 0; w < 8; w++) max = fmaxf(max, scratch[w]);
    if (threadIdx.x == 0) nested[blockIdx.x] = max, offset[blockIdx.x] = *mean;
    float x = max > 0.0f ? v * reciprocal_fast(max) : 0.0f;
    u32 low = 0, high = 255;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (levels[middle] <= x) low = middle;
        else high = middle;
    }
    u32 code = x > (levels[low] + levels[high]) * 0.5f ? high : low;
    if (i < blocks) codes[i] = (u8)code;
}

// Products with the thin matrices of LoRA, with the dropout mask drawn where it is needed instead of being written to memory and read
// back. All of them are bound by the bytes of the wide operand, which each kernel reads once.
// Macros: T dtype (f16 or bf16), RP the rank of all factors together, rounded up to 64, 128 or 192.
#include "common.cuh"
#include "philox.cuh"
#include "tile.cuh"

#if __CUDA_ARCH__ < 800
#define STAGES 1
#elif __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890
#define STAGES 2
#else
#define STAGES 3
#endif

DYNAMIC_SHARED(shared);

// Zeroes what the mask drops in the chunk at `address`: columns 8·group .. of `row`.
DEVICE void mask_chunk(const Mask &mask, u32 address, u32 row, u32 group) {
    Bits bits = draw(mask, row, group);
    uint4 v = shared_load16(address);
    v.x = keep(mask, bits.word[0], v.x), v.y = keep(mask, bits.word[1], v.y);
    v.z = keep(mask, bits.word[2], v.z), v.w = keep(mask, bits.word[3], v.w);
    shared_store16(address, v);
}

// --- u = (m∘x)·aᵀ --------------------------------------------------------------------------------------------------------

// Partial sums of a 64 × RP tile of u over `steps` times 64 columns of x (n × inner) and a (rank × inner). Four warps, 16 rows each.
// Grid (row tiles, splits); partials [splits][n][rank].
extern "C" __global__ void __launch_bounds__(128, 2)
    lora_down(const T *x, i64 x_stride, const T *a, i64 a_stride, u32 n, u32 inner, u32 rank, u32 steps, Mask mask, float *partials) {
    const u32 base = shared_address(shared), stage_bytes = (64 + RP) * 128;
    const u32 row0 = blockIdx.x * 64, first = blockIdx.y * steps, all = (inner + 63) / 64;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunk = threadIdx.x % 8, r0 = threadIdx.x / 8;
    if (first + steps > all) steps = first < all ? all - first : 0;

    auto load = [&](u32 step) {
        const u32 at = base + step % STAGES * stage_bytes, column = (first + step) * 64 + chunk * 8;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 r = r0 + 16 * i;
            const bool inside = row0 + r < n && column < inner;
            copy16(chunk_address<128>(at, r, chunk), inside ? x + (i64)(row0 + r) * x_stride + column : x, inside);
        }
#pragma unroll
        for (u32 i = 0; i < RP / 16; i++) {
            const u32 r = r0 + 16 * i;
            const bool inside = r < rank && column < inner;
            copy16(chunk_address<128>(at + 64 * 128, r, chunk), inside ? a + (i64)r * a_stride + column : a, inside);
        }
    };
    for (u32 s = 0; s + 1 < STAGES; s++) {
        if (s < steps) load(s);
        copy_commit();
    }
    float acc[RP / 8][4] = {};
    for (u32 step = 0; step < steps; step++) {
        if constexpr (STAGES == 1) {
            __syncthreads();
            load(step);
        } else {
            copy_wait<STAGES - 2>();
        }
        const u32 at = base + step % STAGES * stage_bytes;
        // A thread masks the chunks that it copied itself: it sees them before the others do.
        if (mask.threshold) {
#pragma unroll
            for (u32 i = 0; i < 4; i++)
                mask_chunk(mask, chunk_address<128>(at, r0 + 16 * i, chunk), row0 + r0 + 16 * i, (first + step) * 8 + chunk);
        }
        __syncthreads();
        if constexpr (STAGES > 1) {
            if (step + STAGES - 1 < steps) load(step + STAGES - 1);
            copy_commit();
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 left[4];
            left_fragment<128>(left, at, warp * 16, k);
#pragma unroll
            for (int j = 0; j < RP / 16; j++) {
                u32 b[4];
                right_fragments_nt<128>(b, at + 64 * 128, 16 * j, k);
                mma(acc[2 * j], left, b[0], b[1], T());
                mma(acc[2 * j + 1], left, b[2], b[3], T());
            }
        }
    }
    const u32 row = row0 + warp * 16 + lane / 4;
    float *out = partials + ((i64)blockIdx.y * n + row) * rank + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < RP / 8; j++) {
        if (j * 8 >= rank) break;
        if (row < n) *(float2 *)(out + j * 8) = make_float2(acc[j][0], acc[j][1]);
        if (row + 8 < n) *(float2 *)(out + (i64)8 * rank + j * 8) = make_float2(acc[j][2], acc[j][3]);
    }
}

// u = scale · Σ partials; rows of `rank` elements. Eight elements a thread.
extern "C" __global__ void __launch_bounds__(256)
    lora_down_finish(const float *partials, u32 splits, u32 n, u32 rank, float scale, T *u, i64 u_stride) {
    const u64 i = ((u64)blockIdx.x * 256 + threadIdx.x) * 8, total = (u64)n * rank;
    if (i >= total) return;
    float sum[8] = {};
    for (u32 s = 0; s < splits; s++) {
        float v[8];
        load8(partials + s * total + i, v);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += v[j];
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] *= scale;
    store8(u + (i64)(i / rank) * u_stride + i % rank, sum);
}

// --- da += duᵀ·(m∘x) -----------------------------------------------------------------------------------------------------

// Partial sums of RP × 64 columns of da over `steps` times 64 rows of du (n × rank) and x (n × inner). Eight warps: four across the
// rank, two across the columns. Grid (column tiles, splits); partials [splits][rank][inner].
extern "C" __global__ void __launch_bounds__(256, 2)
    lora_gradient(const T *du, i64 du_stride, const T *x, i64 x_stride, u32 n, u32 inner, u32 rank, u32 steps, Mask mask, float *partials) {
    constexpr int MT = RP / 64;
    const u32 base = shared_address(shared), stage_bytes = 64 * 128 + 64 * RP * 2;
    const u32 column0 = blockIdx.x * 64, first = blockIdx.y * steps, all = (n + 63) / 64;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % 4, wn = warp / 4;
    if (first + steps > all) steps = first < all ? all - first : 0;

    auto load = [&](u32 step) {
        const u32 at = base + step % STAGES * stage_bytes, row0 = (first + step) * 64;
        const u32 chunk = threadIdx.x % 8, column = column0 + chunk * 8;
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 r = threadIdx.x / 8 + 32 * i;
            const bool inside = row0 + r < n && column < inner;
            copy16(chunk_address<128>(at, r, chunk), inside ? x + (i64)(row0 + r) * x_stride + column : x, inside);
        }
#pragma unroll
        for (u32 i = 0; i < RP / 32; i++) {
            const u32 id = threadIdx.x + i * 256, r = id / (RP / 8), c = id % (RP / 8);
            const bool inside = row0 + r < n && c * 8 < rank;
            copy16(chunk_address<RP * 2>(at + 64 * 128, r, c), inside ? du + (i64)(row0 + r) * du_stride + c * 8 : du, inside);
        }
    };
    for (u32 s = 0; s + 1 < STAGES; s++) {
        if (s < steps) load(s);
        copy_commit();
    }
    float acc[MT][4][4] = {};
    for (u32 step = 0; step < steps; step++) {
        if constexpr (STAGES == 1) {
            __syncthreads();
            load(step);
        } else {
            copy_wait<STAGES - 2>();
        }
        const u32 at = base + step % STAGES * stage_bytes;
        if (mask.threshold) {
            const u32 chunk = threadIdx.x % 8;
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const u32 r = threadIdx.x / 8 + 32 * i;
                mask_chunk(mask, chunk_address<128>(at, r, chunk), (first + step) * 64 + r, column0 / 8 + chunk);
            }
        }
        __syncthreads();
        if constexpr (STAGES > 1) {
            if (step + STAGES - 1 < steps) load(step + STAGES - 1);
            copy_commit();
        }
#pragma unroll 2
        for (int k = 0; k < 4; k++) {
            u32 b[2][4];
#pragma unroll
            for (int j = 0; j < 2; j++) right_fragments_nn<128>(b[j], at, 16 * k, wn * 2 + j);
#pragma unroll
            for (int i = 0; i < MT; i++) {
                u32 left[4];
                left_fragment_transposed<RP * 2>(left, at + 64 * 128, 16 * k, wm * MT + i);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    mma(acc[i][2 * j], left, b[j][0], b[j][1], T());
                    mma(acc[i][2 * j + 1], left, b[j][2], b[j][3], T());
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 row = (wm * MT + i) * 16 + lane / 4, column = column0 + wn * 32 + j * 8 + lane % 4 * 2;
            if (column >= inner) continue;
            float *out = partials + ((i64)blockIdx.y * rank + row) * inner + column;
            if (row < rank) *(float2 *)out = make_float2(acc[i][j][0], acc[i][j][1]);
            if (row + 8 < rank) *(float2 *)(out + (i64)8 * inner) = make_float2(acc[i][j][2], acc[i][j][3]);
        }
}

// da += scale · Σ partials. Four elements a thread; inner is a multiple of four.
extern "C" __global__ void __launch_bounds__(256)
    lora_gradient_finish(const float *partials, u32 splits, u32 rank, u32 inner, float scale, float *da, i64 da_stride) {
    const u64 i = ((u64)blockIdx.x * 256 + threadIdx.x) * 4, total = (u64)rank * inner;
    if (i >= total) return;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (u32 s = 0; s < splits; s++) {
        float4 v = *(const float4 *)(partials + s * total + i);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    float4 *to = (float4 *)(da + (i64)(i / inner) * da_stride + i % inner), d = *to;
    *to = make_float4(d.x + scale * sum.x, d.y + scale * sum.y, d.z + scale * sum.z, d.w + scale * sum.w);
}

// --- c += scale · m∘(l·r) ------------------------------------------------------------------------------------------------

DEVICE float2 load_pair(const float *p) { return *(const float2 *)p; }
DEVICE void store_pair(float *p, float a, float b) { *(float2 *)p = make_float2(a, b); }
DEVICE float2 load_pair(const T *p) {
    u32 w = *(const u32 *)p;
    return make_float2(low(w, T()), high(w, T()));
}
DEVICE void store_pair(T *p, float a, float b) { *(u32 *)p = pack(a, b, T()); }

// Word q of lane c of a quad goes to word c of lane q.
DEVICE void transpose_quad(u32 (&w)[4]) {
    const u32 c = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        u32 t = __shfl_xor_sync(0xffffffffu, c & 1 ? w[i] : w[i + 1], 1);
        if (c & 1) w[i] = t;
        else w[i + 1] = t;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 t = __shfl_xor_sync(0xffffffffu, c & 2 ? w[i] : w[i + 2], 2);
        if (c & 2) w[i] = t;
        else w[i + 2] = t;
    }
}

// A 128 × 128 tile of c: l (n × k), r (k × cols, or with TRANSPOSED cols × k), k ≤ RP all in shared memory at once. Eight warps of
// 32 × 64. Grid (column tiles, row tiles).
template <bool TRANSPOSED, bool MASKED, typename C>
DEVICE void apply(const T *l, i64 l_stride, const T *r, i64 r_stride, u32 n, u32 cols, u32 k, float scale, const Mask &mask, C *c, i64 c_stride) {
    constexpr int R_ROW = TRANSPOSED ? RP * 2 : 256;
    const u32 l_base = shared_address(shared), r_base = l_base + 128 * RP * 2;
    const u32 row0 = blockIdx.y * 128, column0 = blockIdx.x * 128;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % 4, wn = warp / 4;
#pragma unroll
    for (u32 i = 0; i < RP / 16; i++) {
        const u32 id = threadIdx.x + i * 256, row = id / (RP / 8), chunk = id % (RP / 8);
        const bool inside = row0 + row < n && chunk * 8 < k;
        copy16(chunk_address<RP * 2>(l_base, row, chunk), inside ? l + (i64)(row0 + row) * l_stride + chunk * 8 : l, inside);
    }
#pragma unroll
    for (u32 i = 0; i < RP / 16; i++) {
        const u32 id = threadIdx.x + i * 256, row = id / (R_ROW / 16), chunk = id % (R_ROW / 16);
        const bool inside = TRANSPOSED ? column0 + row < cols && chunk * 8 < k : row < k && column0 + chunk * 8 < cols;
        const T *from = TRANSPOSED ? r + (i64)(column0 + row) * r_stride + chunk * 8 : r + (i64)row * r_stride + column0 + chunk * 8;
        copy16(chunk_address<R_ROW>(r_base, row, chunk), inside ? from : r, inside);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    float acc[2][8][4] = {};
    // Not unrolled: the addresses of all steps at once would not fit in the registers that two blocks leave each other.
#pragma unroll 1
    for (int step = 0; step < RP / 16; step++) {
        u32 left[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++) left_fragment<RP * 2>(left[i], l_base, wm * 32 + i * 16, step);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 b[4];
            if (TRANSPOSED) right_fragments_nt<R_ROW>(b, r_base, wn * 64 + j * 16, step);
            else right_fragments_nn<R_ROW>(b, r_base, step * 16, wn * 4 + j);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                mma(acc[i][2 * j], left[i], b[0], b[1], T());
                mma(acc[i][2 * j + 1], left[i], b[2], b[3], T());
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 row = row0 + wm * 32 + i * 16 + lane / 4, column = column0 + wn * 64 + j * 16 + lane % 4 * 2;
            u32 bits[4];
            if (MASKED) {
                // Two rows and two groups of eight columns make four draws for the four lanes that share them.
                const u32 q = lane % 4;
                Bits drawn = draw(mask, row + q / 2 * 8, (column0 + wn * 64 + j * 16) / 8 + q % 2);
#pragma unroll
                for (int w = 0; w < 4; w++) bits[w] = drawn.word[w];
                transpose_quad(bits);
            }
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const u32 at_row = row + q / 2 * 8, at = column + q % 2 * 8;
                if (at_row >= n || at >= cols) continue;
                float a = acc[i][2 * j + q % 2][q / 2 * 2] * scale, b = acc[i][2 * j + q % 2][q / 2 * 2 + 1] * scale;
                if (MASKED) {
                    if ((bits[q] & 0xffffu) < mask.threshold) a = 0.0f;
                    if (bits[q] >> 16 < mask.threshold) b = 0.0f;
                }
                C *to = c + (i64)at_row * c_stride + at;
                float2 old = load_pair(to);
                store_pair(to, old.x + a, old.y + b);
            }
        }
}

// dx += scale · m∘(du·a)
extern "C" __global__ void __launch_bounds__(256, 2)
    lora_apply_masked(const T *l, i64 l_stride, const T *r, i64 r_stride, u32 n, u32 cols, u32 k, float scale, Mask mask, T *c, i64 c_stride) {
    apply<false, true>(l, l_stride, r, r_stride, n, cols, k, scale, mask, c, c_stride);
}

// c += scale · l·r and c += scale · l·rᵀ, for c of dtype T and f32.
#define KERNELS(NAME, TRANSPOSED, C)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                                       \
        NAME(const T *l, i64 l_stride, const T *r, i64 r_stride, u32 n, u32 cols, u32 k, float scale, C *c, i64 c_stride) {    \
        Mask none = {};                                                                                                        \
        apply<TRANSPOSED, false>(l, l_stride, r, r_stride, n, cols, k, scale, none, c, c_stride);                              \
    }
KERNELS(add_nn, false, T)
KERNELS(add_nn_f32, false, float)
KERNELS(add_nt, true, T)
KERNELS(add_nt_f32, true, float)

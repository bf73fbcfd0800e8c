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
#elif RP == 64
#define STAGES 4
#else
#define STAGES 3
#endif

DYNAMIC_SHARED(shared);

// Zeroes what the mask drops in N chunks of shared memory. The bits are drawn before the chunks arrive.
template <int N> DEVICE void mask_chunks(const Mask &mask, const Bits (&bits)[N], const u32 (&addresses)[N]) {
    uint4 v[N];
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = shared_load16(addresses[i]);
#pragma unroll
    for (int i = 0; i < N; i++) {
        v[i].x = keep(mask, bits[i].word[0], v[i].x), v[i].y = keep(mask, bits[i].word[1], v[i].y);
        v[i].z = keep(mask, bits[i].word[2], v[i].z), v[i].w = keep(mask, bits[i].word[3], v[i].w);
        shared_store16(addresses[i], v[i]);
    }
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
    FIRST_STAGES(load, steps);
    float acc[RP / 8][4] = {};
    for (u32 step = 0; step < steps; step++) {
        const u32 at = base + step % STAGES * stage_bytes;
        Bits bits[4];
        if (mask.threshold) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) bits[i] = draw(mask, row0 + r0 + 16 * i, (first + step) * 8 + chunk);
        }
        AWAIT_STAGE(load, step)
        // A thread masks the chunks that it copied itself: it sees them before the others do.
        if (mask.threshold) {
            u32 addresses[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) addresses[i] = chunk_address<128>(at, r0 + 16 * i, chunk);
            mask_chunks(mask, bits, addresses);
        }
        ENTER_STAGE(load, step, steps)
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
#pragma unroll 4
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
    FIRST_STAGES(load, steps);
    float acc[MT][4][4] = {};
    for (u32 step = 0; step < steps; step++) {
        const u32 at = base + step % STAGES * stage_bytes, chunk = threadIdx.x % 8, r0 = threadIdx.x / 8;
        Bits bits[2];
        if (mask.threshold) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) bits[i] = draw(mask, (first + step) * 64 + r0 + 32 * i, column0 / 8 + chunk);
        }
        AWAIT_STAGE(load, step)
        if (mask.threshold) {
            u32 addresses[2] = {chunk_address<128>(at, r0, chunk), chunk_address<128>(at, r0 + 32, chunk)};
            mask_chunks(mask, bits, addresses);
        }
        ENTER_STAGE(load, step, steps)
#pragma unroll (RP == 192 ? 1 : 2)
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
#pragma unroll 4
    for (u32 s = 0; s < splits; s++) {
        float4 v = *(const float4 *)(partials + s * total + i);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    float4 *to = (float4 *)(da + (i64)(i / inner) * da_stride + i % inner), d = *to;
    *to = make_float4(d.x + scale * sum.x, d.y + scale * sum.y, d.z + scale * sum.z, d.w + scale * sum.w);
}

// --- dx += scale · m∘(du·a) ----------------------------------------------------------------------------------------------

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

// A 128 × 128 tile of dx: du (n × rank) and a (rank × cols), all of the rank in shared memory at once. Eight warps of 32 × 64.
// Grid (column tiles, row tiles).
extern "C" __global__ void __launch_bounds__(256, 2)
    lora_apply(const T *du, i64 du_stride, const T *a, i64 a_stride, u32 n, u32 cols, u32 rank, float scale, Mask mask, T *dx, i64 dx_stride) {
    const u32 l_base = shared_address(shared), r_base = l_base + 128 * RP * 2;
    const u32 row0 = blockIdx.y * 128, column0 = blockIdx.x * 128;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % 4, wn = warp / 4;
#pragma unroll
    for (u32 i = 0; i < RP / 16; i++) {
        const u32 id = threadIdx.x + i * 256, row = id / (RP / 8), chunk = id % (RP / 8);
        const bool inside = row0 + row < n && chunk * 8 < rank;
        copy16(chunk_address<RP * 2>(l_base, row, chunk), inside ? du + (i64)(row0 + row) * du_stride + chunk * 8 : du, inside);
    }
#pragma unroll
    for (u32 i = 0; i < RP / 16; i++) {
        const u32 id = threadIdx.x + i * 256, row = id / 16, chunk = id % 16;
        const bool inside = row < rank && column0 + chunk * 8 < cols;
        copy16(chunk_address<256>(r_base, row, chunk), inside ? a + (i64)row * a_stride + column0 + chunk * 8 : a, inside);
    }
    copy_commit();
    // What is there already, on its way while the product is made: pair q of (i, j) is row + q / 2 · 8, column + q % 2 · 8.
    const u32 row = row0 + wm * 32 + lane / 4, column = column0 + wn * 64 + lane % 4 * 2;
    T *const corner = dx + (i64)row * dx_stride + column;
    u32 old[2][4][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int q = 0; q < 4; q++)
                if (row + i * 16 + q / 2 * 8 < n && column + j * 16 + q % 2 * 8 < cols)
                    old[i][j][q] = *(const u32 *)(corner + (i64)(i * 16 + q / 2 * 8) * dx_stride + j * 16 + q % 2 * 8);
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
            right_fragments_nn<256>(b, r_base, step * 16, wn * 4 + j);
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
            u32 bits[4] = {~0u, ~0u, ~0u, ~0u};
            if (mask.threshold) {
                // Two rows and two groups of eight columns make four draws for the four lanes that share them.
                const u32 q = lane % 4;
                Bits drawn = draw(mask, row + i * 16 + q / 2 * 8, (column0 + wn * 64 + j * 16) / 8 + q % 2);
#pragma unroll
                for (int w = 0; w < 4; w++) bits[w] = drawn.word[w];
                transpose_quad(bits);
            }
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const float *product = &acc[i][2 * j + q % 2][q / 2 * 2];
                float x = (bits[q] & 0xffffu) >= mask.threshold ? product[0] * scale : 0.0f;
                float y = bits[q] >> 16 >= mask.threshold ? product[1] * scale : 0.0f;
                u32 sum = pack(low(old[i][j][q], T()) + x, high(old[i][j][q], T()) + y, T());
                if (row + i * 16 + q / 2 * 8 < n && column + j * 16 + q % 2 * 8 < cols)
                    *(u32 *)(corner + (i64)(i * 16 + q / 2 * 8) * dx_stride + j * 16 + q % 2 * 8) = sum;
            }
        }
}

// --- [W | s·B] -----------------------------------------------------------------------------------------------------------

// Up to four factors: b (rows × r) for rows first .. first + rows of the weight.
struct Factors {
    const T *b[4];
    i64 stride[4];
    u32 first[4], rows[4];
};

// The columns behind a frozen weight, `rows` rows from row `row0` of the weight on: factor j's scale·b in columns j·r .. (j + 1)·r of its
// rows, zero elsewhere. Eight elements a thread; `chunks` = factors · r / 8.
extern "C" __global__ void __launch_bounds__(256)
    lora_room(Factors factors, u32 r, float scale, u32 row0, u32 rows, u32 chunks, T *out, i64 stride) {
    const u32 id = blockIdx.x * 256 + threadIdx.x, local = id / chunks, column = id % chunks * 8, j = column / r;
    if (local >= rows) return;
    const u32 row = row0 + local;
    float v[8] = {};
#pragma unroll
    for (int f = 0; f < 4; f++)
        if (f == j && row >= factors.first[f] && row - factors.first[f] < factors.rows[f])
            load8(factors.b[f] + (i64)(row - factors.first[f]) * factors.stride[f] + (column - j * r), v);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= scale;
    store8(out + (i64)local * stride + column, v);
}

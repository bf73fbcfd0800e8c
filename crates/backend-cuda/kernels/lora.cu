// What LoRA adds to the products of cuBLASLt: the gradient that passes back through a dropped-out input, and the factors' copy behind a
// frozen weight. Macros: T dtype (f16 or bf16), RP the rank of all factors of a site together, rounded up to 64, 128 or 192.
#include "common.cuh"
#include "philox.cuh"
#include "tile.cuh"

// Blocks that a multiprocessor should hold at once.
#if __CUDA_ARCH__ >= 800
#define RESIDENT 2
#else
#define RESIDENT 1
#endif

DYNAMIC_SHARED(shared);

// --- dx += m∘(du·a) · scale ----------------------------------------------------------------------------------------------

// A 128 × 128 tile of dx: du (n × rank) and a (rank × cols), all of the rank in shared memory at once. Eight warps of 32 × 64. The
// product then passes through shared memory (as T), so that dx is read and written 16 bytes a thread, whole rows at a time: two elements a
// thread, as the accumulators lie, took twice as long. Grid (column tiles, row tiles).
extern "C" __global__ void __launch_bounds__(256, RESIDENT)
    lora_backward(const T *du, i64 du_stride, const T *a, i64 a_stride, u32 n, u32 cols, u32 rank, float scale, Mask mask, T *dx, i64 dx_stride) {
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
    // What is there already: chunk threadIdx.x % 16 of rows threadIdx.x / 16 + 16 i. Half of it is on its way while the product is made,
    // the other half once the accumulators have left their registers.
    const u32 chunk = threadIdx.x % 16, r0 = threadIdx.x / 16, column = column0 + chunk * 8;
    T *const corner = dx + (i64)(row0 + r0) * dx_stride + column;
    uint4 old[8];
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        if (row0 + r0 + 16 * i < n && column < cols) old[i] = *(const uint4 *)(corner + (i64)(16 * i) * dx_stride);
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
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int q = 0; q < 2; q++)
                shared_store(chunk_address<256>(l_base, wm * 32 + i * 16 + lane / 4 + q * 8, wn * 8 + j) + lane % 4 * 4,
                             pack(acc[i][j][2 * q], acc[i][j][2 * q + 1], T()));
#pragma unroll
    for (u32 i = 4; i < 8; i++)
        if (row0 + r0 + 16 * i < n && column < cols) old[i] = *(const uint4 *)(corner + (i64)(16 * i) * dx_stride);
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        const u32 row = row0 + r0 + 16 * i;
        if (row >= n || column >= cols) continue;
        uint4 w = shared_load16(chunk_address<256>(l_base, r0 + 16 * i, chunk));
        float v[8] = {low(w.x, T()), high(w.x, T()), low(w.y, T()), high(w.y, T()), low(w.z, T()), high(w.z, T()), low(w.w, T()), high(w.w, T())};
        if (mask.threshold) drop<T, 8>(mask, scale, row, column, v);
        w.x = pack(low(old[i].x, T()) + v[0], high(old[i].x, T()) + v[1], T());
        w.y = pack(low(old[i].y, T()) + v[2], high(old[i].y, T()) + v[3], T());
        w.z = pack(low(old[i].z, T()) + v[4], high(old[i].z, T()) + v[5], T());
        w.w = pack(low(old[i].w, T()) + v[6], high(old[i].w, T()) + v[7], T());
        *(uint4 *)(corner + (i64)(16 * i) * dx_stride) = w;
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

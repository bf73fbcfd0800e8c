// Softmax attention over a packed batch by matrix instructions, forward and backward, in the manner of FlashAttention-2 (Dao 2023).
// Macros: T dtype (f16 or bf16), HD head dimension (64 or 128).
//
// Keys are numbered through a segment's spans, so that no span costs a partial key tile of its own. Four warps, 16 query rows each;
// key tiles of BK keys pass through shared memory; while one is used, the next STAGES - 1 are on their way.
#include "attention.cuh"
#include "tile.cuh"

#if __CUDA_ARCH__ >= 800
#define STAGES 2
#else
#define STAGES 1
#endif
#define BQ 64
#define BK 32
#define THREADS 128
#define CHUNKS (HD / 8)
#define ROW_BYTES (HD * 2)

// Rows `row .. row + rows` of a head into a shared tile of ROWS rows, zeros below.
template <int ROWS> DEVICE void copy_rows(u32 base, const T *p, i64 stride, u32 rows) {
    u32 chunk = threadIdx.x % CHUNKS;
#pragma unroll
    for (u32 i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        const u32 r = threadIdx.x / CHUNKS + i * (THREADS / CHUNKS);
        copy16(chunk_address<ROW_BYTES>(base, r, chunk), p + (r < rows ? (i64)r * stride : 0) + chunk * 8, r < rows);
    }
}

// Keys `key .. key + BK` of a tile (of `keys` in all) from two matrices at once.
DEVICE void copy_keys(u32 base0, View m0, u32 base1, View m1, const Tile &t, u32 key, u32 keys) {
    u32 chunk = threadIdx.x % CHUNKS;
#pragma unroll
    for (u32 i = 0; i < BK * CHUNKS / THREADS; i++) {
        const u32 r = threadIdx.x / CHUNKS + i * (THREADS / CHUNKS);
        bool inside = key + r < keys;
        i64 row = inside ? key_row(t, key + r) : 0;
        copy16(chunk_address<ROW_BYTES>(base0, r, chunk), m0.p + row * m0.stride + chunk * 8, inside);
        copy16(chunk_address<ROW_BYTES>(base1, r, chunk), m1.p + row * m1.stride + chunk * 8, inside);
    }
}

// s += a·bᵀ for a in registers and BK rows of b in shared memory.
DEVICE void multiply_nt(float (&s)[BK / 8][4], const u32 (&a)[HD / 16][4], u32 b_base) {
#pragma unroll
    for (int k = 0; k < HD / 16; k++)
#pragma unroll
        for (int n = 0; n < BK / 16; n++) {
            u32 b[4];
            right_fragments_nt<ROW_BYTES>(b, b_base, 16 * n, k);
            mma(s[2 * n], a[k], b[0], b[1], T());
            mma(s[2 * n + 1], a[k], b[2], b[3], T());
        }
}
// acc += p·b for p in registers (as accumulators left it) and BK rows of b.
DEVICE void multiply_nn(float (&acc)[HD / 8][4], const u32 (&p)[BK / 16][4], u32 b_base) {
#pragma unroll
    for (int k = 0; k < BK / 16; k++)
#pragma unroll
        for (int n = 0; n < HD / 16; n++) {
            u32 b[4];
            right_fragments_nn<ROW_BYTES>(b, b_base, 16 * k, n);
            mma(acc[2 * n], p[k], b[0], b[1], T());
            mma(acc[2 * n + 1], p[k], b[2], b[3], T());
        }
}
// Accumulators of a 16 × BK product as left operands of the next one.
DEVICE void as_left(u32 (&p)[BK / 16][4], const float (&s)[BK / 8][4]) {
#pragma unroll
    for (int k = 0; k < BK / 16; k++) {
        p[k][0] = pack(s[2 * k][0], s[2 * k][1], T());
        p[k][1] = pack(s[2 * k][2], s[2 * k][3], T());
        p[k][2] = pack(s[2 * k + 1][0], s[2 * k + 1][1], T());
        p[k][3] = pack(s[2 * k + 1][2], s[2 * k + 1][3], T());
    }
}

// Writes a warp's 16 × HD accumulators, times the factors of its two rows a lane, through the 16 rows of shared memory at `base`
// (which the warp has to itself), as rows 0 .. rows of `out`.
DEVICE void write_rows(const float (&acc)[HD / 8][4], float factor0, float factor1, u32 base, u32 row, T *out, i64 stride, int rows) {
    u32 lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < HD / 8; n++) {
        shared_store(chunk_address<ROW_BYTES>(base, row + g, n) + 4 * c, pack(acc[n][0] * factor0, acc[n][1] * factor0, T()));
        shared_store(chunk_address<ROW_BYTES>(base, row + g + 8, n) + 4 * c, pack(acc[n][2] * factor1, acc[n][3] * factor1, T()));
    }
    __syncwarp();
#pragma unroll
    for (u32 i = 0; i < CHUNKS / 2; i++) {
        const u32 r = (i * 32 + lane) / CHUNKS, chunk = lane % CHUNKS;
        if ((int)r < rows) *(uint4 *)(out + (i64)r * stride + chunk * 8) = shared_load16(chunk_address<ROW_BYTES>(base, row + r, chunk));
    }
}

DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Grid (tiles, heads). Shared memory: q, then STAGES times k and v.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_forward(const Tile *tiles, View q, View k, View v, ViewMut o, float *lse, u32 heads, u32 group, float scale) {
    DYNAMIC_SHARED(memory);
    const u32 q_base = shared_address(memory), stage_base = q_base + BQ * ROW_BYTES, stage_bytes = 2 * BK * ROW_BYTES;
    const Tile t = tiles[blockIdx.x];
    const u32 head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    q.p += (i64)t.q_row * q.stride + head * HD;
    k.p += head / group * HD, v.p += head / group * HD;
    const u32 context = t.len0 + t.len1 + t.first, keys = context + t.rows;
    const u32 key_tiles = (keys + BK - 1) / BK;

    copy_rows<BQ>(q_base, q.p, q.stride, t.rows);
    auto load = [&](u32 tile) {
        const u32 base = stage_base + tile % STAGES * stage_bytes;
        copy_keys(base, k, base + BK * ROW_BYTES, v, t, tile * BK, keys);
    };
    FIRST_STAGES(load, key_tiles);

    u32 qf[HD / 16][4];
    float acc[HD / 8][4] = {};
    float m[2] = {-1e30f, -1e30f}, l[2] = {0.0f, 0.0f};
    const float scale2 = scale * 1.44269504f;
    const bool active = warp * 16 < t.rows;
    // The last key that each of the lane's two rows sees; rows below the tile's end see what its last row sees.
    u32 limit[2];
    for (int i = 0; i < 2; i++) {
        u32 row = warp * 16 + g + 8 * i;
        limit[i] = context + (row < t.rows ? row : t.rows - 1);
    }

    for (u32 tile = 0; tile < key_tiles; tile++) {
        const u32 base = stage_base + tile % STAGES * stage_bytes;
        NEXT_STAGE(load, tile, key_tiles);
        if (tile == 0) {
#pragma unroll
            for (int i = 0; i < HD / 16; i++) left_fragment<ROW_BYTES>(qf[i], q_base, warp * 16, i);
        }
        // A warp has nothing to do for keys behind its last row.
        if (active && tile * BK <= context + warp * 16 + 15) {
            float s[BK / 8][4] = {};
            multiply_nt(s, qf, base);
            if (tile * BK + BK - 1 > context + warp * 16) {
#pragma unroll
                for (int n = 0; n < BK / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (tile * BK + n * 8 + 2 * c + i % 2 > limit[i / 2]) s[n][i] = -1e30f;
            }
            float factor[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float max = m[i];
#pragma unroll
                for (int n = 0; n < BK / 8; n++) max = fmaxf(max, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
                max = quad_max(max);
                factor[i] = exp2_fast((m[i] - max) * scale2);
                m[i] = max;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < BK / 8; n++)
#pragma unroll
                    for (int j = 2 * i; j < 2 * i + 2; j++) {
                        s[n][j] = exp2_fast(s[n][j] * scale2 - max * scale2);
                        sum += s[n][j];
                    }
                l[i] = l[i] * factor[i] + sum;
            }
#pragma unroll
            for (int n = 0; n < HD / 8; n++) {
                acc[n][0] *= factor[0], acc[n][1] *= factor[0];
                acc[n][2] *= factor[1], acc[n][3] *= factor[1];
            }
            u32 p[BK / 16][4];
            as_left(p, s);
            multiply_nn(acc, p, base + BK * ROW_BYTES);
        }
    }
    if (!active) return;
    float factor[2];
    for (int i = 0; i < 2; i++) {
        l[i] = quad_sum(l[i]);
        factor[i] = 1.0f / l[i];
        u32 row = warp * 16 + g + 8 * i;
        if (c == 0 && row < t.rows) lse[(i64)(t.q_row + row) * heads + head] = m[i] * scale + logf(l[i]);
    }
    // The warp's rows of q were read before its first product and by no other warp.
    write_rows(acc, factor[0], factor[1], q_base, warp * 16, o.p + (i64)(t.q_row + warp * 16) * o.stride + head * HD, o.stride,
               (int)t.rows - (int)warp * 16);
}

// dq of a tile, and D = Σ d_o∘o of its rows for the key side. Grid (tiles, heads). Shared memory: q, d_o, then STAGES times k and v.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_backward_q(const Tile *tiles, View q, View k, View v, View o, View d_o, ViewMut dq, const float *lse, float *delta, u32 heads,
                         u32 group, float scale) {
    DYNAMIC_SHARED(memory);
    const u32 q_base = shared_address(memory), do_base = q_base + BQ * ROW_BYTES, stage_base = do_base + BQ * ROW_BYTES;
    const u32 stage_bytes = 2 * BK * ROW_BYTES;
    const Tile t = tiles[blockIdx.x];
    const u32 head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    q.p += (i64)t.q_row * q.stride + head * HD;
    o.p += (i64)t.q_row * o.stride + head * HD;
    d_o.p += (i64)t.q_row * d_o.stride + head * HD;
    k.p += head / group * HD, v.p += head / group * HD;
    const u32 context = t.len0 + t.len1 + t.first, keys = context + t.rows;
    const u32 key_tiles = (keys + BK - 1) / BK;
    const bool active = warp * 16 < t.rows;

    copy_rows<BQ>(q_base, q.p, q.stride, t.rows);
    copy_rows<BQ>(do_base, d_o.p, d_o.stride, t.rows);
    auto load = [&](u32 tile) {
        const u32 base = stage_base + tile % STAGES * stage_bytes;
        copy_keys(base, k, base + BK * ROW_BYTES, v, t, tile * BK, keys);
    };
    FIRST_STAGES(load, key_tiles);

    // D of row lane / 2 of the warp's rows, two lanes a row.
    float d_row = 0.0f;
    {
        u32 row = warp * 16 + lane / 2;
        if (row < t.rows) {
#pragma unroll
            for (u32 i = 0; i < CHUNKS / 2; i++) {
                float a[8], b[8];
                const u32 column = (2 * i + lane % 2) * 8;
                load8(o.p + (i64)row * o.stride + column, a);
                load8(d_o.p + (i64)row * d_o.stride + column, b);
#pragma unroll
                for (int j = 0; j < 8; j++) d_row += a[j] * b[j];
            }
        }
        d_row += __shfl_xor_sync(0xffffffffu, d_row, 1);
        if (lane % 2 == 0 && row < t.rows) delta[(i64)(t.q_row + row) * heads + head] = d_row;
    }
    const float scale2 = scale * 1.44269504f;
    u32 limit[2];
    float lse2[2], d[2];
    for (int i = 0; i < 2; i++) {
        u32 row = warp * 16 + g + 8 * i;
        limit[i] = context + (row < t.rows ? row : t.rows - 1);
        lse2[i] = row < t.rows ? lse[(i64)(t.q_row + row) * heads + head] * 1.44269504f : 0.0f;
        d[i] = __shfl_sync(0xffffffffu, d_row, 2 * (g + 8 * i));
    }

    u32 qf[HD / 16][4], dof[HD / 16][4];
    float acc[HD / 8][4] = {};
    for (u32 tile = 0; tile < key_tiles; tile++) {
        const u32 base = stage_base + tile % STAGES * stage_bytes;
        NEXT_STAGE(load, tile, key_tiles);
        if (tile == 0) {
#pragma unroll
            for (int i = 0; i < HD / 16; i++) left_fragment<ROW_BYTES>(qf[i], q_base, warp * 16, i), left_fragment<ROW_BYTES>(dof[i], do_base, warp * 16, i);
        }
        if (active && tile * BK <= context + warp * 16 + 15) {
            float s[BK / 8][4] = {}, dp[BK / 8][4] = {};
            multiply_nt(s, qf, base);
            multiply_nt(dp, dof, base + BK * ROW_BYTES);
            const bool partial = tile * BK + BK - 1 > context + warp * 16;
#pragma unroll
            for (int n = 0; n < BK / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float p = exp2_fast(s[n][i] * scale2 - lse2[i / 2]);
                    if (partial && tile * BK + n * 8 + 2 * c + i % 2 > limit[i / 2]) p = 0.0f;
                    s[n][i] = scale * p * (dp[n][i] - d[i / 2]);
                }
            u32 ds[BK / 16][4];
            as_left(ds, s);
            multiply_nn(acc, ds, base);
        }
    }
    if (!active) return;
    write_rows(acc, 1.0f, 1.0f, q_base, warp * 16, dq.p + (i64)(t.q_row + warp * 16) * dq.stride + head * HD, dq.stride,
               (int)t.rows - (int)warp * 16);
}

// dk and dv of an item, summed over the query heads of its key head. Grid (items, kv_heads). Products are transposed: a warp owns 16
// keys, and queries run through the columns, so that probabilities pass from one product to the next in registers.
// Shared memory: k, v, then STAGES times q, d_o (BK rows each) and lse, D, visible (BK words each).
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_backward_kv(const KeyItem *items, View q, View k, View v, View d_o, ViewMut dk, ViewMut dv, const float *lse,
                          const float *delta, const u32 *visible, u32 heads, u32 group, float scale, float *partials) {
    DYNAMIC_SHARED(memory);
    const u32 k_base = shared_address(memory), v_base = k_base + BQ * ROW_BYTES, stage_base = v_base + BQ * ROW_BYTES;
    const u32 stage_bytes = 2 * BK * ROW_BYTES + 3 * BK * 4, scalars = 2 * BK * ROW_BYTES;
    const KeyItem item = items[blockIdx.x];
    const u32 kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    k.p += (i64)item.key * k.stride + kv_head * HD;
    v.p += (i64)item.key * v.stride + kv_head * HD;
    const u32 q_tiles = (item.q_end - item.q_begin + BK - 1) / BK, steps = q_tiles * group;
    const bool active = warp * 16 < item.keys;

    auto copy_queries = [&](u32 step) {
        const u32 base = stage_base + step % STAGES * stage_bytes;
        const u32 head = kv_head * group + step / q_tiles, row = item.q_begin + step % q_tiles * BK;
        const u32 rows = item.q_end - row;
        copy_rows<BK>(base, q.p + (i64)row * q.stride + head * HD, q.stride, rows);
        copy_rows<BK>(base + BK * ROW_BYTES, d_o.p + (i64)row * d_o.stride + head * HD, d_o.stride, rows);
        if (threadIdx.x < 3 * BK) {
            const u32 r = threadIdx.x % BK, which = threadIdx.x / BK;
            const bool inside = r < rows;
            const i64 at = inside ? row + r : 0;
            const void *from = which == 0 ? (const void *)(lse + at * heads + head)
                                          : which == 1 ? (const void *)(delta + at * heads + head) : (const void *)(visible + at);
            copy4(base + scalars + threadIdx.x * 4, from, inside);
        }
    };
    copy_rows<BQ>(k_base, k.p, k.stride, item.keys);
    copy_rows<BQ>(v_base, v.p, v.stride, item.keys);
    FIRST_STAGES(copy_queries, steps);

    float dk_acc[HD / 8][4] = {}, dv_acc[HD / 8][4] = {};
    const float scale2 = scale * 1.44269504f;
    for (u32 step = 0; step < steps; step++) {
        const u32 base = stage_base + step % STAGES * stage_bytes;
        NEXT_STAGE(copy_queries, step, steps);
        const u32 row = item.q_begin + step % q_tiles * BK;
        // Own rows see keys up to their own: a warp whose first key lies behind the tile's last row has nothing to do.
        if (active && (!item.own || item.key + warp * 16 < row + BK)) {
            float s[BK / 8][4] = {}, dp[BK / 8][4] = {};
#pragma unroll
            for (int i = 0; i < HD / 16; i++) {
                u32 a[4], b[4];
                left_fragment<ROW_BYTES>(a, k_base, warp * 16, i);
#pragma unroll
                for (int n = 0; n < BK / 16; n++) {
                    right_fragments_nt<ROW_BYTES>(b, base, 16 * n, i);
                    mma(s[2 * n], a, b[0], b[1], T());
                    mma(s[2 * n + 1], a, b[2], b[3], T());
                }
                left_fragment<ROW_BYTES>(a, v_base, warp * 16, i);
#pragma unroll
                for (int n = 0; n < BK / 16; n++) {
                    right_fragments_nt<ROW_BYTES>(b, base + BK * ROW_BYTES, 16 * n, i);
                    mma(dp[2 * n], a, b[0], b[1], T());
                    mma(dp[2 * n + 1], a, b[2], b[3], T());
                }
            }
            const u8 *column = memory + (base - k_base) + scalars;
#pragma unroll
            for (int n = 0; n < BK / 8; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const u32 r = n * 8 + 2 * c + j;
                    const float lse2 = ((const float *)column)[r] * 1.44269504f, d = ((const float *)column)[BK + r];
                    const u32 seen = item.own ? (row + r < item.q_end ? row + r + 1 : 0) : ((const u32 *)column)[2 * BK + r];
#pragma unroll
                    for (int i = j; i < 4; i += 2) {
                        float p = exp2_fast(s[n][i] * scale2 - lse2);
                        if (item.key + warp * 16 + g + i / 2 * 8 >= seen) p = 0.0f;
                        s[n][i] = p;
                        dp[n][i] = scale * p * (dp[n][i] - d);
                    }
                }
            u32 p[BK / 16][4];
            as_left(p, s);
            multiply_nn(dv_acc, p, base + BK * ROW_BYTES);
            as_left(p, dp);
            multiply_nn(dk_acc, p, base);
        }
    }
    if (!active) return;
    const int rows = (int)item.keys - (int)warp * 16;
    if (item.slot == ~0u) {
        const i64 first = (i64)item.key + warp * 16;
        write_rows(dk_acc, 1.0f, 1.0f, k_base, warp * 16, dk.p + first * dk.stride + kv_head * HD, dk.stride, rows);
        write_rows(dv_acc, 1.0f, 1.0f, v_base, warp * 16, dv.p + first * dv.stride + kv_head * HD, dv.stride, rows);
        return;
    }
    float *part = partials + ((i64)item.slot * gridDim.y + kv_head) * (2 * BQ * HD) + warp * 16 * HD;
#pragma unroll
    for (int n = 0; n < HD / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float *at = part + (g + 8 * i) * HD + n * 8 + 2 * c;
            *(float2 *)at = make_float2(dk_acc[n][2 * i], dk_acc[n][2 * i + 1]);
            *(float2 *)(at + BQ * HD) = make_float2(dv_acc[n][2 * i], dv_acc[n][2 * i + 1]);
        }
}

// Sums the partials of the prefix in the order of their slots: key tile `blockIdx.x` has slots tile·parts .. (tile + 1)·parts.
// Grid (key tiles, kv_heads, 2 · BQ · HD / (4 · 256)).
extern "C" __global__ void __launch_bounds__(256)
    attention_reduce(const float *partials, u32 parts, u32 keys, ViewMut dk, ViewMut dv) {
    const u32 i = (blockIdx.z * 256 + threadIdx.x) * 4, which = i / (BQ * HD), row = i % (BQ * HD) / HD, column = i % HD;
    const u32 key = blockIdx.x * BQ + row;
    if (key >= keys) return;
    const float *p = partials + ((i64)blockIdx.x * parts * gridDim.y + blockIdx.y) * (2 * BQ * HD) + i;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (u32 part = 0; part < parts; part++, p += (i64)gridDim.y * (2 * BQ * HD)) {
        float4 v = *(const float4 *)p;
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    ViewMut out = which ? dv : dk;
    uint2 w = make_uint2(pack(sum.x, sum.y, T()), pack(sum.z, sum.w, T()));
    *(uint2 *)(out.p + (i64)key * out.stride + blockIdx.y * HD + column) = w;
}

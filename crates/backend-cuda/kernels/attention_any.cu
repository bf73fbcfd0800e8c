// Attention in f32 arithmetic for every dtype, head dimension and alignment (macro T): the path of compute dtype f32 and of
// views that the matrix instructions cannot read. One warp a query row (or a key row), keys in batches of 32, one a lane.
// Head dimensions up to 256.
#include "attention.cuh"

#define MAX_HEAD 256
#define PER_LANE (MAX_HEAD / 32)

DEVICE float dot(const float *a, const T *b, u32 n) {
    float sum = 0.0f;
    for (u32 i = 0; i < n; i++) sum += a[i] * to_f32(b[i]);
    return sum;
}

// Grid (tiles, heads), four warps that take every fourth row of the tile.
extern "C" __global__ void __launch_bounds__(128, 4)
    attention_any_forward(const Tile *tiles, View q, View k, View v, ViewMut o, float *lse, u32 heads, u32 group, u32 head_dim, float scale) {
    __shared__ float rows[4][MAX_HEAD];
    const Tile t = tiles[blockIdx.x];
    const u32 head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv = head / group * head_dim;
    float *query = rows[warp];
    for (u32 r = warp; r < t.rows; r += 4) {
        const T *from = q.p + (i64)(t.q_row + r) * q.stride + head * head_dim;
        __syncwarp();
        for (u32 i = lane; i < head_dim; i += 32) query[i] = to_f32(from[i]);
        __syncwarp();
        const u32 keys = t.len0 + t.len1 + t.first + r + 1;
        float m = -1e30f, l = 0.0f, acc[PER_LANE] = {};
        for (u32 key = 0; key < keys; key += 32) {
            const bool inside = key + lane < keys;
            const u32 row = inside ? key_row(t, key + lane) : 0;
            float s = inside ? scale * dot(query, k.p + (i64)row * k.stride + kv, head_dim) : -1e30f;
            float max = fmaxf(m, warp_max(s)), p = inside ? expf(s - max) : 0.0f, factor = expf(m - max);
            l = l * factor + warp_sum(p);
            m = max;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) acc[i] *= factor;
            const u32 count = keys - key < 32 ? keys - key : 32;
            for (u32 j = 0; j < count; j++) {
                float pj = __shfl_sync(0xffffffffu, p, j);
                const T *value = v.p + (i64)__shfl_sync(0xffffffffu, row, j) * v.stride + kv;
#pragma unroll
                for (int i = 0; i < PER_LANE; i++)
                    if (lane + 32 * i < head_dim) acc[i] += pj * to_f32(value[lane + 32 * i]);
            }
        }
        T *to = o.p + (i64)(t.q_row + r) * o.stride + head * head_dim;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (lane + 32 * i < head_dim) from_f32(acc[i] / l, to[lane + 32 * i]);
        if (lane == 0) lse[(i64)(t.q_row + r) * heads + head] = m + logf(l);
    }
}

extern "C" __global__ void __launch_bounds__(128, 4)
    attention_any_backward_q(const Tile *tiles, View q, View k, View v, View o, View d_o, ViewMut dq, const float *lse, float *delta,
                             u32 heads, u32 group, u32 head_dim, float scale) {
    __shared__ float rows[4][2][MAX_HEAD];
    const Tile t = tiles[blockIdx.x];
    const u32 head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv = head / group * head_dim;
    float *query = rows[warp][0], *d_out = rows[warp][1];
    for (u32 r = warp; r < t.rows; r += 4) {
        const i64 at = t.q_row + r;
        __syncwarp();
        float d = 0.0f;
        for (u32 i = lane; i < head_dim; i += 32) {
            query[i] = to_f32(q.p[at * q.stride + head * head_dim + i]);
            d_out[i] = to_f32(d_o.p[at * d_o.stride + head * head_dim + i]);
            d += d_out[i] * to_f32(o.p[at * o.stride + head * head_dim + i]);
        }
        __syncwarp();
        d = warp_sum(d);
        if (lane == 0) delta[at * heads + head] = d;
        const float log_sum = lse[at * heads + head];
        const u32 keys = t.len0 + t.len1 + t.first + r + 1;
        float acc[PER_LANE] = {};
        for (u32 key = 0; key < keys; key += 32) {
            const bool inside = key + lane < keys;
            const u32 row = inside ? key_row(t, key + lane) : 0;
            float ds = 0.0f;
            if (inside) {
                float p = expf(scale * dot(query, k.p + (i64)row * k.stride + kv, head_dim) - log_sum);
                ds = scale * p * (dot(d_out, v.p + (i64)row * v.stride + kv, head_dim) - d);
            }
            const u32 count = keys - key < 32 ? keys - key : 32;
            for (u32 j = 0; j < count; j++) {
                float dsj = __shfl_sync(0xffffffffu, ds, j);
                const T *from = k.p + (i64)__shfl_sync(0xffffffffu, row, j) * k.stride + kv;
#pragma unroll
                for (int i = 0; i < PER_LANE; i++)
                    if (lane + 32 * i < head_dim) acc[i] += dsj * to_f32(from[lane + 32 * i]);
            }
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (lane + 32 * i < head_dim) from_f32(acc[i], dq.p[at * dq.stride + head * head_dim + lane + 32 * i]);
    }
}

// Grid (items, kv_heads), four warps that take every fourth key of the item.
extern "C" __global__ void __launch_bounds__(128, 4)
    attention_any_backward_kv(const KeyItem *items, View q, View k, View v, View d_o, ViewMut dk, ViewMut dv, const float *lse,
                              const float *delta, const u32 *visible, u32 heads, u32 group, u32 head_dim, float scale) {
    __shared__ float rows[4][2][MAX_HEAD];
    const KeyItem item = items[blockIdx.x];
    const u32 kv = blockIdx.y * head_dim, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *key = rows[warp][0], *value = rows[warp][1];
    for (u32 r = warp; r < item.keys; r += 4) {
        const u32 at = item.key + r;
        __syncwarp();
        for (u32 i = lane; i < head_dim; i += 32) {
            key[i] = to_f32(k.p[(i64)at * k.stride + kv + i]);
            value[i] = to_f32(v.p[(i64)at * v.stride + kv + i]);
        }
        __syncwarp();
        float dk_acc[PER_LANE] = {}, dv_acc[PER_LANE] = {};
        for (u32 head = blockIdx.y * group; head < (blockIdx.y + 1) * group; head++) {
            for (u32 first = item.q_begin; first < item.q_end; first += 32) {
                const u32 row = first + lane;
                float p = 0.0f, ds = 0.0f;
                if (row < item.q_end && at < (item.own ? row + 1 : visible[row])) {
                    const i64 scalar = (i64)row * heads + head;
                    p = expf(scale * dot(key, q.p + (i64)row * q.stride + head * head_dim, head_dim) - lse[scalar]);
                    ds = scale * p * (dot(value, d_o.p + (i64)row * d_o.stride + head * head_dim, head_dim) - delta[scalar]);
                }
                const u32 count = item.q_end - first < 32 ? item.q_end - first : 32;
                for (u32 j = 0; j < count; j++) {
                    float pj = __shfl_sync(0xffffffffu, p, j), dsj = __shfl_sync(0xffffffffu, ds, j);
                    const T *from_q = q.p + (i64)(first + j) * q.stride + head * head_dim;
                    const T *from_do = d_o.p + (i64)(first + j) * d_o.stride + head * head_dim;
#pragma unroll
                    for (int i = 0; i < PER_LANE; i++)
                        if (lane + 32 * i < head_dim) {
                            dk_acc[i] += dsj * to_f32(from_q[lane + 32 * i]);
                            dv_acc[i] += pj * to_f32(from_do[lane + 32 * i]);
                        }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (lane + 32 * i < head_dim) {
                from_f32(dk_acc[i], dk.p[(i64)at * dk.stride + kv + lane + 32 * i]);
                from_f32(dv_acc[i], dv.p[(i64)at * dv.stride + kv + lane + 32 * i]);
            }
    }
}

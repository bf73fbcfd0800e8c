// Cross-entropy with its gradient, one block a row (macro T: dtype of the gradient), and deterministic sums over a buffer.
#include "common.cuh"

// Running maximum m and Σ exp(x - m).
struct Running {
    float m, s;
};
DEVICE Running join(Running a, Running b) {
    float m = fmaxf(a.m, b.m);
    Running r = {m, 0.0f};
    // A side that has seen nothing (-inf) contributes nothing; comparing keeps inf - inf out.
    r.s = (a.m == m ? a.s : a.s * __expf(a.m - m)) + (b.m == m ? b.s : b.s * __expf(b.m - m));
    return r;
}

template <int V>
DEVICE void cross_entropy_(const float *logits, i64 stride, u32 vocab, const u32 *targets, const float *weights, float smoothing,
                           float gradient_scale, float *loss, T *gradient, i64 gradient_stride) {
    __shared__ float scratch[33];
    __shared__ Running partial[33];
    i64 row = blockIdx.x;
    const float *x = logits + row * stride;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Running r = {-__int_as_float(0x7f800000), 0.0f};
    float sum = 0.0f;
    bool bad = false;
    for (u32 c = threadIdx.x * V; c < vocab; c += blockDim.x * V) {
        float v[V];
        Lane<V, float>::load(x + c, v);
        float m = r.m;
        for (int i = 0; i < V; i++) m = fmaxf(m, v[i]), sum += v[i], bad |= v[i] != v[i];
        float s = 0.0f;
        for (int i = 0; i < V; i++) s += __expf(v[i] - m);
        r.s = (r.m == m ? r.s : r.s * __expf(r.m - m)) + s;
        r.m = m;
    }
    for (int d = 16; d > 0; d >>= 1) {
        Running other = {__shfl_xor_sync(0xffffffffu, r.m, d), __shfl_xor_sync(0xffffffffu, r.s, d)};
        // The lower lane's value first, in both: the same bits in every lane.
        r = (lane & d) ? join(other, r) : join(r, other);
    }
    if (lane == 0) partial[warp] = r;
    sum = block_sum(bad ? not_a_number() : sum, scratch);
    if (threadIdx.x == 0) {
        Running all = partial[0];
        for (u32 i = 1; i < blockDim.x / 32; i++) all = join(all, partial[i]);
        partial[32] = all;
    }
    __syncthreads();
    float lse = partial[32].m + logf(partial[32].s);
    if (sum != sum) lse = not_a_number();
    u32 target = targets[row];
    bool inside = target < vocab;
    float weight = weights[row], uniform = smoothing / (float)vocab;
    if (threadIdx.x == 0) {
        float value = (1.0f - smoothing) * (lse - (inside ? x[target] : not_a_number()));
        if (smoothing > 0.0f) value += smoothing * (lse - sum / (float)vocab);
        loss[row] = weight * value;
    }
    if (!gradient) return;
    T *g = gradient + row * gradient_stride;
    float factor = weight * gradient_scale;
    for (u32 c = threadIdx.x * V; c < vocab; c += blockDim.x * V) {
        float v[V];
        Lane<V, float>::load(x + c, v);
        for (int i = 0; i < V; i++) {
            float p = __expf(v[i] - lse) - uniform;
            v[i] = factor * (c + i == target ? p - (1.0f - smoothing) : p);
        }
        Lane<V, T>::store(g + c, v);
    }
}

#define KERNELS(V)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(512)                                                                         \
        cross_entropy_##V(const float *logits, i64 stride, u32 vocab, const u32 *targets, const float *weights, float smoothing, \
                          float gradient_scale, float *loss, T *gradient, i64 gradient_stride) {                              \
        cross_entropy_<V>(logits, stride, vocab, targets, weights, smoothing, gradient_scale, loss, gradient, gradient_stride); \
    }
KERNELS(8)
KERNELS(1)

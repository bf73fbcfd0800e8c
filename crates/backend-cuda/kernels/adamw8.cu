// One AdamW step with block-wise 8-bit moments, as bitsandbytes: a block of threads per block of moments. `maps` holds the
// signed and then the unsigned dynamic map. The host folds the hyper-parameters as for adamw.cu.
#include "common.cuh"

// Index of the level next to x: eight halvings of 256.
DEVICE u32 nearest(const float *map, float x) {
    u32 low = 0;
    for (u32 width = 128; width > 0; width >>= 1) {
        u32 middle = low + width - 1;
        if (x > 0.5f * (map[middle] + map[middle + 1])) low += width;
    }
    return low;
}

DEVICE float block_max(float x, float *scratch) {
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = scratch[0];
    for (u32 i = 1; i < 8; i++) x = fmaxf(x, scratch[i]);
    __syncthreads();
    return x;
}

extern "C" __global__ void __launch_bounds__(256)
    adamw_8bit(float *parameter, const float *gradient, const u32 *table, u8 *m, u8 *v, float *absmax, float *m32, float *v32,
               T *compute, const float *maps, u32 blocks, float gradient_scale, float beta1, float beta2, float decay, float step,
               float root, float epsilon) {
    __shared__ float map[512];
    __shared__ float scratch[8];
    map[threadIdx.x] = maps[threadIdx.x];
    map[threadIdx.x + 256] = maps[threadIdx.x + 256];
    __syncthreads();
    u32 first = table[3 * blockIdx.x], len = table[3 * blockIdx.x + 1], wide = table[3 * blockIdx.x + 2];
    bool mine = threadIdx.x < len;
    u64 i = (u64)first + threadIdx.x;
    float p = 0.0f, a = 0.0f, b = 0.0f;
    if (mine) {
        float s = gradient[i] * gradient_scale;
        p = parameter[i];
        if (wide != 0xffffffffu) {
            a = m32[wide + threadIdx.x], b = v32[wide + threadIdx.x];
        } else {
            a = map[m[i]] * absmax[blockIdx.x], b = map[256 + v[i]] * absmax[blocks + blockIdx.x];
        }
        a = beta1 * a + (1.0f - beta1) * s;
        b = beta2 * b + (1.0f - beta2) * s * s;
        float u = step * a / (sqrtf(b) * root + epsilon);
        p = p * decay - u;
        parameter[i] = p;
        from_f32(p, compute[i]);
    }
    if (wide != 0xffffffffu) {
        if (mine) m32[wide + threadIdx.x] = a, v32[wide + threadIdx.x] = b;
        return;
    }
    float top1 = block_max(fabsf(a), scratch), top2 = block_max(b, scratch);
    if (mine) {
        u32 c = nearest(map, top1 > 0.0f ? a / top1 : 0.0f);
        if (a > 0.0f && map[c] < 0.0f) c++;
        if (a < 0.0f && map[c] >= 0.0f) c--;
        m[i] = (u8)c;
        v[i] = (u8)nearest(map + 256, top2 > 0.0f ? b / top2 : 0.0f);
    }
    if (threadIdx.x == 0) absmax[blockIdx.x] = top1, absmax[blocks + blockIdx.x] = top2;
}

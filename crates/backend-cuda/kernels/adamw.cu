// One AdamW step over f32 masters, with the rounded copy for the matrix products (macro T). The host folds the
// hyper-parameters: decay = 1 - lr·λ, step = lr / (1 - β₁ᵗ), root = 1 / √(1 - β₂ᵗ).
#include "common.cuh"

template <int V>
DEVICE void adamw_(float *parameter, const float *gradient, float *m, float *v, T *compute, u64 i, float gradient_scale, float beta1,
                   float beta2, float decay, float step, float root, float epsilon) {
    float p[V], g[V], a[V], b[V];
    Lane<V, float>::load(parameter + i, p);
    Lane<V, float>::load(gradient + i, g);
    Lane<V, float>::load(m + i, a);
    Lane<V, float>::load(v + i, b);
    for (int j = 0; j < V; j++) {
        float s = g[j] * gradient_scale;
        a[j] = beta1 * a[j] + (1.0f - beta1) * s;
        b[j] = beta2 * b[j] + (1.0f - beta2) * s * s;
        p[j] = p[j] * decay - step * a[j] / (sqrtf(b[j]) * root + epsilon);
    }
    Lane<V, float>::store(parameter + i, p);
    Lane<V, float>::store(m + i, a);
    Lane<V, float>::store(v + i, b);
    Lane<V, T>::store(compute + i, p);
}

extern "C" __global__ void __launch_bounds__(256)
    adamw(float *parameter, const float *gradient, float *m, float *v, T *compute, u64 len, float gradient_scale, float beta1, float beta2,
          float decay, float step, float root, float epsilon) {
    u64 i = ((u64)blockIdx.x * 256 + threadIdx.x) * 8;
    if (i + 8 <= len) {
        adamw_<8>(parameter, gradient, m, v, compute, i, gradient_scale, beta1, beta2, decay, step, root, epsilon);
    } else {
        for (; i < len; i++) adamw_<1>(parameter, gradient, m, v, compute, i, gradient_scale, beta1, beta2, decay, step, root, epsilon);
    }
}

// Every instruction that plain CUDA C++ has no name for, and the 16-bit float types: kernels include no toolkit header.
//
// sm_75 lacks cp.async, m16n8k16 and all bf16 instructions. Copies fall back to ordinary loads, a k16 product is two k8
// products, and bf16 is converted by integer arithmetic; only the bf16 matrix product has no fallback.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef float f32;

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// --- conversions -------------------------------------------------------------------------------------------------------

DEVICE float to_f32(float x) { return x; }
DEVICE float to_f32(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
DEVICE float to_f32(f16 x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
    return r;
}

DEVICE void from_f32(float x, float &r) { r = x; }
DEVICE void from_f32(float x, bf16 &r) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
#else
    u32 b = __float_as_uint(x);
    r.bits = (b & 0x7fffffffu) > 0x7f800000u ? (u16)0x7fff : (u16)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
#endif
}
DEVICE void from_f32(float x, f16 &r) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x)); }

// Two values in one word, the first in the low half.
DEVICE u32 pack(float lo, float hi, bf16) {
#if __CUDA_ARCH__ >= 800
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
#else
    bf16 a, b;
    from_f32(lo, a);
    from_f32(hi, b);
    return (u32)a.bits | (u32)b.bits << 16;
#endif
}
DEVICE u32 pack(float lo, float hi, f16) {
#if __CUDA_ARCH__ >= 800
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
#else
    f16 a, b;
    from_f32(lo, a);
    from_f32(hi, b);
    return (u32)a.bits | (u32)b.bits << 16;
#endif
}
DEVICE float low(u32 w, bf16) { return __uint_as_float(w << 16); }
DEVICE float high(u32 w, bf16) { return __uint_as_float(w & 0xffff0000u); }
DEVICE float low(u32 w, f16) {
    f16 h = {(u16)w};
    return to_f32(h);
}
DEVICE float high(u32 w, f16) {
    f16 h = {(u16)(w >> 16)};
    return to_f32(h);
}

// --- special functions -------------------------------------------------------------------------------------------------

DEVICE float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// As bitsandbytes' kernels, which are compiled with --use_fast_math.
DEVICE float reciprocal_fast(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// --- shared memory -----------------------------------------------------------------------------------------------------

DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory; zeros when `inside` is false (the source is then not read).
DEVICE void copy16(u32 dst, const void *src, bool inside) {
#if __CUDA_ARCH__ >= 800
    u32 n = inside ? 16u : 0u;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)), "r"(n));
#else
    uint4 v = inside ? *(const uint4 *)src : make_uint4(0, 0, 0, 0);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w));
#endif
}
// The same for 4 bytes.
DEVICE void copy4(u32 dst, const void *src, bool inside) {
#if __CUDA_ARCH__ >= 800
    u32 n = inside ? 4u : 0u;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)), "r"(n));
#else
    u32 v = inside ? *(const u32 *)src : 0;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(dst), "r"(v));
#endif
}
DEVICE void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;");
#endif
}
// Waits until at most `N` of the groups committed last are still under way.
template <int N> DEVICE void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

DEVICE void shared_store(u32 address, u32 value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
DEVICE uint4 shared_load16(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}

DEVICE void shared_store16(u32 address, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// --- matrix instructions -----------------------------------------------------------------------------------------------

// Four 8×8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
DEVICE void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// d += a·b: a 16×16 (row-major fragments), b 16×8 (column-major fragments), d 16×8 in f32.
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, f16) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
#if __CUDA_ARCH__ >= 800
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, bf16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

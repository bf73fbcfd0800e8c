// The generator of `cashtag_backend::philox`: Philox-4x32-10, one call for eight columns of a row.
#pragma once
#include "ptx.cuh"

// A dropout mask: element (row, column) is kept if its sixteen bits are at least `threshold`.
struct Mask {
    u32 seed_low, seed_high, step, site, threshold;
};

struct Bits {
    u32 word[4];
};

// Sixteen bits each for columns 8·group .. 8·group + 8: the low half of word 0 first.
DEVICE Bits draw(const Mask &m, u32 row, u32 group) {
    u32 c0 = group, c1 = row, c2 = m.site, c3 = m.step, k0 = m.seed_low, k1 = m.seed_high;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        if (round > 0) k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
        u32 h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
        c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
    }
    Bits b = {{c0, c1, c2, c3}};
    return b;
}

// v as dropout leaves it when it reads v rounded to T: elements of `row` from `column` on, V = 8 (column a multiple of 8) or 1.
template <typename T, int V> DEVICE void drop(const Mask &m, float scale, u32 row, u32 column, float (&v)[V]) {
    Bits bits = draw(m, row, column / 8);
#pragma unroll
    for (int i = 0; i < V; i++) {
        u32 j = V == 8 ? i : column % 8;
        u32 word = j < 4 ? (j < 2 ? bits.word[0] : bits.word[1]) : (j < 6 ? bits.word[2] : bits.word[3]);
        T rounded;
        from_f32(v[i], rounded);
        v[i] = (j % 2 ? word >> 16 : word & 0xffffu) >= m.threshold ? to_f32(rounded) * scale : 0.0f;
    }
}

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

// The halves of `pair` (two elements of a 16-bit type) that the mask keeps.
DEVICE u32 keep(const Mask &m, u32 bits, u32 pair) {
    u32 low = (bits & 0xffffu) >= m.threshold ? 0xffffu : 0, high = (bits >> 16) >= m.threshold ? 0xffff0000u : 0;
    return pair & (low | high);
}

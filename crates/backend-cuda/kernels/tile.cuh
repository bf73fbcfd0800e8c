// Tiles of 16-bit elements in shared memory, and the fragments of matrix instructions read from them.
//
// A tile has rows of ROW bytes in 16-byte chunks, ROW a multiple of 128. Chunk c of row r stands at c ^ (r % 8): copies of whole rows
// and ldmatrix, eight rows of one chunk column, are then both free of bank conflicts.
//
// Tiles arrive in STAGES buffers in turn (a macro of the including file): while step s is used, the next STAGES - 1 are under way.
// With one stage (no asynchronous copies) a step is loaded when it is needed.
#pragma once
#include "ptx.cuh"

// Starts the copies of the first steps; a group of copies for each, even an empty one, so that groups can be counted.
#define FIRST_STAGES(load, steps)                     \
    for (u32 s_ = 0; s_ + 1 < STAGES; s_++) {         \
        if (s_ < (steps)) load(s_);                   \
        copy_commit();                                \
    }
// Waits for the copies of step `step` that this thread made.
#define AWAIT_STAGE(load, step)                       \
    if constexpr (STAGES == 1) {                      \
        __syncthreads();                              \
        load(step);                                   \
    } else {                                          \
        copy_wait<(STAGES > 1 ? STAGES - 2 : 0)>();   \
    }
// Makes everyone's copies of the step visible and starts those of the step STAGES - 1 further on, whose buffer is free by now.
#define ENTER_STAGE(load, step, steps)                \
    __syncthreads();                                  \
    if constexpr (STAGES > 1) {                       \
        if ((step) + STAGES - 1 < (steps)) load((step) + STAGES - 1); \
        copy_commit();                                \
    }
#define NEXT_STAGE(load, step, steps)                 \
    AWAIT_STAGE(load, step)                           \
    ENTER_STAGE(load, step, steps)

template <int ROW> DEVICE u32 chunk_address(u32 base, u32 row, u32 chunk) { return base + row * ROW + ((chunk ^ (row & 7)) << 4); }

// Left operand: rows row .. row + 16, columns 16k .. 16k + 16 of the tile.
template <int ROW> DEVICE void left_fragment(u32 (&a)[4], u32 base, u32 row, u32 k) {
    u32 lane = threadIdx.x % 32;
    load_matrices(a, chunk_address<ROW>(base, row + lane % 16, 2 * k + lane / 16));
}
// Left operand that is the transpose of the tile: its columns 16m .. 16m + 16, summed over rows row .. row + 16.
template <int ROW> DEVICE void left_fragment_transposed(u32 (&a)[4], u32 base, u32 row, u32 m) {
    u32 lane = threadIdx.x % 32;
    load_matrices_transposed(a, chunk_address<ROW>(base, row + lane / 16 * 8 + lane % 8, 2 * m + lane / 8 % 2));
}
// Two right operands side by side for the product with the tile's transpose: columns are its rows row .. row + 16, summed over its
// columns 16k .. 16k + 16.
template <int ROW> DEVICE void right_fragments_nt(u32 (&b)[4], u32 base, u32 row, u32 k) {
    u32 lane = threadIdx.x % 32;
    load_matrices(b, chunk_address<ROW>(base, row + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
}
// The same for the product with the tile itself: columns 16n .. 16n + 16, summed over rows row .. row + 16.
template <int ROW> DEVICE void right_fragments_nn(u32 (&b)[4], u32 base, u32 row, u32 n) {
    u32 lane = threadIdx.x % 32;
    load_matrices_transposed(b, chunk_address<ROW>(base, row + lane % 16, 2 * n + lane / 16));
}

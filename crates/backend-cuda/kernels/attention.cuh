// The layout of a packed batch as the attention kernels see it (macro T). The host builds these in `attention.rs`.
#pragma once
#include "common.cuh"

// Up to 64 query rows of one segment. Their keys are numbered through the segment's spans, context 0, context 1, own: query row t
// of the tile sees keys 0 ..= len0 + len1 + first + t.
struct Tile {
    u32 q_row, rows;
    u32 start0, len0, start1, len1, own;
    // Row of its segment at which the tile starts.
    u32 first;
};

// Up to 64 keys and the query rows that may see them.
struct KeyItem {
    u32 key, keys;
    u32 q_begin, q_end;
    // 1: keys of an example, seen by its own rows from their diagonal on. 0: keys of the prefix, row r sees the first visible[r].
    u32 own;
    // Where partial sums go if the rows are shared out over several items; ~0: straight into dk and dv.
    u32 slot;
};

struct View {
    const T *p;
    i64 stride;
};
struct ViewMut {
    T *p;
    i64 stride;
};

// The matrix row of key number `key` of a tile.
DEVICE u32 key_row(const Tile &t, u32 key) {
    if (key < t.len0) return t.start0 + key;
    key -= t.len0;
    if (key < t.len1) return t.start1 + key;
    return t.own + (key - t.len1);
}

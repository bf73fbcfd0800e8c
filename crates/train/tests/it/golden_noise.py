"""Philox-4x32-10 words, which the tests draw as well: what the scripts beside this file make factors and projections of."""
import numpy as np


def philox(counter, key):
    c = [x.astype(np.uint64) for x in counter]
    k = [np.uint64(key[0]), np.uint64(key[1])]
    mask = np.uint64(0xFFFFFFFF)
    for i in range(10):
        if i:
            k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k[0], p1 & mask, (p0 >> np.uint64(32)) ^ c[3] ^ k[1], p0 & mask]
    return c[0]


def words(n, stream, seed):
    i = np.arange(n, dtype=np.uint64)
    zero = np.zeros(n, dtype=np.uint64)
    return philox([i, zero + np.uint64(stream), zero, zero], (seed, 0))


def uniform(n, stream, bound):
    return ((words(n, stream, 1) >> np.uint64(8)).astype(np.float32) / np.float32(2**23) - 1) * np.float32(bound)


def signs(n, stream, projection):
    return 1.0 - 2.0 * (words(n, stream, 100 + projection) & np.uint64(1)).astype(np.float64)

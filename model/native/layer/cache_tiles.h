// The tiles of the KV cache (attention.cpp says how they lie), and how keys of latents become values.
#pragma once
#include "products/gemm.h"

#include <cstring>

namespace emoe {

constexpr int64_t kTile = 16;      // tokens of a tile of the cache
constexpr int64_t kKeys = 256;     // keys of a chunk
constexpr int64_t kQueries = 32;   // most query rows computed together

#ifdef __AVX512BW__

// Turns 8 registers of 8 numbers of 64 bits each: row i of the result has number i of every register.
inline void transpose(__m512i (&rows)[8]) {
    __m512i pairs[8], halves[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm512_unpacklo_epi64(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi64(rows[i], rows[i + 1]);
    }
    // parts of 128 bits: those of even and of odd places of four registers
    for (int odd = 0; odd < 2; ++odd)
        for (int i = 0; i < 2; ++i) {
            const __m512i first = pairs[4 * i + odd], second = pairs[4 * i + 2 + odd];
            halves[4 * odd + i] = _mm512_shuffle_i64x2(first, second, 0x88);
            halves[4 * odd + 2 + i] = _mm512_shuffle_i64x2(first, second, 0xdd);
        }
    for (int odd = 0; odd < 2; ++odd)
        for (int i = 0; i < 2; ++i) {
            const __m512i first = halves[4 * odd + 2 * i], second = halves[4 * odd + 2 * i + 1];
            rows[2 * i + odd] = _mm512_shuffle_i64x2(first, second, 0x88);
            rows[2 * i + 4 + odd] = _mm512_shuffle_i64x2(first, second, 0xdd);
        }
}

// As `turn`, for 16 dimensions.
inline void turn16(const bf16* keys, int64_t size, bf16* values) {
    __m512i rows[8];
    for (int i = 0; i < 8; ++i) {
        const __m512i row = _mm512_loadu_si512(keys + i * 2 * kTile);
        rows[i] = _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(row, 0xd8), 0xd8);
    }
    transpose(rows);
    for (int pair = 0; pair < 8; ++pair) _mm512_storeu_si512(values + pair * size * 2, rows[pair]);
}

#endif

// Makes a tile of values [8][size][2] from the first `size` dimensions of a tile of keys [size/2][16][2]. `size` is even.
inline void turn(const bf16* keys, int64_t size, bf16* values) {
    int64_t d = 0;
#ifdef __AVX512BW__
    for (; d + 16 <= size; d += 16) turn16(keys + d * kTile, size, values + d * 2);
#endif
    for (; d < size; d += 2)
        for (int64_t pair = 0; pair < kTile / 2; ++pair) {
            uint32_t first, second; // of two tokens, two dimensions each
            std::memcpy(&first, keys + d * kTile + pair * 4, 4);
            std::memcpy(&second, keys + d * kTile + pair * 4 + 2, 4);
            const uint64_t low = (first & 0xffffu) | second << 16, high = first >> 16 | (second & 0xffff0000u);
            const uint64_t both = low | high << 32;
            std::memcpy(values + (pair * size + d) * 2, &both, 8);
        }
}

} // namespace emoe

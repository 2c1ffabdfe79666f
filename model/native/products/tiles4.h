// Products of rows in 16 bits (wide.h) with weights of 4 bits by the matrix unit (tiles.h).
//
// A row's number is taken apart into a multiple of 128 and a rest below 128. Both are numbers in bfloat16, and so are the
// weights without their scales. A sum of 32 products stays below 2^24 (32 x 15 x 2^14), so float32 sums of bfloat16 products
// are exact here, in any order. So both parts are added up in one tile, and the sums have the bits that vector.h's
// instructions give: either may be used for any number of rows.
#pragma once

#include "products/tiles8.h"

#ifdef EMOE_TILES

namespace emoe {

constexpr int64_t kFewTiles4 = 7; // rows up to which vector.h's instructions are faster

// A group of a panel in bfloat16, with the scales of its parts.
struct WideFloats {
    alignas(64) bf16 values[kGroup / 2][kPanel][2];
    alignas(64) float scales[kGroup / kFine][kPanel];
    int64_t parts;
};

// Bytes of 16 rows: for each 32 steps of K, a tile of the multiples of 128 and one of the rests.
inline int64_t float_block_bytes(int64_t depth) { return (depth + kFine - 1) / kFine * 2 * kTileSize; }

inline __m512i exact_bf16(__m512i values) { // of 32 integers of 16 bits that have at most 8 significant ones
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(values)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(values, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Takes rows apart.
inline void take_apart4(std::vector<Row8>& rows, int64_t depth, std::vector<char>& memory) {
    const __m512i rest = _mm512_set1_epi16(127);
    const int64_t steps = (depth + kFine - 1) / kFine;
    lay_out(rows, float_block_bytes(depth), memory, [&](const Row8& row, char* to) {
        for (int64_t k = 0; k < steps; ++k, to += 2 * kTileSize) {
            const __m512i values = _mm512_loadu_si512(row.values + k * kFine);
            _mm512_storeu_si512(to, exact_bf16(_mm512_andnot_si512(rest, values)));
            _mm512_storeu_si512(to + kTileSize, exact_bf16(_mm512_and_si512(rest, values)));
        }
    });
}

// The exact sums of each part, for a block: 16 rows by 32 columns, 16 columns each.
using FoundFloats = float[2][kTileRows][kGroup / kFine][16];

// Multiplies 16 rows by one part of 32 columns. The sums become tiles 0 and 1, or 2 and 3: tiles' numbers must be literals.
template <int SUMS> void find_part(const char* block, const bf16* columns, AheadOfNext& ahead) {
    constexpr int64_t kLine = kPanel * 4;
    if constexpr (SUMS == 0) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_zero(2);
        _tile_zero(3);
    }
    _tile_loadd(4, block, kTileBytes);
    _tile_loadd(6, columns, kLine);
    if constexpr (SUMS == 0) _tile_dpbf16ps(0, 4, 6);
    else _tile_dpbf16ps(2, 4, 6);
    ahead.some();
    _tile_loadd(7, columns + 32, kLine);
    if constexpr (SUMS == 0) _tile_dpbf16ps(1, 4, 7);
    else _tile_dpbf16ps(3, 4, 7);
    _tile_loadd(5, block + kTileSize, kTileBytes);
    if constexpr (SUMS == 0) _tile_dpbf16ps(0, 5, 6);
    else _tile_dpbf16ps(2, 5, 6);
    ahead.some();
    if constexpr (SUMS == 0) _tile_dpbf16ps(1, 5, 7);
    else _tile_dpbf16ps(3, 5, 7);
}

// Writes what find_part has found.
template <int SUMS> void keep_part(FoundFloats& found, int part) {
    constexpr int64_t kFound = sizeof found[0][0];
    if constexpr (SUMS == 0) {
        _tile_stored(0, found[0][0][part], kFound);
        _tile_stored(1, found[1][0][part], kFound);
    } else {
        _tile_stored(2, found[0][0][part], kFound);
        _tile_stored(3, found[1][0][part], kFound);
    }
    written();
}

// Adds a block to its sums: the parts' sums times their scales, times the rows' scales.
template <int PARTS, bool FIRST>
void add_parts(const FoundFloats& found, const WideFloats& wide, int64_t first, const float* row_scales, float* sums) {
    Register scales[PARTS][2];
    for (int part = 0; part < PARTS; ++part)
        for (int c = 0; c < 2; ++c) scales[part][c] = load_sum(wide.scales[part] + first + c * 16);
    for (int c = 0; c < 2; ++c)
        for (int r = 0; r < kTileRows; ++r) {
            Register total = times(load_sum(found[c][r][0]), scales[0][c]);
            for (int part = 1; part < PARTS; ++part) total = times_plus(load_sum(found[c][r][part]), scales[part][c], total);
            add_group(sums + r * kPanel + first + c * 16, total, row_scales[r], !FIRST);
        }
}

// Multiplies rows that were taken apart by a group of a panel. The tiles are configured. The sums of a part are written while
// the unit multiplies the next one. A second place for them, so that a block could be added while the next one is
// multiplied, made it slower: rows, columns and sums fill L1. Meanwhile `fetched` lines of the caches are prefetched, from
// `next` on.
template <int PARTS, bool FIRST>
void multiply_all_parts(int64_t count, const Row8* rows, int64_t group, const WideFloats& wide, const char* next,
                        int64_t fetched, float* sums) {
    alignas(64) FoundFloats found;
    float row_scales[kChunk] = {};
    for (int64_t r = 0; r < count; ++r) row_scales[r] = rows[r].scales[group];
    const int64_t blocks = (count + kTileRows - 1) / kTileRows * 2;
    AheadOfNext ahead{next, (fetched + blocks * PARTS * 2 - 1) / (blocks * PARTS * 2)};
    written();
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = block / 2 * kTileRows, first = block % 2 * 32;
        const char* bytes = rows[at].bytes + group * kGroup / kFine * 2 * kTileSize;
        for (int part = 0; part < PARTS; ++part) {
            const bf16* columns = wide.values[part * kFine / 2][first];
            if (part % 2 == 0) find_part<0>(bytes + part * 2 * kTileSize, columns, ahead);
            else find_part<2>(bytes + part * 2 * kTileSize, columns, ahead);
            if (part % 2 == 1) keep_part<0>(found, part - 1);
            else if (part > 0) keep_part<2>(found, part - 1);
        }
        keep_part<(PARTS - 1) % 2 * 2>(found, PARTS - 1);
        add_parts<PARTS, FIRST>(found, wide, first, row_scales + at, sums + at * kPanel);
    }
}

template <bool FIRST>
void multiply_all_floats(int64_t count, const Row8* rows, int64_t group, const WideFloats& wide, const char* next,
                         int64_t fetched, float* sums) {
    switch (wide.parts) {
    case 1: return multiply_all_parts<1, FIRST>(count, rows, group, wide, next, fetched, sums);
    case 2: return multiply_all_parts<2, FIRST>(count, rows, group, wide, next, fetched, sums);
    case 3: return multiply_all_parts<3, FIRST>(count, rows, group, wide, next, fetched, sums);
    default: return multiply_all_parts<4, FIRST>(count, rows, group, wide, next, fetched, sums);
    }
}

} // namespace emoe

#endif

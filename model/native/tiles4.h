// Products of rows in 16 bits (wide.h) with weights of 4 bits by the matrix unit (tiles.h).
//
// A row's number is taken apart into a multiple of 128 and a rest below 128. Both are numbers in bfloat16, and so are the
// weights without their scales. A sum of 32 products stays below 2^24 (32 x 15 x 2^14), so float32 sums of bfloat16 products
// are exact here, in any order. So both parts are added up in one tile, and the sums have the bits that vector.h's
// instructions give: either may be used for any number of rows.
#pragma once

#include "tiles8.h"

#ifdef EMOE_TILES

namespace emoe {

constexpr int64_t kFewTiles4 = 16; // rows up to which vector.h's instructions are faster

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

// The exact sums of one part, for 16 rows: of 16 columns each.
using FoundFloats = float[4][kTileRows][16];

// Multiplies the 16 rows of a block by one part.
inline void find_floats(const char* block, const bf16* columns, AheadOfNext& ahead, FoundFloats& found) {
    constexpr int64_t kLine = kPanel * 4, kFound = 64;
    written();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(6, columns, kLine);
    _tile_loadd(4, block, kTileBytes);
    _tile_dpbf16ps(0, 4, 6);
    ahead.some();
    _tile_loadd(7, columns + 32, kLine);
    _tile_dpbf16ps(1, 4, 7);
    ahead.some();
    _tile_loadd(5, block + kTileSize, kTileBytes);
    _tile_dpbf16ps(0, 5, 6);
    _tile_loadd(6, columns + 64, kLine);
    _tile_dpbf16ps(1, 5, 7);
    ahead.some();
    _tile_loadd(7, columns + 96, kLine);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 7);
    ahead.some();
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_stored(0, found[0], kFound);
    _tile_stored(1, found[1], kFound);
    _tile_stored(2, found[2], kFound);
    _tile_stored(3, found[3], kFound);
    written();
}

// Adds the sums of one part times their scales to `totals`, from which the last part goes on to `sums`.
template <bool FIRST, bool LAST>
void add_floats(int64_t count, const Row8* rows, int64_t group, const float* scales, const FoundFloats& found,
                float (*totals)[kPanel], float* sums) {
    Register scale[4];
    for (int c = 0; c < 4; ++c) scale[c] = load_sum(scales + c * 16);
    for (int64_t r = 0; r < count; ++r)
        for (int c = 0; c < 4; ++c) {
            const Register sum = load_sum(found[c][r]);
            const Register total = FIRST ? times(sum, scale[c]) : times_plus(sum, scale[c], load_sum(totals[r] + c * 16));
            if (LAST) add_group(sums + r * kPanel + c * 16, total, rows[r].scales[group], group > 0);
            else store_sum(totals[r] + c * 16, total);
        }
}

// Multiplies rows that were taken apart by a group of a panel. The tiles are configured. While the unit multiplies 16 rows by
// one part, the sums of the part before are used. Meanwhile `fetched` lines of the caches are prefetched, from `next` on.
inline void multiply_all_floats(int64_t count, const Row8* rows, int64_t group, const WideFloats& wide, const char* next,
                                int64_t fetched, float* sums) {
    alignas(64) FoundFloats found[2];
    alignas(64) float totals[kTileRows][kPanel]; // of the parts so far, for one block of rows
    const auto add = [&](int64_t at, int64_t part, const FoundFloats& sums_of_part) {
        const bool last = part + 1 == wide.parts;
        const auto run = part == 0 ? (last ? add_floats<true, true> : add_floats<true, false>)
                                   : (last ? add_floats<false, true> : add_floats<false, false>);
        run(std::min(kTileRows, count - at), rows + at, group, wide.scales[part], sums_of_part, totals, sums + at * kPanel);
    };
    const int64_t times = (count + kTileRows - 1) / kTileRows * wide.parts * 4;
    AheadOfNext ahead{next, (fetched + times - 1) / times};
    int64_t at_before = -1, part_before = 0;
    int now = 0;
    for (int64_t at = 0; at < count; at += kTileRows)
        for (int64_t part = 0; part < wide.parts; ++part, now ^= 1) {
            const char* block = rows[at].bytes + (group * kGroup / kFine + part) * 2 * kTileSize;
            find_floats(block, wide.values[part * kFine / 2][0], ahead, found[now]);
            if (at_before >= 0) add(at_before, part_before, found[now ^ 1]);
            at_before = at;
            part_before = part;
        }
    add(at_before, part_before, found[now ^ 1]);
}

} // namespace emoe

#endif

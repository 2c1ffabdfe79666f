// Products of rows in 16 bits (wide.h) with weights of 8 or of 4 bits by the matrix unit (tiles.h).
//
// The unit multiplies bytes. So a row's numbers are taken apart into low and high bytes, which are multiplied one after the
// other: a number is the low byte, without a sign, plus 256 times the high one. Sums of integers are exact, so the result has
// the bits that vector.h's instructions give, and either may be used for any number of rows.
//
// A tile of columns has 4 steps of K of one column in 32 bits. Of 8 steps of K, these are 0, 4, 1, 5 and then 2, 6, 3, 7, as
// words of 4-bit codes give them (gemm4.h).
#pragma once

#include "wide.h"

#ifdef EMOE_TILES

namespace emoe {

constexpr int64_t kFewRowsTiles = 4; // up to which vector.h's instructions are faster

// Up to 128 steps of K of a panel in bytes, with the scales of its parts.
struct WideBytes {
    alignas(64) int8_t values[kGroup / 4][kPanel][4];
    alignas(64) float scales[kGroup / kFine][kPanel];
    int64_t parts, part_bytes; // part_bytes: steps of K that have scales of their own, filled up to whole tiles
};

// Bytes of one half, low or high, of a row.
inline int64_t half_bytes(int64_t depth) { return (depth + kTileBytes - 1) / kTileBytes * kTileBytes; }

// Takes rows apart, for products of whole tiles of rows. The bytes lie in `memory`.
inline void take_apart(std::vector<Row8>& rows, int64_t depth, std::vector<char>& memory) {
    alignas(64) uint8_t order[64];
    for (int i = 0; i < 64; ++i) order[i] = 2 * (i / 8 * 8 + (i % 8 / 4 * 2 + i % 4 / 2 + i % 2 * 4));
    const __m512i low = _mm512_load_si512(order), high = _mm512_or_si512(low, _mm512_set1_epi8(1));
    const int64_t half = half_bytes(depth), filled = (depth + kFine - 1) / kFine * kFine;
    // rows that are a power of 2 apart would share few places of the cache
    const int64_t stride = 2 * half + 64, needed = (rows.size() + kTileRows) * stride;
    if (int64_t(memory.size()) < needed) memory.resize(needed);
    char* to = memory.data();
    for (Row8& row : rows) {
        for (int64_t k = 0; k < filled; k += 64) {
            const __m512i first = _mm512_loadu_si512(row.values + k);
            const __m512i second = k + 32 < filled ? _mm512_loadu_si512(row.values + k + 32) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + k, _mm512_permutex2var_epi8(first, low, second));
            _mm512_storeu_si512(to + half + k, _mm512_permutex2var_epi8(first, high, second));
        }
        row.bytes = to;
        to += stride;
    }
}

// The sums of one block, 16 rows by 32 columns, for each part: of the low bytes, 16 columns each, and of the high ones.
using Found = int32_t[kGroup / kFine][4][kTileRows][16];

// Adds a quarter of a block, 8 rows by 16 columns, to `sums`. `first` is the block's first column.
template <int PARTS>
void add_quarter(int quarter, int64_t count, const Row8* rows, int64_t group, const WideBytes& wide, int64_t first,
                 const Found& found, float* sums) {
    const int64_t c = quarter / 2, column = first + c * 16, begin = quarter % 2 * 8;
    Register scales[PARTS];
    for (int part = 0; part < PARTS; ++part) scales[part] = load_sum(wide.scales[part] + column);
    for (int64_t r = begin; r < std::min(count, begin + 8); ++r) {
        Register total{};
        for (int part = 0; part < PARTS; ++part) {
            const Integers low = load_integers(found[part][c][r]), high = load_integers(found[part][2 + c][r]);
            const Register sum = to_register(_mm512_add_epi32(low, _mm512_slli_epi32(high, 8)));
            total = part == 0 ? times(sum, scales[0]) : times_plus(sum, scales[part], total);
        }
        add_group(sums + r * kPanel + column, total, rows[r].scales[group], group > 0);
    }
}

// Multiplies a block by one part.
inline void find_part(const char* low, const char* high, int64_t stride, const int8_t* columns, int64_t part_bytes,
                      int32_t (*found)[kTileRows][16]) {
    constexpr int64_t kLine = kPanel * 4, kFound = 64;
    const int64_t step = std::min(part_bytes, kTileBytes);
    written();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < part_bytes; k += step, columns += step / 4 * kLine) {
        _tile_loadd(6, columns, kLine);
        _tile_loadd(4, low + k, stride);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(7, columns + 64, kLine);
        _tile_dpbusd(1, 4, 7);
        _tile_loadd(5, high + k, stride);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, found[0], kFound);
    _tile_stored(1, found[1], kFound);
    _tile_stored(2, found[2], kFound);
    _tile_stored(3, found[3], kFound);
    written();
}

// Multiplies rows that were taken apart by a group of a panel. The tiles are configured. While the unit multiplies one
// block, the block before is added to the sums.
template <int PARTS>
void multiply_parts(int64_t count, const Row8* rows, int64_t depth, int64_t group, const WideBytes& wide, float* sums) {
    constexpr int kQuarters = 4;
    alignas(64) Found found[2];
    const int64_t half = half_bytes(depth), stride = 2 * half + 64, blocks = (count + kTileRows - 1) / kTileRows * 2;
    const auto add = [&](int64_t block, int quarter) {
        const int64_t at = block / 2 * kTileRows;
        add_quarter<PARTS>(quarter, count - at, rows + at, group, wide, block % 2 * 32, found[block % 2], sums + at * kPanel);
    };
    for (int64_t block = 0; block < blocks; ++block) {
        const char* low = rows[block / 2 * kTileRows].bytes + group * kGroup;
        const int8_t* columns = wide.values[0][block % 2 * 32];
        for (int part = 0; part < PARTS; ++part) {
            const int64_t k = part * wide.part_bytes;
            find_part(low + k, low + half + k, stride, columns + k * kPanel, wide.part_bytes, found[block % 2][part]);
            for (int quarter = part * kQuarters / PARTS; block > 0 && quarter < (part + 1) * kQuarters / PARTS; ++quarter)
                add(block - 1, quarter);
        }
    }
    for (int quarter = 0; quarter < kQuarters; ++quarter) add(blocks - 1, quarter);
}

inline void multiply_all_bytes(int64_t count, const Row8* rows, int64_t depth, int64_t group, const WideBytes& wide,
                               float* sums) {
    switch (wide.parts) {
    case 1: return multiply_parts<1>(count, rows, depth, group, wide, sums);
    case 2: return multiply_parts<2>(count, rows, depth, group, wide, sums);
    case 3: return multiply_parts<3>(count, rows, depth, group, wide, sums);
    default: return multiply_parts<4>(count, rows, depth, group, wide, sums);
    }
}

} // namespace emoe

#endif

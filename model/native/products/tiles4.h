// Products of rows in 8 bits (rows4.h) with weights of 4 bits by the matrix unit (tiles.h).
//
// The unit multiplies bytes: 32 steps of K of 16 rows by those of 16 columns. The weights are in bytes then, less their zero
// points. Sums of integers are exact, so the result has the bits that vector.h's instructions give, and either may be used for
// any number of rows.
#pragma once

#include "products/rows4.h"
#include "products/tiles8.h"

#ifdef EMOE_TILES

namespace emoe {

constexpr int64_t kFewTiles4 = 7; // rows up to which vector.h's instructions are faster

// A block of a panel in bytes, with the scales of its groups.
struct WideBytes4 {
    alignas(64) int8_t values[kGroup / kFine][kFine / 4][kPanel][4];
    alignas(64) float scales[kGroup / kFine][kPanel];
    int64_t groups;
};

constexpr int64_t kTile4 = kTileRows * kFine; // bytes of a tile of rows

// Lays rows out: for each 32 steps of K, a tile of 16 rows.
inline void lay_out4(std::vector<Row4>& rows, int64_t depth, std::vector<char>& memory) {
    const int64_t groups = groups4(depth);
    const auto fill = [&](const Row4& row, char* to) {
        for (int64_t g = 0; g < groups; ++g, to += kTile4) std::memcpy(to, row.groups[g].values, kFine);
    };
    lay_out(rows, groups * kTile4, kFine, memory, fill);
}

// The sums of each group of a block, for 16 rows by 32 columns, 16 columns each.
using FoundBytes4 = int32_t[2][kTileRows][kGroup / kFine][16];

// Multiplies 16 rows by one group of 32 columns. The sums become tiles 0 and 1, or 2 and 3: tiles' numbers must be literals.
template <int SUMS> void find_group(const char* rows, const int8_t* columns, AheadOfNext& ahead) {
    constexpr int64_t kLine = kPanel * 4;
    if constexpr (SUMS == 0) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_zero(2);
        _tile_zero(3);
    }
    _tile_loadd(4, rows, kFine);
    _tile_loadd(6, columns, kLine);
    if constexpr (SUMS == 0) _tile_dpbssd(0, 4, 6);
    else _tile_dpbssd(2, 4, 6);
    ahead.some();
    _tile_loadd(7, columns + 64, kLine);
    if constexpr (SUMS == 0) _tile_dpbssd(1, 4, 7);
    else _tile_dpbssd(3, 4, 7);
    ahead.some();
}

// Writes what find_group has found.
template <int SUMS> void keep_group(FoundBytes4& found, int group) {
    constexpr int64_t kFound = sizeof found[0][0];
    if constexpr (SUMS == 0) {
        _tile_stored(0, found[0][0][group], kFound);
        _tile_stored(1, found[1][0][group], kFound);
    } else {
        _tile_stored(2, found[0][0][group], kFound);
        _tile_stored(3, found[1][0][group], kFound);
    }
    written();
}

// Adds a block to its sums: the groups' sums times their scales and those of the rows.
template <int GROUPS>
void add_found(const FoundBytes4& found, const WideBytes4& wide, int64_t first, int64_t count, const Row4* rows, int64_t number,
               float* sums) {
    Register scales[GROUPS][2];
    for (int group = 0; group < GROUPS; ++group)
        for (int c = 0; c < 2; ++c) scales[group][c] = load_sum(wide.scales[group] + first + c * 16);
    for (int c = 0; c < 2; ++c)
        for (int64_t r = 0; r < std::min(count, kTileRows); ++r) {
            const Group4* of_row = rows[r].groups + number * (kGroup / kFine);
            for (int group = 0; group < GROUPS; ++group)
                add_products(sums + r * kPanel + first + c * 16, to_register(load_integers(found[c][r][group])),
                             times(scales[group][c], all_lanes(of_row[group].scale)), number + group > 0);
        }
}

// Multiplies rows that were laid out by a block of a panel. The tiles are configured. The sums of a group are written while the
// unit multiplies the next one. A second place for them, so that a block could be added while the next one is multiplied, made
// it slower: rows, columns and sums fill L1. Meanwhile `fetched` lines of the caches are prefetched, from `next` on.
template <int GROUPS>
void multiply_all_groups(int64_t count, const Row4* rows, int64_t number, const WideBytes4& wide, const char* next,
                         int64_t fetched, float* sums) {
    alignas(64) FoundBytes4 found;
    const int64_t blocks = (count + kTileRows - 1) / kTileRows * 2;
    AheadOfNext ahead{next, (fetched + blocks * GROUPS * 2 - 1) / (blocks * GROUPS * 2)};
    written();
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = block / 2 * kTileRows, first = block % 2 * 32;
        const char* bytes = rows[at].tiles + number * (kGroup / kFine) * kTile4;
        for (int group = 0; group < GROUPS; ++group) {
            const int8_t* columns = wide.values[group][0][first];
            if (group % 2 == 0) find_group<0>(bytes + group * kTile4, columns, ahead);
            else find_group<2>(bytes + group * kTile4, columns, ahead);
            if (group % 2 == 1) keep_group<0>(found, group - 1);
            else if (group > 0) keep_group<2>(found, group - 1);
        }
        keep_group<(GROUPS - 1) % 2 * 2>(found, GROUPS - 1);
        add_found<GROUPS>(found, wide, first, count - at, rows + at, number, sums + at * kPanel);
    }
}

inline void multiply_all_bytes4(int64_t count, const Row4* rows, int64_t number, const WideBytes4& wide, const char* next,
                                int64_t fetched, float* sums) {
    switch (wide.groups) {
    case 1: return multiply_all_groups<1>(count, rows, number, wide, next, fetched, sums);
    case 2: return multiply_all_groups<2>(count, rows, number, wide, next, fetched, sums);
    case 3: return multiply_all_groups<3>(count, rows, number, wide, next, fetched, sums);
    default: return multiply_all_groups<4>(count, rows, number, wide, next, fetched, sums);
    }
}

} // namespace emoe

#endif

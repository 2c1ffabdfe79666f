// Products of rows (rows8.h) with weights of 8 bits by the matrix unit (tiles.h).
//
// The unit multiplies bytes, and a row's integers times their factors have 11 bits. So they are taken apart into low and high bytes,
// which are multiplied one after the other: a number is the low byte, without a sign, plus 256 times the high one. Sums of
// integers are exact, so the result has the bits that vector.h's instructions give, and either may be used for any number of rows.
//
// A tile of columns has 4 steps of K of one column in 32 bits. Of 8 steps of K, these are 0, 4, 1, 5 and then 2, 6, 3, 7,
// which is how pairs of K (gemm8.h) are put together fastest.
#pragma once

#include "products/rows8.h"

#ifdef EMOE_TILES

namespace emoe {

constexpr int64_t kFewTiles8 = 4; // rows up to which vector.h's instructions are faster

// Up to 128 steps of K of a panel in bytes, and their scales.
struct WideBytes {
    alignas(64) int8_t values[kGroup / 4][kPanel][4];
    alignas(64) float scales[kPanel];
    int64_t steps; // of 64 of K
};

// Steps of 64 of K that a row is filled up to, and the bytes of 16 rows: for each step a tile of low bytes and one of high ones.
inline int64_t byte_steps(int64_t depth) { return (depth + kTileBytes - 1) / kTileBytes; }
constexpr int64_t kTileSize = kTileRows * kTileBytes;
inline int64_t block_bytes(int64_t depth) { return byte_steps(depth) * 2 * kTileSize; }

// Lays rows out in `memory`: one block of `size` bytes after the other, each of 16 rows in tiles of `line` bytes of a row. `fill`
// writes a row's lines, which lie a tile apart. The last block is filled up with zeros.
template <class Row, class Fill>
void lay_out(std::vector<Row>& rows, int64_t size, int64_t line, std::vector<char>& memory, Fill fill) {
    const int64_t count = rows.size(), needed = (count + kTileRows - 1) / kTileRows * size + kTileBytes;
    if (int64_t(memory.size()) < needed) memory.resize(needed);
    char* blocks = (char*)((uintptr_t(memory.data()) + kTileBytes - 1) / kTileBytes * kTileBytes);
    for (int64_t r = 0; r < count; ++r) {
        char* block = blocks + r / kTileRows * size;
        fill(rows[r], block + r % kTileRows * line);
        rows[r].tiles = block;
    }
    for (int64_t r = count; r % kTileRows != 0; ++r)
        for (int64_t tile = 0; tile < size; tile += kTileRows * line)
            std::memset(blocks + r / kTileRows * size + tile + r % kTileRows * line, 0, line);
}

// Takes rows apart.
inline void take_apart(std::vector<Row8>& rows, int64_t depth, std::vector<char>& memory) {
    alignas(64) uint8_t order[64];
    for (int i = 0; i < 64; ++i) order[i] = 2 * (i / 8 * 8 + (i % 8 / 4 * 2 + i % 4 / 2 + i % 2 * 4));
    const __m512i low = _mm512_load_si512(order), high = _mm512_or_si512(low, _mm512_set1_epi8(1));
    lay_out(rows, block_bytes(depth), kTileBytes, memory, [&](const Row8& row, char* to) {
        const auto numbers = [&](const Group8& group, int64_t fine) { // 32 in 16 bits
            const __m512i values = load_bytes(group.values + fine * kFine);
            return _mm512_mullo_epi16(values, _mm512_set1_epi16(int16_t(group.factors[fine])));
        };
        for (int64_t k = 0; k < depth; k += 64, to += 2 * kTileSize) {
            const Group8& group = row.groups[k / kGroup];
            const __m512i first = numbers(group, k % kGroup / kFine), second = numbers(group, k % kGroup / kFine + 1);
            _mm512_storeu_si512(to, _mm512_permutex2var_epi8(first, low, second));
            _mm512_storeu_si512(to + kTileSize, _mm512_permutex2var_epi8(first, high, second));
        }
    });
}

// The sums of one block, 16 rows by 32 columns: of the low bytes, 16 columns each, and of the high ones.
using Found = int32_t[4][kTileRows][16];

// Adds a quarter of a block, 8 rows by 16 columns, to `sums`. `first` is the block's first column.
inline void add_quarter(int quarter, int64_t count, const Row8* rows, int64_t group, const WideBytes& wide, int64_t first,
                        const Found& found, float* sums) {
    const int64_t c = quarter / 2, column = first + c * 16, begin = quarter % 2 * 8;
    const Register scale = load_sum(wide.scales + column);
    for (int64_t r = begin; r < std::min(count, begin + 8); ++r) {
        const Integers low = load_integers(found[c][r]), high = load_integers(found[2 + c][r]);
        const Register sum = to_register(_mm512_add_epi32(low, _mm512_slli_epi32(high, 8)));
        add_products(sums + r * kPanel + column, times(sum, scale), all_lanes(rows[r].groups[group].scale), group > 0);
    }
}

// Multiplies the rows of a block, whose bytes are given, by 32 columns.
inline void find_block(const char* bytes, const int8_t* columns, int64_t steps, AheadOfNext& ahead, Found& found) {
    constexpr int64_t kLine = kPanel * 4, kFound = 64;
    written();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < steps; ++k, columns += 16 * kLine, bytes += 2 * kTileSize) {
        _tile_loadd(6, columns, kLine);
        _tile_loadd(4, bytes, kTileBytes);
        _tile_dpbusd(0, 4, 6);
        ahead.some();
        _tile_loadd(7, columns + 64, kLine);
        _tile_dpbusd(1, 4, 7);
        ahead.some();
        _tile_loadd(5, bytes + kTileSize, kTileBytes);
        _tile_dpbssd(2, 5, 6);
        ahead.some();
        _tile_dpbssd(3, 5, 7);
        ahead.some();
    }
    _tile_stored(0, found[0], kFound);
    _tile_stored(1, found[1], kFound);
    _tile_stored(2, found[2], kFound);
    _tile_stored(3, found[3], kFound);
    written();
}

// Multiplies rows that were taken apart by a group of a panel. The tiles are configured. While the unit multiplies one
// block, the block before is added to the sums. Meanwhile `fetched` lines of the caches are prefetched, from `next` on.
inline void multiply_all_bytes(int64_t count, const Row8* rows, int64_t depth, int64_t group, const WideBytes& wide,
                               const char* next, int64_t fetched, float* sums) {
    alignas(64) Found found[2];
    const int64_t blocks = (count + kTileRows - 1) / kTileRows * 2, begin = group * kGroup / kTileBytes * 2 * kTileSize;
    const auto add = [&](int64_t block) {
        const int64_t at = block / 2 * kTileRows;
        for (int quarter = 0; quarter < 4; ++quarter)
            add_quarter(quarter, count - at, rows + at, group, wide, block % 2 * 32, found[block % 2], sums + at * kPanel);
    };
    AheadOfNext ahead{next, (fetched + blocks * wide.steps * 4 - 1) / (blocks * wide.steps * 4)};
    for (int64_t block = 0; block < blocks; ++block) {
        const char* bytes = rows[block / 2 * kTileRows].tiles + begin;
        if (block % 2 == 0) // the next rows come from L2
            for (int64_t line = 0; line < 4 * kTileSize; line += 64)
                _mm_prefetch(bytes + block_bytes(depth) + line, _MM_HINT_T0);
        find_block(bytes, wide.values[0][block % 2 * 32], wide.steps, ahead, found[block % 2]);
        if (block > 0) add(block - 1);
    }
    add(blocks - 1);
}

} // namespace emoe

#endif

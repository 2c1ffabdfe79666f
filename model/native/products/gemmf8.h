// Products of bfloat16 rows with a matrix of 8-bit floats (E4M3).
//
// A matrix lies in panels as in gemm8.h, with E4M3 in place of integers. A group of a panel becomes bfloat16, which loses nothing,
// and all rows are multiplied with it as in gemm.h. Scales are of two kinds:
// - Each 128 steps of K of one column have a float32 scale, by which the sums of the group are multiplied.
// - Each 32 steps have a power of 2 (E8M0, as in MXFP8). In place of a float32 scale lie the bytes of four powers. They scale the
//   weights, which loses nothing either, except that weights below 2^-118 may count as 0 (widened.h).
#pragma once

#include "products/e4m3.h"
#include "products/gemm8.h"
#include "products/widened.h"

namespace emoe {

// The two cache lines of pair `k` of the group after the next.
inline void fetch_group8(const int8_t* group, int64_t k) {
    const char* next = (const char*)group + 2 * kGroupBytes8 + k * 128;
    _mm_prefetch(next, _MM_HINT_T0);
    _mm_prefetch(next + 64, _MM_HINT_T0);
}

// A panel with float32 scales. Weights are divided by 256.
struct ScalesPanel {
    const int8_t* at;

    template <class To> void visit(int64_t pairs, bool fetch, To to) {
        for (int64_t k = 0; k < pairs; ++k) {
            if (fetch) fetch_group8(at, k);
            for (int c = 0; c < kWidenedColumns; ++c) to(k, c, load_e4m3(at + (k * kPanel + c * kLanes) * 2));
        }
        at += pairs * 2 * kPanel + kPanel * sizeof(float);
    }
    const float* last_scales() const { return (const float*)at - kPanel; } // of what was visited last
};

// A panel with powers of 2. Weights times powers are divided by 256.
struct PowersPanel {
    const int8_t* at;

    template <class To> void visit(int64_t pairs, bool fetch, To to) {
        const uint32_t* words = (const uint32_t*)(at + pairs * 2 * kPanel);
        for (int64_t first = 0, fine = 0; first < pairs; first += kFine / 2, ++fine) {
            Powers powers[kWidenedColumns];
            for (int c = 0; c < kWidenedColumns; ++c) powers[c] = load_powers(words + c * kLanes, int(fine));
            for (int64_t k = first; k < std::min(pairs, first + kFine / 2); ++k) {
                if (fetch) fetch_group8(at, k);
                for (int c = 0; c < kWidenedColumns; ++c) to(k, c, load_e4m3(at + (k * kPanel + c * kLanes) * 2, powers[c]));
            }
        }
        at = (const int8_t*)(words + kPanel);
    }
    Register scale(int64_t) const { return all_lanes(kE4m3Scale); } // of the sums of columns
};

#ifdef EMOE_TILES

// The sums of a block, 32 rows by 32 columns, 16 by 16 each.
using FoundBlock = float[4][kTileRows][16];

// Adds a quarter of a block times its columns' scales to `sums`. `first` is the block's first column.
inline void add_floats8(int quarter, int64_t count, bool more, const float* scales, int64_t first, const FoundBlock& found,
                        float* sums) {
    const int64_t column = first + quarter % 2 * 16, begin = quarter / 2 * kTileRows;
    const Register scale = load_sum(scales + column);
    for (int64_t r = begin; r < std::min(count, begin + kTileRows); ++r) {
        float* to = sums + r * kPanel + column;
        const Register product = load_sum(found[quarter][r - begin]);
        store_sum(to, more ? times_plus(product, scale, load_sum(to)) : times(product, scale));
    }
}

// Multiplies rows by a group of a panel, `steps` steps of 32 of K. The tiles are configured. While the unit multiplies one
// block, the block before is added to the sums. Meanwhile `fetched` lines of the caches are prefetched, from `next` on.
inline void multiply_all_floats8(int64_t count, TileRows rows, int64_t steps, const bf16* wide, const float* scales, bool more,
                                 const char* next, int64_t fetched, float* sums) {
    constexpr int64_t kLine = kPanel * 4, kFound = 64, kRowsOfBlock = 2 * kTileRows;
    alignas(64) FoundBlock found[2];
    const int64_t blocks = (count + kRowsOfBlock - 1) / kRowsOfBlock * 2, below = kTileRows * rows.stride;
    AheadOfNext ahead{next, (fetched + blocks * steps * 4 - 1) / (blocks * steps * 4)};
    const auto add = [&](int64_t block, int quarter) {
        const int64_t at = block / 2 * kRowsOfBlock;
        add_floats8(quarter, count - at, more, scales, block % 2 * 32, found[block % 2], sums + at * kPanel);
    };
    for (int64_t block = 0; block < blocks; ++block) {
        const char* row = rows.data + block / 2 * kRowsOfBlock * rows.stride;
        const char* columns = (const char*)wide + block % 2 * 2 * kTileBytes;
        int quarter = 0;
        written();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < steps; ++k, row += kTileBytes, columns += kTileRows * kLine) {
            _tile_loadd(6, columns, kLine);
            _tile_loadd(4, row, rows.stride);
            _tile_dpbf16ps(0, 4, 6);
            ahead.some();
            _tile_loadd(7, columns + kTileBytes, kLine);
            _tile_dpbf16ps(1, 4, 7);
            ahead.some();
            _tile_loadd(5, row + below, rows.stride);
            _tile_dpbf16ps(2, 5, 6);
            ahead.some();
            _tile_dpbf16ps(3, 5, 7);
            ahead.some();
            for (; block > 0 && quarter < 4 * (k + 1) / steps; ++quarter) add(block - 1, quarter);
        }
        _tile_stored(0, found[block % 2][0], kFound);
        _tile_stored(1, found[block % 2][1], kFound);
        _tile_stored(2, found[block % 2][2], kFound);
        _tile_stored(3, found[block % 2][3], kFound);
        written();
    }
    for (int quarter = 0; quarter < 4; ++quarter) add(blocks - 1, quarter);
}

// The rows lie at equal distances. They are filled up with zeros to a multiple of 32 of K, and are followed by others up to
// a multiple of 32 rows.
inline void multiply_chunk_f8_tiles(int64_t count, TileRows rows, int64_t depth, const int8_t* panel, float* sums, bool fetch) {
    alignas(64) bf16 wide[kGroup * kPanel];
    alignas(64) float scales[kPanel];
    const int64_t group_bytes = (kGroup + sizeof(float)) * kPanel;
    TileSizes::apart().load();
    for (int64_t group = 0; group < groups(depth); ++group) {
        const int64_t pairs = std::min(kGroup, depth - group * kGroup) / 2, steps = (pairs + 15) / 16;
        for (int64_t i = 0; i < pairs * 2 * kPanel; i += 2 * kLanes) store_pairs(wide + i, load_e4m3(panel + i));
        std::fill(wide + pairs * 2 * kPanel, wide + steps * 32 * kPanel, bf16(0));
        for (int64_t c = 0; c < kPanel; c += kLanes)
            store_sum(scales + c, times(load_sum((const float*)(panel + pairs * 2 * kPanel) + c), all_lanes(kE4m3Scale)));
        const TileRows some{rows.data + group * kGroup * int64_t(sizeof(bf16)), rows.stride};
        multiply_all_floats8(count, some, steps, wide, scales, group > 0, (const char*)panel + 2 * group_bytes,
                             fetch ? group_bytes / 64 : 0, sums);
        panel += pairs * 2 * kPanel + kPanel * sizeof(float);
    }
    _tile_release();
}

#endif

// Multiplies R rows by `pairs` pairs of a group. The products times their columns' scales are added to `sums` [R][64] if `more` is
// true, else they replace it. A product is added up as in gemm.h.
template <int R>
void multiply_scaled(const bf16* const* rows, int64_t first, int64_t pairs, const bf16* wide, const float* scales, float* sums,
                     bool more) {
    constexpr int C = kColumns<R>;
    const int32_t* a[R];
    for (int r = 0; r < R; ++r) a[r] = (const int32_t*)(rows[r] + first);
    for (int64_t begin = 0; begin < kPanel; begin += C * kLanes) {
        Register acc[R][C];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) acc[r][c] = no_sum();
        const bf16* b = wide + begin * 2;
        for (int64_t k = 0; k < pairs; ++k, b += 2 * kPanel) {
            Pairs column[C];
            for (int c = 0; c < C; ++c) column[c] = load_pairs(b + c * 2 * kLanes);
            for (int r = 0; r < R; ++r) {
                const Pairs pair = all_pairs(a[r][k]);
                for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], pair, column[c]);
            }
        }
        for (int c = 0; c < C; ++c) {
            const Register scale = load_sum(scales + begin + c * kLanes);
            for (int r = 0; r < R; ++r) {
                float* to = sums + r * kPanel + begin + c * kLanes;
                store_sum(to, more ? times_plus(acc[r][c], scale, load_sum(to)) : times(acc[r][c], scale));
            }
        }
    }
}

// Does what multiply_chunk does, for a panel of 8-bit floats.
inline void multiply_chunk_f8(int64_t count, const bf16* const* rows, int64_t depth, const int8_t* panel, float* sums,
                              bool fetch) {
#ifdef EMOE_TILES
    if (tiles_used) {
        const int64_t stride = count > 1 ? (rows[1] - rows[0]) * int64_t(sizeof(bf16)) : kTileBytes;
        return multiply_chunk_f8_tiles(count, {(const char*)rows[0], stride}, depth, panel, sums, fetch);
    }
#endif
    alignas(64) bf16 wide[kGroup * kPanel];
    alignas(64) float products[kFew * kPanel];
    alignas(64) float scales[kPanel];
    const int64_t blocks = (count + kRows - 1) / kRows;
    ScalesPanel weights{panel};
    for (int64_t first = 0; first < depth; first += kGroup) {
        const int64_t pairs = std::min(kGroup, depth - first) / 2;
        const bool few = multiply_few(count, rows, first, pairs, weights, products, false, fetch);
        if (!few) widen(weights, pairs, wide, fetch);
        for (int64_t c = 0; c < kPanel; c += kLanes)
            store_sum(scales + c, times(load_sum(weights.last_scales() + c), all_lanes(kE4m3Scale)));
        if (few) {
            for (int64_t r = 0; r < count; ++r)
                for (int64_t c = 0; c < kPanel; c += kLanes) {
                    float* to = sums + r * kPanel + c;
                    const Register product = load_sum(products + r * kPanel + c), scale = load_sum(scales + c);
                    store_sum(to, first > 0 ? times_plus(product, scale, load_sum(to)) : times(product, scale));
                }
            continue;
        }
        for (int64_t block = 0, at = 0; block < blocks; ++block) {
            const int64_t here = count / blocks + (block < count % blocks);
            with_rows<kRows>(here, [&](auto number) {
                multiply_scaled<decltype(number)::value>(rows + at, first, pairs, wide, scales, sums + at * kPanel, first > 0);
            });
            at += here;
        }
    }
}

} // namespace emoe

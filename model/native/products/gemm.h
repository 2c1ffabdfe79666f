// Products of bfloat16 rows with a packed matrix, summed in float32.
//
// A matrix [N, K] is stored in panels of 64 of its rows, which are columns of the product: [N/64][K/2][64][2]. So one
// dot-product instruction takes two steps of K for 16 columns. A panel is read from memory once and is multiplied with
// all rows, a few rows at a time. Each element of a product is summed over K in ascending order in one accumulator. So a
// row's result does not depend on the other rows of the call. Where the CPU has a matrix unit, it computes all products in
// bfloat16 (tiles.h).
#pragma once

#include "products/tiles.h"
#include "vector.h"

#include <type_traits>
#include <vector>

namespace emoe {

constexpr int64_t kPanel = 64; // columns of a panel
constexpr int64_t kChunk = 96; // rows whose sums are kept in L1
// Rows of the register tile. With 32 registers, 6 x 4 accumulators leave room for 4 registers of the panel and 1 of the
// row. With 16 registers, 4 x 2 accumulators leave room for the halves of pairs, which AVX2 must take apart.
constexpr int64_t kRows = kRegisters == 32 ? 6 : 4;
// Pairs of K that are multiplied at a time: a piece of the panel. The piece is read again for every few rows. It is 256 KB
// with AVX-512, which L2 holds. With AVX2 it is read again for every few columns too, so it is 16 KB, which L1 holds.
constexpr int64_t kPairs = kRegisters == 32 ? 1024 : 64;
constexpr int64_t kAhead = 4096; // bytes that a single pass over a panel fetches in advance
constexpr bool kWide = kRegisters == 32;
// Rows of two or three register tiles: memory would wait while a piece of 256 KB is read again out of L2. So pieces are so
// small that L1 holds them, and what is fetched lies further ahead (products of 8 rows: 28 before and 40 GB/s of 43 now).
inline int64_t piece_pairs(int64_t blocks) { return kWide && blocks == 2 ? 16 : kWide && blocks == 3 ? 64 : kPairs; }
constexpr int64_t kFurther = kWide ? 8192 : 0; // bytes

inline int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
inline int64_t panel_size(int64_t depth) { return depth * kPanel; }

// Registers of columns in a tile of R rows. Fewer rows leave room for more columns.
template <int R> constexpr int kColumns = kRegisters == 32 ? 4 : R == 1 ? 8 : R == 2 ? 4 : 2;

// Multiplies R rows by `pairs` pairs of one panel. The products are added to `sums` [R][64] if `more` is true, else they
// replace it. Meanwhile LINES cache lines per pair are prefetched from `ahead` on, so that memory is read while the
// registers are busy.
template <int R, int LINES>
void multiply(const bf16* const* rows, int64_t first_pair, int64_t pairs, const bf16* panel, float* sums, bool more,
              const char* ahead) {
    constexpr int C = kColumns<R>;
    constexpr int kPasses = kPanel / (C * kLanes), kLines = (LINES + kPasses - 1) / kPasses; // lines that one pass prefetches
    const int32_t* a[R];
    for (int r = 0; r < R; ++r) a[r] = (const int32_t*)rows[r] + first_pair;
    for (int64_t first = 0; first < kPanel; first += C * kLanes) {
        float* to = sums + first;
        Register acc[R][C];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) acc[r][c] = more ? load_sum(to + r * kPanel + c * kLanes) : no_sum();
        const bf16* b = panel + first_pair * 2 * kPanel + first * 2;
        for (int64_t k = 0; k < pairs; ++k, b += 2 * kPanel) {
            if (first < LINES * C * kLanes)
                for (int line = 0; line < kLines; ++line, ahead += 64)
                    _mm_prefetch(ahead, LINES == 4 || (kWide && LINES == 2) ? _MM_HINT_T0 : _MM_HINT_T1);
            Pairs column[C];
            for (int c = 0; c < C; ++c) column[c] = load_pairs(b + c * 2 * kLanes);
            for (int r = 0; r < R; ++r) {
                const Pairs pair = all_pairs(a[r][k]);
                for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], pair, column[c]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) store_sum(to + r * kPanel + c * kLanes, acc[r][c]);
    }
}

// Calls `run` with the number of rows as a compile-time constant. Counts above MOST become MOST.
template <int MOST, class Run> void with_rows(int64_t count, Run run) {
    if constexpr (MOST > 1)
        if (count < MOST) return with_rows<MOST - 1>(count, run);
    run(std::integral_constant<int, MOST>{});
}

template <int LINES>
void multiply_some(int64_t count, const bf16* const* rows, int64_t first, int64_t pairs, const bf16* panel,
                   float* sums, bool more, const char* ahead) {
    with_rows<kRows>(count, [&](auto number) {
        multiply<decltype(number)::value, LINES>(rows, first, pairs, panel, sums, more, ahead);
    });
}

#ifdef EMOE_TILES

// Multiplies `count` rows by `steps` steps of 32 of K of a panel. The products are added to `sums` if `more` is true, else
// they replace it. If `fetch`, the memory behind these steps is prefetched.
inline void multiply_steps(int64_t count, TileRows rows, int64_t steps, const bf16* panel, float* sums, bool more,
                           bool fetch) {
    constexpr int64_t kBoth = 2 * kTileRows, kLine = kPanel * 4; // bytes of a row of sums, and of a pair of K
    constexpr int64_t kStep = 16 * kLine, kParts = kStep / 64 / 4;  // parts of what a step takes: 4 lines of the caches
    const int64_t rest = count % kBoth, passes = count / kBoth * 2 + (rest > kTileRows ? 2 : rest > 0);
    const int64_t fetching = std::min<int64_t>(passes, 6), lines = fetch ? (kParts + fetching - 1) / fetching : 0;
    const char* next = (const char*)panel + steps * kStep;
    const auto columns_from = [&](int64_t first) {
        return [at = (const char*)panel + first * 4](int column, int64_t k) { return at + k * kStep + column * 64; };
    };
    for (int64_t at = 0, pass = 0; at < count; at += kBoth) {
        const int64_t here = std::min(kBoth, count - at);
        const TileRows some{rows.data + at * rows.stride, rows.stride};
        float* to = sums + at * kPanel;
        if (here <= kTileRows) {
            // a single pass waits for memory all the time, so it prefetches a little ahead of itself
            const AheadOfItself ahead{(const char*)panel + kAhead, fetch && passes == 1 ? kParts : 0};
            TileSizes::one(here).load();
            multiply_1x4(some, columns_from(0), kLine, steps, {to, kLine}, more, ahead);
            continue;
        }
        if (at == 0 || here < kBoth) TileSizes::two(here).load();
        for (int64_t first = 0; first < kPanel; first += 32, ++pass, next += lines * 4 * steps * 64) {
            const AheadOfNext ahead{next, pass < fetching ? lines : 0};
            multiply_2x2(some, columns_from(first), kLine, steps, {to + first, kLine}, more, ahead);
        }
    }
}

// Copies the last `rest` of `depth` numbers of each row, and fills them up with zeros to 32.
inline TileRows last_of_rows(int64_t count, TileRows rows, int64_t depth, int64_t rest, bf16* to) {
    std::memset(to, 0, count * kTileBytes);
    for (int64_t r = 0; r < count; ++r)
        std::memcpy(to + r * 32, rows.data + r * rows.stride + (depth - rest) * 2, rest * sizeof(bf16));
    return {(const char*)to, kTileBytes};
}

inline void multiply_chunk_tiles(int64_t count, const bf16* const* rows, int64_t depth, const bf16* panel, float* sums,
                                 bool fetch, bool more) {
    thread_local std::vector<bf16> copied;
    TileRows even{(const char*)rows[0], count > 1 ? (const char*)rows[1] - (const char*)rows[0] : kTileBytes};
    if (!evenly_spaced(count, rows)) {
        if (int64_t(copied.size()) < count * depth) copied.resize(count * depth);
        for (int64_t r = 0; r < count; ++r) std::memcpy(copied.data() + r * depth, rows[r], depth * sizeof(bf16));
        even = {(const char*)copied.data(), depth * int64_t(sizeof(bf16))};
    }
    const int64_t steps = depth / 32, rest = depth % 32;
    for (int64_t first = 0; first < steps; first += kPairs / 16) {
        const TileRows some{even.data + first * kTileBytes, even.stride};
        multiply_steps(count, some, std::min(kPairs / 16, steps - first), panel + first * 32 * kPanel,
                       sums, more || first > 0, fetch);
    }
    if (rest > 0) {
        alignas(64) bf16 last_rows[kChunk * 32], last_columns[32 * kPanel] = {};
        std::memcpy(last_columns, panel + steps * 32 * kPanel, rest * kPanel * sizeof(bf16));
        multiply_steps(count, last_of_rows(count, even, depth, rest, last_rows), 1, last_columns, sums, more || steps > 0, false);
    }
    _tile_release();
}

#endif

// Multiplies up to kChunk rows by one panel of a matrix with `depth` columns, an even number: sums [count][64]. If `fetch`
// is true, the memory behind the panel is prefetched, on the assumption that it is multiplied next. If `more` is true, the
// products are added to `sums`.
inline void multiply_chunk(int64_t count, const bf16* const* rows, int64_t depth, const bf16* panel, float* sums,
                           bool fetch, bool more = false) {
#ifdef EMOE_TILES
    if (tiles_used) return multiply_chunk_tiles(count, rows, depth, panel, sums, fetch, more);
#endif
    const int64_t blocks = (count + kRows - 1) / kRows, piece = piece_pairs(blocks);
    for (int64_t first = 0; first < depth / 2; first += piece) {
        const int64_t pairs = std::min(piece, depth / 2 - first);
        const bool adding = more || first > 0;
        const char* next = (const char*)(panel + (first + pairs) * 2 * kPanel);
        for (int64_t block = 0, at = 0; block < blocks; ++block) {
            // blocks have about equal sizes, since 4 + 3 rows are faster than 6 + 1
            const int64_t here = count / blocks + (block < count % blocks);
            float* to = sums + at * kPanel;
            if (!fetch) multiply_some<0>(here, rows + at, first, pairs, panel, to, adding, next);
            // a single pass over the panel waits for memory all the time, so it prefetches a little ahead of itself
            else if (blocks == 1) multiply_some<4>(here, rows, first, pairs, panel, to, adding, kRegisters == 32 ? next - pairs * 256 + kAhead : next);
            // with several passes, each of them prefetches a share of the next piece
            else if (blocks < 4 && block < 2)
                multiply_some<2>(here, rows + at, first, pairs, panel, to, adding, next + kFurther + block * pairs * 128);
            else if (blocks >= 4 && block < 4) multiply_some<1>(here, rows + at, first, pairs, panel, to, adding, next + block * pairs * 64);
            else multiply_some<0>(here, rows + at, first, pairs, panel, to, adding, next);
            at += here;
        }
    }
}

// Panels of `bytes` each that are multiplied with the same rows before the next rows. The matrix unit is so fast that it
// would wait for rows, if only one panel were multiplied with them while they are in L2. 512 KB of panels leave room for
// rows there.
inline int64_t panels_together(int64_t bytes) {
    constexpr int64_t kTogether = 512 << 10;
    return tiles_used ? std::max<int64_t>(1, kTogether / bytes) : 1;
}

// The items [begin, end) of `count` that thread `index` of `threads` computes.
struct Share {
    int64_t begin, end;
    Share(int64_t count, int index, int threads) : begin(count * index / threads), end(count * (index + 1) / threads) {}
};

} // namespace emoe

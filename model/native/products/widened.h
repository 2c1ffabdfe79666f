// Products of bfloat16 rows with weights that become bfloat16 first.
//
// A `Panel` brings the next 128 steps of K of its 64 columns to bfloat16: `panel.visit(pairs, fetch, to)` calls
// `to(k, c, Pairs)` for each pair of K and each register of columns. If `fetch`, the 128 steps after the next are prefetched
// meanwhile. With AVX-512, few rows are multiplied at once with what is in a register. For more rows all is written to memory,
// and all rows are multiplied with it as in gemm.h. Each sum is added up in the same order either way.
#pragma once

#include "products/gemm.h"
#include "products/rows.h"

namespace emoe {

constexpr int kWidenedColumns = kPanel / kLanes; // registers of columns
constexpr int kFew = 4; // rows whose sums leave room in registers. With AVX2 there is too little for one row already.

// Brings the next steps of K to bfloat16: [pairs][64][2].
template <class Panel> void widen(Panel& panel, int64_t pairs, bf16* wide, bool fetch) {
    panel.visit(pairs, fetch, [&](int64_t k, int c, Pairs column) { store_pairs(wide + (k * kPanel + c * kLanes) * 2, column); });
}

// Multiplies R rows with the next steps of K. The products are added to `sums` if `more` is true, else they replace it.
template <int R, class Panel>
void multiply_widened(const bf16* const* rows, int64_t first, int64_t pairs, Panel& panel, float* sums, bool more, bool fetch) {
    const int32_t* a[R];
    for (int r = 0; r < R; ++r) a[r] = (const int32_t*)(rows[r] + first);
    Register acc[R][kWidenedColumns];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < kWidenedColumns; ++c) acc[r][c] = more ? load_sum(sums + r * kPanel + c * kLanes) : no_sum();
    panel.visit(pairs, fetch, [&](int64_t k, int c, Pairs column) {
        for (int r = 0; r < R; ++r) acc[r][c] = dot(acc[r][c], all_pairs(a[r][k]), column);
    });
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < kWidenedColumns; ++c) store_sum(sums + r * kPanel + c * kLanes, acc[r][c]);
}

// Does so and returns true if the rows are few.
template <class Panel>
bool multiply_few(int64_t count, const bf16* const* rows, int64_t first, int64_t pairs, Panel& panel, float* sums, bool more,
                  bool fetch) {
    if (!kWide || count > kFew) return false;
    if constexpr (kWide)
        with_rows<kFew>(count, [&](auto number) {
            multiply_widened<decltype(number)::value>(rows, first, pairs, panel, sums, more, fetch);
        });
    return true;
}

// Does what multiply_chunk does, for weights that become bfloat16 together with their scales, so that the sums over all of K are
// those of gemm.h, bit for bit. At last the sums of a column are multiplied by `panel.scale`. For the matrix unit, rows lie at
// equal distances, and are filled up with zeros to a multiple of 32 of K.
template <class Panel>
void multiply_chunk_widened(int64_t count, const bf16* const* rows, int64_t depth, Panel panel, float* sums, bool fetch) {
    // Groups at a time. The matrix unit would wait for sums that are read and written more often, and so do many rows, which read
    // the weights out of L2 in any case.
    constexpr int64_t kMost = 4;
    alignas(64) bf16 wide[kMost * kGroup * kPanel];
    const int64_t together = (tiles_used || (kWide && count > 3 * kRows) ? kMost : 1) * kGroup;
    for (int64_t first = 0; first < depth; first += together) {
        const int64_t steps = std::min(together, depth - first);
        if (!tiles_used && multiply_few(count, rows, first, steps / 2, panel, sums, first > 0, fetch)) continue;
        for (int64_t at = 0; at < steps; at += kGroup) widen(panel, std::min(kGroup, steps - at) / 2, wide + at * kPanel, fetch);
#ifdef EMOE_TILES
        if (tiles_used) {
            const int64_t whole = (steps + 31) / 32, stride = count > 1 ? (rows[1] - rows[0]) * int64_t(sizeof(bf16)) : kTileBytes;
            std::fill(wide + steps * kPanel, wide + whole * 32 * kPanel, bf16(0));
            multiply_steps(count, {(const char*)(rows[0] + first), stride}, whole, wide, sums, first > 0, false);
            continue;
        }
#endif
        const bf16* at[kChunk];
        for (int64_t r = 0; r < count; ++r) at[r] = rows[r] + first;
        multiply_chunk(count, at, steps, wide, sums, false, first > 0);
    }
#ifdef EMOE_TILES
    if (tiles_used) _tile_release();
#endif
    for (int64_t c = 0; c < kPanel; c += kLanes) {
        const Register scale = panel.scale(c);
        for (float* to = sums + c; to < sums + count * kPanel; to += kPanel) store_sum(to, times(load_sum(to), scale));
    }
}

} // namespace emoe

// Products of bfloat16 rows with weights that become bfloat16 together with their scales, so that the sums over all of K are those
// of gemm.h, bit for bit.
#pragma once

#include "products/gemm.h"
#include "products/rows.h"

namespace emoe {

// Does what multiply_chunk does. `panel.widen` brings the next 128 steps of K to bfloat16, and the sums of a column are multiplied by
// `panel.scale`. For the matrix unit, rows lie at equal distances, and are filled up with zeros to a multiple of 32 of K.
template <class Panel>
void multiply_chunk_widened(int64_t count, const bf16* const* rows, int64_t depth, Panel panel, float* sums, bool fetch) {
    constexpr int64_t kMost = 4; // groups at a time: the matrix unit would wait for sums that are read and written more often
    alignas(64) bf16 wide[kMost * kGroup * kPanel];
    const int64_t together = (tiles_used ? kMost : 1) * kGroup;
    for (int64_t first = 0; first < depth; first += together) {
        const int64_t steps = std::min(together, depth - first);
        for (int64_t at = 0; at < steps; at += kGroup) panel.widen(std::min(kGroup, steps - at) / 2, wide + at * kPanel, fetch);
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

// Products of bfloat16 rows with a matrix of 8-bit floats (E4M3).
//
// A matrix lies in panels as in gemm8.h, with E4M3 in place of integers. Each has a float32 scale for 128 steps of K of one
// column. A group of a panel becomes bfloat16, which loses nothing, and all rows are multiplied with it as in gemm.h.
#pragma once

#include "gemm8.h"

namespace emoe {

constexpr float kE4m3Scale = 256.f; // what load_e4m3 leaves out

// Does what multiply_chunk does, for a panel of 8-bit floats.
inline void multiply_chunk_f8(int64_t count, const bf16* const* rows, int64_t depth, const int8_t* panel, float* sums,
                              bool fetch) {
    constexpr int64_t kDistance = 2; // groups that prefetching is ahead
    alignas(64) bf16 wide[kGroup * kPanel];
    alignas(64) float products[kChunk * kPanel];
    const bf16* at[kChunk];
    for (int64_t group = 0; group < groups(depth); ++group) {
        const int64_t pairs = std::min(kGroup, depth - group * kGroup) / 2;
        const char* next = (const char*)panel + kDistance * (kGroup + sizeof(float)) * kPanel;
        for (int64_t k = 0; k < pairs; ++k) {
            if (fetch)
                for (int64_t line = 2 * k; line < 2 * k + 2; ++line) _mm_prefetch(next + line * 64, _MM_HINT_T0);
            for (int64_t c = 0; c < kPanel; c += kLanes)
                store_pairs(wide + (k * kPanel + c) * 2, load_e4m3(panel + (k * kPanel + c) * 2));
        }
        for (int64_t r = 0; r < count; ++r) at[r] = rows[r] + group * kGroup;
        multiply_chunk(count, at, 2 * pairs, wide, products, false);
        const float* scales = (const float*)(panel + pairs * 2 * kPanel);
        for (int64_t c = 0; c < kPanel; c += kLanes) {
            const Register scale = times(load_sum(scales + c), all_lanes(kE4m3Scale));
            for (int64_t r = 0; r < count; ++r) {
                float* to = sums + r * kPanel + c;
                const Register product = load_sum(products + r * kPanel + c);
                store_sum(to, group > 0 ? times_plus(product, scale, load_sum(to)) : times(product, scale));
            }
        }
        panel += pairs * 2 * kPanel + kPanel * sizeof(float);
    }
}

} // namespace emoe

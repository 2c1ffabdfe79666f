// Products of rows with a matrix of 8-bit integers.
//
// Each column of weights is rounded to 8 bits in groups of 128 steps of K, and each group has a float32 scale. Rows are
// rounded to 16 bits in the same groups. A matrix [N, K] is stored in panels of 64 columns, and a panel in groups: a group
// is [64 pairs of K][64][2], followed by the scales [64]. Sums within a group are exact. The groups' sums are added in
// ascending order, so a row's result does not depend on the other rows of the call.
#pragma once

#include "gemm.h"

#include <cmath>
#include <vector>

namespace emoe {

constexpr int64_t kGroup = 128; // steps of K with one scale

inline int64_t groups(int64_t depth) { return (depth + kGroup - 1) / kGroup; }
inline int64_t panel_bytes8(int64_t depth) { return depth * kPanel + groups(depth) * kPanel * sizeof(float); }

// A row of numbers in 16 bits.
struct Row8 {
    const int16_t* values; // [depth]
    const float* scales;   // [groups]
};

// Rows [rows, depth] of numbers in 16 bits, one after the other.
struct Rows8 {
    int64_t depth = 0;
    std::vector<int16_t> values;
    std::vector<float> scales;

    void resize(int64_t rows, int64_t size) {
        depth = size;
        if (int64_t(values.size()) < rows * depth) values.resize(rows * depth);
        if (int64_t(scales.size()) < rows * groups(depth)) scales.resize(rows * groups(depth));
    }
    Row8 at(int64_t row) const { return {values.data() + row * depth, scales.data() + row * groups(depth)}; }

    // Rounds a row to 14 bits and a sign. So the sum of 128 products with 8-bit weights stays below 2^31, and the rounding
    // error stays below that of bfloat16.
    void set(int64_t row, const bf16* from) {
        constexpr float kMost = 16383.f;
        int16_t* to = values.data() + row * depth;
        for (int64_t g = 0, first = 0; first < depth; ++g, first += kGroup) {
            const int64_t end = std::min(depth, first + kGroup);
            Floats largest = zero(), broken = zero();
            for (int64_t k = first; k < end; k += 16) {
                const Floats value = load(from + k, lanes_before(k, end));
                largest = larger(largest, larger(value, sub(zero(), value)));
                broken = fused(value, zero(), broken);
            }
            const float most = maximum(largest);
            // if a value is infinite or not a number, the scale is not a number, so that the product shows it
            scales[row * groups(depth) + g] = most / kMost + sum(broken);
            const float factor = most > 0 ? kMost / most : 0.f;
            for (int64_t k = first; k < end; ++k) to[k] = int16_t(std::nearbyint(to_float(from[k]) * factor));
        }
    }
};

// Multiplies R rows by one group of `pairs` pairs. The products are added to `sums` [R][64] if `more` is true, else they
// replace it.
template <int R, int LINES>
void multiply8(const Row8* rows, int64_t group, int64_t pairs, const int8_t* weights, float* sums, bool more,
               const char* ahead) {
    constexpr int C = kColumns<R>;
    constexpr int kPasses = kPanel / (C * kLanes), kLines = (LINES + kPasses - 1) / kPasses;
    const int32_t* a[R];
    for (int r = 0; r < R; ++r) a[r] = (const int32_t*)(rows[r].values + group * kGroup);
    const float* scales = (const float*)(weights + pairs * 2 * kPanel);
    for (int64_t first = 0; first < kPanel; first += C * kLanes) {
        Integers acc[R][C];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) acc[r][c] = no_integers();
        const int8_t* b = weights + first * 2;
        for (int64_t k = 0; k < pairs; ++k, b += 2 * kPanel) {
            if (first < LINES * C * kLanes)
                for (int line = 0; line < kLines; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T0);
            Integers column[C];
            for (int c = 0; c < C; ++c) column[c] = load_bytes(b + c * 2 * kLanes);
            for (int r = 0; r < R; ++r) {
                const Integers pair = all_integers(a[r][k]);
                for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], pair, column[c]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) {
                float* to = sums + r * kPanel + first + c * kLanes;
                const Register scale = scaled(load_sum(scales + first + c * kLanes), rows[r].scales[group]);
                store_sum(to, product(acc[r][c], scale, more ? load_sum(to) : no_sum()));
            }
    }
}

constexpr int64_t kRows8 = 6; // rows of the register tile, which needs fewer registers beside its sums than bfloat16's

template <int LINES>
void multiply_some8(int64_t count, const Row8* rows, int64_t group, int64_t pairs, const int8_t* weights, float* sums,
                    const char* ahead) {
    with_rows<kRows8>(count, [&](auto number) {
        multiply8<decltype(number)::value, LINES>(rows, group, pairs, weights, sums, group > 0, ahead);
    });
}

// Does what multiply_chunk does, for a panel in 8 bits.
inline void multiply_chunk8(int64_t count, const Row8* rows, int64_t depth, const int8_t* panel, float* sums,
                            bool fetch) {
    constexpr int64_t kDistance = 2; // groups that prefetching is ahead
    const int64_t blocks = (count + kRows8 - 1) / kRows8;
    for (int64_t group = 0; group < groups(depth); ++group) {
        const int64_t pairs = std::min(kGroup, depth - group * kGroup) / 2;
        const char* next = (const char*)panel + kDistance * (kGroup + sizeof(float)) * kPanel;
        for (int64_t block = 0, at = 0; block < blocks; ++block) {
            const int64_t here = count / blocks + (block < count % blocks);
            float* to = sums + at * kPanel;
            // one pair of K takes two cache lines
            if (fetch && blocks == 1) multiply_some8<2>(here, rows, group, pairs, panel, to, next);
            else if (fetch && block < 2) multiply_some8<1>(here, rows + at, group, pairs, panel, to, next + block * pairs * 64);
            else multiply_some8<0>(here, rows + at, group, pairs, panel, to, next);
            at += here;
        }
        panel += pairs * 2 * kPanel + kPanel * sizeof(float);
    }
}

} // namespace emoe

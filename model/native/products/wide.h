// Rows of products with weights of 8 bits (gemm8.h, tiles8.h), and the order in which panels in groups are multiplied.
//
// Rows are rounded to 16 bits in groups of 128 steps of K, each with a float32 scale. Sums within a group of a panel are
// exact. The groups' sums are added in ascending order, so a row's result does not depend on the other rows of the call.
// The matrix unit (tiles8.h) computes the same sums.
#pragma once

#include "products/gemm.h"

#include <cmath>
#include <vector>

namespace emoe {

constexpr int64_t kGroup = 128; // steps of K with one scale of a row
constexpr int64_t kFine = 32;   // steps of K with one scale of weights in 4 bits

inline int64_t groups(int64_t depth) { return (depth + kGroup - 1) / kGroup; }
inline int64_t groups4(int64_t depth) { return (depth + kFine - 1) / kFine; }

// A row of numbers in 16 bits.
struct Row8 {
    const int16_t* values; // [depth], filled up with zeros to a multiple of kFine
    const float* scales;   // [groups]
    const char* tiles = nullptr; // the values taken apart for the matrix unit (tiles8.h), if they are
};

// Rows [rows, depth] of numbers in 16 bits, one after the other.
struct Rows8 {
    int64_t depth = 0, stride = 0;
    std::vector<int16_t> values;
    std::vector<float> scales;

    void resize(int64_t rows, int64_t size) {
        depth = size;
        stride = (size + kFine - 1) / kFine * kFine;
        if (int64_t(values.size()) < rows * stride) values.resize(rows * stride);
        if (int64_t(scales.size()) < rows * groups(depth)) scales.resize(rows * groups(depth));
    }
    Row8 at(int64_t row) const {
        return {values.data() + row * stride, scales.data() + row * groups(depth)};
    }

    // Rounds a row to 14 bits and a sign. So the sum of 128 products with 8-bit weights stays below 2^31, and the rounding
    // error stays below that of bfloat16.
    void set(int64_t row, const bf16* from) {
        constexpr float kMost = 16383.f;
        int16_t* to = values.data() + row * stride;
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
            for (int64_t k = first; k < end; k += 16) {
                const Lanes lanes = lanes_before(k, end);
                store_nearest(to + k, mul(load(from + k, lanes), all(factor)), lanes);
            }
        }
        std::fill(to + depth, to + stride, int16_t(0));
    }
};

// Adds a group's products to `sums` [R][64] if `more` is true; else they replace it. `total` is the sum of the products of
// all parts times their scales.
inline void add_group(float* to, Register total, float scale, bool more) {
    const Register scales = all_lanes(scale);
    store_sum(to, more ? times_plus(total, scales, load_sum(to)) : times(total, scales));
}

// Rows of the register tiles of multiply8. Weights are widened anew for each tile, so tiles have many rows and few columns.
constexpr int64_t kRows8 = kRegisters == 32 ? 8 : 4;

// Groups of a panel that one tile of rows after the other is multiplied with. They are 270 KB in 8 bits, which L2 holds.
constexpr int64_t kGroupsTogether = 32;

// Calls run(tile, number of tiles, first row, rows as a compile-time constant, first group, end of groups) for each tile of up to
// MOST rows, for some groups after the other. Tiles have about equal sizes.
template <int64_t MOST, class Run> void for_tiles(int64_t count, int64_t depth, Run run) {
    const int64_t tiles = (count + MOST - 1) / MOST;
    for (int64_t begin = 0; begin < groups(depth); begin += kGroupsTogether) {
        const int64_t end = std::min(groups(depth), begin + kGroupsTogether);
        for (int64_t tile = 0, at = 0; tile < tiles; ++tile) {
            const int64_t here = count / tiles + (tile < count % tiles);
            with_rows<MOST>(here, [&](auto rows) { run(tile, tiles, at, rows, begin, end); });
            at += here;
        }
    }
}

} // namespace emoe

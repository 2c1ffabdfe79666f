// Products of rows in 16 bits with weights of 8 or fewer bits: what gemm8.h and gemm4.h share.
//
// Rows are rounded to 16 bits in groups of 128 steps of K, each with a float32 scale. Sums within a group of a panel are
// exact. The groups' sums are added in ascending order, so a row's result does not depend on the other rows of the call.
// For many rows, a group is widened to 16 bits once, and all rows are multiplied with it: the sums are the same, since they
// are exact. The matrix unit (tiles8.h) computes the same sums too.
#pragma once

#include "products/gemm.h"

#include <cmath>
#include <vector>

namespace emoe {

constexpr int64_t kGroup = 128; // steps of K with one scale of a row
constexpr int64_t kFine = 32;   // steps of K with one scale of weights in 4 bits

inline int64_t groups(int64_t depth) { return (depth + kGroup - 1) / kGroup; }

// A row of numbers in 16 bits.
struct Row8 {
    const int16_t* values; // [depth], filled up with zeros to a multiple of kFine
    const float* scales;   // [groups]
    const int32_t* sums;   // [depth / kFine] of the values
    const char* bytes = nullptr; // the values taken apart for the matrix unit (tiles8.h), if they are
};

// Rows [rows, depth] of numbers in 16 bits, one after the other.
struct Rows8 {
    int64_t depth = 0, stride = 0;
    std::vector<int16_t> values;
    std::vector<float> scales;
    std::vector<int32_t> sums;

    void resize(int64_t rows, int64_t size) {
        depth = size;
        stride = (size + kFine - 1) / kFine * kFine;
        if (int64_t(values.size()) < rows * stride) values.resize(rows * stride);
        if (int64_t(scales.size()) < rows * groups(depth)) scales.resize(rows * groups(depth));
        if (int64_t(sums.size()) < rows * stride / kFine) sums.resize(rows * stride / kFine);
    }
    Row8 at(int64_t row) const {
        return {values.data() + row * stride, scales.data() + row * groups(depth), sums.data() + row * stride / kFine};
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
        for (int64_t g = 0; g < stride / kFine; ++g) {
            Integers total = no_integers();
            for (int64_t k = 0; k < kFine; k += 2 * kLanes)
                total = dot(total, load_integers(to + g * kFine + k), all_integers(0x10001));
            sums[row * (stride / kFine) + g] = sum(total);
        }
    }
};

// One group of a panel in 16 bits, with the scales of its parts.
struct Wide {
    alignas(64) int16_t values[kGroup / 2][kPanel][2]; // [pairs of K][columns]
    alignas(64) float scales[kGroup / kFine][kPanel];
    int64_t pairs, parts; // of K in the group; parts with scales of their own, all but the last of equal size
};

// Adds a group's products to `sums` [R][64] if `more` is true; else they replace it. `total` is the sum of the products of
// all parts times their scales.
inline void add_group(float* to, Register total, float scale, bool more) {
    const Register scales = all_lanes(scale);
    store_sum(to, more ? times_plus(total, scales, load_sum(to)) : times(total, scales));
}

// Multiplies R rows by a group in 16 bits.
template <int R> void multiply_wide(const Row8* rows, int64_t group, const Wide& wide, float* sums) {
    constexpr int C = kRegisters == 32 ? 2 : R <= 3 ? 2 : 1; // registers of columns: there are two sums for each
    const int32_t* a[R];
    for (int r = 0; r < R; ++r) a[r] = (const int32_t*)(rows[r].values + group * kGroup);
    const int64_t step = wide.parts == 1 ? wide.pairs : kFine / 2;
    for (int64_t first = 0; first < kPanel; first += C * kLanes) {
        Register total[R][C];
        for (int64_t part = 0; part < wide.parts; ++part) {
            Integers acc[R][C];
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < C; ++c) acc[r][c] = no_integers();
            for (int64_t k = part * step; k < (part + 1) * step; ++k) {
                Integers column[C];
                for (int c = 0; c < C; ++c) column[c] = load_integers(wide.values[k][first + c * kLanes]);
                for (int r = 0; r < R; ++r) {
                    const Integers pair = all_integers(a[r][k]);
                    for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], pair, column[c]);
                }
            }
            for (int c = 0; c < C; ++c) {
                const Register scale = load_sum(wide.scales[part] + first + c * kLanes);
                for (int r = 0; r < R; ++r) {
                    const Register sum = to_register(acc[r][c]);
                    total[r][c] = part == 0 ? times(sum, scale) : times_plus(sum, scale, total[r][c]);
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c)
                add_group(sums + r * kPanel + first + c * kLanes, total[r][c], rows[r].scales[group], group > 0);
    }
}

constexpr int64_t kRowsWide = kRegisters == 32 ? 6 : 3; // rows of the register tile of multiply_wide

inline void multiply_all_wide(int64_t count, const Row8* rows, int64_t group, const Wide& wide, float* sums) {
    const int64_t blocks = (count + kRowsWide - 1) / kRowsWide;
    for (int64_t block = 0, at = 0; block < blocks; ++block) {
        const int64_t here = count / blocks + (block < count % blocks);
        with_rows<kRowsWide>(here, [&](auto number) {
            multiply_wide<decltype(number)::value>(rows + at, group, wide, sums + at * kPanel);
        });
        at += here;
    }
}

} // namespace emoe

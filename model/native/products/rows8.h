// Rows of products with weights of 8 bits (gemm8.h, tiles8.h).
//
// Of 128 steps of K, each 32 have a factor from 1 to 8, and all a float32 scale. A number of a row is an integer from -127 to 127
// times factor times scale: nearly what a scale for each 32 would give. But the sums of 128 products with weights are whole: those
// of the integers, times the factors, stay below 2^24, so float32 and integers of any width hold them. So all instructions give the
// same bits: with AVX-512 those for bytes, with AVX2 those for 16 bits, and the matrix unit's. The groups' sums are added in
// ascending order, so a row's result does not depend on the other rows of the call.
#pragma once

#include "products/rows.h"

namespace emoe {

// 128 numbers of a row.
struct Group8 {
    static constexpr int64_t kSteps = kGroup;

#ifdef EMOE_BYTES
    int8_t values[kGroup]; // the integers
    int32_t less[kFines];  // -128 times the sums of the integers: weights are multiplied as bytes without a sign, plus 128
#else
    int16_t values[kGroup]; // the integers times their factors
#endif
    float scale, factors[kFines];

    // Rounds the numbers from step `first` on of a row of `depth` numbers.
    void set(const bf16* from, int64_t first, int64_t depth) {
        Floats parts[kGroup / 16];
        for (int64_t i = 0; i < kGroup / 16; ++i) {
            const Lanes lanes = lanes_before(first + 16 * i, depth);
            parts[i] = lanes ? load(from + first + 16 * i, lanes) : zero();
        }
        constexpr float kFactors = 8, kMost = 127 * kFactors;
        float sizes[kFines], most = 0;
        for (int64_t fine = 0; fine < kFines; ++fine) {
            sizes[fine] = largest_size(parts[2 * fine], parts[2 * fine + 1]);
            if (!(sizes[fine] <= most) && most == most) most = sizes[fine]; // what is not a number stays
        }
        // If a value is infinite or not a number, so is the scale, and the product shows it. Numbers whose reciprocals are too large
        // are taken as zeros.
        const bool usual = most > 1e-30f && most < INFINITY;
        scale = most / kMost;
        for (int64_t fine = 0; fine < kFines; ++fine) {
            const float factor = usual ? std::max(1.f, std::ceil(sizes[fine] / most * kFactors)) : 1.f;
            const Floats inverse = all(usual ? kMost / most / factor : 0.f);
            const Floats low = nearest(mul(parts[2 * fine], inverse)), high = nearest(mul(parts[2 * fine + 1], inverse));
            factors[fine] = factor;
#ifdef EMOE_BYTES
            store_bytes(values + fine * kFine, low);
            store_bytes(values + fine * kFine + 16, high);
            less[fine] = -128 * int32_t(sum(add(low, high)));
#else
            store_nearest(values + fine * kFine, mul(low, all(factor)));
            store_nearest(values + fine * kFine + 16, mul(high, all(factor)));
#endif
        }
    }
};

using Row8 = RoundedRow<Group8>;
using Rows8 = RoundedRows<Group8>;

// Rows of the register tiles of multiply8. Weights are widened anew for each tile, so tiles have many rows and few columns.
constexpr int64_t kRows8 = kRegisters == 32 ? 8 : 4;

} // namespace emoe

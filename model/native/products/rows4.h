// Rows of products with weights of 4 bits: what gemm4.h and tiles4.h share.
//
// Rows are rounded to 8 bits in groups of 32 steps of K, each with a float32 scale, which are the groups of the weights too. That
// is a root mean square error of some 0.5 %, where rounding weights to 4 bits costs some 8 %. The sums of a group are exact, and
// the groups' sums are added in ascending order, so a row's result does not depend on the other rows of the call.
//
// Of 8 steps of K, a row has the steps 0, 4, 1, 5, and then 2, 6, 3, 7: this is how a word of codes (gemm4.h) falls apart into the
// lower and the upper halves of its bytes. One instruction multiplies four steps.
#pragma once

#include "products/rows.h"

namespace emoe {

// 32 numbers of a row in 8 bits, their scale and their sum without it.
struct Group4 {
    static constexpr int64_t kSteps = kFine;

    int8_t values[kFine];
    float scale, sum;

    // Rounds the numbers from step `first` on of a row of `depth` numbers.
    void set(const bf16* from, int64_t first, int64_t depth) {
        constexpr float kMost = 127.f;
        const Floats low = load(from + first, lanes_before(first, depth));
        const Lanes rest = lanes_before(first + 16, depth);
        const Floats high = rest ? load(from + first + 16, rest) : zero();
        // If a value is infinite or not a number, so is the scale, and the product shows it. Numbers whose reciprocals are too
        // large are taken as zeros.
        const float most = largest_size(low, high), factor = most > 1e-30f && most < INFINITY ? kMost / most : 0.f;
        scale = most / kMost;
        const Floats whole_low = nearest(mul(low, all(factor))), whole_high = nearest(mul(high, all(factor)));
        sum = emoe::sum(add(whole_low, whole_high));
        store_eights(values, whole_low);
        store_eights(values + 16, whole_high);
    }
};

using Row4 = RoundedRow<Group4>;
using Rows4 = RoundedRows<Group4>;

} // namespace emoe

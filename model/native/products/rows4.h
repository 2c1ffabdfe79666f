// Rows of products with weights of 4 bits: what gemm4.h and tiles4.h share.
//
// Rows are rounded to 8 bits in groups of 32 steps of K, each with a float32 scale, which are the groups of the weights too. That
// is a root mean square error of some 0.5 %, where rounding weights to 4 bits costs some 8 %. The sums of a group are exact, and
// the groups' sums are added in ascending order, so a row's result does not depend on the other rows of the call.
//
// Of 8 steps of K, a row has the steps 0, 4, 1, 5, and then 2, 6, 3, 7: this is how a word of codes (gemm4.h) falls apart into the
// lower and the upper halves of its bytes. One instruction multiplies four steps.
#pragma once

#include "products/rows8.h"

namespace emoe {

// 32 numbers of a row in 8 bits, their scale and their sum without it.
struct Group4 {
    int8_t values[kFine];
    float scale, sum;

    int32_t four(int64_t i) const { // of the values, from 4 i on
        int32_t some;
        std::memcpy(&some, values + 4 * i, sizeof some);
        return some;
    }
};

// A row.
struct Row4 {
    const Group4* groups;        // [groups4], the last one filled up with zeros
    const char* tiles = nullptr; // the values as the matrix unit takes them (tiles4.h), if it shall
};

// Rows [rows, depth], one after the other.
struct Rows4 {
    int64_t depth = 0;
    std::vector<Group4> groups;

    void resize(int64_t rows, int64_t size) {
        depth = size;
        if (int64_t(groups.size()) < rows * groups4(depth)) groups.resize(rows * groups4(depth));
    }
    Row4 at(int64_t row) const { return {groups.data() + row * groups4(depth)}; }
    void set(int64_t row, const bf16* from) {
        constexpr float kMost = 127.f;
        Group4* to = groups.data() + row * groups4(depth);
        for (int64_t first = 0; first < depth; first += kFine, ++to) {
            const Floats low = load(from + first, lanes_before(first, depth));
            const Lanes rest = lanes_before(first + 16, depth);
            const Floats high = rest ? load(from + first + 16, rest) : zero();
            // If a value is infinite or not a number, so is the scale, and the product shows it. Numbers whose reciprocals are too
            // large are taken as zeros.
            const float most = largest_size(low, high), factor = most > 1e-30f && most < INFINITY ? kMost / most : 0.f;
            to->scale = most / kMost;
            const Floats whole_low = nearest(mul(low, all(factor))), whole_high = nearest(mul(high, all(factor)));
            to->sum = sum(add(whole_low, whole_high));
            store_eights(to->values, whole_low);
            store_eights(to->values + 16, whole_high);
        }
    }
};

// Adds a group's products, which are `sum` times `scale`, to `to` if `more` is true; else they replace it.
inline void add_products(float* to, Register sum, Register scale, bool more) {
    store_sum(to, more ? times_plus(sum, scale, load_sum(to)) : times(sum, scale));
}

} // namespace emoe

// Rows of products with weights of 8 bits (gemm8.h, tiles8.h), and the order in which panels in groups are multiplied.
//
// Of 128 steps of K, each 32 have a factor from 1 to 8, and all a float32 scale. A number of a row is an integer from -127 to 127
// times factor times scale: nearly what a scale for each 32 would give. But the sums of 128 products with weights are whole: those
// of the integers, times the factors, stay below 2^24, so float32 and integers of any width hold them. So all instructions give the
// same bits: with AVX-512 those for bytes, with AVX2 those for 16 bits, and the matrix unit's. The groups' sums are added in
// ascending order, so a row's result does not depend on the other rows of the call.
#pragma once

#include "products/gemm.h"

#include <cmath>
#include <vector>

namespace emoe {

constexpr int64_t kGroup = 128; // steps of K with one scale of a row
constexpr int64_t kFine = 32;   // steps of K with one scale of weights in 4 bits

constexpr int64_t kFines = kGroup / kFine;
inline int64_t groups(int64_t depth) { return (depth + kGroup - 1) / kGroup; }
inline int64_t groups4(int64_t depth) { return (depth + kFine - 1) / kFine; }

// 128 numbers of a row.
struct Group8 {
#ifdef EMOE_BYTES
    int8_t values[kGroup]; // the integers
    int32_t less[kFines];  // -128 times the sums of the integers: weights are multiplied as bytes without a sign, plus 128
#else
    int16_t values[kGroup]; // the integers times their factors
#endif
    float scale, factors[kFines];
};

// A row.
struct Row8 {
    const Group8* groups;        // the last one is filled up with zeros
    const char* tiles = nullptr; // the values taken apart for the matrix unit (tiles8.h), if they are
};

// Rows [rows, depth], one after the other.
struct Rows8 {
    int64_t depth = 0;
    std::vector<Group8> numbers;

    void resize(int64_t rows, int64_t size) {
        depth = size;
        if (int64_t(numbers.size()) < rows * groups(depth)) numbers.resize(rows * groups(depth));
    }
    Row8 at(int64_t row) const { return {numbers.data() + row * groups(depth)}; }

    void set(int64_t row, const bf16* from) {
        Group8* to = numbers.data() + row * groups(depth);
        for (int64_t first = 0; first < depth; first += kGroup, ++to) {
            Floats parts[kGroup / 16];
            for (int64_t i = 0; i < kGroup / 16; ++i) {
                const Lanes lanes = lanes_before(first + 16 * i, depth);
                parts[i] = lanes ? load(from + first + 16 * i, lanes) : zero();
            }
            round(parts, *to);
        }
    }

  private:
    static void round(const Floats* parts, Group8& to) {
        constexpr float kFactors = 8, kMost = 127 * kFactors;
        float sizes[kFines], most = 0;
        for (int64_t fine = 0; fine < kFines; ++fine) {
            sizes[fine] = largest_size(parts[2 * fine], parts[2 * fine + 1]);
            if (!(sizes[fine] <= most) && most == most) most = sizes[fine]; // what is not a number stays
        }
        // If a value is infinite or not a number, so is the scale, and the product shows it. Numbers whose reciprocals are too large
        // are taken as zeros.
        const bool usual = most > 1e-30f && most < INFINITY;
        to.scale = most / kMost;
        for (int64_t fine = 0; fine < kFines; ++fine) {
            const float factor = usual ? std::max(1.f, std::ceil(sizes[fine] / most * kFactors)) : 1.f;
            const Floats inverse = all(usual ? kMost / most / factor : 0.f);
            const Floats low = nearest(mul(parts[2 * fine], inverse)), high = nearest(mul(parts[2 * fine + 1], inverse));
            to.factors[fine] = factor;
#ifdef EMOE_BYTES
            store_bytes(to.values + fine * kFine, low);
            store_bytes(to.values + fine * kFine + 16, high);
            to.less[fine] = -128 * int32_t(sum(add(low, high)));
#else
            store_nearest(to.values + fine * kFine, mul(low, all(factor)));
            store_nearest(to.values + fine * kFine + 16, mul(high, all(factor)));
#endif
        }
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

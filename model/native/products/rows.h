// Rows that are rounded for products with weights of 8 bits (rows8.h) and of 4 bits (rows4.h): what both share, and the order in
// which panels in groups are multiplied.
#pragma once

#include "products/gemm.h"

#include <cmath>
#include <vector>

namespace emoe {

constexpr int64_t kGroup = 128; // steps of K with one scale of weights in 8 bits
constexpr int64_t kFine = 32;   // steps of K with one scale of weights in 4 bits

constexpr int64_t kFines = kGroup / kFine;
inline int64_t groups(int64_t depth) { return (depth + kGroup - 1) / kGroup; }
inline int64_t groups4(int64_t depth) { return (depth + kFine - 1) / kFine; }

inline int32_t four_bytes(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return four;
}

// A row. A `Group` has kSteps of its numbers.
template <class Group> struct RoundedRow {
    const Group* groups;         // the last one is filled up with zeros
    const char* tiles = nullptr; // the numbers as the matrix unit takes them (tiles8.h, tiles4.h), if it shall
};

// Rows [rows, depth], one after the other.
template <class Group> struct RoundedRows {
    int64_t depth = 0, each = 0; // groups of a row
    std::vector<Group> groups;

    void resize(int64_t rows, int64_t size) {
        depth = size;
        each = (depth + Group::kSteps - 1) / Group::kSteps;
        if (int64_t(groups.size()) < rows * each) groups.resize(rows * each);
    }
    RoundedRow<Group> at(int64_t row) const { return {groups.data() + row * each}; }
    void set(int64_t row, const bf16* from) {
        for (int64_t g = 0; g < each; ++g) groups[row * each + g].set(from, g * Group::kSteps, depth);
    }
};

// Adds a group's products, which are `sum` times `scale`, to `to` if `more` is true; else they replace it.
inline void add_products(float* to, Register sum, Register scale, bool more) {
    store_sum(to, more ? times_plus(sum, scale, load_sum(to)) : times(sum, scale));
}

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

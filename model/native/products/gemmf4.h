// Products of bfloat16 rows with a matrix of 4-bit floats (E2M1) with scales in E4M3, as NVFP4 has them.
//
// A weight is a code times the scale of its 16 steps of K, both of one column, times a float32 scale of the column. Code times scale
// has 6 bits, so it becomes bfloat16 (widened.h), which loses nothing. The sums are multiplied by the columns' scales. K is a
// multiple of 16.
//
// A matrix [N, K] is stored in panels of 64 columns. A panel has the columns' scales [64], and then blocks of 128 steps of K; the
// last one may have fewer. A block has, in words of 32 bits,
//     the codes   [steps / 8][64]: 8 steps of one column. Step 2i is in bits 4i, step 2i+1 in bits 16+4i
//     the scales  [steps / 64, rounded up][64]: the bytes of four groups of one column
#pragma once

#include "products/e4m3.h"
#include "products/widened.h"

namespace emoe {

constexpr int64_t kFloats4Group = 16; // steps of K with one scale

// Words of a block for each column.
constexpr int64_t words_of_codes(int64_t steps) { return steps / 8; }
constexpr int64_t words_of_block(int64_t steps) { return words_of_codes(steps) + (steps + 63) / 64; }
inline int64_t panel_bytes_f4(int64_t depth) {
    const int64_t words = depth / kGroup * words_of_block(kGroup) + words_of_block(depth % kGroup);
    return (words + 1) * kPanel * int64_t(sizeof(uint32_t));
}

struct Floats4Panel {
    const uint32_t* at;
    const float* columns;

    explicit Floats4Panel(const char* panel) : at((const uint32_t*)panel + kPanel), columns((const float*)panel) {}

    template <class To> void visit(int64_t pairs, bool fetch, To to) {
        constexpr int64_t kGroupWords = words_of_codes(kFloats4Group);
        const uint32_t* scales = at + words_of_codes(2 * pairs) * kPanel;
        const char* next = (const char*)(at + 2 * words_of_block(kGroup) * kPanel);
        for (int64_t word = 0; word * 4 < pairs;) {
            const int64_t group = word / kGroupWords;
            Register scale[kWidenedColumns];
            for (int c = 0; c < kWidenedColumns; ++c)
                scale[c] = e4m3_of_words(scales + group / 4 * kPanel + c * kLanes, int(group % 4));
            if (fetch) // a block takes 72 lines
                for (int64_t line = 9 * group; line < 9 * group + 9; ++line) _mm_prefetch(next + line * 64, _MM_HINT_T0);
            for (const int64_t end = word + kGroupWords; word < end; ++word)
                for (int c = 0; c < kWidenedColumns; ++c) {
                    const Integers codes = load_integers(at + word * kPanel + c * kLanes);
#pragma GCC unroll 4
                    for (int pair = 0; pair < 4; ++pair)
                        to(word * 4 + pair, c,
                           paired(times(e2m1(shifted(codes, 4 * pair)), scale[c]), times(e2m1(shifted(codes, 16 + 4 * pair)), scale[c])));
                }
        }
        at = scales + (pairs + 31) / 32 * kPanel;
    }
    Register scale(int64_t column) const { return times(load_sum(columns + column), all_lanes(kE4m3Scale)); }
};

} // namespace emoe

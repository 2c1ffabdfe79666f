// Products of rows with a matrix of 4-bit codes.
//
// A weight is (value of its code - zero point) x scale. Scale and zero point are those of 32 steps of K of one column. The
// value of a code is the code itself, or what a table says (E2M1). Rows are in 8 bits (rows4.h).
//
// A matrix [N, K] is stored in panels of 64 columns, and a panel in blocks of 128 steps of K, which are 4 groups of 32; the
// last block may have fewer groups, and the last group is filled up. A block has
//     the codes    [groups][4][64]: 8 steps of K of one column in 32 bits. Step 2i is in bits 4i, step 2i+1 in bits 16+4i
//     the scales   [groups][64] in bfloat16 or in float16
//     zero points  [groups][16] unless there is a table: bits 4c of number i are those of column 16c + i; filled up to a
//                  multiple of 64 bytes
#pragma once

#include "products/tiles4.h"

namespace emoe {

constexpr int64_t kCodes = kFine * kPanel / 2;                  // bytes of a group's codes
constexpr int64_t kScales = kPanel * sizeof(uint16_t);          // bytes of a group's scales
constexpr int64_t kZeros = 16 * sizeof(uint16_t);               // bytes of a group's zero points
constexpr int8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24,   // twice the values of E2M1, plus kE2m1Zero
                              12, 11, 10, 9,  8,  6,  4,  0};
constexpr int kE2m1Zero = 12;

constexpr int64_t block_bytes4(int64_t groups, bool table) {
    return groups * (kCodes + kScales) + (table ? 0 : (groups * kZeros + 63) / 64 * 64);
}
inline int64_t panel_bytes4(int64_t depth, bool table) {
    const int64_t whole = groups4(depth) / kFines, rest = groups4(depth) % kFines;
    return whole * block_bytes4(kFines, table) + block_bytes4(rest, table);
}

// A block of a panel.
template <bool TABLE, bool HALF> struct Block4 {
    const char* codes;
    const uint16_t *scales, *zeros;

    Block4(const char* from, int64_t groups)
        : codes(from), scales((const uint16_t*)(from + groups * kCodes)),
          zeros((const uint16_t*)(from + groups * (kCodes + kScales))) {}

    Register scale(int64_t group, int64_t column) const {
        const uint16_t* from = scales + group * kPanel + column;
        return HALF ? load_f16(from) : load_bf16(from);
    }
    Integers zero(int64_t group, int64_t column) const { // in 32 bits
        if (TABLE) return all_integers(kE2m1Zero);
        return four_bits(load_words(zeros + group * 16 + column % 16), 4 * (column / 16));
    }
};

// The values of a register of words of codes, which a table has if TABLE: of the lower and of the upper halves of their bytes.
template <bool TABLE> void values_of_codes(const char* from, Integers table, Integers& low, Integers& high) {
    const Integers codes = load_integers(from);
    low = low_halves(codes);
    high = high_halves(codes);
    if (TABLE) low = at(table, low), high = at(table, high);
}

// Rows of a register tile, and its registers of columns. With 32 registers, 5 x 4 accumulators leave room for 8 registers of the
// panel and 1 of a row.
constexpr int64_t kRows4 = kRegisters == 32 ? 5 : 4;
template <int R> constexpr int kColumns4 = R == 1 || kRegisters == 32 ? 4 : 2;

// Multiplies R rows by a block of `groups` groups, as it lies in a panel. If `fetch`, prefetches from `ahead` on.
template <int R, class Block, bool TABLE>
void multiply4(const Row4* rows, int64_t number, int64_t groups, const Block& block, float* sums, bool fetch,
               const char* ahead) {
    constexpr int C = kColumns4<R>, kWords = kFine / 8;
    // ByteSums hold so many words of products; those of codes up to 15 are smaller than those of the table
    constexpr int kTogether = kSmallByteSums && TABLE ? kWords / 2 : kWords;
    const Integers table = load_table(kE2m1);
    const Group4* a[R];
    for (int r = 0; r < R; ++r) a[r] = rows[r].groups + number * kFines;
    for (int64_t first = 0; first < kPanel; first += C * kLanes)
        for (int64_t group = 0; group < groups; ++group) {
            IntegerSums found[R][C];
            const char* from = block.codes + group * kCodes + first * 4;
            for (int begin = 0; begin < kWords; begin += kTogether) {
                ByteSums acc[R][C];
                for (int r = 0; r < R; ++r)
                    for (int c = 0; c < C; ++c) acc[r][c] = no_bytes();
#pragma GCC unroll 4
                for (int word = begin; word < begin + kTogether; ++word, from += kPanel * 4) {
                    if (fetch && first == 0) // a block takes 74 lines, which is less than 5 for each of these rounds
                        for (int line = 0; line < 5; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T0);
                    Integers low[C], high[C];
                    for (int c = 0; c < C; ++c) values_of_codes<TABLE>(from + c * kLanes * 4, table, low[c], high[c]);
                    for (int r = 0; r < R; ++r) {
                        const Integers four = all_integers(four_bytes(a[r][group].values + 8 * word));
                        for (int c = 0; c < C; ++c) acc[r][c] = dot_bytes(acc[r][c], low[c], four);
                    }
                    for (int r = 0; r < R; ++r) {
                        const Integers four = all_integers(four_bytes(a[r][group].values + 8 * word + 4));
                        for (int c = 0; c < C; ++c) acc[r][c] = dot_bytes(acc[r][c], high[c], four);
                    }
                }
                for (int r = 0; r < R; ++r)
                    for (int c = 0; c < C; ++c) {
                        const IntegerSums some = to_integers(acc[r][c]);
                        found[r][c] = begin == 0 ? some : plus(found[r][c], some);
                    }
            }
            // The sums of codes are integers below 2^24, as are those of rows times zero points, so nothing is rounded before
            // the scales.
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                const Register scale = block.scale(group, first + c * kLanes);
                const Register zero = to_register(block.zero(group, first + c * kLanes));
                float* to = sums + first + c * kLanes;
                for (int r = 0; r < R; ++r, to += kPanel) {
                    const Register sum = less_product(to_register(found[r][c]), zero, all_lanes(a[r][group].sum));
                    add_products(to, sum, times(scale, all_lanes(a[r][group].scale)), number + group > 0);
                }
            }
        }
}

#ifdef EMOE_TILES

// Brings a block into the form that the matrix unit takes: values less zero points.
template <class Block, bool TABLE> void widen_bytes4(const Block& block, int64_t groups, WideBytes4& wide) {
    const Integers table = load_table(kE2m1);
    wide.groups = groups;
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t c = 0; c < kPanel; c += 16) {
            store_sum(wide.scales[group] + c, block.scale(group, c));
            const Integers zero = _mm512_shuffle_epi8(block.zero(group, c), _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
            for (int64_t word = 0; word < kFine / 8; ++word) {
                Integers low, high;
                values_of_codes<TABLE>(block.codes + group * kCodes + (word * kPanel + c) * 4, table, low, high);
                store_integers(wide.values[group][2 * word][c], _mm512_sub_epi8(low, zero));
                store_integers(wide.values[group][2 * word + 1][c], _mm512_sub_epi8(high, zero));
            }
        }
}

template <bool TABLE, bool HALF>
void multiply_chunk4_tiles(int64_t count, const Row4* rows, int64_t depth, const char* panel, float* sums, bool fetch) {
    using Block = Block4<TABLE, HALF>;
    WideBytes4 wide;
    TileSizes::apart(kFine).load();
    for (int64_t number = 0; number < groups(depth); ++number) {
        const int64_t fines = std::min(kFines, groups4(depth) - number * kFines);
        const Block block(panel, fines);
        panel += block_bytes4(fines, TABLE);
        const char* next = panel + block_bytes4(kFines, TABLE); // the block after the next
        widen_bytes4<Block, TABLE>(block, fines, wide);
        multiply_all_bytes4(count, rows, number, wide, next, fetch ? block_bytes4(kFines, TABLE) / 64 : 0, sums);
    }
    _tile_release();
}

#endif

// Does what multiply_chunk does, for a panel in 4 bits.
template <bool TABLE, bool HALF>
void multiply_chunk4(int64_t count, const Row4* rows, int64_t depth, const char* panel, float* sums, bool fetch) {
    using Block = Block4<TABLE, HALF>;
#ifdef EMOE_TILES
    if (rows[0].tiles != nullptr) return multiply_chunk4_tiles<TABLE, HALF>(count, rows, depth, panel, sums, fetch);
#endif
    constexpr int64_t kBytes = block_bytes4(kFines, TABLE);
    for_tiles<kRows4>(count, depth, [&](int64_t tile, int64_t tiles, int64_t at, auto number, int64_t begin, int64_t end) {
        const int64_t ahead = (tiles == 1 ? 2 : end - begin) * kBytes;
        for (int64_t block = begin; block < end; ++block) {
            const int64_t fines = std::min(kFines, groups4(depth) - block * kFines);
            const char* from = panel + block * kBytes;
            multiply4<decltype(number)::value, Block, TABLE>(rows + at, block, fines, Block(from, fines), sums + at * kPanel,
                                                             fetch && tile == 0, from + ahead);
        }
    });
}

} // namespace emoe

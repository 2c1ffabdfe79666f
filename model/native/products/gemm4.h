// Products of rows with a matrix of 4-bit codes.
//
// A weight is (value of its code - zero point) x scale. Scale and zero point are those of 32 steps of K of one column. The
// value of a code is the code itself, or what a table says (E2M1). Rows are in 16 bits, as in gemm8.h.
//
// A matrix [N, K] is stored in panels of 64 columns, and a panel in blocks of 128 steps of K, which are 4 groups of 32; the
// last block may have fewer groups, and the last group is filled up. A block has
//     the codes    [groups][4][64]: 8 steps of K of one column in 32 bits. Step 2i is in bits 4i, step 2i+1 in bits 16+4i
//     the scales   [groups][64] in bfloat16 or in float16
//     zero points  [groups][16] unless there is a table: bits 4c of number i are those of column 16c + i; filled up to a
//                  multiple of 64 bytes
#pragma once

#include "products/gemm8.h"
#include "products/tiles4.h"

namespace emoe {

constexpr int64_t kCodes = kFine * kPanel / 2;                  // bytes of a group's codes
constexpr int64_t kScales = kPanel * sizeof(uint16_t);          // bytes of a group's scales
constexpr int64_t kZeros = 16 * sizeof(uint16_t);               // bytes of a group's zero points
constexpr int64_t kFines = kGroup / kFine;                      // groups of a block
constexpr int8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24,   // twice the values of E2M1, plus kE2m1Zero
                              12, 11, 10, 9,  8,  6,  4,  0};
constexpr int kE2m1Zero = 12;

inline int64_t groups4(int64_t depth) { return (depth + kFine - 1) / kFine; }
inline int64_t block_bytes4(int64_t groups, bool table) {
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
        const Integers words = load_words(zeros + group * 16 + column % 16);
        return four_bits(shifted_right(words, 4 * (column / 16)), 0);
    }
};

// The values of step 2i and 2i + 1 of the columns whose words of 8 steps are given.
template <bool TABLE> inline Integers values4(Integers words, int i, Integers table) {
    const Integers codes = four_bits(words, 4 * i);
    return TABLE ? at(table, codes) : codes;
}

// Multiplies R rows by a block of `groups` groups, as it lies in a panel. If `fetch`, prefetches from `ahead` on.
template <int R, class Block, bool TABLE>
void multiply4(const Row8* rows, int64_t number, int64_t groups, const Block& block, float* sums, bool fetch,
               const char* ahead) {
    constexpr int C = kRegisters == 32 || R == 1 ? 4 : 2;
    const Integers table = load_table(kE2m1);
    const int32_t* a[R];
    for (int r = 0; r < R; ++r) a[r] = (const int32_t*)(rows[r].values + number * kGroup);
    for (int64_t first = 0; first < kPanel; first += C * kLanes) {
        Register total[R][C];
        for (int64_t group = 0; group < groups; ++group) {
            Integers acc[R][C];
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < C; ++c) acc[r][c] = no_integers();
            const char* from = block.codes + group * kCodes + first * 4;
            for (int64_t eight = 0; eight < kFine / 8; ++eight, from += kPanel * 4) {
                if (fetch && first == 0) // a block takes 74 lines, which is less than 5 for each of these rounds
                    for (int line = 0; line < 5; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T0);
                for (int i = 0; i < 4; ++i) {
                    Integers column[C];
                    for (int c = 0; c < C; ++c) column[c] = values4<TABLE>(load_integers(from + c * kLanes * 4), i, table);
                    for (int r = 0; r < R; ++r) {
                        const Integers pair = all_integers(a[r][group * kFine / 2 + eight * 4 + i]);
                        for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], pair, column[c]);
                    }
                }
            }
            for (int c = 0; c < C; ++c) {
                const Register scale = block.scale(group, first + c * kLanes);
                const Integers zero = block.zero(group, first + c * kLanes);
                for (int r = 0; r < R; ++r) {
                    const Integers shift = all_integers(rows[r].sums[number * kFines + group]);
                    const Register sum = to_register(less_product(acc[r][c], zero, shift));
                    total[r][c] = group == 0 ? times(sum, scale) : times_plus(sum, scale, total[r][c]);
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c)
                add_group(sums + r * kPanel + first + c * kLanes, total[r][c], rows[r].scales[number], number > 0);
    }
}

template <class Block, bool TABLE> void widen4(const Block& block, int64_t groups, Wide& wide) {
    const Integers table = load_table(kE2m1);
    wide.pairs = groups * kFine / 2;
    wide.parts = groups;
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t c = 0; c < kPanel; c += kLanes) {
            store_sum(wide.scales[group] + c, block.scale(group, c));
            const Integers zero = twice16(block.zero(group, c));
            for (int64_t eight = 0; eight < kFine / 8; ++eight) {
                const Integers words = load_integers(block.codes + group * kCodes + (eight * kPanel + c) * 4);
                for (int i = 0; i < 4; ++i)
                    store_integers(wide.values[group * kFine / 2 + eight * 4 + i][c],
                                   minus16(values4<TABLE>(words, i, table), zero));
            }
        }
}

#ifdef EMOE_TILES

// As widen4, for the matrix unit. Values of codes are looked up: all that a code less a zero point can be, or those of E2M1.
template <class Block, bool TABLE> void widen_floats4(const Block& block, int64_t groups, __m512i table, WideFloats& wide) {
    wide.parts = groups;
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t c = 0; c < kPanel; c += 16) {
            store_sum(wide.scales[group] + c, block.scale(group, c));
            const __m512i nibble = _mm512_set1_epi8(15), zero = twice16(block.zero(group, c));
            const __m512i shift = _mm512_sub_epi8(nibble, _mm512_or_si512(zero, _mm512_slli_epi16(zero, 8)));
            for (int64_t eight = 0; eight < kFine / 8; ++eight) {
                const __m512i words = load_integers(block.codes + group * kCodes + (eight * kPanel + c) * 4);
                // codes 0 and 2 of 16 bits, and 1 and 3; the table looks at the lowest 5 bits only
                __m512i even = _mm512_and_si512(words, nibble), odd = _mm512_and_si512(_mm512_srli_epi16(words, 4), nibble);
                if (!TABLE) even = _mm512_add_epi8(even, shift), odd = _mm512_add_epi8(odd, shift);
                const auto to = [&](int i) { return wide.values[group * kFine / 2 + eight * 4 + i][c]; };
                store_integers(to(0), _mm512_permutexvar_epi16(even, table));
                store_integers(to(1), _mm512_permutexvar_epi16(odd, table));
                store_integers(to(2), _mm512_permutexvar_epi16(_mm512_srli_epi16(even, 8), table));
                store_integers(to(3), _mm512_permutexvar_epi16(_mm512_srli_epi16(odd, 8), table));
            }
        }
}

template <bool TABLE> __m512i values_of_codes() {
    alignas(64) float known[32];
    for (int i = 0; i < 32; ++i) known[i] = TABLE ? float(kE2m1[i % 16] - kE2m1Zero) : float(i - 15);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(known + 16), _mm512_load_ps(known));
}

template <bool TABLE, bool HALF>
void multiply_chunk4_tiles(int64_t count, const Row8* rows, int64_t depth, const char* panel, float* sums, bool fetch) {
    using Block = Block4<TABLE, HALF>;
    const __m512i table = values_of_codes<TABLE>();
    WideFloats wide;
    TileSizes::apart().load();
    for (int64_t number = 0; number < groups(depth); ++number) {
        const int64_t fines = std::min(kFines, groups4(depth) - number * kFines);
        const Block block(panel, fines);
        panel += block_bytes4(fines, TABLE);
        const char* next = panel + block_bytes4(kFines, TABLE); // the block after the next
        widen_floats4<Block, TABLE>(block, fines, table, wide);
        const int64_t fetched = fetch ? block_bytes4(kFines, TABLE) / 64 : 0;
        if (number == 0) multiply_all_floats<true>(count, rows, number, wide, next, fetched, sums);
        else multiply_all_floats<false>(count, rows, number, wide, next, fetched, sums);
    }
    _tile_release();
}

#endif

constexpr int64_t kRows4 = 3;    // rows of the register tile of multiply4
constexpr int64_t kFewRows4 = 6; // up to which a block is not widened in memory

// Does what multiply_chunk does, for a panel in 4 bits.
template <bool TABLE, bool HALF>
void multiply_chunk4(int64_t count, const Row8* rows, int64_t depth, const char* panel, float* sums, bool fetch) {
    using Block = Block4<TABLE, HALF>;
#ifdef EMOE_TILES
    if (rows[0].bytes != nullptr) return multiply_chunk4_tiles<TABLE, HALF>(count, rows, depth, panel, sums, fetch);
#endif
    Wide wide;
    for (int64_t number = 0; number < groups(depth); ++number) {
        const int64_t fines = std::min(kFines, groups4(depth) - number * kFines);
        const Block block(panel, fines);
        panel += block_bytes4(fines, TABLE);
        const char* next = panel + block_bytes4(kFines, TABLE); // the block after the next
        if (count > kFewRows4) {
            if (fetch)
                for (int64_t line = 0; line < block_bytes4(kFines, TABLE); line += 64) _mm_prefetch(next + line, _MM_HINT_T1);
            widen4<Block, TABLE>(block, fines, wide);
            multiply_all_wide(count, rows, number, wide, sums);
            continue;
        }
        const int64_t blocks = (count + kRows4 - 1) / kRows4;
        for (int64_t part = 0, at = 0; part < blocks; ++part) {
            const int64_t here = count / blocks + (part < count % blocks);
            with_rows<kRows4>(here, [&](auto size) {
                multiply4<decltype(size)::value, Block, TABLE>(rows + at, number, fines, block, sums + at * kPanel,
                                                               fetch && part == 0, next);
            });
            at += here;
        }
    }
}

} // namespace emoe

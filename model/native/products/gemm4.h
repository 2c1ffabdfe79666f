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
        const Integers words = load_words(zeros + group * 16 + column % 16);
        return four_bits(shifted_right(words, 4 * (column / 16)), 0);
    }
};

// The values of step 2i and 2i + 1 of the columns whose words of 8 steps are given.
template <bool TABLE> inline Integers values4(Integers words, int i, Integers table) {
    const Integers codes = four_bits(words, 4 * i);
    return TABLE ? at(table, codes) : codes;
}

// Registers of columns in a tile of R rows.
template <int R> constexpr int kColumns4 = R > 3 || (R > 1 && kRegisters < 32) ? 2 : 4;

// Multiplies R rows by a block of `groups` groups, as it lies in a panel. If `fetch`, prefetches from `ahead` on.
template <int R, class Block, bool TABLE>
void multiply4(const Row8* rows, int64_t number, int64_t groups, const Block& block, float* sums, bool fetch,
               const char* ahead) {
    constexpr int C = kColumns4<R>;
    // With few rows it takes fewer instructions to take zero points off the sums, and with many off the codes. Sums of the codes
    // too are integers below 2^24, as are those of the rows times zero points: float32 holds all of them, and nothing is rounded.
    constexpr bool kLate = R <= 3;
    const Integers table = load_table(kE2m1);
    const int32_t* a[R];
    for (int r = 0; r < R; ++r) a[r] = (const int32_t*)(rows[r].values + number * kGroup);
    for (int64_t first = 0; first < kPanel; first += C * kLanes) {
        Register total[R][C];
        for (int64_t group = 0; group < groups; ++group) {
            IntegerSums acc[R][C];
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < C; ++c) acc[r][c] = no_integers();
            Integers zeros[C];
            for (int c = 0; c < C; ++c) zeros[c] = twice16(block.zero(group, first + c * kLanes));
            const char* from = block.codes + group * kCodes + first * 4;
            for (int64_t eight = 0; eight < kFine / 8; ++eight, from += kPanel * 4) {
                if (fetch && first == 0) // a block takes 74 lines, which is less than 5 for each of these rounds
                    for (int line = 0; line < 5; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T0);
                for (int i = 0; i < 4; ++i) {
                    Integers column[C];
                    for (int c = 0; c < C; ++c) {
                        column[c] = values4<TABLE>(load_integers(from + c * kLanes * 4), i, table);
                        if (!kLate) column[c] = minus16(column[c], zeros[c]);
                    }
                    for (int r = 0; r < R; ++r) {
                        const Integers pair = all_integers(a[r][group * kFine / 2 + eight * 4 + i]);
                        for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], pair, column[c]);
                    }
                }
            }
            for (int c = 0; c < C; ++c) {
                const Register scale = block.scale(group, first + c * kLanes);
                const Register zero = to_register(block.zero(group, first + c * kLanes));
                for (int r = 0; r < R; ++r) {
                    Register sum = to_register(acc[r][c]);
                    if (kLate) sum = less_product(sum, zero, all_lanes(float(rows[r].sums[number * kFines + group])));
                    total[r][c] = group == 0 ? times(sum, scale) : times_plus(sum, scale, total[r][c]);
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c)
                add_group(sums + r * kPanel + first + c * kLanes, total[r][c], rows[r].scales[number], number > 0);
    }
}

// Rows up to which a block is not widened in memory. With AVX2, a tile has so few rows that it pays to widen once for many of
// them. With AVX-512 that was measured to be slower for up to 64 rows, and no faster for more.
constexpr int64_t kFewRows4 = kRegisters == 32 ? kChunk : 6;
constexpr int64_t kRowsWide = 4; // rows of the register tile of multiply_wide

// A block in 16 bits, with the scales of its groups.
struct Wide {
    alignas(64) int16_t values[kGroup / 2][kPanel][2]; // [pairs of K][columns]
    alignas(64) float scales[kFines][kPanel];
};

template <class Block, bool TABLE> void widen4(const Block& block, int64_t groups, Wide& wide) {
    const Integers table = load_table(kE2m1);
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

// Multiplies R rows by a block in 16 bits.
template <int R> void multiply_wide(const Row8* rows, int64_t number, int64_t groups, const Wide& wide, float* sums) {
    constexpr int C = 2;
    const int32_t* a[R];
    for (int r = 0; r < R; ++r) a[r] = (const int32_t*)(rows[r].values + number * kGroup);
    for (int64_t first = 0; first < kPanel; first += C * kLanes) {
        Register total[R][C];
        for (int64_t group = 0; group < groups; ++group) {
            IntegerSums acc[R][C];
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < C; ++c) acc[r][c] = no_integers();
            const int16_t* from = wide.values[group * kFine / 2][first];
            for (int64_t k = 0; k < kFine / 2; ++k, from += 2 * kPanel) {
                Integers column[C];
                for (int c = 0; c < C; ++c) column[c] = load_integers(from + c * 2 * kLanes);
                for (int r = 0; r < R; ++r) {
                    const Integers pair = all_integers(a[r][group * kFine / 2 + k]);
                    for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], pair, column[c]);
                }
            }
            for (int c = 0; c < C; ++c) {
                const Register scale = load_sum(wide.scales[group] + first + c * kLanes);
                for (int r = 0; r < R; ++r) {
                    const Register sum = to_register(acc[r][c]);
                    total[r][c] = group == 0 ? times(sum, scale) : times_plus(sum, scale, total[r][c]);
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c)
                add_group(sums + r * kPanel + first + c * kLanes, total[r][c], rows[r].scales[number], number > 0);
    }
}

// Does what multiply_chunk does, for many rows.
template <bool TABLE, bool HALF>
void multiply_chunk_wide(int64_t count, const Row8* rows, int64_t depth, const char* panel, float* sums, bool fetch) {
    using Block = Block4<TABLE, HALF>;
    constexpr int64_t kBytes = block_bytes4(kFines, TABLE);
    const int64_t tiles = (count + kRowsWide - 1) / kRowsWide;
    Wide wide;
    for (int64_t block = 0; block < groups(depth); ++block, panel += kBytes) {
        const int64_t fines = std::min(kFines, groups4(depth) - block * kFines);
        if (fetch)
            for (int64_t line = 0; line < kBytes; line += 64) _mm_prefetch(panel + 2 * kBytes + line, _MM_HINT_T1);
        widen4<Block, TABLE>(Block(panel, fines), fines, wide);
        for (int64_t tile = 0, at = 0; tile < tiles; ++tile) {
            const int64_t here = count / tiles + (tile < count % tiles);
            with_rows<kRowsWide>(here, [&](auto number) {
                multiply_wide<decltype(number)::value>(rows + at, block, fines, wide, sums + at * kPanel);
            });
            at += here;
        }
    }
}

#ifdef EMOE_TILES

// Brings a block into the form that the matrix unit takes. Values of codes are looked up: all that a code less a zero point can
// be, or those of E2M1.
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

// Does what multiply_chunk does, for a panel in 4 bits.
template <bool TABLE, bool HALF>
void multiply_chunk4(int64_t count, const Row8* rows, int64_t depth, const char* panel, float* sums, bool fetch) {
    using Block = Block4<TABLE, HALF>;
#ifdef EMOE_TILES
    if (rows[0].bytes != nullptr) return multiply_chunk4_tiles<TABLE, HALF>(count, rows, depth, panel, sums, fetch);
#endif
    constexpr int64_t kBytes = block_bytes4(kFines, TABLE);
    if constexpr (kFewRows4 < kChunk)
        if (count > kFewRows4) return multiply_chunk_wide<TABLE, HALF>(count, rows, depth, panel, sums, fetch);
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

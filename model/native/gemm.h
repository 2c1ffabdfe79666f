// Products of bfloat16 rows with a packed matrix, summed in float32.
//
// A matrix [N, K] lies in panels of 64 rows of it (columns of the product): [N/64][K/2][64][2], so that one dot-product
// instruction takes two steps of K for 16 columns. A panel is read once from memory and serves all rows that there are;
// rows are few registers' worth at a time. Each element of a product is summed over K in ascending order in one
// accumulator, whatever the other rows are: a row's result does not depend on its company.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace emoe {

using bf16 = uint16_t;

constexpr int64_t kPanel = 64;   // columns of a panel
constexpr int64_t kRows = 6;     // rows of the register tile: 6 x 4 accumulators, 4 of the panel, 1 of the row
constexpr int64_t kChunk = 96;   // rows whose sums are kept in L1
constexpr int64_t kPairs = 1024; // pairs of K at a time: a piece of the panel of 256 KB, which L2 holds
constexpr int64_t kAhead = 4096; // bytes that a single pass over a panel fetches in advance

inline int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
inline int64_t panel_size(int64_t depth) { return depth * kPanel; }

inline __m512bh as_bf16(__m512i raw) { return (__m512bh)raw; }

inline float to_float(bf16 value) {
    uint32_t bits = uint32_t(value) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline __m512 widened(__m256i raw) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)); }
inline __m512 load16(const bf16* from, __mmask16 lanes = 0xffff) {
    return widened(_mm256_maskz_loadu_epi16(lanes, from));
}

// To nearest, ties to even, as torch rounds; a not-a-number stays one.
inline __m256i round16(__m512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }
inline void store16(bf16* to, __m512 value, __mmask16 lanes = 0xffff) {
    _mm256_mask_storeu_epi16(to, lanes, round16(value));
}
inline __m512 rounded(__m512 value) { return widened(round16(value)); }

// Of 16 columns from `first` on, those before `end`.
inline __mmask16 lanes_before(int64_t first, int64_t end) {
    return end - first >= 16 ? 0xffff : __mmask16((1u << std::max<int64_t>(end - first, 0)) - 1);
}

// R rows times `pairs` of one panel, added to `sums` [R][64] where `more`. Meanwhile LINES cache lines per pair are
// fetched from `ahead` on: as far as prefetching goes, memory is read while registers are busy.
template <int R, int LINES>
void multiply(const bf16* const* rows, int64_t first_pair, int64_t pairs, const bf16* panel, float* sums, bool more,
              const char* ahead) {
    __m512 acc[R][4];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 4; ++c) acc[r][c] = more ? _mm512_loadu_ps(sums + r * kPanel + c * 16) : _mm512_setzero_ps();
    const int32_t* a[R];
    for (int r = 0; r < R; ++r) a[r] = (const int32_t*)rows[r] + first_pair;
    const bf16* b = panel + first_pair * 2 * kPanel;
    for (int64_t k = 0; k < pairs; ++k, b += 2 * kPanel, ahead += LINES * 64) {
        for (int line = 0; line < LINES; ++line) _mm_prefetch(ahead + line * 64, LINES == 4 ? _MM_HINT_T0 : _MM_HINT_T1);
        __m512bh column[4];
        for (int c = 0; c < 4; ++c) column[c] = as_bf16(_mm512_loadu_si512(b + c * 32));
        for (int r = 0; r < R; ++r) {
            __m512bh pair = as_bf16(_mm512_set1_epi32(a[r][k]));
            for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], pair, column[c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 4; ++c) _mm512_storeu_ps(sums + r * kPanel + c * 16, acc[r][c]);
}

template <int LINES>
void multiply_some(int64_t count, const bf16* const* rows, int64_t first, int64_t pairs, const bf16* panel,
                   float* sums, const char* ahead) {
    const bool more = first > 0;
    switch (count) {
    case 1: return multiply<1, LINES>(rows, first, pairs, panel, sums, more, ahead);
    case 2: return multiply<2, LINES>(rows, first, pairs, panel, sums, more, ahead);
    case 3: return multiply<3, LINES>(rows, first, pairs, panel, sums, more, ahead);
    case 4: return multiply<4, LINES>(rows, first, pairs, panel, sums, more, ahead);
    case 5: return multiply<5, LINES>(rows, first, pairs, panel, sums, more, ahead);
    default: return multiply<6, LINES>(rows, first, pairs, panel, sums, more, ahead);
    }
}

// Up to kChunk rows times one panel of a matrix with `depth` columns (even): sums [count][64]. With `fetch`, what lies
// behind the panel in memory is brought near, on the assumption that it comes next.
inline void multiply_chunk(int64_t count, const bf16* const* rows, int64_t depth, const bf16* panel, float* sums,
                           bool fetch) {
    const int64_t blocks = (count + kRows - 1) / kRows;
    for (int64_t first = 0; first < depth / 2; first += kPairs) {
        const int64_t pairs = std::min(kPairs, depth / 2 - first);
        const char* next = (const char*)(panel + (first + pairs) * 2 * kPanel);
        for (int64_t block = 0, at = 0; block < blocks; ++block) {
            // of about equal size: 4 + 3 rows are faster than 6 + 1
            const int64_t here = count / blocks + (block < count % blocks);
            float* to = sums + at * kPanel;
            if (!fetch) multiply_some<0>(here, rows + at, first, pairs, panel, to, next);
            // one pass over the panel waits for memory all the time: a little ahead of itself
            else if (blocks == 1) multiply_some<4>(here, rows, first, pairs, panel, to, next - pairs * 256 + kAhead);
            // several passes: each brings its share of the next piece
            else if (blocks < 4 && block < 2) multiply_some<2>(here, rows + at, first, pairs, panel, to, next + block * pairs * 128);
            else if (blocks >= 4 && block < 4) multiply_some<1>(here, rows + at, first, pairs, panel, to, next + block * pairs * 64);
            else multiply_some<0>(here, rows + at, first, pairs, panel, to, next);
            at += here;
        }
    }
}

// The share of `count` that thread `index` of `threads` takes: [begin, end).
struct Share {
    int64_t begin, end;
    Share(int64_t count, int index, int threads) : begin(count * index / threads), end(count * (index + 1) / threads) {}
};

} // namespace emoe

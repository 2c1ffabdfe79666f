// Products of rows with a matrix of 8-bit integers.
//
// Each column of weights is rounded to 8 bits in groups of 128 steps of K, and each group has a float32 scale. Rows are in 8
// bits too (rows8.h). A matrix [N, K] is stored in panels of 64 columns, and a panel in groups: a group is [64 pairs of
// K][64][2], followed by the scales [64].
#pragma once

#include "products/rows8.h"
#include "products/tiles8.h"

namespace emoe {

constexpr int64_t kGroupBytes8 = (kGroup + sizeof(float)) * kPanel; // of a whole group

inline int64_t panel_bytes8(int64_t depth) { return depth * kPanel + groups(depth) * kPanel * sizeof(float); }

// Registers of columns in a tile of R rows.
template <int R> constexpr int kColumns8 = R < 4 && kRegisters == 32 ? 4 : R == 1 ? 8 : R == 2 ? 4 : 2;

#ifdef EMOE_BYTES

// The whole sums of products of R rows with C registers of columns of one group: those of each 32 steps of K, times their factors.
// `fetch(n)` is called for each n pairs.
template <int R, int C, class Fetch>
void whole_sums(const Group8* const* a, int64_t pairs, const int8_t* b, Register (&total)[R][C], Fetch fetch) {
    for (int64_t fine = 0, k = 0; k < pairs; ++fine) {
        IntegerSums acc[R][C];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) acc[r][c] = (IntegerSums)all_integers(a[r]->less[fine]);
        for (const int64_t end = std::min(pairs, k + kFine / 2); k < end; k += 2, b += 4 * kPanel) {
            fetch(2);
            // of an odd number of pairs, what follows the last one is multiplied with zeros
            Integers column[C];
            for (int c = 0; c < C; c += 2)
                take_fours(load_integers(b + c * 2 * kLanes), load_integers(b + 2 * kPanel + c * 2 * kLanes), column[c], column[c + 1]);
            for (int r = 0; r < R; ++r) {
                const Integers four = all_integers(four_bytes(a[r]->values + 2 * k));
                for (int c = 0; c < C; ++c) acc[r][c] = dot_bytes(acc[r][c], column[c], four);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) {
                const Register sum = to_register(acc[r][c]), factor = all_lanes(a[r]->factors[fine]);
                total[r][c] = fine == 0 ? times(sum, factor) : times_plus(sum, factor, total[r][c]);
            }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; c += 2) in_order(total[r][c], total[r][c + 1]);
}

#else

template <int R, int C, class Fetch>
void whole_sums(const Group8* const* a, int64_t pairs, const int8_t* b, Register (&total)[R][C], Fetch fetch) {
    const int32_t* values[R];
    for (int r = 0; r < R; ++r) values[r] = (const int32_t*)a[r]->values;
    IntegerSums acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = no_integers();
    for (int64_t k = 0; k < pairs; ++k, b += 2 * kPanel) {
        fetch(1);
        Integers column[C];
        for (int c = 0; c < C; ++c) column[c] = load_bytes(b + c * 2 * kLanes);
        for (int r = 0; r < R; ++r) {
            const Integers pair = all_integers(values[r][k]);
            for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], pair, column[c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) total[r][c] = to_register(acc[r][c]);
}

#endif

// Multiplies R rows by one group of `pairs` pairs, as it lies in a panel. Prefetches LINES cache lines per pair from `ahead` on.
template <int R, int LINES>
void multiply8(const Row8* rows, int64_t group, int64_t pairs, const int8_t* weights, float* sums, const char* ahead) {
    constexpr int C = kColumns8<R>;
    constexpr int kPasses = kPanel / (C * kLanes), kLines = (LINES + kPasses - 1) / kPasses;
    const Group8* a[R];
    for (int r = 0; r < R; ++r) a[r] = rows[r].groups + group;
    const float* scales = (const float*)(weights + pairs * 2 * kPanel);
    for (int64_t first = 0; first < kPanel; first += C * kLanes) {
        Register total[R][C];
        const bool fetching = first < LINES * C * kLanes;
        whole_sums<R, C>(a, pairs, weights + first * 2, total, [&](int64_t some) {
            if (fetching)
                for (int64_t line = 0; line < some * kLines; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T0);
        });
        for (int c = 0; c < C; ++c) {
            const Register scale = load_sum(scales + first + c * kLanes);
            for (int r = 0; r < R; ++r)
                add_products(sums + r * kPanel + first + c * kLanes, times(total[r][c], scale), all_lanes(a[r]->scale), group > 0);
        }
    }
}

constexpr int64_t kAhead8 = 2 * kGroupBytes8; // bytes that prefetching in a single pass over a panel is ahead: two groups

#ifdef EMOE_TILES

// Brings a group into the form that the matrix unit takes.
inline void widen_bytes8(const int8_t* weights, int64_t pairs, WideBytes& wide) {
    alignas(64) uint8_t order[64];
    for (int i = 0; i < 64; ++i) order[i] = i / 4 * 2 + i % 4 / 2 + i % 2 * 64;
    const __m512i first = _mm512_load_si512(order), second = _mm512_add_epi8(first, _mm512_set1_epi8(32));
    wide.steps = byte_steps(2 * pairs);
    for (int64_t quad = 0; quad < wide.steps * kTileBytes / 4; ++quad) {
        const int64_t pair = quad / 2 * 4 + quad % 2; // the quad has this pair and the one after the next
        for (int64_t c = 0; c < kPanel; c += 32) {
            const auto at = [&](int64_t k) {
                return k < pairs ? _mm512_loadu_si512(weights + (k * kPanel + c) * 2) : _mm512_setzero_si512();
            };
            const __m512i a = at(pair), b = at(pair + 2);
            _mm512_store_si512(wide.values[quad][c], _mm512_permutex2var_epi8(a, first, b));
            _mm512_store_si512(wide.values[quad][c + 16], _mm512_permutex2var_epi8(a, second, b));
        }
    }
    std::memcpy(wide.scales, weights + pairs * 2 * kPanel, kPanel * sizeof(float));
}

inline void multiply_chunk8_tiles(int64_t count, const Row8* rows, int64_t depth, const int8_t* panel, float* sums,
                                  bool fetch) {
    WideBytes wide;
    TileSizes::apart().load();
    for (int64_t group = 0; group < groups(depth); ++group) {
        const int64_t pairs = std::min(kGroup, depth - group * kGroup) / 2;
        widen_bytes8(panel, pairs, wide);
        multiply_all_bytes(count, rows, depth, group, wide, (const char*)panel + kAhead8, fetch ? pairs * 2 : 0, sums);
        panel += pairs * 2 * kPanel + kPanel * sizeof(float);
    }
    _tile_release();
}

#endif

// Does what multiply_chunk does, for a panel in 8 bits.
inline void multiply_chunk8(int64_t count, const Row8* rows, int64_t depth, const int8_t* panel, float* sums,
                            bool fetch) {
#ifdef EMOE_TILES
    if (rows[0].tiles != nullptr) return multiply_chunk8_tiles(count, rows, depth, panel, sums, fetch);
#endif
    for_tiles<kRows8>(count, depth, [&](int64_t tile, int64_t tiles, int64_t at, auto number, int64_t begin, int64_t end) {
        constexpr int R = decltype(number)::value;
        float* to = sums + at * kPanel;
        // This loop stands here, and not in multiply8: GCC 12 took such a function for one without effects, and left out the call.
        for (int64_t group = begin; group < end; ++group) {
            const int64_t pairs = std::min(kGroup, depth - group * kGroup) / 2;
            const int8_t* weights = panel + group * kGroupBytes8;
            // one pair of K takes two cache lines; of two tiles and more, two fetch what comes after these groups
            const char* ahead = (const char*)weights + (tiles == 1 ? kAhead8 : (end - begin) * kGroupBytes8 + tile * pairs * 64);
            if (fetch && tiles == 1) multiply8<R, 2>(rows, group, pairs, weights, to, ahead);
            else if (fetch && tile < 2) multiply8<R, 1>(rows + at, group, pairs, weights, to, ahead);
            else multiply8<R, 0>(rows + at, group, pairs, weights, to, ahead);
        }
    });
}

} // namespace emoe

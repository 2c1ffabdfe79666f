// Rounds matrices to 4 bits, packs codes into the panels of gemm4.h, and unpacks them.
//
// Outside panels, codes are nibbles [N, K / 2], the lower half of a byte first; scales are [N, groups of 32] in 16 bits; zero
// points are bytes [N, groups], and there are none for E2M1. K is even. With scales in E4M3 (gemmf4.h), these are bytes [N, groups
// of 16], and there is a float32 scale for each of N. K is a multiple of 16.
#include "products/gemm4.h"
#include "products/gemmf4.h"
#include "products/panels.h"

using namespace emoe;

namespace {

// Calls visit(n, k, word, shift) for every weight of a panel: its row n of the matrix, its step k, the word of its code.
// Calls scales(n, group, column, block) for every scale. n is -1 past the end of the matrix.
template <class Weight, class Group>
void walk(char* panel, int64_t depth, bool table, Weight weight, Group group_at) {
    for (int64_t number = 0; number < groups(depth); ++number) {
        const int64_t fines = std::min(kFines, groups4(depth) - number * kFines);
        char *scales = panel + fines * kCodes, *zeros = scales + fines * kScales;
        for (int64_t group = 0; group < fines; ++group)
            for (int64_t c = 0; c < kPanel; ++c) {
                group_at(c, number * kFines + group, (uint16_t*)scales + group * kPanel + c,
                         (uint16_t*)zeros + group * 16 + c % 16, 4 * (c / 16));
                for (int64_t k = 0; k < kFine; ++k) {
                    uint32_t* word = (uint32_t*)(panel + group * kCodes + (k / 8 * kPanel + c) * 4);
                    const int64_t step = (number * kFines + group) * kFine + k;
                    if (step < depth) weight(c, step, word, k % 8 / 2 * 4 + k % 2 * 16);
                }
            }
        panel += block_bytes4(fines, table);
    }
}

// For panels of gemmf4.h: calls weight(c, k, word, shift) for every weight of a panel, and scale(c, group, byte) for every scale.
template <class Weight, class Scale> void walk_f4(char* panel, int64_t depth, Weight weight, Scale scale) {
    char* at = panel + kPanel * sizeof(float);
    for (int64_t begin = 0; begin < depth; begin += kGroup) {
        const int64_t steps = std::min(kGroup, depth - begin);
        char* scales = at + words_of_codes(steps) * kPanel * sizeof(uint32_t);
        for (int64_t c = 0; c < kPanel; ++c) {
            for (int64_t k = 0; k < steps; ++k)
                weight(c, begin + k, (uint32_t*)at + k / 8 * kPanel + c, k % 8 / 2 * 4 + k % 2 * 16);
            for (int64_t group = 0; group < steps / kFloats4Group; ++group)
                scale(c, begin / kFloats4Group + group, scales + (group / 4 * kPanel + c) * sizeof(uint32_t) + group % 4);
        }
        at += words_of_block(steps) * kPanel * sizeof(uint32_t);
    }
}

uint16_t nearest_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// 32 weights of a group, with zeros past the end.
struct Weights {
    Floats low, high;

    Floats codes(Floats weights, float inverse, float zero) const {
        return smaller(all(15.f), larger(emoe::zero(), add(nearest(mul(weights, all(inverse))), all(zero))));
    }
    // The squared error with a scale and a zero point. `better` becomes the scale with the least error for these codes.
    float error(float scale, float zero, float& better) const {
        const Floats from_zero = all(-zero), by = all(-scale);
        const Floats q = add(codes(low, 1 / scale, zero), from_zero), r = add(codes(high, 1 / scale, zero), from_zero);
        const float top = sum(fused(q, low, mul(r, high))), under = sum(fused(q, q, mul(r, r)));
        better = under > 0 ? top / under : scale;
        const Floats e = fused(q, by, low), f = fused(r, by, high);
        return sum(fused(e, e, mul(f, f)));
    }
};

struct Rounded {
    uint16_t scale;
    int zero;
};

// Tries zero points around that of the whole range, and ranges that cut off the largest weights. For the codes of each try,
// the best scale follows by least squares.
Rounded round_group(const Weights& w) {
    const float high = std::max(0.f, std::max(maximum(w.low), maximum(w.high)));
    const float low = -std::max(0.f, std::max(maximum(sub(zero(), w.low)), maximum(sub(zero(), w.high))));
    if (!(high - low > 1e-30f)) return {0, 0}; // all weights are 0
    const float whole = (high - low) / 15, middle = std::nearbyint(-low / whole);
    Rounded best{nearest_bf16(whole), int(middle)};
    float least = INFINITY;
    for (float zero = std::max(0.f, middle - 1); zero <= std::min(15.f, middle + 1); zero += 1)
        for (float share : {1.05f, 1.f, 0.95f, 0.89f, 0.82f, 0.75f, 0.68f}) {
            float scale = to_float(nearest_bf16(whole * share)), better;
            for (int turn = 0; turn < 3; ++turn) {
                const float error = w.error(scale, zero, better);
                if (error < least) least = error, best = {nearest_bf16(scale), int(zero)};
                const float next = to_float(nearest_bf16(better));
                if (!(next > 0) || next == scale) break;
                scale = next;
            }
        }
    return best;
}

} // namespace

// Rounds a bfloat16 matrix [N, K], so that the squared error is small.
extern "C" void emoe_round4(const bf16* matrix, int64_t rows, int64_t depth, uint8_t* codes, uint16_t* scales,
                            uint8_t* zeros, int threads) {
    const int64_t fines = groups4(depth);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < rows; ++n)
        for (int64_t g = 0; g < fines; ++g) {
            const int64_t first = g * kFine, end = std::min(depth, first + kFine);
            const bf16* from = matrix + n * depth + first;
            const Lanes low = lanes_before(first, end), high = lanes_before(first + 16, end);
            const Weights w{load(from, low), high ? load(from + 16, high) : zero()};
            const Rounded made = round_group(w);
            scales[n * fines + g] = made.scale;
            zeros[n * fines + g] = uint8_t(made.zero);
            const float scale = to_float(made.scale), inverse = scale > 0 ? 1 / scale : 0.f;
            alignas(64) float q[kFine];
            store(q, w.codes(w.low, inverse, float(made.zero)));
            store(q + 16, w.codes(w.high, inverse, float(made.zero)));
            for (int64_t k = first; k < end; k += 2)
                codes[(n * depth + k) / 2] = uint8_t(int(q[k - first]) | int(q[k - first + 1]) << 4);
        }
}

// Packs codes. `zeros` is null for E2M1.
extern "C" void emoe_pack4(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, int64_t columns,
                           int64_t depth, int64_t parts, int interleaved, char* packed) {
    const bool table = zeros == nullptr;
    std::memset(packed, 0, panels(columns / parts) * parts * panel_bytes4(depth, table));
    for (int64_t p = 0; p < panels(columns / parts) * parts; ++p, packed += panel_bytes4(depth, table))
        walk(
            packed, depth, table,
            [&](int64_t c, int64_t k, uint32_t* word, int64_t shift) {
                const int64_t n = source(p, c, columns, parts, interleaved);
                if (n >= 0) *word |= uint32_t(codes[(n * depth + k) / 2] >> k % 2 * 4 & 15) << shift;
            },
            [&](int64_t c, int64_t group, uint16_t* scale, uint16_t* zero, int64_t shift) {
                const int64_t n = source(p, c, columns, parts, interleaved);
                if (n < 0) return;
                *scale = scales[n * groups4(depth) + group];
                if (!table) *zero |= uint16_t((zeros[n * groups4(depth) + group] & 15) << shift);
            });
}

// Does the opposite of emoe_pack4. `codes` are zeros at first.
extern "C" void emoe_unpack4(const char* packed, int64_t columns, int64_t depth, int64_t parts, int interleaved,
                             uint8_t* codes, uint16_t* scales, uint8_t* zeros) {
    const bool table = zeros == nullptr;
    char* panel = (char*)packed; // it is read only
    for (int64_t p = 0; p < panels(columns / parts) * parts; ++p, panel += panel_bytes4(depth, table))
        walk(
            panel, depth, table,
            [&](int64_t c, int64_t k, const uint32_t* word, int64_t shift) {
                const int64_t n = source(p, c, columns, parts, interleaved);
                if (n >= 0) codes[(n * depth + k) / 2] |= uint8_t((*word >> shift & 15) << k % 2 * 4);
            },
            [&](int64_t c, int64_t group, const uint16_t* scale, const uint16_t* zero, int64_t shift) {
                const int64_t n = source(p, c, columns, parts, interleaved);
                if (n < 0) return;
                scales[n * groups4(depth) + group] = *scale;
                if (!table) zeros[n * groups4(depth) + group] = uint8_t(*zero >> shift & 15);
            });
}

// Packs codes with scales in E4M3 and a scale of each column.
extern "C" void emoe_pack_f4(const uint8_t* codes, const uint8_t* scales, const float* each, int64_t columns, int64_t depth,
                             int64_t parts, int interleaved, char* packed) {
    const int64_t all = panels(columns / parts) * parts, size = panel_bytes_f4(depth);
    std::memset(packed, 0, all * size);
    for (int64_t p = 0; p < all; ++p, packed += size) {
        int64_t rows[kPanel];
        for (int64_t c = 0; c < kPanel; ++c) {
            rows[c] = source(p, c, columns, parts, interleaved);
            if (rows[c] >= 0) ((float*)packed)[c] = each[rows[c]];
        }
        walk_f4(
            packed, depth,
            [&](int64_t c, int64_t k, uint32_t* word, int64_t shift) {
                if (rows[c] >= 0) *word |= uint32_t(codes[(rows[c] * depth + k) / 2] >> k % 2 * 4 & 15) << shift;
            },
            [&](int64_t c, int64_t group, char* scale) {
                if (rows[c] >= 0) *scale = char(scales[rows[c] * (depth / kFloats4Group) + group]);
            });
    }
}

// Does the opposite of emoe_pack_f4. `codes` are zeros at first.
extern "C" void emoe_unpack_f4(const char* packed, int64_t columns, int64_t depth, int64_t parts, int interleaved,
                               uint8_t* codes, uint8_t* scales, float* each) {
    const int64_t all = panels(columns / parts) * parts, size = panel_bytes_f4(depth);
    char* panel = (char*)packed; // it is read only
    for (int64_t p = 0; p < all; ++p, panel += size) {
        int64_t rows[kPanel];
        for (int64_t c = 0; c < kPanel; ++c) {
            rows[c] = source(p, c, columns, parts, interleaved);
            if (rows[c] >= 0) each[rows[c]] = ((const float*)panel)[c];
        }
        walk_f4(
            panel, depth,
            [&](int64_t c, int64_t k, const uint32_t* word, int64_t shift) {
                if (rows[c] >= 0) codes[(rows[c] * depth + k) / 2] |= uint8_t((*word >> shift & 15) << k % 2 * 4);
            },
            [&](int64_t c, int64_t group, const char* scale) {
                if (rows[c] >= 0) scales[rows[c] * (depth / kFloats4Group) + group] = uint8_t(*scale);
            });
    }
}

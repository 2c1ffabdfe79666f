// Packs matrices into panels, unpacks them, and computes a linear layer.
#include "products/linear.h"

#include "products/gemm8.h"
#include "products/panels.h"

#include <omp.h>

#include <vector>

using namespace emoe;

// Packs a matrix [N, K] into panels. Columns past the end are zero. K is even, and N is a multiple of `parts`.
extern "C" void emoe_pack(const uint32_t* matrix, int64_t columns, int64_t depth, int64_t parts, int interleaved,
                          uint32_t* packed) {
    const int64_t pairs = depth / 2, each = panels(columns / parts);
    constexpr int64_t kPiece = 16; // pairs that are copied at a time: a cache line of each row
    for (int64_t p = 0; p < each * parts; ++p, packed += pairs * kPanel)
        for (int64_t first = 0; first < pairs; first += kPiece)
            for (int64_t c = 0; c < kPanel; ++c) {
                const int64_t n = source(p, c, columns, parts, interleaved);
                for (int64_t k = first; k < std::min(pairs, first + kPiece); ++k)
                    packed[k * kPanel + c] = n < 0 ? 0 : matrix[n * pairs + k];
            }
}

extern "C" void emoe_unpack(const uint32_t* packed, int64_t columns, int64_t depth, int64_t parts, int interleaved,
                            uint32_t* matrix) {
    const int64_t pairs = depth / 2, each = panels(columns / parts);
    for (int64_t p = 0; p < each * parts; ++p, packed += pairs * kPanel)
        for (int64_t c = 0; c < kPanel; ++c) {
            const int64_t n = source(p, c, columns, parts, interleaved);
            for (int64_t k = 0; n >= 0 && k < pairs; ++k) matrix[n * pairs + k] = packed[k * kPanel + c];
        }
}

// Packs a matrix [N, K] of bytes with scales [N, groups of K] into the panels of gemm8.h. Columns past the end are zero. K is
// even. A scale is a word: a float32, or the bytes of four powers of 2.
extern "C" void emoe_pack8(const int8_t* matrix, const uint32_t* scales, int64_t columns, int64_t depth, int64_t parts,
                           int interleaved, int8_t* packed) {
    for (int64_t p = 0; p < panels(columns / parts) * parts; ++p)
        for (int64_t g = 0; g < groups(depth); ++g) {
            const int64_t begin = g * kGroup, end = std::min(depth, begin + kGroup);
            uint32_t* to = (uint32_t*)(packed + (end - begin) * kPanel);
            for (int64_t c = 0; c < kPanel; ++c) {
                const int64_t n = source(p, c, columns, parts, interleaved);
                for (int64_t k = begin; k < end; ++k)
                    packed[(k - begin) / 2 * 2 * kPanel + c * 2 + k % 2] = n < 0 ? 0 : matrix[n * depth + k];
                to[c] = n < 0 ? 0 : scales[n * groups(depth) + g];
            }
            packed = (int8_t*)(to + kPanel);
        }
}

extern "C" void emoe_unpack8(const int8_t* packed, int64_t columns, int64_t depth, int64_t parts, int interleaved,
                             int8_t* matrix, uint32_t* scales) {
    for (int64_t p = 0; p < panels(columns / parts) * parts; ++p)
        for (int64_t g = 0; g < groups(depth); ++g) {
            const int64_t begin = g * kGroup, end = std::min(depth, begin + kGroup);
            const uint32_t* from = (const uint32_t*)(packed + (end - begin) * kPanel);
            for (int64_t c = 0; c < kPanel; ++c) {
                const int64_t n = source(p, c, columns, parts, interleaved);
                if (n < 0) continue;
                for (int64_t k = begin; k < end; ++k)
                    matrix[n * depth + k] = packed[(k - begin) / 2 * 2 * kPanel + c * 2 + k % 2];
                scales[n * groups(depth) + g] = from[c];
            }
            packed = (const int8_t*)(from + kPanel);
        }
}

// Copies rows of a matrix in the panels of emoe_pack8, as bfloat16 numbers: out [count, depth].
extern "C" void emoe_rows8(const int8_t* packed, int64_t depth, const int64_t* rows, int64_t count, bf16* out, int threads) {
    const int64_t size = panel_bytes8(depth);
#pragma omp parallel for num_threads(threads) if (threads > 1 && count >= 16)
    for (int64_t i = 0; i < count; ++i) {
        const int8_t* panel = packed + rows[i] / kPanel * size;
        const int64_t c = rows[i] % kPanel;
        for (int64_t begin = 0; begin < depth; begin += kGroup) {
            const int64_t steps = std::min(kGroup, depth - begin);
            const float scale = ((const float*)(panel + steps * kPanel))[c];
            alignas(64) float values[kGroup];
            for (int64_t k = 0; k < steps; ++k) values[k] = scale * panel[k / 2 * 2 * kPanel + c * 2 + k % 2];
            for (int64_t k = 0; k < steps; k += 16)
                store(out + i * depth + begin + k, load(values + k), lanes_before(k, steps));
            panel += steps * kPanel + kPanel * sizeof(float);
        }
    }
}

namespace {

// Rows of x, as the products of a form take them. Their memory is kept from call to call, since fresh memory costs page
// faults.
template <class Bits> const std::vector<typename Bits::Row>& rows_of(const bf16* x, int64_t rows, int64_t stride, int64_t depth,
                                                                     int threads) {
    thread_local std::vector<typename Bits::Row> at;
    thread_local std::vector<char> memory;
    at.resize(rows);
    if constexpr (kRoundsRows<Bits>) {
        thread_local typename Bits::Rows narrow;
        narrow.resize(rows, depth);
        auto& all = narrow; // the other threads have a thread_local of their own
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows >= 16)
        for (int64_t r = 0; r < rows; ++r) all.set(r, x + r * stride);
        for (int64_t r = 0; r < rows; ++r) at[r] = narrow.at(r);
    } else
        for (int64_t r = 0; r < rows; ++r) at[r] = x + r * stride;
    Bits::prepare(at, depth, memory);
    return at;
}

// Computes the panels `share` of a linear layer: out [rows, columns] = x [rows, depth] times the packed matrix, plus the bias
// unless it is null. Sums are in float32, and are rounded if `out` is bfloat16.
template <class Bits, class Out>
void linear(const std::vector<typename Bits::Row>& x, int64_t depth, const char* packed, int64_t columns, const bf16* bias,
            Out* out, Share share, int threads) {
    const int64_t rows = x.size(), size = Bits::panel_bytes(depth);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        alignas(64) float sums[kChunk * kPanel];
        Share mine(share.end - share.begin, omp_get_thread_num(), omp_get_num_threads());
        mine.begin += share.begin;
        mine.end += share.begin;
        const int64_t together = panels_together(size);
        for (int64_t group = mine.begin; group < mine.end; group += together)
            for (int64_t first = 0; first < rows; first += kChunk) {
                const int64_t count = std::min(kChunk, rows - first);
                for (int64_t p = group; p < std::min(mine.end, group + together); ++p) {
                    Bits::multiply(count, x.data() + first, depth, packed + p * size, sums, first == 0);
                    for (int64_t c = p * kPanel; c < std::min(columns, (p + 1) * kPanel); c += 16) {
                        const Lanes lanes = lanes_before(c, columns);
                        const Floats shift = bias == nullptr ? zero() : load(bias + c, lanes);
                        for (int64_t r = 0; r < count; ++r) {
                            const Floats sum = load(sums + r * kPanel + c - p * kPanel);
                            store(out + (first + r) * columns + c, add(sum, shift), lanes);
                        }
                    }
                }
            }
    }
}

} // namespace

void emoe::linear_share(const bf16* x, int64_t rows, int64_t stride, int64_t depth, const Product* products, int64_t count,
                        int index, int shares, int threads) {
    for (int64_t i = 0; i < count;)
        with_form(products[i].matrix.form, [&](auto bits) {
            using Bits = decltype(bits);
            const auto& at = rows_of<Bits>(x, rows, stride, depth, threads);
            for (const int64_t form = products[i].matrix.form; i < count && products[i].matrix.form == form; ++i) {
                const Product& p = products[i];
                linear<Bits>(at, depth, (const char*)p.matrix.packed, p.columns, p.matrix.bias, p.out,
                             Share(panels(p.columns), index, shares), threads);
            }
        });
}

extern "C" void emoe_linear(const bf16* x, int64_t rows, int64_t stride, int64_t depth, const void* packed, int form,
                            int64_t columns, const bf16* bias, bf16* out, int threads) {
    const Product product{{packed, bias, form}, columns, out};
    linear_share(x, rows, stride, depth, &product, 1, 0, 1, threads);
}

// As emoe_linear in bfloat16, without a rounding of the sums.
extern "C" void emoe_linear_wide(const bf16* x, int64_t rows, int64_t stride, int64_t depth, const bf16* packed,
                                 int64_t columns, float* out, int threads) {
    linear<Bits16>(rows_of<Bits16>(x, rows, stride, depth, threads), depth, (const char*)packed, columns, nullptr, out,
                   Share(panels(columns), 0, 1), threads);
}

// A product for each head: out = x times that head's packed matrix. Heads and rows of x and out lie at strides, in
// elements. The heads' matrices follow one another.
extern "C" void emoe_linear_heads(const bf16* x, int64_t heads, int64_t rows, int64_t head_stride, int64_t row_stride,
                                  int64_t depth, const bf16* packed, int64_t columns, bf16* out,
                                  int64_t out_head_stride, int64_t out_row_stride, int threads) {
    const int64_t each = panels(columns);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        alignas(64) float sums[kChunk * kPanel];
        const bf16* at[kChunk];
        const Share mine(heads * each, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t i = mine.begin; i < mine.end; ++i) {
            const int64_t h = i / each, p = i % each;
            for (int64_t first = 0; first < rows; first += kChunk) {
                const int64_t count = std::min(kChunk, rows - first);
                for (int64_t r = 0; r < count; ++r) at[r] = x + h * head_stride + (first + r) * row_stride;
                multiply_chunk(count, at, depth, packed + i * panel_size(depth), sums, first == 0);
                for (int64_t c = p * kPanel; c < std::min(columns, (p + 1) * kPanel); c += 16)
                    for (int64_t r = 0; r < count; ++r)
                        store(out + h * out_head_stride + (first + r) * out_row_stride + c,
                              load(sums + r * kPanel + c - p * kPanel), lanes_before(c, columns));
            }
        }
    }
}

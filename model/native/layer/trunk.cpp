// Small operators of the trunk. Each makes one pass over its rows.
#include "layer/trunk.h"

#include <omp.h>

#include <limits>
#include <vector>

using namespace emoe;

namespace {

// The number of the largest of `count` numbers, the first one of equal ones; -1 if one is not a number or infinite, or if
// none is above minus infinity.
template <class Number> int64_t first_of_largest(const Number* x, int64_t count) {
    const Floats most = all(std::numeric_limits<float>::max()), least = sub(zero(), most);
    Floats largest = all(-std::numeric_limits<float>::infinity()), broken = zero();
    for (int64_t c = 0; c < count; c += 16) {
        const Lanes lanes = lanes_before(c, count);
        const Floats value = chosen(lanes, load(x + c, lanes), largest);
        largest = larger(largest, value);
        // a not-a-number stays one in the product, and nothing else makes one
        broken = fused(smaller(most, larger(least, value)), zero(), broken);
    }
    const float found = maximum(largest);
    if (!(sum(broken) == 0.f) || !std::isfinite(found)) return -1;
    for (int64_t c = 0;; c += 16) {
        const Lanes lanes = lanes_before(c, count);
        const Lanes equal = Lanes(lanes & ~differ(load(x + c, lanes), all(found)));
        if (equal != 0) return c + __builtin_ctz(equal);
    }
}

} // namespace

// The most likely token of each row of logits [rows, columns], which are floats if `wide`, else bfloat16: see first_of_largest.
extern "C" void emoe_most_likely(const void* logits, int wide, int64_t rows, int64_t columns, int64_t* tokens) {
    for (int64_t r = 0; r < rows; ++r)
        tokens[r] = wide ? first_of_largest((const float*)logits + r * columns, columns)
                         : first_of_largest((const bf16*)logits + r * columns, columns);
}

// Calls norm_row for each row of x [rows, size].
extern "C" void emoe_rms_norm(const bf16* x, int64_t rows, int64_t size, const float* weight, float epsilon, int rounds,
                              bf16* out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows >= 16)
    for (int64_t r = 0; r < rows; ++r) norm_row(x + r * size, size, weight, epsilon, rounds, out + r * size);
}

// Calls layer_norm_row for each row of x [rows, size]. `bias` may be null.
extern "C" void emoe_layer_norm(const bf16* x, int64_t rows, int64_t size, const float* weight, const float* bias,
                                float epsilon, bf16* out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows >= 16)
    for (int64_t r = 0; r < rows; ++r) layer_norm_row(x + r * size, size, weight, bias, epsilon, out + r * size);
}

// Normalises groups of `group` numbers of each row of x [rows, size], and multiplies by silu(gate), or by the logistic
// function of the gate unless `silu`: before the normalisation if `gate_first`, else afterwards. Rows of x and of the gate
// lie at strides, in elements. If `rounds`, normalised values are rounded before and after the product with the weight.
extern "C" void emoe_gated_norm(const bf16* x, int64_t stride, const bf16* gate, int64_t gate_stride, int64_t rows,
                                int64_t size, int64_t group, const float* weight, float epsilon, int rounds, int gate_first,
                                int silu, bf16* out, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && rows >= 16)
    {
        std::vector<float> row(size), factor(size);
#pragma omp for
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < size; c += 16) {
                const Lanes lanes = lanes_before(c, size);
                const Floats own = load(gate + r * gate_stride + c, lanes);
                const Floats times = over_logistic(silu ? own : all(1.f), own), value = load(x + r * stride + c, lanes);
                store(factor.data() + c, times, lanes);
                store(row.data() + c, gate_first ? mul(value, times) : value, lanes);
            }
            for (int64_t first = 0; first < size; first += group) {
                Floats squares = zero();
                for (int64_t c = first; c < first + group; c += 16) {
                    const Floats value = load(row.data() + c, lanes_before(c, first + group));
                    squares = fused(value, value, squares);
                }
                const Floats scale = all(1.f / std::sqrt(sum(squares) / group + epsilon));
                for (int64_t c = first; c < first + group; c += 16) {
                    const Lanes lanes = lanes_before(c, first + group);
                    Floats value = mul(load(row.data() + c, lanes), scale);
                    value = mul(rounds ? rounded(value) : value, load(weight + c, lanes));
                    value = rounds ? rounded(value) : value;
                    if (!gate_first) value = mul(value, load(factor.data() + c, lanes));
                    store(out + r * size + c, value, lanes);
                }
            }
        }
    }
}

// Applies the rotary embedding to `heads` heads of every token. Heads of x lie `head_stride` elements apart, and tokens
// `token_stride`. cosines and sines are [tokens, size], out is [tokens, heads, size]. If `pairs`, it is rotate_pairs_row that
// is applied.
extern "C" void emoe_rotate(const bf16* x, int64_t head_stride, int64_t token_stride, int64_t tokens, int64_t heads,
                            int64_t size, const bf16* cosines, const bf16* sines, int pairs, bf16* out) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h)
            (pairs ? rotate_pairs_row : rotate_row)(x + h * head_stride + t * token_stride, cosines + t * size, sines + t * size, size,
                       out + (t * heads + h) * size);
}

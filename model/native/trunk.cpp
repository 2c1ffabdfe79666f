// Small operators of the trunk, each in one pass over its rows.
#include "gemm.h"

#include <omp.h>

#include <cmath>

using namespace emoe;

// Root mean square normalisation of rows [rows, size]. `rounds`: the normalised value is rounded to bfloat16 before it is
// multiplied by the weight.
extern "C" void emoe_rms_norm(const bf16* x, int64_t rows, int64_t size, const float* weight, float epsilon, int rounds,
                              bf16* out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows >= 16)
    for (int64_t r = 0; r < rows; ++r) {
        const bf16* from = x + r * size;
        bf16* to = out + r * size;
        Floats squares = zero();
        for (int64_t c = 0; c < size; c += 16) {
            const Floats value = load(from + c, lanes_before(c, size));
            squares = fused(value, value, squares);
        }
        const Floats factor = all(1.f / std::sqrt(sum(squares) / size + epsilon));
        for (int64_t c = 0; c < size; c += 16) {
            const Lanes lanes = lanes_before(c, size);
            Floats value = mul(load(from + c, lanes), factor);
            if (rounds) value = rounded(value);
            store(to + c, mul(value, load(weight + c, lanes)), lanes);
        }
    }
}

namespace {

// 16 columns of x * cos + turned * sin, rounded after every operator.
Floats turn(Floats x, Floats turned, const bf16* cosine, const bf16* sine, Lanes lanes) {
    return add(rounded(mul(x, load(cosine, lanes))), rounded(mul(turned, load(sine, lanes))));
}

void rotate(const bf16* x, const bf16* cosine, const bf16* sine, int64_t size, bf16* out) {
    const int64_t half = size / 2;
    for (int64_t c = 0; c < half; c += 16) {
        const Lanes lanes = lanes_before(c, half);
        const Floats first = load(x + c, lanes), second = load(x + half + c, lanes);
        const Floats minus = sub(zero(), second);
        store(out + c, turn(first, minus, cosine + c, sine + c, lanes), lanes);
        store(out + half + c, turn(second, first, cosine + half + c, sine + half + c, lanes), lanes);
    }
}

} // namespace

// Rotary embedding of `heads` heads of every token, halves turned against each other; x has strides [head, token],
// cosines and sines are [tokens, size], out is [tokens, heads, size].
extern "C" void emoe_rotate(const bf16* x, int64_t head_stride, int64_t token_stride, int64_t tokens, int64_t heads,
                            int64_t size, const bf16* cosines, const bf16* sines, bf16* out) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h)
            rotate(x + h * head_stride + t * token_stride, cosines + t * size, sines + t * size, size,
                   out + (t * heads + h) * size);
}

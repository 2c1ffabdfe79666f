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
        __m512 squares = _mm512_setzero_ps();
        for (int64_t c = 0; c < size; c += 16) {
            const __m512 value = load16(from + c, lanes_before(c, size));
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        const __m512 factor = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / size + epsilon));
        for (int64_t c = 0; c < size; c += 16) {
            const __mmask16 lanes = lanes_before(c, size);
            __m512 value = _mm512_mul_ps(load16(from + c, lanes), factor);
            if (rounds) value = rounded(value);
            store16(to + c, _mm512_mul_ps(value, _mm512_maskz_loadu_ps(lanes, weight + c)), lanes);
        }
    }
}

namespace {

// 16 columns of x * cos + turned * sin, rounded after every operator.
__m512 turn(__m512 x, __m512 turned, const bf16* cosine, const bf16* sine, __mmask16 lanes) {
    return _mm512_add_ps(rounded(_mm512_mul_ps(x, load16(cosine, lanes))), rounded(_mm512_mul_ps(turned, load16(sine, lanes))));
}

void rotate(const bf16* x, const bf16* cosine, const bf16* sine, int64_t size, bf16* out) {
    const int64_t half = size / 2;
    for (int64_t c = 0; c < half; c += 16) {
        const __mmask16 lanes = lanes_before(c, half);
        const __m512 first = load16(x + c, lanes), second = load16(x + half + c, lanes);
        const __m512 minus = _mm512_sub_ps(_mm512_setzero_ps(), second);
        store16(out + c, turn(first, minus, cosine + c, sine + c, lanes), lanes);
        store16(out + half + c, turn(second, first, cosine + half + c, sine + half + c, lanes), lanes);
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

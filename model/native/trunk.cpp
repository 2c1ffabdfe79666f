// Small operators of the trunk. Each makes one pass over its rows.
#include "trunk.h"

#include <omp.h>

using namespace emoe;

// Calls norm_row for each row of x [rows, size].
extern "C" void emoe_rms_norm(const bf16* x, int64_t rows, int64_t size, const float* weight, float epsilon, int rounds,
                              bf16* out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows >= 16)
    for (int64_t r = 0; r < rows; ++r) norm_row(x + r * size, size, weight, epsilon, rounds, out + r * size);
}

// Applies the rotary embedding to `heads` heads of every token. Heads of x lie `head_stride` elements apart, and tokens
// `token_stride`. cosines and sines are [tokens, size], out is [tokens, heads, size].
extern "C" void emoe_rotate(const bf16* x, int64_t head_stride, int64_t token_stride, int64_t tokens, int64_t heads,
                            int64_t size, const bf16* cosines, const bf16* sines, bf16* out) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h)
            rotate_row(x + h * head_stride + t * token_stride, cosines + t * size, sines + t * size, size,
                       out + (t * heads + h) * size);
}

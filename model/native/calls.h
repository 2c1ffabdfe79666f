// What the library offers of attention and of products to its own callers; see attention.cpp and linear.cpp.
#pragma once

#include "vector.h"

extern "C" {
void emoe_attention(const emoe::bf16* query, const emoe::bf16* key, const emoe::bf16* value, const int64_t* strides,
                    int64_t heads, int64_t key_heads, int64_t key_size, int64_t value_size, emoe::bf16* keys,
                    emoe::bf16* values, int64_t block_size, const void* sequences, int64_t num_sequences,
                    const int32_t* tables, float scale, int64_t window, float softcap, const float* sinks,
                    emoe::bf16* out, int threads);
void emoe_linear(const emoe::bf16* x, int64_t rows, int64_t stride, int64_t depth, const emoe::bf16* packed,
                 int64_t columns, const emoe::bf16* bias, emoe::bf16* out, int threads);
}

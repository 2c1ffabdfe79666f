// Functions that Python calls and that other files of the library call too. Each is described where it is defined, in
// the .cpp file of its name.
#pragma once

#include "vector.h"

namespace emoe {
struct Exchange;
struct Supply;
} // namespace emoe

extern "C" {
void emoe_attention(const emoe::bf16* query, const emoe::bf16* key, const emoe::bf16* value, const int64_t* strides,
                    int64_t heads, int64_t key_heads, int64_t key_size, int64_t value_size, emoe::bf16* keys,
                    emoe::bf16* values, int64_t block_size, const void* sequences, int64_t num_sequences,
                    const int32_t* tables, float scale, int64_t window, float softcap, const float* sinks,
                    emoe::bf16* out, int threads);
void emoe_latent_attention(const emoe::bf16* query, const emoe::bf16* key, const int64_t* strides, int64_t heads,
                           int64_t key_size, int64_t value_size, emoe::bf16* keys, int64_t block_size,
                           const void* sequences, int64_t num_sequences, int64_t attended, const int32_t* tables,
                           float scale, int64_t window, float softcap, const float* sinks, emoe::bf16* out, int threads);
void emoe_linear(const emoe::bf16* x, int64_t rows, int64_t stride, int64_t depth, const void* packed, int form,
                 int64_t columns, const emoe::bf16* bias, emoe::bf16* out, int threads);
void emoe_linear_wide(const emoe::bf16* x, int64_t rows, int64_t stride, int64_t depth, const emoe::bf16* packed,
                      int64_t columns, float* out, int threads);
void emoe_linear_heads(const emoe::bf16* x, int64_t heads, int64_t rows, int64_t head_stride, int64_t row_stride,
                       int64_t depth, const emoe::bf16* packed, int64_t columns, emoe::bf16* out, int64_t out_head_stride,
                       int64_t out_row_stride, int threads);
void emoe_route(const emoe::bf16* x, int64_t rows, int64_t depth, const emoe::bf16* packed, const emoe::bf16* bias,
                int64_t experts, int64_t top_k, int normalise, emoe::bf16* logits, float* scores, int64_t* index, int threads);
void emoe_route_scored(const emoe::bf16* x, int64_t rows, int64_t depth, const emoe::bf16* packed, int64_t experts, int wide,
                       int logistic, const float* bias, int64_t groups, int64_t top_groups, int64_t best, int64_t top_k,
                       int normalise, float scale, float* logits, float* scores, int64_t* index, int threads);
int emoe_experts(const emoe::bf16* x, int64_t rows, int64_t hidden, int64_t width, int64_t num_experts,
                 const void* const* tables, int bits, int interleaved, int gate, float alpha, float limit,
                 emoe::Supply* supply, const void* index, int index_bytes, const void* weight, int weight_bytes,
                 int64_t top_k, emoe::bf16* out, int threads);
int emoe_exchange_layer(emoe::Exchange* exchange, int64_t width, int64_t num_experts, const void* const* tables,
                        int bits, int interleaved, int gate, float alpha, float limit, emoe::Supply* supply,
                        const int16_t* routes, const emoe::bf16* x, const int64_t* choices, const float* weights,
                        emoe::bf16* out, int threads);
void emoe_gated_norm(const emoe::bf16* x, int64_t stride, const emoe::bf16* gate, int64_t gate_stride, int64_t rows,
                     int64_t size, int64_t group, const float* weight, float epsilon, int rounds, int gate_first, int silu,
                     emoe::bf16* out, int threads);
void emoe_delta_rule(const void* query, int64_t query_stride, const void* key, int64_t key_stride, const void* value,
                     int64_t value_stride, int wide, int unit, const float* gates, const float* beta, int64_t rows,
                     int64_t key_heads, int64_t value_heads, int64_t key_size, int64_t value_size, int by_channel,
                     float* states, const int64_t* sources, const int64_t* targets, void* out, int threads);
void emoe_delta_scan(const void* query, int64_t query_stride, const void* key, int64_t key_stride, const void* value,
                     int64_t value_stride, int wide, int unit, const float* gates, const float* beta, int64_t tokens,
                     int64_t key_heads, int64_t value_heads, int64_t key_size, int64_t value_size, int by_channel,
                     const float* begin, float* state, void* out, int threads);
void emoe_selective_update(const void* x, int64_t x_stride, const void* steps, int64_t steps_stride, const void* read,
                           int64_t read_stride, const void* written, int64_t written_stride, int wide, int softplus,
                           const float* rates, const float* shift, const float* skip, float least, float most,
                           int64_t rows, int64_t heads, int64_t groups, int64_t head_size, int64_t state_size,
                           float* states, const int64_t* sources, const int64_t* targets, void* out, int threads);
void emoe_selective_scan(const void* x, int64_t x_stride, const void* steps, int64_t steps_stride, const void* read,
                         int64_t read_stride, const void* written, int64_t written_stride, int wide, int softplus,
                         const float* rates, const float* shift, const float* skip, float least, float most,
                         int64_t tokens, int64_t heads, int64_t groups, int64_t head_size, int64_t state_size,
                         const float* begin, float* state, void* out, int threads);
}

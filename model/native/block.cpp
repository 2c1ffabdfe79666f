// The attention half of a decoder layer in one call: normalise, project, rotate, attend, project, add, normalise.
//
// Decoding steps are short: Python and torch took a sixth of a step of one sequence to call these dozen parts. The parts
// are the same that modules call one by one, in the same order, so the result has the same bits.
#include "calls.h"
#include "trunk.h"

#include <omp.h>

#include <vector>

namespace emoe {

// model/native/structs.py mirrors these structures.
struct Norm {
    const float* weight; // null: there is no norm
    int64_t size;        // numbers in a row that is normalised
    float epsilon;
    int32_t rounds;

    void operator()(const bf16* from, int64_t count, bf16* to) const {
        for (int64_t at = 0; weight != nullptr && at < count; at += size)
            norm_row(from + at, size, weight, epsilon, rounds, to + at);
    }
};

struct Matrix {
    const bf16 *packed, *bias;
};

struct Block {
    int64_t hidden, heads, key_heads, key_size, value_size;
    Norm before, query_norm, key_norm, after;
    Matrix query, key, value, out;
    const float* sinks; // null: there are none
    float scale;
};

namespace {

bf16* of_size(std::vector<bf16>& scratch, int64_t size) {
    if (int64_t(scratch.size()) < size) scratch.resize(size);
    return scratch.data();
}

} // namespace
} // namespace emoe

using namespace emoe;

// x [T, H] is the layer's input. `sum` [T, H] becomes x plus the output of attention, and `normed` [T, H] becomes `sum`
// after the norm of the feed-forward half. cosines and sines are [T, rotated]: so many numbers of each head, the first ones,
// are rotated. Other arguments are as in emoe_attention.
extern "C" void emoe_block(const Block* block, const bf16* x, int64_t tokens, const bf16* cosines, const bf16* sines,
                           int64_t rotated, bf16* keys, bf16* values, int64_t block_size, const void* sequences,
                           int64_t num_sequences, const int32_t* tables, int64_t window, bf16* sum, bf16* normed, int threads) {
    const Block& b = *block;
    const int64_t wide = b.heads * b.key_size, narrow = b.key_heads * b.key_size, values_wide = b.key_heads * b.value_size;
    // this memory is kept from call to call, since fresh memory costs page faults
    thread_local std::vector<bf16> q_scratch, k_scratch, v_scratch, a_scratch;
    bf16 *q = of_size(q_scratch, tokens * wide), *k = of_size(k_scratch, tokens * narrow);
    bf16 *v = of_size(v_scratch, tokens * values_wide), *attended = of_size(a_scratch, tokens * b.heads * b.value_size);
    const bool shared = threads > 1 && tokens >= 16;
#pragma omp parallel for num_threads(threads) if (shared)
    for (int64_t t = 0; t < tokens; ++t) b.before(x + t * b.hidden, b.hidden, normed + t * b.hidden);
    emoe_linear(normed, tokens, b.hidden, b.hidden, b.query.packed, wide, b.query.bias, q, threads);
    emoe_linear(normed, tokens, b.hidden, b.hidden, b.key.packed, narrow, b.key.bias, k, threads);
    emoe_linear(normed, tokens, b.hidden, b.hidden, b.value.packed, values_wide, b.value.bias, v, threads);
#pragma omp parallel for num_threads(threads) if (shared)
    for (int64_t t = 0; t < tokens; ++t) {
        b.query_norm(q + t * wide, wide, q + t * wide);
        b.key_norm(k + t * narrow, narrow, k + t * narrow);
        const bf16 *cosine = cosines + t * rotated, *sine = sines + t * rotated;
        for (bf16* head = q + t * wide; head < q + (t + 1) * wide; head += b.key_size)
            rotate_row(head, cosine, sine, rotated, head);
        for (bf16* head = k + t * narrow; head < k + (t + 1) * narrow; head += b.key_size)
            rotate_row(head, cosine, sine, rotated, head);
    }
    const int64_t strides[6] = {b.key_size, wide, b.key_size, narrow, b.value_size, values_wide};
    emoe_attention(q, k, v, strides, b.heads, b.key_heads, b.key_size, b.value_size, keys, values, block_size, sequences,
                   num_sequences, tables, b.scale, window, 0.f, b.sinks, attended, threads);
    emoe_linear(attended, tokens, b.heads * b.value_size, b.heads * b.value_size, b.out.packed, b.hidden, b.out.bias, sum,
                threads);
#pragma omp parallel for num_threads(threads) if (shared)
    for (int64_t t = 0; t < tokens; ++t) {
        bf16* row = sum + t * b.hidden;
        for (int64_t c = 0; c < b.hidden; c += 16) {
            const Lanes lanes = lanes_before(c, b.hidden);
            store(row + c, add(load(x + t * b.hidden + c, lanes), load(row + c, lanes)), lanes);
        }
        b.after(row, b.hidden, normed + t * b.hidden);
    }
}

// Writes the bytes of the structures that model/native/structs.py mirrors, in its order.
extern "C" void emoe_block_sizes(int64_t* sizes) { sizes[0] = sizeof(Norm); sizes[1] = sizeof(Matrix); sizes[2] = sizeof(Block); }

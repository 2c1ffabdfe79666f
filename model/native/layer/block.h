// The attention half of a decoder layer: its parts, and how workers compute it together.
#pragma once

#include "moe/exchange.h"
#include "layer/trunk.h"
#include "products/linear.h"

namespace emoe {

// model/native/structs.py mirrors these structures.
struct Norm {
    const float* weight; // null: there is no norm
    int64_t size;        // numbers in a row that is normalised
    float epsilon;
    int32_t rounds;
    int64_t centred;   // whether it is a layer normalisation, and not one by the root mean square
    const float* bias; // of a layer normalisation; null: it has none

    void operator()(const bf16* from, int64_t count, bf16* to) const {
        for (int64_t at = 0; weight != nullptr && at < count; at += size) {
            if (centred) layer_norm_row(from + at, size, weight, bias, epsilon, to + at);
            else norm_row(from + at, size, weight, epsilon, rounds, to + at);
        }
    }
};

// Adds x [tokens, hidden] to `sum`, and normalises the sums.
inline void add_and_normalise(const bf16* x, int64_t tokens, int64_t hidden, const Norm& norm, bf16* sum, bf16* normed,
                              int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens >= 16)
    for (int64_t t = 0; t < tokens; ++t) {
        bf16* row = sum + t * hidden;
        add_row(x + t * hidden, hidden, row);
        norm(row, hidden, normed + t * hidden);
    }
}

struct Block {
    int64_t hidden, heads, key_heads, key_size, value_size;
    Norm before, query_norm, key_norm, value_norm, behind, after; // `behind` is that of attention's output
    Matrix query, key, value, out; // value is null where values are keys before their norm and rotation
    const float* sinks; // null: there are none
    float scale, factor; // of scores; of attention's output
    // Whether `query` makes a gate behind each head's query, whose logistic function scales the head's output. Then a head's
    // query and value have one size.
    int32_t gated;
    int32_t turns_first; // whether queries and keys are rotated before their norms

    // Numbers that `query` makes for a head.
    int64_t query_step() const { return gated ? 2 * key_size : key_size; }
};

// What a step gives to a block: see emoe_block.
struct BlockStep {
    const bf16 *x, *cosines, *sines;
    int64_t tokens, rotated;
    bf16 *keys, *values;
    int64_t block_size;
    const void* sequences;
    int64_t num_sequences;
    const int32_t* tables;
    int64_t window;
    bf16 *sum, *normed;
};

// The trunk's last linear layer, which makes logits. model/native/structs.py mirrors it.
struct Head {
    int64_t depth, columns;
    Matrix matrix;
};

// Computes a block. `exchange` is null where no other rank may help. Returns a Status.
int run_block(const Block& block, const BlockStep& step, Exchange* exchange, int threads);

// Helps the rank `asker` with a block, if it asks before the layer's experts run. Returns a Status.
int help_with_block(const Block& block, Exchange& exchange, int64_t asker, int threads);

// The same with the output head. It waits until the asker has asked, or has declined help (emoe_exchange_decline).
int help_with_head(const Head& head, Exchange& exchange, int64_t asker, int threads);

} // namespace emoe

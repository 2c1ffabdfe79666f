// Computes the experts of one layer that this worker holds, over the rows that were sent to it.
#pragma once

#include "products/gemm.h"

namespace emoe {

// Brings a layer's experts into memory when a step needs them and they are not there. model/native/structs.py mirrors it.
struct Supply {
    // Begins with all experts of the step that have rows, and the number of these rows; later with the experts that have
    // been computed, and null. Writes the experts that are in memory and are to be computed next, and returns how many
    // they are: 0 when all have been computed, and a number below 0 if an expert cannot be read. May block.
    int64_t (*next)(int64_t layer, int64_t count, const int64_t* experts, const int64_t* rows, int64_t* ready);
    int64_t layer;
    // Steps whose experts were all in memory, so that `next` was not called: the number of experts, then the experts.
    int64_t* log;
    int64_t log_size, log_used;

    void note(const int64_t* experts, int64_t count);
};

// What is made of gate and up, which `limit` clamps first. The last one has no gate: relu(up) squared.
enum {
    kSilu = 0,  // silu(gate) * up
    kSwish = 1, // gate * sigmoid(alpha * gate) * (up + 1)
    kGelu = 2,  // gelu(gate) * up, approximated by tanh
    kSquaredRelu = 3
};

// One layer's experts. Tables are indexed by logical expert; an entry is null where the expert is not in memory or has no
// bias.
struct Layer {
    int64_t hidden, width, num_experts;
    const void* const* gate_up; // panels of gate and of up take turns; without a gate, those of up
    const void* const* gate_up_bias;
    const void* const* down;
    const void* const* down_bias;
    int bits;        // the form of weights, one of those in forms.h
    int interleaved; // 1: gate and up are the even and the odd entries of a bias; 0: its halves
    int gate;        // one of those above
    float alpha, limit;
    Supply* supply; // null if all experts are always in memory
};

// The experts that each row chose and their weights, [rows, top_k]. A choice below 0 is computed on another worker, and
// is left out here.
struct Choices {
    const void* index;
    int index_bytes; // 4 or 8
    const void* weight;
    int weight_bytes; // 2: bfloat16, 4: float32
    int64_t top_k;
};

// Where sums go: [rows, pieces, hidden] floats. With two pieces a sum is a high and a low part, which together have some 48
// bits. So sums of parts, rounded to bfloat16, have the same bits however experts are divided among the parts.
struct Sums {
    float* data;
    int64_t pieces; // 1 or 2
};

// sums [rows, pieces, hidden] = for every row, the sum of its experts' outputs times their weights, in the order of the experts.
// An expert's output is rounded to bfloat16 where the PyTorch path rounds it. Sums are in float32. Their bits do not depend
// on which experts were in memory. Returns 0, or kUnavailable if an expert cannot be read.
constexpr int kUnavailable = 4; // beside the values of Status in exchange.h
int sum_of_experts(const Layer& layer, const bf16* x, int64_t rows, const Choices& choices, Sums sums, int threads);

} // namespace emoe

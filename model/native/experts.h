// The experts of one layer that are held here, over rows that are sent here.
#pragma once

#include "gemm.h"

namespace emoe {

// Of one layer: tables by logical expert, null where the expert is not held, or has no bias.
struct Layer {
    int64_t hidden, width, num_experts;
    const void* const* gate_up; // panels of gate and up in turn
    const void* const* gate_up_bias;
    const void* const* down;
    const void* const* down_bias;
    int bits; // of the weights: 16 as in gemm.h, 8 as in gemm8.h
    int interleaved; // of the biases: gate and up are even and odd entries
    int gate;        // with both clamped by `limit`, 0: silu(gate) * up; 1: gate * sigmoid(alpha * gate) * (up + 1)
    float alpha, limit;
};

// Choices of each row, [rows, top_k]; a choice below 0 counts for nothing.
struct Choices {
    const void* index;
    int index_bytes; // 4 or 8
    const void* weight;
    int weight_bytes; // 2: bfloat16, 4: float32
    int64_t top_k;
};

// out [rows, hidden] = for every row the sum of its experts' outputs times their weights, in order of the experts. An
// expert's output is rounded to bfloat16 where the PyTorch path rounds it, sums are in float32.
void sum_of_experts(const Layer& layer, const bf16* x, int64_t rows, const Choices& choices, float* out, int threads);

} // namespace emoe

// Computes the experts of one layer that this worker holds, over the rows that were sent to it.
#pragma once

#include "gemm.h"

namespace emoe {

// One layer's experts. Tables are indexed by logical expert; an entry is null where the expert is not held or has no bias.
struct Layer {
    int64_t hidden, width, num_experts;
    const void* const* gate_up; // panels of gate and of up take turns
    const void* const* gate_up_bias;
    const void* const* down;
    const void* const* down_bias;
    int bits;        // of a weight: 16 as in gemm.h, 8 as in gemm8.h
    int interleaved; // 1: gate and up are the even and the odd entries of a bias; 0: its halves
    int gate;        // 0: silu(gate) * up; 1: gate * sigmoid(alpha * gate) * (up + 1). `limit` clamps gate and up first
    float alpha, limit;
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

// out [rows, hidden] = for every row, the sum of its experts' outputs times their weights, in the order of the experts.
// An expert's output is rounded to bfloat16 where the PyTorch path rounds it. Sums are in float32.
void sum_of_experts(const Layer& layer, const bf16* x, int64_t rows, const Choices& choices, float* out, int threads);

} // namespace emoe

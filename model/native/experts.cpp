#include "experts.h"

#include "vector.h"

#include <omp.h>

#include <vector>

namespace emoe {
namespace {

// (row, choice) pairs in order of their experts.
struct Sorted {
    std::vector<int64_t> begin; // [E + 1] where each expert's pairs begin
    std::vector<int64_t> active; // experts that have pairs
    std::vector<int64_t> row;
    std::vector<float> weight;

    Sorted(const Choices& choices, int64_t rows, int64_t num_experts) : begin(num_experts + 1) {
        const int64_t pairs = rows * choices.top_k;
        std::vector<int64_t> next(num_experts);
        for (int64_t i = 0; i < pairs; ++i)
            if (expert(choices, i) >= 0) ++next[expert(choices, i)];
        for (int64_t e = 0; e < num_experts; ++e) {
            begin[e + 1] = begin[e] + next[e];
            if (next[e] > 0) active.push_back(e);
            next[e] = begin[e];
        }
        row.resize(begin[num_experts]);
        weight.resize(begin[num_experts]);
        for (int64_t i = 0; i < pairs; ++i) {
            const int64_t e = expert(choices, i);
            if (e < 0) continue;
            row[next[e]] = i / choices.top_k;
            weight[next[e]++] = choices.weight_bytes == 4 ? ((const float*)choices.weight)[i]
                                                         : to_float(((const bf16*)choices.weight)[i]);
        }
    }

    static int64_t expert(const Choices& choices, int64_t i) {
        return choices.index_bytes == 8 ? ((const int64_t*)choices.index)[i] : ((const int32_t*)choices.index)[i];
    }
};

Floats bias_of(const bf16* bias, int64_t first, int64_t step, Lanes lanes) {
    if (bias == nullptr) return zero();
    alignas(64) float values[16] = {};
    for (int64_t i = 0; i < 16; ++i)
        if (lanes >> i & 1) values[i] = to_float(bias[first + i * step]);
    return load(values);
}

// What transformers' gates compute in bfloat16, rounding after every operator as they do. Of two operands of min and max
// the second is kept if one is not a number.
Floats gated(const Layer& layer, Floats gate, Floats up) {
    const Floats limit = all(layer.limit);
    gate = smaller(limit, gate);
    up = larger(sub(zero(), limit), smaller(limit, up));
    if (layer.gate == 0) return mul(rounded(over_logistic(gate, gate)), up);
    const Floats one = all(1.f);
    const Floats sigmoid = rounded(over_logistic(one, rounded(mul(gate, all(layer.alpha)))));
    return mul(rounded(add(up, one)), rounded(mul(gate, sigmoid)));
}

// Panel `p` of gate and of up for all rows of expert `e`: 64 columns of `hidden` [pairs, width].
void gate_up(const Layer& layer, const bf16* x, const Sorted& sorted, int64_t e, int64_t p, bf16* hidden) {
    alignas(64) float sums[2][kChunk * kPanel];
    const bf16* rows[kChunk];
    const bf16* panel = layer.gate_up[e] + 2 * p * panel_size(layer.hidden);
    const bf16* bias = layer.gate_up_bias[e];
    const int64_t step = layer.interleaved ? 2 : 1, second = layer.interleaved ? 1 : layer.width;
    for (int64_t first = sorted.begin[e]; first < sorted.begin[e + 1]; first += kChunk) {
        const int64_t count = std::min(kChunk, sorted.begin[e + 1] - first);
        for (int64_t r = 0; r < count; ++r) rows[r] = x + sorted.row[first + r] * layer.hidden;
        for (int part = 0; part < 2; ++part)
            multiply_chunk(count, rows, layer.hidden, panel + part * panel_size(layer.hidden), sums[part],
                           first == sorted.begin[e]);
        for (int64_t c = 0; c < kPanel; c += 16) {
            const int64_t column = p * kPanel + c;
            const Lanes lanes = lanes_before(column, layer.width);
            const Floats gate_bias = bias_of(bias, column * step, step, lanes);
            const Floats up_bias = bias_of(bias, column * step + second, step, lanes);
            for (int64_t r = 0; r < count; ++r) {
                const Floats gate = rounded(add(load(sums[0] + r * kPanel + c), gate_bias));
                const Floats up = rounded(add(load(sums[1] + r * kPanel + c), up_bias));
                store(hidden + (first + r) * layer.width + column, gated(layer, gate, up), lanes);
            }
        }
    }
}

// Panel `p` of down for all rows of expert `e`, added to 64 columns of `out`.
void down(const Layer& layer, const bf16* hidden, const Sorted& sorted, int64_t e, int64_t p, float* out) {
    alignas(64) float sums[kChunk * kPanel];
    const bf16* rows[kChunk];
    const bf16* panel = layer.down[e] + p * panel_size(layer.width);
    for (int64_t first = sorted.begin[e]; first < sorted.begin[e + 1]; first += kChunk) {
        const int64_t count = std::min(kChunk, sorted.begin[e + 1] - first);
        for (int64_t r = 0; r < count; ++r) rows[r] = hidden + (first + r) * layer.width;
        multiply_chunk(count, rows, layer.width, panel, sums, first == sorted.begin[e]);
        for (int64_t c = 0; c < kPanel; c += 16) {
            const int64_t column = p * kPanel + c;
            const Lanes lanes = lanes_before(column, layer.hidden);
            const Floats bias = bias_of(layer.down_bias[e], column, 1, lanes);
            for (int64_t r = 0; r < count; ++r) {
                const Floats y = rounded(add(load(sums + r * kPanel + c), bias));
                float* to = out + sorted.row[first + r] * layer.hidden + column;
                const Floats weight = all(sorted.weight[first + r]);
                // a product and a sum, not fused: the PyTorch path has two roundings here
                const Floats sum = add(load(to, lanes), mul(y, weight));
                store(to, sum, lanes);
            }
        }
    }
}

} // namespace

void sum_of_experts(const Layer& layer, const bf16* x, int64_t rows, const Choices& choices, float* out, int threads) {
    const Sorted sorted(choices, rows, layer.num_experts);
    thread_local std::vector<bf16> scratch; // kept from call to call: fresh memory costs page faults
    const int64_t needed = int64_t(sorted.row.size()) * layer.width;
    if (int64_t(scratch.size()) < needed) scratch.resize(needed);
    bf16* hidden = scratch.data();
    std::memset(out, 0, rows * layer.hidden * sizeof(float));
    const int64_t wide = panels(layer.width), items = int64_t(sorted.active.size()) * wide;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < items; ++i) gate_up(layer, x, sorted, sorted.active[i / wide], i % wide, hidden);
        // here columns are shared out, so that no two threads add to the same sum
        const Share mine(panels(layer.hidden), omp_get_thread_num(), omp_get_num_threads());
        for (int64_t e : sorted.active)
            for (int64_t p = mine.begin; p < mine.end; ++p) down(layer, hidden, sorted, e, p, out);
    }
}

} // namespace emoe

using namespace emoe;

// As sum_of_experts, rounded to bfloat16 at the end. The tables are [4][num_experts]: gate_up, its bias, down, its bias.
extern "C" void emoe_experts(const bf16* x, int64_t rows, int64_t hidden, int64_t width, int64_t num_experts,
                             const bf16* const* tables, int interleaved, int gate, float alpha, float limit,
                             const void* index, int index_bytes, const void* weight, int weight_bytes, int64_t top_k,
                             bf16* out, int threads) {
    const Layer layer{hidden, width, num_experts, tables, tables + num_experts, tables + 2 * num_experts,
                      tables + 3 * num_experts, interleaved, gate, alpha, limit};
    thread_local std::vector<float> sums;
    if (int64_t(sums.size()) < rows * hidden) sums.resize(rows * hidden);
    sum_of_experts(layer, x, rows, Choices{index, index_bytes, weight, weight_bytes, top_k}, sums.data(), threads);
    int64_t i = 0;
    for (; i < rows * hidden; i += 16) store(out + i, load(sums.data() + i), lanes_before(i, rows * hidden));
}

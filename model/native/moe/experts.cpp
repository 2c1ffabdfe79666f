#include "moe/experts.h"

#include "products/forms.h"

#include <omp.h>

#include <algorithm>
#include <vector>

namespace emoe {
namespace {

// The (row, choice) pairs, sorted by expert.
struct Sorted {
    std::vector<int64_t> begin; // [E + 1] where each expert's pairs begin
    std::vector<int64_t> active; // the experts that have pairs
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

// Computes what transformers' gates compute in bfloat16: it rounds after every operator, as they do. `smaller` and
// `larger` return their second operand if one of the two is not a number, so the activation stays not-a-number.
Floats gated(const Layer& layer, Floats gate, Floats up) {
    const Floats limit = all(layer.limit);
    gate = smaller(limit, gate);
    up = larger(sub(zero(), limit), smaller(limit, up));
    if (layer.gate == kSilu) return mul(rounded(over_logistic(gate, gate)), up);
    if (layer.gate == kGelu) return mul(rounded(gelu(gate)), up);
    const Floats one = all(1.f);
    const Floats sigmoid = rounded(over_logistic(one, rounded(mul(gate, all(layer.alpha)))));
    return mul(rounded(add(up, one)), rounded(mul(gate, sigmoid)));
}

// The rows of one expert, as `multiply` takes them. Each thread keeps those of the expert that it computes.
template <class Bits> struct Gathered {
    int64_t expert = -1;
    std::vector<typename Bits::Row> rows;
    std::vector<char> memory;

    // `row` gives the row of one of the expert's pairs.
    template <class Get> void of(int64_t e, const Sorted& sorted, int64_t depth, Get row) {
        if (e == expert) return;
        expert = e;
        rows.clear();
        for (int64_t i = sorted.begin[e]; i < sorted.begin[e + 1]; ++i) rows.push_back(row(i));
        Bits::prepare(rows, depth, memory);
    }
    // One that has no expert's rows yet, for the thread that calls. Its memory is kept from call to call.
    static Gathered& empty() {
        thread_local Gathered gathered;
        gathered.expert = -1;
        return gathered;
    }
};

// Multiplies all rows of expert `e` by panel `p` of gate and of up, or of up alone: this makes 64 columns of `hidden`
// [pairs, width].
template <class Bits>
void gate_up(const Layer& layer, const typename Bits::Rows& x, const Sorted& sorted, int64_t e, int64_t p,
             Gathered<Bits>& gathered, bf16* hidden) {
    alignas(64) float sums[2][kChunk * kPanel];
    gathered.of(e, sorted, layer.hidden, [&](int64_t pair) { return x.at(sorted.row[pair]); });
    const bool alone = layer.gate == kSquaredRelu;
    const int parts = alone ? 1 : 2;
    const char* panel = (const char*)layer.gate_up[e] + parts * p * Bits::panel_bytes(layer.hidden);
    const bf16* bias = (const bf16*)layer.gate_up_bias[e];
    const int64_t step = layer.interleaved ? 2 : 1, second = layer.interleaved ? 1 : layer.width;
    for (int64_t first = sorted.begin[e]; first < sorted.begin[e + 1]; first += kChunk) {
        const int64_t count = std::min(kChunk, sorted.begin[e + 1] - first);
        const typename Bits::Row* rows = gathered.rows.data() + first - sorted.begin[e];
        for (int part = 0; part < parts; ++part)
            Bits::multiply(count, rows, layer.hidden, panel + part * Bits::panel_bytes(layer.hidden), sums[part],
                           first == sorted.begin[e]);
        for (int64_t c = 0; c < kPanel; c += 16) {
            const int64_t column = p * kPanel + c;
            const Lanes lanes = lanes_before(column, layer.width);
            const Floats gate_bias = bias_of(bias, column * step, step, lanes);
            const Floats up_bias = alone ? zero() : bias_of(bias, column * step + second, step, lanes);
            for (int64_t r = 0; r < count; ++r) {
                const Floats gate = rounded(add(load(sums[0] + r * kPanel + c), gate_bias));
                if (alone) {
                    const Floats positive = larger(zero(), gate);
                    store(hidden + (first + r) * layer.width + column, mul(positive, positive), lanes);
                    continue;
                }
                const Floats up = rounded(add(load(sums[1] + r * kPanel + c), up_bias));
                store(hidden + (first + r) * layer.width + column, gated(layer, gate, up), lanes);
            }
        }
    }
}

// Multiplies all rows of expert `e` by panel `p` of down. Calls `take` with the pair, the column, the lanes and the products
// of 16 columns.
template <class Bits, class Take>
void down(const Layer& layer, const typename Bits::Rows& hidden, const Sorted& sorted, int64_t e, int64_t p,
          Gathered<Bits>& gathered, Take take) {
    alignas(64) float sums[kChunk * kPanel];
    gathered.of(e, sorted, layer.width, [&](int64_t pair) { return hidden.at(pair); });
    const char* panel = (const char*)layer.down[e] + p * Bits::panel_bytes(layer.width);
    const bf16* down_bias = (const bf16*)layer.down_bias[e];
    for (int64_t first = sorted.begin[e]; first < sorted.begin[e + 1]; first += kChunk) {
        const int64_t count = std::min(kChunk, sorted.begin[e + 1] - first);
        const typename Bits::Row* rows = gathered.rows.data() + first - sorted.begin[e];
        Bits::multiply(count, rows, layer.width, panel, sums, first == sorted.begin[e]);
        for (int64_t c = 0; c < kPanel; c += 16) {
            const int64_t column = p * kPanel + c;
            const Lanes lanes = lanes_before(column, layer.hidden);
            const Floats bias = bias_of(down_bias, column, 1, lanes);
            for (int64_t r = 0; r < count; ++r)
                take(first + r, column, lanes, rounded(add(load(sums + r * kPanel + c), bias)));
        }
    }
}

// Adds an expert's output, 16 columns from `column` on, to the sum of its row.
void add_output(const Layer& layer, const Sorted& sorted, int64_t pair, int64_t column, Lanes lanes, Floats y, Sums out) {
    float* to = out.data + sorted.row[pair] * out.pieces * layer.hidden + column;
    // product and sum are not fused, since the PyTorch path rounds twice here
    const Floats before = load(to, lanes), product = mul(y, all(sorted.weight[pair])), after = add(before, product);
    store(to, after, lanes);
    if (out.pieces == 1) return;
    float* low = to + layer.hidden;
    store(low, add(load(low, lanes), lost(before, product, after)), lanes);
}

template <class Bits>
void sum(const Layer& layer, typename Bits::Rows& x, const bf16* from, int64_t rows, typename Bits::Rows& hidden,
         bf16* raw, const Sorted& sorted, Sums out, int threads) {
    const int64_t wide = panels(layer.width), items = int64_t(sorted.active.size()) * wide;
    const int64_t pairs = sorted.row.size();
    x.resize(rows, layer.hidden);
    hidden.resize(pairs, layer.width);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t r = 0; r < rows; ++r) x.set(r, from + r * layer.hidden);
        Gathered<Bits>& gathered = Gathered<Bits>::empty();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < items; ++i)
            gate_up<Bits>(layer, x, sorted, sorted.active[i / wide], i % wide, gathered, raw);
#pragma omp for
        for (int64_t i = 0; i < pairs; ++i) hidden.set(i, raw + i * layer.width);
        gathered.expert = -1;
        // each thread takes columns of its own here, so that no two threads add to the same sum
        const Share mine(panels(layer.hidden), omp_get_thread_num(), omp_get_num_threads());
        for (int64_t e : sorted.active)
            for (int64_t p = mine.begin; p < mine.end; ++p)
                down<Bits>(layer, hidden, sorted, e, p, gathered, [&](int64_t pair, int64_t column, Lanes lanes, Floats y) {
                    add_output(layer, sorted, pair, column, lanes, y, out);
                });
    }
}

// Computes some experts, in any order, over their rows: the pairs' outputs [pairs, hidden].
template <class Bits>
void outputs(const Layer& layer, const typename Bits::Rows& x, typename Bits::Rows& hidden, bf16* raw, const Sorted& sorted,
             const int64_t* experts, int64_t count, bf16* out, int threads) {
    const int64_t wide = panels(layer.width), high = panels(layer.hidden);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Gathered<Bits>& gathered = Gathered<Bits>::empty();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count * wide; ++i)
            gate_up<Bits>(layer, x, sorted, experts[i / wide], i % wide, gathered, raw);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < count; ++n)
            for (int64_t i = sorted.begin[experts[n]]; i < sorted.begin[experts[n] + 1]; ++i)
                hidden.set(i, raw + i * layer.width);
        gathered.expert = -1;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count * high; ++i)
            down<Bits>(layer, hidden, sorted, experts[i / high], i % high, gathered,
                       [&](int64_t pair, int64_t column, Lanes lanes, Floats y) {
                           store(out + pair * layer.hidden + column, y, lanes);
                       });
    }
}

// Adds up the pairs' outputs in the order of the experts, as `sum` does.
void add_outputs(const Layer& layer, const Sorted& sorted, const bf16* outputs, Sums out, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Share mine(panels(layer.hidden), omp_get_thread_num(), omp_get_num_threads());
        const int64_t end = std::min(mine.end * kPanel, layer.hidden);
        for (int64_t pair = 0; pair < int64_t(sorted.row.size()); ++pair)
            for (int64_t c = mine.begin * kPanel; c < end; c += 16) {
                const Lanes lanes = lanes_before(c, layer.hidden);
                add_output(layer, sorted, pair, c, lanes, load(outputs + pair * layer.hidden + c, lanes), out);
            }
    }
}

// As `sum`, for experts of which some are not in memory: they are computed as `supply` brings them.
template <class Bits>
int sum_supplied(const Layer& layer, typename Bits::Rows& x, const bf16* from, int64_t rows, typename Bits::Rows& hidden,
                 bf16* raw, const Sorted& sorted, Sums out, int threads) {
    thread_local std::vector<bf16> scratch;
    const int64_t pairs = sorted.row.size(), active = sorted.active.size();
    if (int64_t(scratch.size()) < pairs * layer.hidden) scratch.resize(pairs * layer.hidden);
    x.resize(rows, layer.hidden);
    hidden.resize(pairs, layer.width);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; ++r) x.set(r, from + r * layer.hidden);
    std::vector<int64_t> ready(layer.num_experts), counts;
    for (int64_t e : sorted.active) counts.push_back(sorted.begin[e + 1] - sorted.begin[e]);
    Supply& supply = *layer.supply;
    int64_t count = supply.next(supply.layer, active, sorted.active.data(), counts.data(), ready.data());
    while (count > 0) {
        outputs<Bits>(layer, x, hidden, raw, sorted, ready.data(), count, scratch.data(), threads);
        count = supply.next(supply.layer, count, ready.data(), nullptr, ready.data());
    }
    if (count < 0) return kUnavailable;
    add_outputs(layer, sorted, scratch.data(), out, threads);
    return 0;
}

template <class Bits>
int sum_any(const Layer& layer, typename Bits::Rows& x, const bf16* from, int64_t rows, typename Bits::Rows& hidden,
            bf16* raw, const Sorted& sorted, Sums out, int threads) {
    if (layer.supply != nullptr) {
        for (int64_t e : sorted.active)
            if (layer.gate_up[e] == nullptr)
                return sum_supplied<Bits>(layer, x, from, rows, hidden, raw, sorted, out, threads);
        layer.supply->note(sorted.active.data(), sorted.active.size());
    }
    sum<Bits>(layer, x, from, rows, hidden, raw, sorted, out, threads);
    return 0;
}

} // namespace

void Supply::note(const int64_t* experts, int64_t count) {
    if (count == 0 || log_used + 1 + count > log_size) return;
    log[log_used++] = count;
    std::copy(experts, experts + count, log + log_used);
    log_used += count;
}

int sum_of_experts(const Layer& layer, const bf16* x, int64_t rows, const Choices& choices, Sums sums, int threads) {
    const Sorted sorted(choices, rows, layer.num_experts);
    // this memory is kept from call to call, since fresh memory costs page faults
    thread_local std::vector<bf16> scratch;
    const int64_t needed = int64_t(sorted.row.size()) * layer.width;
    if (int64_t(scratch.size()) < needed) scratch.resize(needed);
    std::memset(sums.data, 0, rows * sums.pieces * layer.hidden * sizeof(float));
    return with_form(layer.bits, [&](auto bits) {
        using Bits = decltype(bits);
        if constexpr (kRoundsRows<Bits>) {
            thread_local typename Bits::Rows narrow, hidden;
            return sum_any<Bits>(layer, narrow, x, rows, hidden, scratch.data(), sorted, sums, threads);
        } else {
            Bits16::Rows x16{x, 0}, hidden16{scratch.data(), 0};
            return sum_any<Bits>(layer, x16, x, rows, hidden16, scratch.data(), sorted, sums, threads);
        }
    });
}

} // namespace emoe

using namespace emoe;

// Calls sum_of_experts and rounds its result to bfloat16. `tables` are [4][num_experts]: gate_up, its bias, down, its
// bias. Returns what sum_of_experts returns.
extern "C" int emoe_experts(const bf16* x, int64_t rows, int64_t hidden, int64_t width, int64_t num_experts,
                            const void* const* tables, int bits, int interleaved, int gate, float alpha, float limit,
                            Supply* supply, const void* index, int index_bytes, const void* weight, int weight_bytes,
                            int64_t top_k, bf16* out, int threads) {
    const Layer layer{hidden, width, num_experts, tables, tables + num_experts, tables + 2 * num_experts,
                      tables + 3 * num_experts, bits, interleaved, gate, alpha, limit, supply};
    thread_local std::vector<float> sums;
    if (int64_t(sums.size()) < rows * hidden) sums.resize(rows * hidden);
    const Choices choices{index, index_bytes, weight, weight_bytes, top_k};
    if (const int status = sum_of_experts(layer, x, rows, choices, {sums.data(), 1}, threads)) return status;
    for (int64_t i = 0; i < rows * hidden; i += 16) store(out + i, load(sums.data() + i), lanes_before(i, rows * hidden));
    return 0;
}

// Writes the bytes of the structures that model/native/structs.py mirrors, in its order.
extern "C" void emoe_experts_sizes(int64_t* sizes) { sizes[0] = sizeof(Supply); }

// Checksum of a record's payload (model/tiers/records.py): sums [512] of the words in each of 512 columns, each word times
// an odd number of its row, modulo 2^64. So a change of any one word changes a sum.
extern "C" void emoe_column_sums(const uint64_t* words, int64_t rows, uint64_t* sums) {
    std::fill(sums, sums + 512, 0);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < 512; ++c) sums[c] += words[r * 512 + c] * uint64_t(2 * r + 1);
}

// A layer that keeps states, or the half of a decoder layer that it makes with two norms, in one call: normalise, project,
// convolve, update states, normalise by a gate, project, add, normalise.
//
// Between a dozen native calls and PyTorch's small operators a decode step spent a sixth of its time. All tokens of a step go
// through the products together, whichever sequences they belong to; convolutions and states go by segments (state.h). A
// token's bits depend on its own sequence alone, and not on how its prompt is cut.
#include "layer/block.h"
#include "layer/calls.h"
#include "states/state.h"

using namespace emoe;

namespace {

enum Kind : int64_t { kDelta, kSelective };

// A linear layer of hidden states, or of what product `source` makes unless that is negative.
struct StateProduct {
    Matrix matrix;
    int64_t columns, depth, source;
};

// Where columns of a product belong among the inputs of the layer's other parts, which lie in one row in this order: what is
// convolved, the gate of the output, what makes decays, and what makes beta.
struct StateColumns {
    int64_t product, first, count, at;
};

// model/native/structs.py mirrors these structures.
//
// kDelta: `convolved` are a query and a key [key_heads, key_size] and a value [value_heads, value_size]. A logarithm of a decay is
// `rates` [value_heads] times softplus(what makes decays + shift); there is one per head, or per number of a key if
// `by_channel`. kSelective: `convolved` are x [value_heads, value_size], and what is written and what is read [key_heads,
// key_size]; see emoe_selective_update.
struct StateBlock {
    int64_t hidden, kind, num_products, num_columns;
    const StateProduct* products;
    const StateColumns* columns;
    Norm before, after;
    int64_t channels, taps_width; // of the convolution
    const bf16 *taps, *taps_bias;
    int64_t key_heads, value_heads, key_size, value_size, by_channel, decays; // `decays`: numbers that make decays
    const float *rates, *shift, *skip;
    float least, most; // limits of steps in prompts
    int64_t norm_size, norm_group;
    const float* norm_weight;
    float norm_epsilon;
    int32_t silu, norm_rounds, gate_first, gate_silu; // `silu`: what is convolved goes through it
    Matrix out;
};

template <class Number> Number* of_size(std::vector<Number>& scratch, int64_t size) {
    if (int64_t(scratch.size()) < size) scratch.resize(size);
    return scratch.data();
}

// log(1 + e^x): the larger of x and 0, plus log(1 + z) for z = e^-|x|, which is 2 artanh(z / (2 + z)).
Floats softplus(Floats x) {
    const Floats z = exponential(smaller(x, sub(zero(), x))), s = div(z, add(all(2.f), z)), square = mul(s, s);
    Floats series = all(1.f / 15);
    for (const float part : {1.f / 13, 1.f / 11, 1.f / 9, 1.f / 7, 1.f / 5, 1.f / 3, 1.f}) series = fused(series, square, all(part));
    return add(larger(x, zero()), mul(add(s, s), series));
}

// The inputs of a block's parts, and its output before the last product. Rows are dense.
struct Inputs {
    bf16 *convolved, *gate, *decays, *beta, *made;
};

// Makes the inputs of x [tokens, hidden].
void make_inputs(const StateBlock& b, const bf16* x, int64_t tokens, const Inputs& in, int threads) {
    thread_local std::vector<bf16> scratch; // it is kept from call to call, since fresh memory costs page faults
    int64_t all_columns = 0;
    for (int64_t i = 0; i < b.num_products; ++i) all_columns += b.products[i].columns;
    std::vector<Product> products;
    std::vector<bf16*> made;
    bf16* at = of_size(scratch, tokens * all_columns);
    for (int64_t i = 0; i < b.num_products; at += tokens * b.products[i++].columns) {
        made.push_back(at);
        if (b.products[i].source < 0) products.push_back({b.products[i].matrix, b.products[i].columns, at});
    }
    linear_share(x, tokens, b.hidden, b.hidden, products.data(), products.size(), 0, 1, threads);
    for (int64_t i = 0; i < b.num_products; ++i) {
        const StateProduct& p = b.products[i];
        if (p.source >= 0) project(made[p.source], tokens, p.depth, p.matrix, p.columns, made[i], threads);
    }
    const int64_t inner = b.value_heads * b.value_size;
    const int64_t ends[] = {b.channels, b.channels + inner, b.channels + inner + b.decays};
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens >= 16)
    for (int64_t t = 0; t < tokens; ++t)
        for (const StateColumns* c = b.columns; c < b.columns + b.num_columns; ++c) {
            const bf16* from = made[c->product] + t * b.products[c->product].columns + c->first;
            bf16* to = c->at < ends[0]   ? in.convolved + t * b.channels + c->at
                       : c->at < ends[1] ? in.gate + t * inner + c->at - ends[0]
                       : c->at < ends[2] ? in.decays + t * b.decays + c->at - ends[1]
                                         : in.beta + t * b.value_heads + c->at - ends[2];
            std::memcpy(to, from, c->count * sizeof(bf16));
        }
}

// Calls `single` for each run of segments that go on with one row, and `scan` for every other one.
template <class Single, class Scan> void by_segment(const Segments& segments, Single single, Scan scan) {
    const auto goes_on = [&](int64_t n) { return segments.sources[n] >= 0 && segments.rows[n + 1] - segments.rows[n] == 1; };
    for (int64_t n = 0; n < segments.count;) {
        int64_t end = n;
        while (end < segments.count && goes_on(end)) ++end;
        if (end > n) single(n, end - n);
        else scan(end++);
        n = end;
    }
}

void run_delta(const StateBlock& b, const Segments& segments, int64_t tokens, const Inputs& in, float* states, int threads) {
    thread_local std::vector<float> scratch;
    float *gates = of_size(scratch, tokens * (b.decays + b.value_heads)), *betas = gates + tokens * b.decays;
    const int64_t each = b.decays / b.value_heads, wide = b.key_heads * b.key_size, inner = b.value_heads * b.value_size;
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens >= 16)
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t c = 0; c < b.decays; c += LANES) {
            const Lanes lanes = lanes_before(c, b.decays);
            alignas(64) float rates[LANES] = {};
            for (int64_t i = 0; i < std::min(LANES, b.decays - c); ++i) rates[i] = b.rates[(c + i) / each];
            const Floats steps = softplus(add(load(in.decays + t * b.decays + c, lanes), load(b.shift + c, lanes)));
            store(gates + t * b.decays + c, mul(load(rates), steps), lanes);
        }
        for (int64_t h = 0; h < b.value_heads; h += LANES) {
            const Lanes lanes = lanes_before(h, b.value_heads);
            const Floats value = load(in.beta + t * b.value_heads + h, lanes);
            store(betas + t * b.value_heads + h, rounded(over_logistic(all(1.f), value)), lanes);
        }
    }
    const int64_t size = inner * b.key_size;
    const auto call = [&](auto function, int64_t row, int64_t rows, auto... where) {
        const bf16* query = in.convolved + row * b.channels;
        function(query, b.channels, query + wide, b.channels, query + 2 * wide, b.channels, 0, 1, gates + row * b.decays,
                 betas + row * b.value_heads, rows, b.key_heads, b.value_heads, b.key_size, b.value_size, int(b.by_channel),
                 where..., in.made + row * inner, threads);
    };
    by_segment(
        segments,
        [&](int64_t n, int64_t count) {
            call(emoe_delta_rule, segments.rows[n], count, states, segments.sources + n, segments.targets + n);
        },
        [&](int64_t n) {
            const int64_t from = segments.sources[n], row = segments.rows[n];
            call(emoe_delta_scan, row, segments.rows[n + 1] - row, from < 0 ? nullptr : (const float*)states + from * size,
                 states + segments.targets[n] * size);
        });
}

void run_selective(const StateBlock& b, const Segments& segments, const Inputs& in, float* states, int threads) {
    const int64_t inner = b.value_heads * b.value_size, beside = b.key_heads * b.key_size, size = inner * b.key_size;
    const auto call = [&](auto function, int64_t row, int64_t rows, float least, float most, auto... where) {
        const bf16 *x = in.convolved + row * b.channels, *written = x + inner, *read = written + beside;
        function(x, b.channels, in.decays + row * b.decays, b.decays, read, b.channels, written, b.channels, 0, 1, b.rates,
                 b.shift, b.skip, least, most, rows, b.value_heads, b.key_heads, b.value_size, b.key_size, where...,
                 in.made + row * inner, threads);
    };
    by_segment(
        segments,
        [&](int64_t n, int64_t count) { // transformers does not limit the steps of single tokens
            call(emoe_selective_update, segments.rows[n], count, 0.f, INFINITY, states, segments.sources + n,
                 segments.targets + n);
        },
        [&](int64_t n) {
            const int64_t from = segments.sources[n], row = segments.rows[n];
            call(emoe_selective_scan, row, segments.rows[n + 1] - row, b.least, b.most,
                 from < 0 ? nullptr : (const float*)states + from * size, states + segments.targets[n] * size);
        });
}

} // namespace

// x [tokens, hidden] are the inputs of the layer, and `sum` [tokens, hidden] becomes its output. If `half`, x are inputs of the
// decoder layer, `sum` becomes x plus the layer's output of normalised x, and `normed` the sum after the norm of the
// feed-forward half, if there is one. Convolutions keep [slots, channels, width], heads [slots, value_heads, key_size,
// value_size] (kSelective: [.., value_size, key_size]). `rows` [count + 1], `sources` and `targets` [count] as in Segments.
extern "C" void emoe_state_block(const StateBlock* block, const bf16* x, int64_t tokens, int half, int64_t count,
                                 const int64_t* rows, const int64_t* sources, const int64_t* targets, bf16* convolutions,
                                 float* states, bf16* sum, bf16* normed, int threads) {
    const StateBlock& b = *block;
    const Segments segments{count, rows, sources, targets};
    const int64_t inner = b.value_heads * b.value_size;
    thread_local std::vector<bf16> scratch;
    Inputs in;
    in.convolved = of_size(scratch, tokens * (b.channels + 2 * inner + b.decays + b.value_heads));
    in.gate = in.convolved + tokens * b.channels;
    in.made = in.gate + tokens * inner;
    in.decays = in.made + tokens * inner;
    in.beta = in.decays + tokens * b.decays;
    if (half)
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens >= 16)
        for (int64_t t = 0; t < tokens; ++t) b.before(x + t * b.hidden, b.hidden, normed + t * b.hidden);
    make_inputs(b, half ? normed : x, tokens, in, threads);
    convolve_segments(segments, b.channels, b.taps_width, b.taps, b.taps_bias, b.silu, convolutions, in.convolved, threads);
    if (b.kind == kDelta) run_delta(b, segments, tokens, in, states, threads);
    else run_selective(b, segments, in, states, threads);
    emoe_gated_norm(in.made, b.norm_size, in.gate, b.norm_size, tokens * inner / b.norm_size, b.norm_size, b.norm_group,
                    b.norm_weight, b.norm_epsilon, b.norm_rounds, b.gate_first, b.gate_silu, in.made, threads);
    project(in.made, tokens, inner, b.out, b.hidden, sum, threads);
    if (half) add_and_normalise(x, tokens, b.hidden, b.after, sum, normed, threads);
}

// Writes the bytes of the structures that model/native/structs.py mirrors, in its order.
extern "C" void emoe_state_block_sizes(int64_t* sizes) {
    sizes[0] = sizeof(StateProduct);
    sizes[1] = sizeof(StateColumns);
    sizes[2] = sizeof(StateBlock);
}

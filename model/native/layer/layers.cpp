// Runs several decoder layers in one call: for each layer the attention half, the router, the experts on whichever worker
// they are, and the sum.
//
// A step of few tokens spent a tenth of its time in Python and torch between its native parts. Weights that stream through
// the caches push Python's code and objects out of them, and all workers are in Python at the same time, so that nobody
// reads weights meanwhile. The parts are the same that Python calls layer by layer, so the result has the same bits.
#include "layer/block.h"
#include "layer/calls.h"

#include <algorithm>
#include <iterator>
#include <vector>

using namespace emoe;

namespace {

// model/native/structs.py mirrors these structures.
struct Layer {
    const Block* block;
    const bf16 *router, *router_bias; // its packed matrix; null: it has no bias
    int64_t num_experts, top_k;
    int32_t normalise, rounds; // whether the scores add up to 1; whether they are rounded to bfloat16, as in the trunk
    bf16 *keys, *values;
};

struct Experts {
    int64_t width, num_experts;
    const void* const* tables;
    int32_t bits, interleaved, gate;
    float alpha, limit;
    Supply* supply;
    const int16_t* routes;
};

// A feed-forward half: a router, experts, and an expert that all tokens share (its matrices are null where there is none).
struct FeedForward {
    int64_t hidden, num_experts, top_k, width;
    const bf16 *router, *router_bias; // as in Layer
    const float* added;               // to scores before the choice; null: nothing
    int64_t groups, top_groups, best;
    int32_t scored, wide, logistic, normalise, rounds; // `scored`: the router is emoe_route_scored, not emoe_route
    int32_t gelu; // the shared expert's activation, in place of silu
    float scale;
    Matrix gate, up, down;
    const bf16* share; // a packed matrix of one column, whose logistic function scales the shared expert's output, or null
};

// A feed-forward half of two parts, each between two norms: the expert that all tokens share, whose rows have been normalised
// before, and the others. The sum of the parts is normalised and added to x, and the result is multiplied by `factor`. The
// router has rows of its own: normalised ones, multiplied by `columns` [hidden] and then by `router_factor`. Scores are
// multiplied by `scales` [num_experts].
struct TwoParts {
    FeedForward half;
    Norm router_norm, behind_shared, before_experts, behind_experts, behind;
    const bf16* columns;
    const float* scales;
    float router_factor, factor;
};

// Makes of rows x what the expert that all tokens share makes of them, with the roundings of single operators.
void make_shared(const FeedForward& f, const bf16* x, int64_t tokens, bf16* made, int threads) {
    thread_local std::vector<bf16> scratch; // it is kept from call to call, since fresh memory costs page faults
    const int64_t wide = tokens * f.width;
    if (int64_t(scratch.size()) < 2 * wide) scratch.resize(2 * wide);
    bf16 *gate = scratch.data(), *up = gate + wide;
    const Product both[2] = {{f.gate, f.width, gate}, {f.up, f.width, up}};
    linear_share(x, tokens, f.hidden, f.hidden, both, 2, 0, 1, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens >= 16)
    for (int64_t i = 0; i < wide; i += 16) {
        const Lanes lanes = lanes_before(i, wide);
        const Floats value = load(gate + i, lanes);
        store(up + i, mul(rounded(f.gelu ? gelu(value) : over_logistic(value, value)), load(up + i, lanes)), lanes);
    }
    project(up, tokens, f.width, f.down, f.hidden, made, threads);
}

// Adds the output of the expert that all tokens share to `out`, with the roundings of single operators.
void add_shared(const FeedForward& f, const bf16* x, int64_t tokens, bf16* out, int threads) {
    thread_local std::vector<bf16> scratch; // it is kept from call to call, since fresh memory costs page faults
    if (int64_t(scratch.size()) < tokens * (f.hidden + 1)) scratch.resize(tokens * (f.hidden + 1));
    bf16 *made = scratch.data(), *share = made + tokens * f.hidden;
    make_shared(f, x, tokens, made, threads);
    if (f.share != nullptr) emoe_linear(x, tokens, f.hidden, f.hidden, f.share, kBits16, 1, nullptr, share, threads);
    for (int64_t t = 0; t < tokens; ++t) {
        const Floats factor = f.share == nullptr ? all(1.f) : rounded(over_logistic(all(1.f), all(to_float(share[t]))));
        for (int64_t c = 0; c < f.hidden; c += 16) {
            const Lanes lanes = lanes_before(c, f.hidden);
            bf16* at = out + t * f.hidden + c;
            const Floats own = load(made + t * f.hidden + c, lanes);
            store(at, add(load(at, lanes), f.share == nullptr ? own : rounded(mul(factor, own))), lanes);
        }
    }
}

// Chooses experts of rows x: `index` [tokens, top_k] and their `scores`.
void route(const FeedForward& f, const bf16* x, int64_t tokens, int64_t* index, float* scores, int threads) {
    thread_local std::vector<float> logits; // as above
    const int64_t chosen = tokens * f.top_k;
    if (int64_t(logits.size()) < tokens * f.num_experts) logits.resize(tokens * f.num_experts);
    if (f.scored)
        emoe_route_scored(x, tokens, f.hidden, f.router, f.num_experts, f.wide, f.logistic, f.added, f.groups, f.top_groups,
                          f.best, f.top_k, f.normalise, f.scale, logits.data(), scores, index, threads);
    else
        emoe_route(x, tokens, f.hidden, f.router, f.router_bias, f.num_experts, f.top_k, f.normalise, (bf16*)logits.data(),
                   scores, index, threads);
    for (int64_t i = 0; f.rounds && i < chosen; i += 16) {
        const Lanes lanes = lanes_before(i, chosen);
        store(scores + i, rounded(load(scores + i, lanes)), lanes);
    }
}

// Chooses experts of x by rows of the router's own (see TwoParts), for which `rows` [tokens, hidden] is room.
void route_own_rows(const TwoParts& parts, const bf16* x, int64_t tokens, bf16* rows, int64_t* index, float* scores,
                    int threads) {
    const FeedForward& f = parts.half;
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens >= 16)
    for (int64_t t = 0; t < tokens; ++t) {
        bf16* row = rows + t * f.hidden;
        parts.router_norm(x + t * f.hidden, f.hidden, row);
        for (int64_t c = 0; c < f.hidden; c += 16) {
            const Lanes lanes = lanes_before(c, f.hidden);
            const Floats scaled = rounded(mul(load(row + c, lanes), load(parts.columns + c, lanes)));
            store(row + c, mul(scaled, all(parts.router_factor)), lanes);
        }
    }
    route(f, rows, tokens, index, scores, threads);
    for (int64_t i = 0; i < tokens * f.top_k; ++i) scores[i] *= parts.scales[index[i]];
}

int run_experts(const Experts& e, Exchange* exchange, const bf16* x, int64_t tokens, int64_t hidden, int64_t top_k,
                const int64_t* index, const float* scores, bf16* out, int threads) {
    if (exchange != nullptr)
        return emoe_exchange_layer(exchange, e.width, e.num_experts, e.tables, e.bits, e.interleaved, e.gate, e.alpha,
                                   e.limit, e.supply, e.routes, x, index, scores, out, threads);
    return emoe_experts(x, tokens, hidden, e.width, e.num_experts, e.tables, e.bits, e.interleaved, e.gate, e.alpha, e.limit,
                        e.supply, index, sizeof *index, scores, sizeof *scores, top_k, out, threads);
}

} // namespace

// Replaces x [T, hidden] by the output of `count` layers. `exchange` is null if this worker holds all experts. `index`
// [count, T, top_k] gets the experts that the tokens chose. Other arguments are as in emoe_block. Returns a Status: that
// of the first layer that failed, or 0.
extern "C" int emoe_layers(const Layer* layers, const Experts* experts, int64_t count, Exchange* exchange, int64_t hidden,
                           bf16* x, int64_t tokens, const bf16* cosines, const bf16* sines, int64_t rotated,
                           int64_t block_size, const void* sequences, int64_t num_sequences, const int32_t* tables,
                           int64_t window, int64_t* index, int trunk_threads, int expert_threads) {
    // this memory is kept from call to call, since fresh memory costs page faults
    thread_local std::vector<bf16> sum, normed, logits, out;
    thread_local std::vector<float> scores;
    if (int64_t(sum.size()) < tokens * hidden)
        for (std::vector<bf16>* rows : {&sum, &normed, &out}) rows->resize(tokens * hidden);
    const bool helped = exchange != nullptr && exchange->asker() == exchange->rank;
    for (const Layer* layer = layers; layer < layers + count; ++layer, ++experts) {
        const int64_t chosen = tokens * layer->top_k;
        if (int64_t(logits.size()) < tokens * layer->num_experts) logits.resize(tokens * layer->num_experts);
        if (int64_t(scores.size()) < chosen) scores.resize(chosen);
        const BlockStep step{x, cosines, sines, tokens, rotated, layer->keys, layer->values, block_size, sequences,
                             num_sequences, tables, window, sum.data(), normed.data()};
        if (const int status = run_block(*layer->block, step, helped ? exchange : nullptr, trunk_threads)) return status;
        emoe_route(normed.data(), tokens, hidden, layer->router, layer->router_bias, layer->num_experts, layer->top_k,
                   layer->normalise, logits.data(), scores.data(), index, trunk_threads);
        for (int64_t i = 0; layer->rounds && i < chosen; i += 16) {
            const Lanes lanes = lanes_before(i, chosen);
            store(scores.data() + i, rounded(load(scores.data() + i, lanes)), lanes);
        }
        if (const int status = run_experts(*experts, exchange, normed.data(), tokens, hidden, layer->top_k, index,
                                           scores.data(), out.data(), expert_threads))
            return status;
        for (int64_t i = 0; i < tokens * hidden; i += 16) {
            const Lanes lanes = lanes_before(i, tokens * hidden);
            store(x + i, add(load(sum.data() + i, lanes), load(out.data() + i, lanes)), lanes);
        }
        index += chosen;
    }
    return 0;
}

// Computes the experts of `count` layers for the other workers' tokens, on a worker that has no tokens in this step. It
// helps with the blocks of `layers` and then with `head`, unless they are null.
extern "C" int emoe_layers_idle(const Layer* layers, const Experts* experts, int64_t count, Exchange* exchange,
                                const Head* head, int threads) {
    const int64_t asker = exchange == nullptr ? -1 : exchange->asker();
    for (int64_t n = 0; n < count; ++n) {
        if (asker >= 0 && layers != nullptr)
            if (const int status = help_with_block(*layers[n].block, *exchange, asker, threads)) return status;
        if (const int status = run_experts(experts[n], exchange, nullptr, 0, 0, 0, nullptr, nullptr, nullptr, threads))
            return status;
    }
    return asker >= 0 && head != nullptr ? help_with_head(*head, *exchange, asker, threads) : kDone;
}

// Computes a feed-forward half: out [T, hidden] of x [T, hidden]. `index` [T, top_k] gets the experts that the tokens chose.
// `experts` is null in a trial: then `out` is that of the shared expert alone. Returns a Status.
extern "C" int emoe_feed_forward(const FeedForward* half, const Experts* experts, Exchange* exchange, const bf16* x,
                                 int64_t tokens, int64_t* index, bf16* out, int trunk_threads, int expert_threads) {
    thread_local std::vector<float> scores; // as above
    const FeedForward& f = *half;
    if (int64_t(scores.size()) < tokens * f.top_k) scores.resize(tokens * f.top_k);
    route(f, x, tokens, index, scores.data(), trunk_threads);
    if (experts == nullptr) std::fill(out, out + tokens * f.hidden, bf16(0));
    else if (const int status = run_experts(*experts, exchange, x, tokens, f.hidden, f.top_k, index, scores.data(), out,
                                            expert_threads))
        return status;
    if (f.gate.packed != nullptr) add_shared(f, x, tokens, out, trunk_threads);
    return 0;
}

// Computes a feed-forward half of two parts: out [T, hidden] of x [T, hidden], and of `normed` [T, hidden], the rows of
// the part that all tokens share. `index` and `scores` [T, top_k] get the choices, `rows` [T, hidden] what the experts are
// given, and `made` [T, hidden] what they make of it. `experts` is null in a trial: then `made` has been made before.
// Returns a Status.
extern "C" int emoe_two_parts(const TwoParts* parts, const Experts* experts, Exchange* exchange, const bf16* x,
                              const bf16* normed, int64_t tokens, int64_t* index, float* scores, bf16* rows, bf16* made,
                              bf16* out, int trunk_threads, int expert_threads) {
    const FeedForward& f = parts->half;
    const int64_t hidden = f.hidden;
    const bool shared = trunk_threads > 1 && tokens >= 16;
    thread_local std::vector<bf16> scratch; // as above
    if (int64_t(scratch.size()) < tokens * hidden) scratch.resize(tokens * hidden);
    route_own_rows(*parts, x, tokens, rows, index, scores, trunk_threads);
#pragma omp parallel for num_threads(trunk_threads) if (shared)
    for (int64_t t = 0; t < tokens; ++t) parts->before_experts(x + t * hidden, hidden, rows + t * hidden);
    bf16* dense = scratch.data();
    make_shared(f, normed, tokens, dense, trunk_threads);
    if (experts != nullptr)
        if (const int status = run_experts(*experts, exchange, rows, tokens, hidden, f.top_k, index, scores, made,
                                           expert_threads))
            return status;
#pragma omp parallel for num_threads(trunk_threads) if (shared)
    for (int64_t t = 0; t < tokens; ++t) {
        bf16 *own = dense + t * hidden, *theirs = made + t * hidden, *sum = out + t * hidden;
        parts->behind_shared(own, hidden, own);
        parts->behind_experts(theirs, hidden, theirs);
        add_row(theirs, hidden, own);
        parts->behind(own, hidden, sum);
        add_row(x + t * hidden, hidden, sum);
        scale_row(hidden, parts->factor, sum);
    }
    return 0;
}

// Writes the bytes of the structures that model/native/structs.py mirrors, in its order.
extern "C" void emoe_layers_sizes(int64_t* sizes) {
    const int64_t all[] = {sizeof(Layer), sizeof(Experts), sizeof(FeedForward), sizeof(TwoParts)};
    std::copy(std::begin(all), std::end(all), sizes);
}

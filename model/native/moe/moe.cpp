// Computes one MoE layer over the workers of one node: tokens go out, experts are computed, partial sums come back.
#include "moe/exchange.h"
#include "moe/experts.h"
#include "moe/replicas.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace emoe {
namespace {

constexpr int32_t kAbsent = -1;

// The rows that this worker computes in a round, those of all ranks in rank order.
struct Work {
    std::vector<bf16> rows;
    std::vector<int32_t> choices; // [R, K] experts; kAbsent where another worker computes the choice
    std::vector<float> weights;   // [R, K]
    std::vector<int64_t> begins;  // [W] each rank's first row

    void clear() { rows.clear(), choices.clear(), weights.clear(), begins.clear(); }
};

struct Round {
    Exchange& exchange;
    const int16_t* routes; // [W, E] the rank that computes expert E for the tokens of rank W
    int64_t num_experts;
    int64_t pieces; // of a sum; 2 where replicas are chosen round by round
    const std::vector<int64_t>& counts; // [W] tokens of this round

    bool visits(const int32_t* choices, int64_t source, int64_t target) const {
        for (int64_t k = 0; k < exchange.layout.top_k; ++k)
            if (routes[source * num_experts + choices[k]] == target) return true;
        return false;
    }

    // Publishes this rank's tokens in its segment.
    void publish_tokens(const bf16* x, const int64_t* choices, const float* weights) const {
        Segment& own = exchange.segments[exchange.rank];
        const int64_t top_k = exchange.layout.top_k, count = counts[exchange.rank];
        for (int64_t i = 0; i < count * top_k; ++i) own.choices()[i] = int32_t(choices[i]);
        std::memcpy(own.weights(), weights, count * top_k * sizeof(float));
        std::memcpy(own.rows(), x, count * exchange.layout.hidden * sizeof(bf16));
        own.header().count = count;
        exchange.publish(own.header().tokens, exchange.round);
    }

    // Adds the tokens of rank `source` that chose an expert of this worker to `work`. Returns the number of these tokens.
    int64_t take(Work& work, int64_t source) const {
        const Segment& from = exchange.segments[source];
        const int64_t top_k = exchange.layout.top_k, hidden = exchange.layout.hidden;
        int64_t taken = 0;
        for (int64_t t = 0; t < counts[source]; ++t) {
            const int32_t* choices = from.choices() + t * top_k;
            if (!visits(choices, source, exchange.rank)) continue;
            ++taken;
            for (int64_t k = 0; k < top_k; ++k) {
                const bool here = routes[source * num_experts + choices[k]] == exchange.rank;
                work.choices.push_back(here ? choices[k] : kAbsent);
                work.weights.push_back(from.weights()[t * top_k + k]);
            }
            work.rows.insert(work.rows.end(), from.rows() + t * hidden, from.rows() + (t + 1) * hidden);
        }
        return taken;
    }

    // Chooses replicas by the choices of all ranks, which have been published: `routes` is then `chosen`.
    void choose(std::vector<int16_t>& chosen) {
        thread_local std::vector<int32_t> tokens;
        const int64_t size = exchange.layout.size;
        tokens.assign(size * num_experts, 0);
        for (int64_t r = 0; r < size; ++r) {
            const int32_t* choices = exchange.segments[r].choices();
            for (int64_t i = 0; i < counts[r] * exchange.layout.top_k; ++i) ++tokens[r * num_experts + choices[i]];
        }
        choose_replicas({routes, size, num_experts}, tokens.data(), chosen);
        routes = chosen.data();
    }

    // Adds up the partial sums of this rank's tokens. The order is that of the ranks, so that the sum has the same bits on
    // every run.
    void combine(bf16* out) const {
        const int64_t hidden = exchange.layout.hidden, size = exchange.layout.size;
        const Segment& own = exchange.segments[exchange.rank];
        std::vector<const float*> next, parts;
        for (const Segment& segment : exchange.segments) next.push_back(segment.sums(exchange.rank, pieces));
        for (int64_t t = 0; t < counts[exchange.rank]; ++t, out += hidden) {
            const int32_t* choices = own.choices() + t * exchange.layout.top_k;
            parts.clear();
            for (int64_t r = 0; r < size; ++r)
                if (visits(choices, exchange.rank, r)) {
                    parts.push_back(next[r]);
                    next[r] += pieces * hidden;
                }
            for (int64_t h = 0; h < hidden; h += 16) {
                const Lanes lanes = lanes_before(h, hidden);
                Floats sum = zero(), low = zero();
                for (const float* part : parts) {
                    const Floats before = sum, high = load(part + h, lanes);
                    sum = add(before, high);
                    if (pieces == 2) low = add(low, add(lost(before, high, sum), load(part + hidden + h, lanes)));
                }
                store(out + h, pieces == 2 ? add(sum, low) : sum, lanes);
            }
        }
    }
};

Status run_round(const Layer& layer, Round& round, Work& work, std::vector<int16_t>& chosen, int threads) {
    Exchange& exchange = round.exchange;
    Segment& own = exchange.segments[exchange.rank];
    work.clear();
    if (round.pieces == 2) {
        for (int64_t r = 0; r < exchange.layout.size; ++r)
            if (r != exchange.rank)
                if (const Status status = exchange.wait_for_tokens(r, round.counts[r])) return status;
        round.choose(chosen);
    }
    int64_t taken = 0;
    for (int64_t r = 0; r < exchange.layout.size; ++r) {
        if (r != exchange.rank)
            if (const Status status = exchange.wait_for_tokens(r, round.counts[r])) return status;
        work.begins.push_back(taken);
        taken += round.take(work, r);
    }
    // this must not be done earlier: a peer that has not published its tokens may still read the sums of the last round
    std::copy(work.begins.begin(), work.begins.end(), own.sums_begin());
    const Choices choices{work.choices.data(), 4, work.weights.data(), 4, exchange.layout.top_k};
    if (const int status = sum_of_experts(layer, work.rows.data(), taken, choices, {own.all_sums(), round.pieces}, threads))
        return Status(status);
    exchange.publish(own.header().sums, exchange.round);
    for (int64_t r = 0; r < exchange.layout.size; ++r)
        if (r != exchange.rank)
            if (const Status status = exchange.wait_for_sums(r)) return status;
    return kDone;
}

} // namespace
} // namespace emoe

using namespace emoe;

// Computes a layer's experts for the tokens of all workers. For this rank's x [T, H], choices [T, K] and weights [T, K],
// out [T, H] gets the weighted sums. Every rank calls this function for every layer of a step, with as many tokens as it
// gave to `emoe_exchange_begin`. Tokens travel in rounds of what a segment holds. `routes` [W, E] is the rank that computes
// expert E for the tokens of rank W. width, num_experts, tables and the arguments from bits to limit are as in
// `emoe_experts`. Returns a Status.
extern "C" int emoe_exchange_layer(Exchange* exchange, int64_t width, int64_t num_experts, const void* const* tables,
                                   int bits, int interleaved, int gate, float alpha, float limit, Supply* supply,
                                   const int16_t* routes, const bf16* x, const int64_t* choices, const float* weights,
                                   bf16* out, int threads) {
    const int64_t rank = exchange->rank, hidden = exchange->layout.hidden, top_k = exchange->layout.top_k;
    const Layer layer{hidden, width, num_experts, tables, tables + num_experts, tables + 2 * num_experts,
                      tables + 3 * num_experts, bits, interleaved, gate, alpha, limit, supply};
    const std::vector<int64_t>& tokens = exchange->step_tokens;
    const int64_t most = *std::max_element(tokens.begin(), tokens.end());
    const int64_t pieces = Routes{routes, exchange->layout.size, num_experts}.replicated() ? 2 : 1;
    const int64_t capacity = exchange->layout.capacity / pieces;
    const int64_t rounds = std::max<int64_t>(1, (most + capacity - 1) / capacity);
    Round round{*exchange, routes, num_experts, pieces, exchange->counts};
    thread_local Work work; // kept from call to call, since fresh memory costs page faults
    thread_local std::vector<int16_t> chosen;
    for (int64_t n = 0; n < rounds; ++n) {
        exchange->counts.clear();
        for (int64_t all : tokens) exchange->counts.push_back(all * (n + 1) / rounds - all * n / rounds);
        const int64_t first = tokens[rank] * n / rounds;
        exchange->begin_round();
        round.routes = routes;
        round.publish_tokens(x + first * hidden, choices + first * top_k, weights + first * top_k);
        if (const Status status = run_round(layer, round, work, chosen, threads)) return status;
        round.combine(out + first * hidden);
    }
    return kDone;
}

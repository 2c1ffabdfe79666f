// The attention half of a decoder layer in one call: normalise, project, rotate, attend, project, add, normalise.
//
// Decoding steps are short: Python and torch took a sixth of a step of one sequence to call these dozen parts. The parts
// are the same that modules call one by one, in the same order, so the result has the same bits.
//
// A step of few tokens mostly reads matrices. Where one worker of a node alone has tokens, the others would only wait for
// its hidden states. So they compute some columns of its products and of its output head, each with its own copy of the
// trunk. A column does not depend on who computes it.
#include "layer/block.h"

#include "layer/calls.h"
#include "products/gemm.h"

#include <omp.h>

#include <algorithm>
#include <iterator>
#include <vector>

namespace emoe {
namespace {

bf16* of_size(std::vector<bf16>& scratch, int64_t size) {
    if (int64_t(scratch.size()) < size) scratch.resize(size);
    return scratch.data();
}

// Linear layers of the same rows. Their results [tokens, columns] follow one another.
struct Products {
    int64_t depth, count;
    const Matrix* matrices[3];
    int64_t columns[3];

    // Computes a share of each product's panels.
    void compute(const bf16* x, int64_t tokens, bf16* out, int index, int shares, int threads) const {
        Product products[3];
        for (int64_t i = 0; i < count; out += tokens * columns[i++]) products[i] = {*matrices[i], columns[i], out};
        linear_share(x, tokens, depth, depth, products, count, index, shares, threads);
    }
    // Copies what `compute` has written for such a share.
    void copy(const bf16* from, int64_t tokens, bf16* to, int index, int shares) const {
        for (int64_t i = 0; i < count; ++i) {
            const Share share(panels(columns[i]), index, shares);
            const int64_t begin = share.begin * kPanel, end = std::min(columns[i], share.end * kPanel);
            for (int64_t t = 0; t < tokens; ++t, from += columns[i], to += columns[i])
                if (begin < end) std::memcpy(to + begin, from + begin, (end - begin) * sizeof(bf16));
        }
    }
    // Whether question and answer have room where they lie.
    bool fit(int64_t tokens, const Layout& layout) const {
        int64_t all = 0;
        for (int64_t i = 0; i < count; ++i) all += columns[i];
        return tokens * depth <= layout.capacity * layout.hidden && tokens * all <= layout.answer_size();
    }
};

// The products of a block: those before attention (kBefore), and the one after it (kAfter).
Products products_of(const Block& b, int number) {
    if (number == kAfter) return {b.heads * b.value_size, 1, {&b.out}, {b.hidden}};
    return {b.hidden, b.value.packed == nullptr ? 2 : 3, {&b.query, &b.key, &b.value},
            {b.heads * b.query_step(), b.key_heads * b.key_size, b.key_heads * b.value_size}};
}
Products products_of(const Head& head) { return {head.depth, 1, {&head.matrix}, {head.columns}}; }

// Scales each number of `attended` [tokens, heads, value_size] by the logistic function of its gate, with the roundings of
// single operators.
void scale_by_gates(const Block& b, const bf16* q, int64_t tokens, bf16* attended, bool shared, int threads) {
#pragma omp parallel for num_threads(threads) if (shared)
    for (int64_t i = 0; i < tokens * b.heads; ++i) {
        const bf16* gate = q + i * b.query_step() + b.key_size;
        bf16* out = attended + i * b.value_size;
        for (int64_t c = 0; c < b.value_size; c += 16) {
            const Lanes lanes = lanes_before(c, b.value_size);
            const Floats share = rounded(over_logistic(all(1.f), load(gate + c, lanes)));
            store(out + c, mul(load(out + c, lanes), share), lanes);
        }
    }
}

int bits_of(uint64_t mask) { return __builtin_popcountll(mask); }

// Computes products, with those ranks that wait for the question of this number.
int multiply(const Products& products, int number, const bf16* x, int64_t tokens, bf16* out, Exchange* exchange, int threads) {
    uint64_t helpers = 0;
    uint32_t question = 0;
    if (exchange != nullptr && tokens > 0 && products.fit(tokens, exchange->layout)) {
        question = exchange->question(number);
        helpers = exchange->ready_for(question);
    }
    if (helpers != 0) {
        const Segment& own = exchange->segments[exchange->rank];
        std::memcpy(own.rows(), x, tokens * products.depth * sizeof(bf16));
        own.header().asked_rows = tokens;
        exchange->ask(question, helpers);
    }
    const int shares = 1 + bits_of(helpers);
    products.compute(x, tokens, out, 0, shares, threads);
    int index = 0;
    for (int64_t peer = 0; helpers >> peer != 0 && peer < 64; ++peer) {
        if (!(helpers >> peer & 1)) continue;
        if (const int status = exchange->wait_for_answer(peer, question)) return status;
        products.copy(exchange->segments[peer].answer(), tokens, out, ++index, shares);
    }
    return kDone;
}

// Helps the rank `asker` with products, if it asks the question of this number.
int help(const Products& products, int number, Exchange& exchange, int64_t asker, int threads) {
    const Segment &from = exchange.segments[asker], &own = exchange.segments[exchange.rank];
    const uint32_t question = exchange.question(number);
    bool mine = false;
    if (const int status = exchange.wait_for_question(asker, question, mine)) return status;
    if (!mine) return kDone;
    const uint64_t helpers = from.header().helpers;
    const int index = 1 + bits_of(helpers & ((uint64_t(1) << exchange.rank) - 1));
    products.compute(from.rows(), from.header().asked_rows, own.answer(), index, 1 + bits_of(helpers), threads);
    exchange.publish(own.header().answered, question);
    return kDone;
}

} // namespace

int help_with_block(const Block& block, Exchange& exchange, int64_t asker, int threads) {
    for (int number : {kBefore, kAfter})
        if (const int status = help(products_of(block, number), number, exchange, asker, threads)) return status;
    return kDone;
}

int help_with_head(const Head& head, Exchange& exchange, int64_t asker, int threads) {
    return help(products_of(head), kHead, exchange, asker, threads);
}

int run_block(const Block& b, const BlockStep& step, Exchange* exchange, int threads) {
    const int64_t tokens = step.tokens, rotated = step.rotated;
    const int64_t wide = b.heads * b.query_step(), narrow = b.key_heads * b.key_size, values_wide = b.key_heads * b.value_size;
    // this memory is kept from call to call, since fresh memory costs page faults
    thread_local std::vector<bf16> scratch, a_scratch;
    bf16* q = of_size(scratch, tokens * (wide + narrow + values_wide));
    bf16 *k = q + tokens * wide, *v = k + tokens * narrow;
    bf16* attended = of_size(a_scratch, tokens * b.heads * b.value_size);
    const bool shared = threads > 1 && tokens >= 16;
#pragma omp parallel for num_threads(threads) if (shared)
    for (int64_t t = 0; t < tokens; ++t) b.before(step.x + t * b.hidden, b.hidden, step.normed + t * b.hidden);
    const bf16* input = b.before.weight == nullptr ? step.x : step.normed;
    if (const int status = multiply(products_of(b, kBefore), kBefore, input, tokens, q, exchange, threads)) return status;
    if (b.value.packed == nullptr) std::memcpy(v, k, tokens * values_wide * sizeof(bf16));
#pragma omp parallel for num_threads(threads) if (shared)
    for (int64_t t = 0; t < tokens; ++t) {
        const auto normalise = [&] {
            if (b.gated)
                for (bf16* head = q + t * wide; head < q + (t + 1) * wide; head += b.query_step())
                    b.query_norm(head, b.key_size, head);
            else b.query_norm(q + t * wide, wide, q + t * wide);
            b.key_norm(k + t * narrow, narrow, k + t * narrow);
        };
        if (!b.turns_first) normalise();
        b.value_norm(v + t * values_wide, values_wide, v + t * values_wide);
        const bf16 *cosine = step.cosines + t * rotated, *sine = step.sines + t * rotated;
        for (bf16* head = q + t * wide; head < q + (t + 1) * wide; head += b.query_step())
            rotate_row(head, cosine, sine, rotated, head);
        for (bf16* head = k + t * narrow; head < k + (t + 1) * narrow; head += b.key_size)
            rotate_row(head, cosine, sine, rotated, head);
        if (b.turns_first) normalise();
    }
    const int64_t strides[6] = {b.query_step(), wide, b.key_size, narrow, b.value_size, values_wide};
    emoe_attention(q, k, v, strides, b.heads, b.key_heads, b.key_size, b.value_size, step.keys, step.values, step.block_size,
                   step.sequences, step.num_sequences, step.tables, b.scale, step.window, 0.f, b.sinks, attended, threads);
    if (b.gated) scale_by_gates(b, q, tokens, attended, shared, threads);
    if (const int status = multiply(products_of(b, kAfter), kAfter, attended, tokens, step.sum, exchange, threads)) return status;
    for (int64_t t = 0; t < tokens; ++t) {
        b.behind(step.sum + t * b.hidden, b.hidden, step.sum + t * b.hidden);
        if (b.factor != 1.f) scale_row(b.hidden, b.factor, step.sum + t * b.hidden);
    }
    add_and_normalise(step.x, tokens, b.hidden, b.after, step.sum, step.normed, threads);
    return kDone;
}

} // namespace emoe

using namespace emoe;

// x [T, H] is the layer's input. `sum` [T, H] becomes x plus the output of attention, and `normed` [T, H] becomes `sum`
// after the norm of the feed-forward half, if there is one. cosines and sines are [T, rotated]: so many numbers of each head,
// the first ones, are rotated. Other arguments are as in emoe_attention.
extern "C" void emoe_block(const Block* block, const bf16* x, int64_t tokens, const bf16* cosines, const bf16* sines,
                           int64_t rotated, bf16* keys, bf16* values, int64_t block_size, const void* sequences,
                           int64_t num_sequences, const int32_t* tables, int64_t window, bf16* sum, bf16* normed, int threads) {
    run_block(*block, {x, cosines, sines, tokens, rotated, keys, values, block_size, sequences, num_sequences, tables, window,
                       sum, normed}, nullptr, threads);
}

// Computes the output head of the last layer's tokens, x [rows, depth], on the rank that may ask others for help in this
// step, or without help on any other. Returns a Status.
extern "C" int emoe_head(Exchange* exchange, const Head* head, const bf16* x, int64_t rows, bf16* out, int threads) {
    const bool helped = exchange->asker() == exchange->rank;
    return multiply(products_of(*head), kHead, x, rows, out, helped ? exchange : nullptr, threads);
}

// Writes the bytes of the structures that model/native/structs.py mirrors, in its order.
extern "C" void emoe_block_sizes(int64_t* sizes) {
    const int64_t all[] = {sizeof(Norm), sizeof(Matrix), sizeof(Block), sizeof(Head)};
    std::copy(std::begin(all), std::end(all), sizes);
}

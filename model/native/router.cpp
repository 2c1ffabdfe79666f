// Chooses the experts of each token: computes the scores of all experts, takes the best few, and normalises their scores.
#include "calls.h"
#include "vector.h"

#include <omp.h>

#include <algorithm>
#include <vector>

using namespace emoe;

namespace {

// Replaces the logits of a row's experts by their probabilities.
void soften(float* row, int64_t experts) {
    const Floats shift = all(*std::max_element(row, row + experts));
    Floats total = zero();
    for (int64_t e = 0; e < experts; e += 16) {
        const Lanes lanes = lanes_before(e, experts);
        const Floats weight = chosen(lanes, exponential(sub(load(row + e, lanes), shift)), zero());
        total = add(total, weight);
        store(row + e, weight, lanes);
    }
    const Floats whole = all(sum(total));
    for (int64_t e = 0; e < experts; e += 16) {
        const Lanes lanes = lanes_before(e, experts);
        store(row + e, div(load(row + e, lanes), whole), lanes);
    }
}

// Takes the `top_k` largest scores out of a row, largest first. Of equal scores, the first expert comes first.
void choose(float* row, int64_t experts, int64_t top_k, bool normalise, float* scores, int64_t* index) {
    float total = 0.f;
    for (int64_t k = 0; k < top_k; ++k) {
        int64_t at = 0;
        for (int64_t e = 1; e < experts; ++e)
            if (row[e] > row[at]) at = e;
        scores[k] = row[at];
        index[k] = at;
        total += scores[k];
        row[at] = -1.f;
    }
    for (int64_t k = 0; normalise && k < top_k; ++k) scores[k] /= total;
}

} // namespace

// Computes the logits [rows, experts] of x [rows, depth], and a softmax over them. `scores` and `index` [rows, top_k] get
// its `top_k` largest values and their experts. If `normalise`, the scores of a row are scaled to add up to 1.
extern "C" void emoe_route(const bf16* x, int64_t rows, int64_t depth, const bf16* packed, const bf16* bias, int64_t experts,
                           int64_t top_k, int normalise, bf16* logits, float* scores, int64_t* index, int threads) {
    emoe_linear(x, rows, depth, depth, packed, experts, bias, logits, threads);
#pragma omp parallel num_threads(threads) if (threads > 1 && rows >= 16)
    {
        std::vector<float> row(experts);
#pragma omp for
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t e = 0; e < experts; ++e) row[e] = to_float(logits[r * experts + e]);
            soften(row.data(), experts);
            choose(row.data(), experts, top_k, normalise, scores + r * top_k, index + r * top_k);
        }
    }
}

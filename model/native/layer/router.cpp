// Chooses the experts of each token: computes the scores of all experts, takes the best few, and normalises their scores.
#include "layer/calls.h"
#include "products/forms.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
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

// Replaces the logits of a row's experts by their logistic function.
void squash(float* row, int64_t experts) {
    for (int64_t e = 0; e < experts; e += 16) {
        const Lanes lanes = lanes_before(e, experts);
        store(row + e, over_logistic(all(1.f), load(row + e, lanes)), lanes);
    }
}

using Scored = std::pair<float, int64_t>;

// Brings the `count` largest values to the front. torch.topk uses the same functions of the standard library, so of equal
// values it takes the same ones.
void bring_largest(std::vector<Scored>& values, int64_t count) {
    const auto before = [](const Scored& x, const Scored& y) {
        return (std::isnan(x.first) && !std::isnan(y.first)) || x.first > y.first;
    };
    if (count * 64 <= int64_t(values.size()))
        std::partial_sort(values.begin(), values.begin() + count, values.end(), before);
    else if (count > 0)
        std::nth_element(values.begin(), values.begin() + count - 1, values.end(), before);
}

// Groups of experts that follow one another. Only the experts of the `chosen` best groups may be chosen. A group is as good
// as the sum of its `best` largest values.
struct Groups {
    int64_t count, chosen, best;

    // Makes the values of all other groups as small as can be.
    void restrict_to_best(std::vector<Scored>& values, std::vector<Scored>& scratch, std::vector<Scored>& ranked) const {
        const int64_t size = values.size() / count;
        ranked.resize(count);
        for (int64_t g = 0; g < count; ++g) {
            scratch.assign(values.begin() + g * size, values.begin() + (g + 1) * size);
            bring_largest(scratch, std::min(best, size));
            float total = 0.f;
            for (int64_t i = 0; i < std::min(best, size); ++i) total += scratch[i].first;
            ranked[g] = {total, g};
        }
        bring_largest(ranked, chosen);
        for (int64_t i = chosen; i < count; ++i)
            for (int64_t e = ranked[i].second * size; e < (ranked[i].second + 1) * size; ++e)
                values[e].first = -std::numeric_limits<float>::infinity();
    }
};

} // namespace

// Computes the logits [rows, experts] of x [rows, depth] in float32, rounded to bfloat16 unless `wide`, and makes a score of
// each: by the logistic function if `logistic`, else by a softmax over the row. The `top_k` experts with the largest sums of
// score and `bias` [experts], which may be null, are chosen among the best groups. `scores` and `index` [rows, top_k] get
// their scores without the bias, which add up to 1 if `normalise`, times `scale`.
extern "C" void emoe_route_scored(const bf16* x, int64_t rows, int64_t depth, const bf16* packed, int64_t experts, int wide,
                                  int logistic, const float* bias, int64_t groups, int64_t top_groups, int64_t best,
                                  int64_t top_k, int normalise, float scale, float* logits, float* scores, int64_t* index,
                                  int threads) {
    emoe_linear_wide(x, rows, depth, depth, packed, experts, logits, threads);
    const Groups limit{groups, top_groups, best};
#pragma omp parallel num_threads(threads) if (threads > 1 && rows >= 16)
    {
        std::vector<float> row(experts);
        std::vector<Scored> values(experts), scratch, ranked;
#pragma omp for
        for (int64_t r = 0; r < rows; ++r) {
            float* own = logits + r * experts;
            for (int64_t e = 0; !wide && e < experts; e += 16) {
                const Lanes lanes = lanes_before(e, experts);
                store(own + e, rounded(load(own + e, lanes)), lanes);
            }
            std::copy(own, own + experts, row.begin());
            if (logistic) squash(row.data(), experts);
            else soften(row.data(), experts);
            for (int64_t e = 0; e < experts; ++e) values[e] = {bias == nullptr ? row[e] : row[e] + bias[e], e};
            if (top_groups < groups) limit.restrict_to_best(values, scratch, ranked);
            bring_largest(values, top_k);
            float total = 0.f;
            for (int64_t k = 0; k < top_k; ++k) {
                index[r * top_k + k] = values[k].second;
                total += row[values[k].second];
            }
            for (int64_t k = 0; k < top_k; ++k) {
                const float score = row[values[k].second];
                scores[r * top_k + k] = (normalise ? score / total : score) * scale;
            }
        }
    }
}

// Computes the logits [rows, experts] of x [rows, depth], and a softmax over them. `scores` and `index` [rows, top_k] get
// its `top_k` largest values and their experts. If `normalise`, the scores of a row are scaled to add up to 1.
extern "C" void emoe_route(const bf16* x, int64_t rows, int64_t depth, const bf16* packed, const bf16* bias, int64_t experts,
                           int64_t top_k, int normalise, bf16* logits, float* scores, int64_t* index, int threads) {
    emoe_linear(x, rows, depth, depth, packed, kBits16, experts, bias, logits, threads);
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

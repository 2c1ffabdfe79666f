// Chooses replicas by the tokens of a round. See replicas.h.
#include "moe/replicas.h"

#include <algorithm>
#include <numeric>

namespace emoe {
namespace {

constexpr int64_t kReadTokens = 8; // tokens that take as long as an expert's weights take to be read: READ_TOKENS in Python

struct Chooser {
    const Routes& routes;
    const int32_t* tokens;
    std::vector<int16_t>& chosen;
    std::vector<int64_t> busy, apart;                  // [W]
    std::vector<int64_t> holders, sources, split_ranks; // of one expert

    int64_t of(int64_t source, int64_t expert) const { return tokens[source * routes.num_experts + expert]; }

    void find_holders(int64_t expert) {
        holders.clear();
        for (int64_t r = 0; r < routes.size; ++r)
            if (routes.holds(r, expert)) holders.push_back(r);
    }

    int64_t most(const std::vector<int64_t>& load) const {
        int64_t found = 0;
        for (int64_t r : holders) found = std::max(found, load[r]);
        return found;
    }

    // The replica of each rank's tokens, where each rank's tokens stay together. Its own one among equals.
    void split(int64_t expert) {
        apart = busy;
        split_ranks.assign(routes.size, holders[0]);
        std::vector<char> read(routes.size);
        sources.resize(routes.size);
        std::iota(sources.begin(), sources.end(), 0);
        std::stable_sort(sources.begin(), sources.end(),
                         [&](int64_t a, int64_t b) { return of(a, expert) > of(b, expert); });
        for (int64_t source : sources) {
            if (of(source, expert) == 0) break;
            int64_t best = -1, best_end = 0;
            for (int64_t r : holders) {
                const int64_t end = apart[r] + (read[r] ? 0 : kReadTokens);
                if (best < 0 || end < best_end || (end == best_end && r == source)) best = r, best_end = end;
            }
            split_ranks[source] = best;
            apart[best] = best_end + of(source, expert);
            read[best] = true;
        }
    }

    void place(int64_t expert, int64_t total) {
        find_holders(expert);
        const int64_t rank = *std::min_element(holders.begin(), holders.end(),
                                               [&](int64_t a, int64_t b) { return busy[a] < busy[b]; });
        const int64_t cost = total + kReadTokens, whole = busy[rank] + cost;
        if (cost > 2 * kReadTokens) {
            split(expert);
            if (most(apart) < std::max(whole, most(busy))) {
                busy.swap(apart);
                for (int64_t r = 0; r < routes.size; ++r) set(r, expert, split_ranks[r]);
                return;
            }
        }
        busy[rank] = whole;
        for (int64_t r = 0; r < routes.size; ++r) set(r, expert, rank);
    }

    void set(int64_t source, int64_t expert, int64_t rank) { chosen[source * routes.num_experts + expert] = int16_t(rank); }
};

} // namespace

bool Routes::replicated() const {
    for (int64_t e = 0; e < num_experts; ++e)
        for (int64_t r = 1; r < size; ++r)
            if (at(r, e) != at(0, e)) return true;
    return false;
}

void choose_replicas(const Routes& routes, const int32_t* tokens, std::vector<int16_t>& chosen) {
    chosen.assign(routes.table, routes.table + routes.size * routes.num_experts);
    Chooser chooser{routes, tokens, chosen, std::vector<int64_t>(routes.size), {}, {}, {}, {}};
    std::vector<int64_t> total(routes.num_experts), heaviest;
    for (int64_t e = 0; e < routes.num_experts; ++e) {
        bool alone = true;
        for (int64_t r = 0; r < routes.size; ++r) {
            total[e] += chooser.of(r, e);
            alone = alone && routes.at(r, e) == routes.at(0, e);
        }
        if (total[e] == 0) continue;
        if (alone)
            chooser.busy[routes.at(0, e)] += total[e] + kReadTokens;
        else
            heaviest.push_back(e);
    }
    std::stable_sort(heaviest.begin(), heaviest.end(), [&](int64_t a, int64_t b) { return total[a] > total[b]; });
    for (int64_t e : heaviest) chooser.place(e, total[e]);
}

} // namespace emoe

using namespace emoe;

// For tests: chosen [W, E] by routes [W, E] and tokens [W, E].
extern "C" void emoe_choose_replicas(int64_t size, int64_t num_experts, const int16_t* routes, const int32_t* tokens,
                                     int16_t* chosen) {
    std::vector<int16_t> found;
    choose_replicas({routes, size, num_experts}, tokens, found);
    std::copy(found.begin(), found.end(), chosen);
}

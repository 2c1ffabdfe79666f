// Which replica computes an expert's tokens in a round whose choices are known: optimizer/buffering/replicas.py in C++, which
// says how, and is its oracle.
#pragma once

#include <cstdint>
#include <vector>

namespace emoe {

// Replicas by the placement alone: routes [W, E] is the rank that computes expert E for the tokens of rank W. A rank that
// holds a replica uses its own, so the table also says who holds what.
struct Routes {
    const int16_t* table;
    int64_t size, num_experts;

    int16_t at(int64_t source, int64_t expert) const { return table[source * num_experts + expert]; }
    bool holds(int64_t rank, int64_t expert) const { return at(rank, expert) == rank; }
    // Whether some expert has more than one replica.
    bool replicated() const;
};

// chosen [W, E]: the rank that computes the tokens [W, E] of each rank, so that the busiest rank has least. All ranks that
// know the tokens come to the same table.
void choose_replicas(const Routes& routes, const int32_t* tokens, std::vector<int16_t>& chosen);

} // namespace emoe

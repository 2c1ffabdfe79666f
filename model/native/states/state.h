// Layers that keep a matrix of floats per head and sequence, and convolutions over tokens: what they share.
//
// Single tokens of many sequences: a step reads each state from one slot and writes it to another one. Nearly all of the
// time is memory traffic, so a matrix is read from memory once and written once.
//
// Scans over the tokens of one sequence: token by token, in the order of a single token's operations. So a prompt leaves the
// same bits in whatever chunks it is run. A part of a matrix that the L1 cache holds goes through all tokens before the next.
#pragma once
#include "vector.h"

#include <omp.h>

#include <cmath>
#include <cstring>
#include <vector>

namespace emoe {

constexpr int64_t LANES = 16;
constexpr int64_t kStateAhead = 1024; // floats that are fetched in advance

// Writes a part of a state. States that nobody reads before the next step are written past the caches: otherwise the memory
// that they overwrite would be read first.
template <bool Streams> void put(float* to, Floats value, Lanes lanes = 0xffff) {
    if (Streams) stream(to, value);
    else store(to, value, lanes);
}

// Whether states can be streamed whose rows have `columns` floats.
inline bool can_stream(const float* states, int64_t columns) { return columns % LANES == 0 && uintptr_t(states) % 64 == 0; }

// The state that a scan begins with: `begin`, or zeros if it is null.
inline void begin_state(const float* begin, int64_t at, int64_t size, float* state) {
    if (begin != nullptr) std::memcpy(state + at, begin + at, size * sizeof(float));
    else std::memset(state + at, 0, size * sizeof(float));
}

// Numbers that are floats or bfloat16.
inline Floats load_as(int wide, const void* from, int64_t at, Lanes lanes) {
    return wide ? load((const float*)from + at, lanes) : load((const bf16*)from + at, lanes);
}
inline float load_as(int wide, const void* from, int64_t at) { return wide ? ((const float*)from)[at] : to_float(((const bf16*)from)[at]); }
inline void write_as(int wide, const float* from, int64_t count, void* to, int64_t at) {
    for (int64_t c = 0; c < count; c += LANES) {
        const Lanes lanes = lanes_before(c, count);
        if (wide) store((float*)to + at + c, load(from + c, lanes), lanes);
        else store((bf16*)to + at + c, load(from + c, lanes), lanes);
    }
}

// The rows of a step by sequence: those of segment n are rows[n] to rows[n + 1]. They begin with the states of slot
// sources[n], or with zeros if that is negative, and leave theirs in slot targets[n]. Segments run in order, so that one may
// begin with what an earlier one has left. One without rows copies states.
struct Segments {
    int64_t count;
    const int64_t *rows, *sources, *targets;
};

// Short convolutions of all segments, in place: x [rows, channels]. Other arguments are as in emoe_convolve.
void convolve_segments(const Segments& segments, int64_t channels, int64_t width, const bf16* weight, const bf16* bias,
                       bool silu, bf16* states, bf16* x, int threads);

} // namespace emoe

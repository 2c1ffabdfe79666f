// Layers that keep a matrix of floats per head and sequence: the gated delta rule (also with a decay for each channel, as in
// KDA), Mamba-2 and Mamba; and short convolutions over tokens.
//
// Single tokens of many sequences: a step reads each state from one slot and writes it to another one. Nearly all of the
// time is memory traffic, so a matrix is read from memory once and written once.
//
// Scans over the tokens of one sequence: token by token, in the order of a single token's operations. So a prompt leaves the
// same bits in whatever chunks it is run. A part of a matrix that the L1 cache holds goes through all tokens before the next.
#include "vector.h"

#include <omp.h>

#include <cstring>
#include <vector>

using namespace emoe;

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t kAhead = 1024; // floats that are fetched in advance

// Writes a part of a state. States that nobody reads before the next step are written past the caches: otherwise the memory
// that they overwrite would be read first.
template <bool Streams> void put(float* to, Floats value, Lanes lanes) {
    if (Streams) stream(to, value);
    else store(to, value, lanes);
}

// Whether states can be streamed whose rows have `columns` floats.
bool can_stream(const float* states, int64_t columns) { return columns % LANES == 0 && uintptr_t(states) % 64 == 0; }

// The inputs of one head of one sequence. A matrix is [key_size, value_size].
struct Head {
    const float *query, *key, *value, *decay;
    int64_t decay_step; // 1 if each key channel has a decay of its own, else 0
    float beta;
};

// Columns `first` to `first + 16 * Width` of the matrix `from`, which become those of `to`.
template <int Width, bool Streams>
void delta_columns(const Head& head, int64_t key_size, int64_t value_size, int64_t first, const float* from, float* to,
                   float* out) {
    Lanes lanes[Width];
    Floats found[Width], change[Width], sum[Width];
    for (int w = 0; w < Width; ++w) {
        lanes[w] = lanes_before(first + w * LANES, value_size);
        found[w] = sum[w] = zero();
    }
    for (int64_t k = 0; k < key_size; ++k) {
        const Floats key = all(head.key[k] * head.decay[k * head.decay_step]);
        for (int w = 0; w < Width; ++w) {
            const float* at = from + k * value_size + first + w * LANES;
            if (Streams) _mm_prefetch((const char*)(at + kAhead), _MM_HINT_T0);
            found[w] = fused(load(at, lanes[w]), key, found[w]);
        }
    }
    for (int w = 0; w < Width; ++w)
        change[w] = mul(sub(load(head.value + first + w * LANES, lanes[w]), found[w]), all(head.beta));
    for (int64_t k = 0; k < key_size; ++k) {
        const Floats key = all(head.key[k]), query = all(head.query[k]), decay = all(head.decay[k * head.decay_step]);
        for (int w = 0; w < Width; ++w) {
            const int64_t at = k * value_size + first + w * LANES;
            const Floats now = fused(key, change[w], mul(load(from + at, lanes[w]), decay));
            put<Streams>(to + at, now, lanes[w]);
            sum[w] = fused(now, query, sum[w]);
        }
    }
    for (int w = 0; w < Width; ++w) store(out + first + w * LANES, sum[w], lanes[w]);
}

template <bool Streams>
void delta_head(const Head& head, int64_t key_size, int64_t value_size, const float* from, float* to, float* out) {
    int64_t first = 0;
    for (; first + 3 * LANES < value_size; first += 4 * LANES)
        delta_columns<4, Streams>(head, key_size, value_size, first, from, to, out);
    for (; first < value_size; first += LANES)
        delta_columns<1, Streams>(head, key_size, value_size, first, from, to, out);
    if (Streams) _mm_sfence();
}

// One token of one head of Mamba-2: `kept` is what the matrix [head_size, state_size] is scaled by.
template <bool Streams>
void selective_head(float kept, const float* inputs, const float* read, const float* written, int64_t head_size,
                    int64_t state_size, const float* from, float* to, float* out) {
    const Floats decay = all(kept);
    for (int64_t p = 0; p < head_size; ++p) {
        const Floats input = all(inputs[p]);
        Floats total = zero();
        for (int64_t n = 0; n < state_size; n += LANES) {
            const Lanes lanes = lanes_before(n, state_size);
            const Floats now =
                fused(input, load(written + n, lanes), mul(load(from + p * state_size + n, lanes), decay));
            put<Streams>(to + p * state_size + n, now, lanes);
            total = fused(now, load(read + n, lanes), total);
        }
        out[p] = sum(total);
    }
    if (Streams) _mm_sfence();
}

// One token of one channel of Mamba, whose state is [state_size].
float channel(float step, float input, const float* rates, const float* read, const float* written, int64_t state_size,
              const float* from, float* to) {
    const Floats wide = all(step), added = all(step * input);
    Floats total = zero();
    for (int64_t n = 0; n < state_size; n += LANES) {
        const Lanes lanes = lanes_before(n, state_size);
        const Floats kept = exponential(mul(wide, load(rates + n, lanes)));
        const Floats now = fused(added, load(written + n, lanes), mul(load(from + n, lanes), kept));
        store(to + n, now, lanes);
        total = fused(now, load(read + n, lanes), total);
    }
    return sum(total);
}

// The state that a scan begins with: `begin`, or zeros if it is null.
void begin_state(const float* begin, int64_t at, int64_t size, float* state) {
    if (begin != nullptr) std::memcpy(state + at, begin + at, size * sizeof(float));
    else std::memset(state + at, 0, size * sizeof(float));
}

// Replaces 16 values by their silu.
void activate(bf16* place, Lanes lanes) {
    const Floats x = load(place, lanes);
    store(place, over_logistic(x, x), lanes);
}

} // namespace

// One token of the gated delta rule for `rows` sequences. query and key [rows, key_heads, key_size], value [rows,
// value_heads, value_size], beta [rows, value_heads], decay [rows, value_heads], or [rows, value_heads, key_size] if
// `by_channel`. states [slots, value_heads, key_size, value_size]. out [rows, value_heads, value_size].
extern "C" void emoe_delta_rule(const float* query, const float* key, const float* value, const float* decay,
                                const float* beta, int64_t rows, int64_t key_heads, int64_t value_heads, int64_t key_size,
                                int64_t value_size, int by_channel, float* states, const int64_t* sources,
                                const int64_t* targets, float* out, int threads) {
    const int64_t group = value_heads / key_heads, matrix = key_size * value_size;
    const bool streams = can_stream(states, value_size);
#pragma omp parallel for num_threads(threads) if (threads > 1) collapse(2) schedule(static)
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t h = 0; h < value_heads; ++h) {
            const int64_t at = r * value_heads + h, shared = (r * key_heads + h / group) * key_size;
            const Head head{query + shared, key + shared, value + at * value_size,
                            decay + (by_channel ? at * key_size : at), by_channel ? 1 : 0, beta[at]};
            (streams ? delta_head<true> : delta_head<false>)(
                head, key_size, value_size, states + (sources[r] * value_heads + h) * matrix,
                states + (targets[r] * value_heads + h) * matrix, out + at * value_size);
        }
}

// One token of Mamba-2 for `rows` sequences. decay [rows, heads], inputs [rows, heads, head_size] (times the time step),
// read and written [rows, groups, state_size] (C and B in Mamba's words). states [slots, heads, head_size, state_size].
// out [rows, heads, head_size].
extern "C" void emoe_selective_update(const float* decay, const float* inputs, const float* read, const float* written,
                                      int64_t rows, int64_t heads, int64_t groups, int64_t head_size, int64_t state_size,
                                      float* states, const int64_t* sources, const int64_t* targets, float* out,
                                      int threads) {
    const int64_t group = heads / groups, matrix = head_size * state_size;
    const bool streams = can_stream(states, state_size);
#pragma omp parallel for num_threads(threads) if (threads > 1) collapse(2) schedule(static)
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t at = r * heads + h, shared = (r * groups + h / group) * state_size;
            const float* from = states + (sources[r] * heads + h) * matrix;
            float* to = states + (targets[r] * heads + h) * matrix;
            (streams ? selective_head<true> : selective_head<false>)(decay[at], inputs + at * head_size, read + shared,
                                                                     written + shared, head_size, state_size, from, to,
                                                                     out + at * head_size);
        }
}

// One token of Mamba for `rows` sequences, whose channels have a decay for each of their numbers: the state is scaled by
// e^(step * rate). steps and inputs [rows, channels], rates [channels, state_size] (A in Mamba's words), read and written
// [rows, state_size] (C and B). states [slots, channels, state_size]. out [rows, channels].
extern "C" void emoe_channel_update(const float* steps, const float* inputs, const float* rates, const float* read,
                                    const float* written, int64_t rows, int64_t channels, int64_t state_size, float* states,
                                    const int64_t* sources, const int64_t* targets, float* out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) collapse(2) schedule(static)
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < channels; ++c) {
            const int64_t at = r * channels + c, own = r * state_size;
            out[at] = channel(steps[at], inputs[at], rates + c * state_size, read + own, written + own, state_size,
                              states + (sources[r] * channels + c) * state_size,
                              states + (targets[r] * channels + c) * state_size);
        }
}

// One token of a convolution over tokens for each of `channels`, for `rows` sequences. x and out [rows, channels], states
// [slots, channels, width] are the last inputs, weight [channels, width], bias [channels] or null. As in PyTorch, sums are
// rounded before the activation.
extern "C" void emoe_convolve(const bf16* x, int64_t rows, int64_t channels, int64_t width, const bf16* weight,
                              const bf16* bias, int silu, bf16* states, const int64_t* sources, const int64_t* targets,
                              bf16* out, int threads) {
    const int64_t blocks = (channels + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) if (threads > 1) collapse(2) schedule(static)
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * LANES, end = std::min(first + LANES, channels);
            float sums[LANES] = {};
            for (int64_t c = first; c < end; ++c) {
                const bf16* from = states + (sources[r] * channels + c) * width;
                bf16* to = states + (targets[r] * channels + c) * width;
                const bf16* taps = weight + c * width;
                float total = bias ? to_float(bias[c]) : 0.f;
                for (int64_t k = 0; k + 1 < width; ++k) {
                    total += to_float(from[k + 1]) * to_float(taps[k]);
                    to[k] = from[k + 1];
                }
                to[width - 1] = x[r * channels + c];
                sums[c - first] = total + to_float(x[r * channels + c]) * to_float(taps[width - 1]);
            }
            const Lanes lanes = lanes_before(first, channels);
            bf16* place = out + r * channels + first;
            store(place, load(sums), lanes);
            if (silu) activate(place, lanes);
        }
}

// The gated delta rule over `tokens` tokens of one sequence. Arguments are as in emoe_delta_rule, with tokens in place of
// sequences. `state` [value_heads, key_size, value_size] becomes the last state; `begin` is the first one, or null.
extern "C" void emoe_delta_scan(const float* query, const float* key, const float* value, const float* decay,
                                const float* beta, int64_t tokens, int64_t key_heads, int64_t value_heads, int64_t key_size,
                                int64_t value_size, int by_channel, const float* begin, float* state, float* out,
                                int threads) {
    const int64_t group = value_heads / key_heads, matrix = key_size * value_size, wide = 4 * LANES;
    const int64_t parts = (value_size + wide - 1) / wide;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t h = 0; h < value_heads; ++h) begin_state(begin, h * matrix, matrix, state);
#pragma omp parallel for num_threads(threads) if (threads > 1) collapse(2) schedule(static)
    for (int64_t h = 0; h < value_heads; ++h)
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t t = 0; t < tokens; ++t) {
                const int64_t at = t * value_heads + h, shared = (t * key_heads + h / group) * key_size;
                const Head head{query + shared, key + shared, value + at * value_size,
                                decay + (by_channel ? at * key_size : at), by_channel ? 1 : 0, beta[at]};
                float* own = state + h * matrix;
                const int64_t end = std::min(value_size, (part + 1) * wide);
                if (end - part * wide > 3 * LANES)
                    delta_columns<4, false>(head, key_size, value_size, part * wide, own, own, out + at * value_size);
                else
                    for (int64_t first = part * wide; first < end; first += LANES)
                        delta_columns<1, false>(head, key_size, value_size, first, own, own, out + at * value_size);
            }
}

// Mamba-2 over `tokens` tokens of one sequence. Arguments are as in emoe_selective_update and emoe_delta_scan.
extern "C" void emoe_selective_scan(const float* decay, const float* inputs, const float* read, const float* written,
                                    int64_t tokens, int64_t heads, int64_t groups, int64_t head_size, int64_t state_size,
                                    const float* begin, float* state, float* out, int threads) {
    const int64_t group = heads / groups, matrix = head_size * state_size;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t h = 0; h < heads; ++h) {
        begin_state(begin, h * matrix, matrix, state);
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t at = t * heads + h, shared = (t * groups + h / group) * state_size;
            selective_head<false>(decay[at], inputs + at * head_size, read + shared, written + shared, head_size, state_size,
                           state + h * matrix, state + h * matrix, out + at * head_size);
        }
    }
}

// Mamba over `tokens` tokens of one sequence. Arguments are as in emoe_channel_update and emoe_delta_scan.
extern "C" void emoe_channel_scan(const float* steps, const float* inputs, const float* rates, const float* read,
                                  const float* written, int64_t tokens, int64_t channels, int64_t state_size,
                                  const float* begin, float* state, float* out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t c = 0; c < channels; ++c) {
        float* own = state + c * state_size;
        begin_state(begin, c * state_size, state_size, state);
        for (int64_t t = 0; t < tokens; ++t)
            out[t * channels + c] = channel(steps[t * channels + c], inputs[t * channels + c], rates + c * state_size,
                                            read + t * state_size, written + t * state_size, state_size, own, own);
    }
}

// A convolution over the tokens of one sequence for each channel. x and out [channels, tokens]; before the first token there
// are zeros. Other arguments are as in emoe_convolve.
extern "C" void emoe_convolve_tokens(const bf16* x, int64_t channels, int64_t tokens, int64_t width, const bf16* weight,
                                     const bf16* bias, int silu, bf16* out, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<bf16> padded(tokens + width - 1);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; ++c) {
            std::memcpy(padded.data() + width - 1, x + c * tokens, tokens * sizeof(bf16));
            const Floats shift = all(bias ? to_float(bias[c]) : 0.f);
            for (int64_t t = 0; t < tokens; t += LANES) {
                const Lanes lanes = lanes_before(t, tokens);
                Floats total = shift;
                for (int64_t k = 0; k < width; ++k)
                    total = add(total, mul(load(padded.data() + t + k, lanes), all(to_float(weight[c * width + k]))));
                store(out + c * tokens + t, total, lanes);
                if (silu) activate(out + c * tokens + t, lanes);
            }
        }
    }
}

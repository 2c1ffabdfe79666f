// One token of layers that keep a matrix of floats per head and sequence: the gated delta rule (also with a decay for each
// channel, as in KDA) and Mamba-2; and of short convolutions over tokens. A step reads each state from one slot and writes
// it to another one. Nearly all of the time is memory traffic, so a matrix is read from memory once and written once.
#include "vector.h"

#include <omp.h>

#include <vector>

using namespace emoe;

namespace {

constexpr int64_t LANES = 16;

// The inputs of one head of one sequence. A matrix is [key_size, value_size].
struct Head {
    const float *query, *key, *value, *decay;
    int64_t decay_step; // 1 if each key channel has a decay of its own, else 0
    float beta;
};

// Columns `first` to `first + 16 * Width` of the matrix `from`, which become those of `to`.
template <int Width>
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
        for (int w = 0; w < Width; ++w)
            found[w] = fused(load(from + k * value_size + first + w * LANES, lanes[w]), key, found[w]);
    }
    for (int w = 0; w < Width; ++w)
        change[w] = mul(sub(load(head.value + first + w * LANES, lanes[w]), found[w]), all(head.beta));
    for (int64_t k = 0; k < key_size; ++k) {
        const Floats key = all(head.key[k]), query = all(head.query[k]), decay = all(head.decay[k * head.decay_step]);
        for (int w = 0; w < Width; ++w) {
            const int64_t at = k * value_size + first + w * LANES;
            const Floats now = fused(key, change[w], mul(load(from + at, lanes[w]), decay));
            store(to + at, now, lanes[w]);
            sum[w] = fused(now, query, sum[w]);
        }
    }
    for (int w = 0; w < Width; ++w) store(out + first + w * LANES, sum[w], lanes[w]);
}

void delta_head(const Head& head, int64_t key_size, int64_t value_size, const float* from, float* to, float* out) {
    int64_t first = 0;
    for (; first + 3 * LANES < value_size; first += 4 * LANES)
        delta_columns<4>(head, key_size, value_size, first, from, to, out);
    for (; first < value_size; first += LANES) delta_columns<1>(head, key_size, value_size, first, from, to, out);
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
#pragma omp parallel for num_threads(threads) if (threads > 1) collapse(2) schedule(static)
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t h = 0; h < value_heads; ++h) {
            const int64_t at = r * value_heads + h, shared = (r * key_heads + h / group) * key_size;
            const Head head{query + shared, key + shared, value + at * value_size,
                            decay + (by_channel ? at * key_size : at), by_channel ? 1 : 0, beta[at]};
            delta_head(head, key_size, value_size, states + (sources[r] * value_heads + h) * matrix,
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
#pragma omp parallel for num_threads(threads) if (threads > 1) collapse(2) schedule(static)
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t at = r * heads + h, shared = (r * groups + h / group) * state_size;
            const float* from = states + (sources[r] * heads + h) * matrix;
            float* to = states + (targets[r] * heads + h) * matrix;
            const Floats kept = all(decay[at]);
            for (int64_t p = 0; p < head_size; ++p) {
                const Floats input = all(inputs[at * head_size + p]);
                Floats total = zero();
                for (int64_t n = 0; n < state_size; n += LANES) {
                    const Lanes lanes = lanes_before(n, state_size);
                    const Floats now = fused(input, load(written + shared + n, lanes),
                                             mul(load(from + p * state_size + n, lanes), kept));
                    store(to + p * state_size + n, now, lanes);
                    total = fused(now, load(read + shared + n, lanes), total);
                }
                out[at * head_size + p] = sum(total);
            }
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
            if (silu) {
                const Floats sum = load(place, lanes);
                store(place, div(sum, add(all(1.f), exponential(sub(zero(), sum)))), lanes);
            }
        }
}

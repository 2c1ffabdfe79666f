// Short convolutions over tokens, of each channel by itself.
#include "states/state.h"

using namespace emoe;

namespace {

// Of 16 channels.
using Four = uint64_t __attribute__((vector_size(128)));
using Bits = uint32_t __attribute__((vector_size(64)));
using Tokens = bf16 __attribute__((vector_size(32)));

// Replaces 16 values by their silu.
void activate(bf16* place, Lanes lanes) {
    const Floats x = load(place, lanes);
    store(place, over_logistic(x, x), lanes);
}

// One token of the channels from `first` to `end`: the inputs `from` [channels, width] become `to`, and sums of products with
// `weight` [channels, width] go to `sums`.
void step(const bf16* x, int64_t width, const bf16* weight, const bf16* bias, int64_t first, int64_t end, const bf16* from,
          bf16* to, float* sums) {
    for (int64_t c = first; c < end; ++c) {
        const bf16 *before = from + c * width, *taps = weight + c * width;
        float total = bias ? to_float(bias[c]) : 0.f;
        for (int64_t k = 0; k + 1 < width; ++k) {
            total += to_float(before[k + 1]) * to_float(taps[k]);
            to[c * width + k] = before[k + 1];
        }
        to[c * width + width - 1] = x[c];
        sums[c - first] = total + to_float(x[c]) * to_float(taps[width - 1]);
    }
}

// Number k of each of 16 channels of the usual width. The four numbers of a channel are one of 64 bits.
Floats part(const Four& all_four, int64_t k) {
    const Bits bits = __builtin_convertvector(all_four >> 16 * k, Bits) << 16;
    Floats out;
    static_assert(sizeof out == sizeof bits);
    std::memcpy(&out, &bits, sizeof bits);
    return out;
}

// The same as `step` for 16 channels of the usual width, with the same bits.
void step_of_four(const bf16* x, const bf16* weight, const bf16* bias, int64_t first, const bf16* from, bf16* to, float* sums) {
    Four now, taps;
    Tokens token;
    std::memcpy(&now, from + first * 4, sizeof now);
    std::memcpy(&taps, weight + first * 4, sizeof taps);
    std::memcpy(&token, x + first, sizeof token);
    now = now >> 16 | __builtin_convertvector(token, Four) << 48;
    std::memcpy(to + first * 4, &now, sizeof now);
    Floats total = zero();
    if (bias) total = load(bias + first);
    for (int64_t k = 0; k < 4; ++k) total = add(total, mul(part(now, k), part(taps, k)));
    store(sums, total);
}

// One token of the 16 channels from `first` on, or of those before `channels`, in any width. `x` and `out` are of this token.
void step_of_any(const bf16* x, int64_t channels, int64_t width, const bf16* weight, const bf16* bias, bool silu,
                 int64_t first, const bf16* from, bf16* to, bf16* out) {
    const int64_t end = std::min(first + LANES, channels);
    const Lanes lanes = lanes_before(first, channels);
    float sums[LANES] = {};
    if (width == 4 && end - first == LANES) step_of_four(x, weight, bias, first, from, to, sums);
    else step(x, width, weight, bias, first, end, from, to, sums);
    store(out + first, load(sums), lanes);
    if (silu) activate(out + first, lanes);
}

} // namespace

// One token of a convolution over tokens for each of `channels`, for `rows` sequences. x and out [rows, channels], states
// [slots, channels, width] are the last inputs, weight [channels, width], bias [channels] or null. As in PyTorch, sums are
// rounded before the activation.
extern "C" void emoe_convolve(const bf16* x, int64_t rows, int64_t channels, int64_t width, const bf16* weight,
                              const bf16* bias, int silu, bf16* states, const int64_t* sources, const int64_t* targets,
                              bf16* out, int threads) {
    const int64_t blocks = (channels + LANES - 1) / LANES, size = channels * width;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t r = 0; r < rows; ++r)
            step_of_any(x + r * channels, channels, width, weight, bias, silu, block * LANES, states + sources[r] * size,
                        states + targets[r] * size, out + r * channels);
}

void emoe::convolve_segments(const Segments& segments, int64_t channels, int64_t width, const bf16* weight, const bf16* bias,
                             bool silu, bf16* states, bf16* x, int threads) {
    const int64_t blocks = (channels + LANES - 1) / LANES, size = channels * width;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t each = (blocks + omp_get_num_threads() - 1) / omp_get_num_threads() * LANES;
        const int64_t begin = std::min(channels, omp_get_thread_num() * each), end = std::min(channels, begin + each);
        for (int64_t n = 0; n < segments.count; ++n) {
            bf16* to = states + segments.targets[n] * size;
            const bf16* from = states + segments.sources[n] * size;
            int64_t t = segments.rows[n];
            if (segments.sources[n] < 0) std::memset(to + begin * width, 0, (end - begin) * width * sizeof(bf16));
            else if (t == segments.rows[n + 1]) std::memcpy(to + begin * width, from + begin * width, (end - begin) * width * sizeof(bf16));
            if (segments.sources[n] < 0) from = to;
            for (; t < segments.rows[n + 1]; ++t, from = to)
                for (int64_t first = begin; first < end; first += LANES) {
                    bf16* row = x + t * channels;
                    step_of_any(row, channels, width, weight, bias, silu, first, from, to, row);
                }
        }
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

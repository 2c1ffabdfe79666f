// Short convolutions over tokens, of each channel by itself.
#include "states/state.h"

using namespace emoe;

namespace {

// Replaces 16 values by their silu.
void activate(bf16* place, Lanes lanes) {
    const Floats x = load(place, lanes);
    store(place, over_logistic(x, x), lanes);
}

} // namespace

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

// Mamba, which has a decay for each number of a channel's state.
#include "states/state.h"

using namespace emoe;

namespace {

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

} // namespace

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

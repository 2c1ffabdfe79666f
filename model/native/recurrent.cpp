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

#include <cmath>
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

// Numbers that are floats or bfloat16.
Floats load_as(int wide, const void* from, int64_t at, Lanes lanes) {
    return wide ? load((const float*)from + at, lanes) : load((const bf16*)from + at, lanes);
}
float load_as(int wide, const void* from, int64_t at) { return wide ? ((const float*)from)[at] : to_float(((const bf16*)from)[at]); }
void write_as(int wide, const float* from, int64_t count, void* to, int64_t at) {
    for (int64_t c = 0; c < count; c += LANES) {
        const Lanes lanes = lanes_before(c, count);
        if (wide) store((float*)to + at + c, load(from + c, lanes), lanes);
        else store((bf16*)to + at + c, load(from + c, lanes), lanes);
    }
}

// What emoe_delta_rule gets.
struct DeltaInputs {
    const void *query, *key, *value;
    int64_t query_stride, key_stride, value_stride;
    int wide, unit;
    const float *gates, *beta;
    int64_t key_heads, value_heads, key_size, value_size;
    int by_channel;
};

// The inputs of one head of one row, made ready, and its output. Each thread has one.
struct HeadBuffer {
    std::vector<float> query, key, value, decay, out;

    HeadBuffer(int64_t key_size, int64_t value_size)
        : query(key_size), key(key_size), value(value_size), decay(key_size), out(value_size) {}

    Head of(const DeltaInputs& in, int64_t row, int64_t h) {
        const int64_t shared = h / (in.value_heads / in.key_heads) * in.key_size, at = row * in.value_heads + h;
        take(in, in.query, row * in.query_stride + shared, 1.f / std::sqrt(float(in.key_size)), query);
        take(in, in.key, row * in.key_stride + shared, 1.f, key);
        for (int64_t c = 0; c < in.value_size; c += LANES) {
            const Lanes lanes = lanes_before(c, in.value_size);
            store(value.data() + c, load_as(in.wide, in.value, row * in.value_stride + h * in.value_size + c, lanes), lanes);
        }
        const int64_t gates = in.by_channel ? in.key_size : 1;
        for (int64_t c = 0; c < gates; c += LANES) {
            const Lanes lanes = lanes_before(c, gates);
            store(decay.data() + c, exponential(load(in.gates + at * gates + c, lanes)), lanes);
        }
        return {query.data(), key.data(), value.data(), decay.data(), in.by_channel ? 1 : 0, in.beta[at]};
    }

  private:
    // A query or a key: of length 1 if that is wanted, and times `scale`.
    void take(const DeltaInputs& in, const void* from, int64_t at, float scale, std::vector<float>& to) {
        Floats squares = zero();
        for (int64_t c = 0; c < in.key_size; c += LANES) {
            const Lanes lanes = lanes_before(c, in.key_size);
            const Floats value = load_as(in.wide, from, at + c, lanes);
            squares = fused(value, value, squares);
            store(to.data() + c, value, lanes);
        }
        const Floats factor = all(in.unit ? scale / std::sqrt(sum(squares) + 1e-6f) : scale);
        for (int64_t c = 0; c < in.key_size; c += LANES) {
            const Lanes lanes = lanes_before(c, in.key_size);
            store(to.data() + c, mul(load(to.data() + c, lanes), factor), lanes);
        }
    }
};

// What emoe_selective_update gets.
struct SelectiveInputs {
    const void *x, *steps, *read, *written;
    int64_t x_stride, steps_stride, read_stride, written_stride;
    int wide, softplus;
    const float *rates, *shift, *skip;
    float least, most;
    int64_t heads, groups, head_size, state_size;
};

// The inputs of one head of one row, made ready, and its output. Each thread has one.
struct SelectiveBuffer {
    std::vector<float> x, inputs, read, written, out;

    SelectiveBuffer(int64_t head_size, int64_t state_size)
        : x(head_size), inputs(head_size), read(state_size), written(state_size), out(head_size) {}

    // Returns what the head's matrix is scaled by.
    float take(const SelectiveInputs& in, int64_t row, int64_t h) {
        float step = load_as(in.wide, in.steps, row * in.steps_stride + h) + in.shift[h];
        if (in.softplus && step <= 20.f) step = std::log1p(std::exp(step));
        step = std::min(std::max(step, in.least), in.most);
        const Floats wide_step = all(step);
        for (int64_t c = 0; c < in.head_size; c += LANES) {
            const Lanes lanes = lanes_before(c, in.head_size);
            const Floats value = load_as(in.wide, in.x, row * in.x_stride + h * in.head_size + c, lanes);
            store(x.data() + c, value, lanes);
            store(inputs.data() + c, mul(value, wide_step), lanes);
        }
        const int64_t shared = h / (in.heads / in.groups) * in.state_size;
        for (int64_t c = 0; c < in.state_size; c += LANES) {
            const Lanes lanes = lanes_before(c, in.state_size);
            store(read.data() + c, load_as(in.wide, in.read, row * in.read_stride + shared + c, lanes), lanes);
            store(written.data() + c, load_as(in.wide, in.written, row * in.written_stride + shared + c, lanes), lanes);
        }
        return std::exp(step * in.rates[h]);
    }

    // Adds what skips the state, and writes the output.
    void finish(const SelectiveInputs& in, int64_t row, int64_t h, void* to) {
        for (int64_t c = 0; c < in.head_size; c += LANES) {
            const Lanes lanes = lanes_before(c, in.head_size);
            store(out.data() + c, fused(load(x.data() + c, lanes), all(in.skip[h]), load(out.data() + c, lanes)), lanes);
        }
        write_as(in.wide, out.data(), in.head_size, to, (row * in.heads + h) * in.head_size);
    }
};

} // namespace

// One token of the gated delta rule for `rows` sequences. query and key [rows, key_heads, key_size] and value [rows,
// value_heads, value_size] are floats if `wide`, else bfloat16; their rows lie at strides, in elements. Queries and keys
// have length 1 if `unit`, and queries are divided by the root of key_size. gates [rows, value_heads], or [rows,
// value_heads, key_size] if `by_channel`, are logarithms of decays; beta [rows, value_heads]. states [slots, value_heads,
// key_size, value_size]. out [rows, value_heads, value_size] is of the inputs' type.
extern "C" void emoe_delta_rule(const void* query, int64_t query_stride, const void* key, int64_t key_stride,
                                const void* value, int64_t value_stride, int wide, int unit, const float* gates,
                                const float* beta, int64_t rows, int64_t key_heads, int64_t value_heads, int64_t key_size,
                                int64_t value_size, int by_channel, float* states, const int64_t* sources,
                                const int64_t* targets, void* out, int threads) {
    const DeltaInputs inputs{query, key, value, query_stride, key_stride, value_stride, wide, unit, gates, beta,
                             key_heads, value_heads, key_size, value_size, by_channel};
    const int64_t matrix = key_size * value_size;
    const bool streams = can_stream(states, value_size);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        HeadBuffer buffer(key_size, value_size);
#pragma omp for collapse(2) schedule(static)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t h = 0; h < value_heads; ++h) {
                const Head head = buffer.of(inputs, r, h);
                (streams ? delta_head<true> : delta_head<false>)(
                    head, key_size, value_size, states + (sources[r] * value_heads + h) * matrix,
                    states + (targets[r] * value_heads + h) * matrix, buffer.out.data());
                write_as(wide, buffer.out.data(), value_size, out, (r * value_heads + h) * value_size);
            }
    }
}

// One token of Mamba-2 for `rows` sequences. x [rows, heads, head_size], steps [rows, heads], read and written [rows, groups,
// state_size] (C and B in Mamba's words) are floats if `wide`, else bfloat16; their rows lie at strides, in elements.
// `shift` [heads] is added to steps, which are then put through softplus if that is wanted, and limited. `rates` [heads] are
// logarithms of what a step of 1 scales a matrix by. x times `skip` [heads] is added to the output. states [slots, heads,
// head_size, state_size]. out [rows, heads, head_size] is of the inputs' type.
extern "C" void emoe_selective_update(const void* x, int64_t x_stride, const void* steps, int64_t steps_stride,
                                      const void* read, int64_t read_stride, const void* written, int64_t written_stride,
                                      int wide, int softplus, const float* rates, const float* shift, const float* skip,
                                      float least, float most, int64_t rows, int64_t heads, int64_t groups,
                                      int64_t head_size, int64_t state_size, float* states, const int64_t* sources,
                                      const int64_t* targets, void* out, int threads) {
    const SelectiveInputs inputs{x, steps, read, written, x_stride, steps_stride, read_stride, written_stride, wide, softplus,
                                 rates, shift, skip, least, most, heads, groups, head_size, state_size};
    const int64_t matrix = head_size * state_size;
    const bool streams = can_stream(states, state_size);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        SelectiveBuffer buffer(head_size, state_size);
#pragma omp for collapse(2) schedule(static)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t h = 0; h < heads; ++h) {
                const float kept = buffer.take(inputs, r, h);
                (streams ? selective_head<true> : selective_head<false>)(
                    kept, buffer.inputs.data(), buffer.read.data(), buffer.written.data(), head_size, state_size,
                    states + (sources[r] * heads + h) * matrix, states + (targets[r] * heads + h) * matrix,
                    buffer.out.data());
                buffer.finish(inputs, r, h, out);
            }
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
extern "C" void emoe_delta_scan(const void* query, int64_t query_stride, const void* key, int64_t key_stride,
                                const void* value, int64_t value_stride, int wide, int unit, const float* gates,
                                const float* beta, int64_t tokens, int64_t key_heads, int64_t value_heads, int64_t key_size,
                                int64_t value_size, int by_channel, const float* begin, float* state, void* out,
                                int threads) {
    const DeltaInputs inputs{query, key, value, query_stride, key_stride, value_stride, wide, unit, gates, beta,
                             key_heads, value_heads, key_size, value_size, by_channel};
    const int64_t matrix = key_size * value_size, columns = 4 * LANES, parts = (value_size + columns - 1) / columns;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        HeadBuffer buffer(key_size, value_size);
#pragma omp for schedule(static)
        for (int64_t h = 0; h < value_heads; ++h) begin_state(begin, h * matrix, matrix, state);
#pragma omp for collapse(2) schedule(static)
        for (int64_t h = 0; h < value_heads; ++h)
            for (int64_t part = 0; part < parts; ++part)
                for (int64_t t = 0; t < tokens; ++t) {
                    const Head head = buffer.of(inputs, t, h);
                    float* own = state + h * matrix;
                    const int64_t begins = part * columns, ends = std::min(value_size, begins + columns);
                    if (ends - begins > 3 * LANES)
                        delta_columns<4, false>(head, key_size, value_size, begins, own, own, buffer.out.data());
                    else
                        for (int64_t first = begins; first < ends; first += LANES)
                            delta_columns<1, false>(head, key_size, value_size, first, own, own, buffer.out.data());
                    write_as(wide, buffer.out.data() + begins, ends - begins, out,
                             (t * value_heads + h) * value_size + begins);
                }
    }
}

// Mamba-2 over `tokens` tokens of one sequence. Arguments are as in emoe_selective_update and emoe_delta_scan.
extern "C" void emoe_selective_scan(const void* x, int64_t x_stride, const void* steps, int64_t steps_stride,
                                    const void* read, int64_t read_stride, const void* written, int64_t written_stride,
                                    int wide, int softplus, const float* rates, const float* shift, const float* skip,
                                    float least, float most, int64_t tokens, int64_t heads, int64_t groups,
                                    int64_t head_size, int64_t state_size, const float* begin, float* state, void* out,
                                    int threads) {
    const SelectiveInputs inputs{x, steps, read, written, x_stride, steps_stride, read_stride, written_stride, wide, softplus,
                                 rates, shift, skip, least, most, heads, groups, head_size, state_size};
    const int64_t matrix = head_size * state_size;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        SelectiveBuffer buffer(head_size, state_size);
#pragma omp for schedule(static)
        for (int64_t h = 0; h < heads; ++h) {
            float* own = state + h * matrix;
            begin_state(begin, h * matrix, matrix, state);
            for (int64_t t = 0; t < tokens; ++t) {
                const float kept = buffer.take(inputs, t, h);
                selective_head<false>(kept, buffer.inputs.data(), buffer.read.data(), buffer.written.data(), head_size,
                                      state_size, own, own, buffer.out.data());
                buffer.finish(inputs, t, h, out);
            }
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

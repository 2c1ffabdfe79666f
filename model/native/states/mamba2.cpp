// Mamba-2, which scales a head's whole matrix by one number in each step.
#include "states/state.h"

using namespace emoe;

namespace {

// `Rows` rows of a head's matrix from row p on: they share what is read and written, and their sums do not wait for each
// other.
template <bool Streams, int Rows>
void selective_rows(Floats decay, const float* inputs, const float* read, const float* written, int64_t p, int64_t state_size,
                    const float* from, float* to, float* out) {
    Floats input[Rows], total[Rows];
    for (int i = 0; i < Rows; ++i) {
        input[i] = all(inputs[p + i]);
        total[i] = zero();
    }
    int64_t n = 0;
    for (; n + LANES <= state_size; n += LANES) {
        const Floats in = load(written + n), by = load(read + n);
        for (int i = 0; i < Rows; ++i) {
            const int64_t at = (p + i) * state_size + n;
            if (Streams) _mm_prefetch((const char*)(from + at + kStateAhead), _MM_HINT_T0);
            const Floats now = fused(input[i], in, mul(load(from + at), decay));
            put<Streams>(to + at, now);
            total[i] = fused(now, by, total[i]);
        }
    }
    if (n < state_size) {
        const Lanes lanes = lanes_before(n, state_size);
        for (int i = 0; i < Rows; ++i) {
            const int64_t at = (p + i) * state_size + n;
            const Floats now = fused(input[i], load(written + n, lanes), mul(load(from + at, lanes), decay));
            store(to + at, now, lanes);
            total[i] = fused(now, load(read + n, lanes), total[i]);
        }
    }
    for (int i = 0; i < Rows; ++i) out[p + i] = sum(total[i]);
}

// One token of one head of Mamba-2: `kept` is what the matrix [head_size, state_size] is scaled by.
template <bool Streams>
void selective_head(float kept, const float* inputs, const float* read, const float* written, int64_t head_size,
                    int64_t state_size, const float* from, float* to, float* out) {
    const Floats decay = all(kept);
    int64_t p = 0;
    for (; p + 4 <= head_size; p += 4)
        selective_rows<Streams, 4>(decay, inputs, read, written, p, state_size, from, to, out);
    for (; p < head_size; ++p)
        selective_rows<Streams, 1>(decay, inputs, read, written, p, state_size, from, to, out);
    if (Streams) _mm_sfence();
}

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

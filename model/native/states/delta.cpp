// The gated delta rule, also with a decay for each channel, as in KDA.
#include "states/state.h"

using namespace emoe;

namespace {

// The inputs of one head of one sequence. A matrix is [key_size, value_size].
struct Head {
    const float *query, *key, *value, *decay;
    int64_t decay_step; // 1 if each key channel has a decay of its own, else 0
    float beta;
};

// Columns `first` to `first + 16 * Width` of the matrix `from`, which become those of `to`. `Whole`: the matrix has them all.
template <int Width, bool Streams, bool Whole>
void delta_columns(const Head& head, int64_t key_size, int64_t value_size, int64_t first, const float* from, float* to,
                   float* out) {
    Lanes lanes[Width];
    Floats found[Width], change[Width], sum[Width];
    for (int w = 0; w < Width; ++w) {
        lanes[w] = Whole ? Lanes(0xffff) : lanes_before(first + w * LANES, value_size);
        found[w] = sum[w] = zero();
    }
    for (int64_t k = 0; k < key_size; ++k) {
        const Floats key = all(head.key[k] * head.decay[k * head.decay_step]);
        for (int w = 0; w < Width; ++w) {
            const float* at = from + k * value_size + first + w * LANES;
            if (Streams) _mm_prefetch((const char*)(at + kStateAhead), _MM_HINT_T0);
            found[w] = fused(Whole ? load(at) : load(at, lanes[w]), key, found[w]);
        }
    }
    for (int w = 0; w < Width; ++w)
        change[w] = mul(sub(load(head.value + first + w * LANES, lanes[w]), found[w]), all(head.beta));
    for (int64_t k = 0; k < key_size; ++k) {
        const Floats key = all(head.key[k]), query = all(head.query[k]), decay = all(head.decay[k * head.decay_step]);
        for (int w = 0; w < Width; ++w) {
            const int64_t at = k * value_size + first + w * LANES;
            const Floats before = Whole ? load(from + at) : load(from + at, lanes[w]);
            const Floats now = fused(key, change[w], mul(before, decay));
            put<Streams>(to + at, now, lanes[w]);
            sum[w] = fused(now, query, sum[w]);
        }
    }
    for (int w = 0; w < Width; ++w) store(out + first + w * LANES, sum[w], lanes[w]);
}

template <bool Streams>
void delta_head(const Head& head, int64_t key_size, int64_t value_size, const float* from, float* to, float* out) {
    int64_t first = 0;
    for (; first + 4 * LANES <= value_size; first += 4 * LANES)
        delta_columns<4, Streams, true>(head, key_size, value_size, first, from, to, out);
    for (; first < value_size; first += LANES)
        delta_columns<1, Streams, false>(head, key_size, value_size, first, from, to, out);
    if (Streams) _mm_sfence();
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
                    if (ends - begins == columns)
                        delta_columns<4, false, true>(head, key_size, value_size, begins, own, own, buffer.out.data());
                    else
                        for (int64_t first = begins; first < ends; first += LANES)
                            delta_columns<1, false, false>(head, key_size, value_size, first, own, own, buffer.out.data());
                    write_as(wide, buffer.out.data() + begins, ends - begins, out,
                             (t * value_heads + h) * value_size + begins);
                }
    }
}

// What a trunk computes between its matrix products, for one row.
#pragma once

#include "vector.h"

#include <cmath>

namespace emoe {

// Root mean square normalisation. If `rounds`, the normalised value is rounded to bfloat16 before it is multiplied by the
// weight. `to` may be `from`.
inline void norm_row(const bf16* from, int64_t size, const float* weight, float epsilon, bool rounds, bf16* to) {
    Floats squares = zero();
    for (int64_t c = 0; c < size; c += 16) {
        const Floats value = load(from + c, lanes_before(c, size));
        squares = fused(value, value, squares);
    }
    const Floats factor = all(1.f / std::sqrt(sum(squares) / size + epsilon));
    for (int64_t c = 0; c < size; c += 16) {
        const Lanes lanes = lanes_before(c, size);
        Floats value = mul(load(from + c, lanes), factor);
        if (rounds) value = rounded(value);
        store(to + c, mul(value, load(weight + c, lanes)), lanes);
    }
}

// Layer normalisation: takes off the mean, divides by the root of the variance, multiplies by the weight, and adds the bias.
inline void layer_norm_row(const bf16* from, int64_t size, const float* weight, const float* bias, float epsilon, bf16* to) {
    Floats values = zero();
    for (int64_t c = 0; c < size; c += 16) values = add(values, load(from + c, lanes_before(c, size)));
    const Floats mean = all(sum(values) / size);
    Floats squares = zero();
    for (int64_t c = 0; c < size; c += 16) {
        const Lanes lanes = lanes_before(c, size);
        const Floats value = chosen(lanes, sub(load(from + c, lanes), mean), zero());
        squares = fused(value, value, squares);
    }
    const Floats factor = all(1.f / std::sqrt(sum(squares) / size + epsilon));
    for (int64_t c = 0; c < size; c += 16) {
        const Lanes lanes = lanes_before(c, size);
        const Floats value = mul(mul(sub(load(from + c, lanes), mean), factor), load(weight + c, lanes));
        store(to + c, bias == nullptr ? value : add(value, load(bias + c, lanes)), lanes);
    }
}

// Computes 16 columns of x * cos + turned * sin, and rounds after every operator.
inline Floats turn(Floats x, Floats turned, const bf16* cosine, const bf16* sine, Lanes lanes) {
    return add(rounded(mul(x, load(cosine, lanes))), rounded(mul(turned, load(sine, lanes))));
}

// Applies the rotary embedding to one head of one token. It rotates the head's two halves against each other. `out` may
// be `x`.
inline void rotate_row(const bf16* x, const bf16* cosine, const bf16* sine, int64_t size, bf16* out) {
    const int64_t half = size / 2;
    for (int64_t c = 0; c < half; c += 16) {
        const Lanes lanes = lanes_before(c, half);
        const Floats first = load(x + c, lanes), second = load(x + half + c, lanes);
        const Floats minus = sub(zero(), second);
        store(out + c, turn(first, minus, cosine + c, sine + c, lanes), lanes);
        store(out + half + c, turn(second, first, cosine + half + c, sine + half + c, lanes), lanes);
    }
}

// As rotate_row, where neighbours are rotated against each other. The first of each pair go to the first half of `out`,
// which is not `x`.
inline void rotate_pairs_row(const bf16* x, const bf16* cosine, const bf16* sine, int64_t size, bf16* out) {
    const int64_t half = size / 2;
    for (int64_t c = 0; c < half; c += 16) {
        const Lanes lanes = lanes_before(c, half);
        alignas(64) bf16 apart[2][16] = {};
        for (int64_t i = 0; i < std::min<int64_t>(16, half - c); ++i) {
            apart[0][i] = x[2 * (c + i)];
            apart[1][i] = x[2 * (c + i) + 1];
        }
        const Floats first = load(apart[0], lanes), second = load(apart[1], lanes), minus = sub(zero(), second);
        store(out + c, turn(first, minus, cosine + c, sine + c, lanes), lanes);
        store(out + half + c, turn(second, first, cosine + c, sine + c, lanes), lanes);
    }
}

// Multiplies a row by a number.
inline void scale_row(int64_t size, float factor, bf16* row) {
    for (int64_t c = 0; c < size; c += 16) {
        const Lanes lanes = lanes_before(c, size);
        store(row + c, mul(load(row + c, lanes), all(factor)), lanes);
    }
}

// Adds x to `sum`.
inline void add_row(const bf16* x, int64_t size, bf16* sum) {
    for (int64_t c = 0; c < size; c += 16) {
        const Lanes lanes = lanes_before(c, size);
        store(sum + c, add(load(x + c, lanes), load(sum + c, lanes)), lanes);
    }
}

} // namespace emoe

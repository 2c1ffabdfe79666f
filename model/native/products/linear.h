// Linear layers whose matrices are packed in any form.
#pragma once

#include "products/forms.h"

namespace emoe {

// A packed matrix, and the bias of its layer. model/native/structs.py mirrors it.
struct Matrix {
    const void* packed;
    const bf16* bias; // null: there is none
    int64_t form;     // one of those in forms.h
};

// A linear layer and where its result [rows, columns] goes.
struct Product {
    Matrix matrix;
    int64_t columns;
    bf16* out;
};

// Computes share number `index` of the panels of linear layers of the same rows, x [rows, depth], which lie `stride`
// elements apart.
void linear_share(const bf16* x, int64_t rows, int64_t stride, int64_t depth, const Product* products, int64_t count,
                  int index, int shares, int threads);

// Computes one linear layer of dense rows: out [rows, columns].
inline void project(const bf16* x, int64_t rows, int64_t depth, const Matrix& matrix, int64_t columns, bf16* out, int threads) {
    const Product product{matrix, columns, out};
    linear_share(x, rows, depth, depth, &product, 1, 0, 1, threads);
}

} // namespace emoe

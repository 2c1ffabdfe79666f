// Which row of a matrix becomes which column of a panel.
#pragma once

#include "products/gemm.h"

namespace emoe {

// Returns the row of the matrix that becomes column `c` of panel `p`, or -1 past the end. A matrix may have two parts,
// gate and up. Then the panels of the two take turns. The parts are the two halves of the matrix's rows or, if
// `interleaved`, its even and odd rows.
inline int64_t source(int64_t p, int64_t c, int64_t columns, int64_t parts, int interleaved) {
    const int64_t each = columns / parts, n = p / parts * kPanel + c, part = p % parts;
    if (n >= each) return -1;
    return interleaved ? n * parts + part : part * each + n;
}

} // namespace emoe

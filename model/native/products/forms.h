// The forms in which weights are kept, and how rows are multiplied with a panel in each of them.
#pragma once

#include "products/rows4.h"
#include "products/rows8.h"

#include <vector>

namespace emoe {

// Forms of weights: bfloat16 (gemm.h), integers of 8 bits (gemm8.h), floats of 8 bits (gemmf8.h) with float32 scales or with
// powers of 2, 4 bits (gemm4.h) with scales in bfloat16 or in float16, or with E2M1 codes, and E2M1 with scales in E4M3 (gemmf4.h).
// model/native/linear.py has the same numbers.
enum { kInt4 = 4, kInt4Half = 5, kE2m1Codes = 6, kE4m3 = 7, kInt8 = 8, kE4m3Powers = 9, kE2m1Floats = 10, kBits16 = 16 };

// Weights in bfloat16, and the rows that they are multiplied with, also in bfloat16.
struct Bits16 {
    using Row = const bf16*;
    // Brings rows into the form that `multiply` is fastest with. They may then lie in `memory`.
    static void prepare(std::vector<Row>& rows, int64_t depth, std::vector<char>& memory);
    struct Rows {
        const bf16* data;
        int64_t depth;
        void resize(int64_t, int64_t size) { depth = size; }
        void set(int64_t, const bf16*) {}
        Row at(int64_t row) const { return data + row * depth; }
    };
    static int64_t panel_bytes(int64_t depth);
    // Does what multiply_chunk does.
    static void multiply(int64_t count, const Row* rows, int64_t depth, const char* panel, float* sums, bool fetch);
};

// Weights in 8-bit floats with float32 scales or with powers of 2, and rows in bfloat16.
template <bool POWERS> struct Floats8 : Bits16 {
    static void prepare(std::vector<Row>& rows, int64_t depth, std::vector<char>& memory);
    static int64_t panel_bytes(int64_t depth);
    static void multiply(int64_t count, const Row* rows, int64_t depth, const char* panel, float* sums, bool fetch);
};

// Weights in 4-bit floats with scales in E4M3, and rows in bfloat16.
struct Floats4 : Bits16 {
    static void prepare(std::vector<Row>& rows, int64_t depth, std::vector<char>& memory);
    static int64_t panel_bytes(int64_t depth);
    static void multiply(int64_t count, const Row* rows, int64_t depth, const char* panel, float* sums, bool fetch);
};

// Weights in 8 bits, and the rows that they are multiplied with, in 8 bits too (rows8.h).
struct Bits8 {
    using Row = Row8;
    using Rows = Rows8;
    static void prepare(std::vector<Row>& rows, int64_t depth, std::vector<char>& memory);
    static int64_t panel_bytes(int64_t depth);
    static void multiply(int64_t count, const Row* rows, int64_t depth, const char* panel, float* sums, bool fetch);
};

// Weights in 4 bits, and the rows that they are multiplied with, in 8 bits (rows4.h).
template <bool TABLE, bool HALF> struct Bits4 {
    using Row = Row4;
    using Rows = Rows4;
    static void prepare(std::vector<Row>& rows, int64_t depth, std::vector<char>& memory);
    static int64_t panel_bytes(int64_t depth);
    static void multiply(int64_t count, const Row* rows, int64_t depth, const char* panel, float* sums, bool fetch);
};

// Whether rows are rounded for a form.
template <class Bits> constexpr bool kRoundsRows = !std::is_same_v<typename Bits::Row, const bf16*>;

// Calls `run` with the products of a form.
template <class Run> auto with_form(int form, Run run) {
    switch (form) {
    case kInt8: return run(Bits8{});
    case kInt4: return run(Bits4<false, false>{});
    case kInt4Half: return run(Bits4<false, true>{});
    case kE2m1Codes: return run(Bits4<true, false>{});
    case kE4m3: return run(Floats8<false>{});
    case kE4m3Powers: return run(Floats8<true>{});
    case kE2m1Floats: return run(Floats4{});
    default: return run(Bits16{});
    }
}

} // namespace emoe

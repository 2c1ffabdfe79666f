#include "products/forms.h"

#include "products/gemm4.h"
#include "products/gemmf4.h"
#include "products/gemmf8.h"

namespace emoe {
namespace {

// Copies rows, and fills them up with zeros to a multiple of 32 of K. A tile may read past the last one.
void copy_rows(std::vector<const bf16*>& rows, int64_t depth, std::vector<char>& memory) {
    constexpr int64_t kMost = 2 * kTileRows; // rows that a product reads at a time
    const int64_t size = depth * sizeof(bf16), filled = (size + kTileBytes - 1) / kTileBytes * kTileBytes;
    // rows that are a power of 2 apart would share few places of the cache
    const int64_t stride = filled + kTileBytes, count = (rows.size() + kMost - 1) / kMost * kMost;
    if (int64_t(memory.size()) < count * stride + kTileBytes) memory.resize(count * stride + kTileBytes);
    char* to = (char*)((uintptr_t(memory.data()) + kTileBytes - 1) / kTileBytes * kTileBytes);
    for (const bf16*& row : rows) {
        std::memcpy(to, row, size);
        std::memset(to + size, 0, filled - size);
        row = (const bf16*)to;
        to += stride;
    }
}

} // namespace

void Bits16::prepare(std::vector<Row>& rows, int64_t depth, std::vector<char>& memory) {
    if (tiles_used && !evenly_spaced(rows.size(), rows.data())) copy_rows(rows, depth, memory);
}
int64_t Bits16::panel_bytes(int64_t depth) { return panel_size(depth) * sizeof(bf16); }
void Bits16::multiply(int64_t count, const Row* rows, int64_t depth, const char* panel, float* sums, bool fetch) {
    multiply_chunk(count, rows, depth, (const bf16*)panel, sums, fetch);
}

template <bool POWERS> void Floats8<POWERS>::prepare(std::vector<Row>& rows, int64_t depth, std::vector<char>& memory) {
    if (tiles_used) copy_rows(rows, depth, memory);
}
template <bool POWERS> int64_t Floats8<POWERS>::panel_bytes(int64_t depth) { return panel_bytes8(depth); }
template <bool POWERS>
void Floats8<POWERS>::multiply(int64_t count, const Row* rows, int64_t depth, const char* panel, float* sums, bool fetch) {
    if constexpr (POWERS) multiply_chunk_widened(count, rows, depth, PowersPanel{(const int8_t*)panel}, sums, fetch);
    else multiply_chunk_f8(count, rows, depth, (const int8_t*)panel, sums, fetch);
}

void Floats4::prepare(std::vector<Row>& rows, int64_t depth, std::vector<char>& memory) {
    if (tiles_used) copy_rows(rows, depth, memory);
}
int64_t Floats4::panel_bytes(int64_t depth) { return panel_bytes_f4(depth); }
void Floats4::multiply(int64_t count, const Row* rows, int64_t depth, const char* panel, float* sums, bool fetch) {
    multiply_chunk_widened(count, rows, depth, Floats4Panel(panel), sums, fetch);
}

void Bits8::prepare(std::vector<Row>& rows, int64_t depth, std::vector<char>& memory) {
#ifdef EMOE_TILES
    if (tiles_used && int64_t(rows.size()) > kFewTiles8) take_apart(rows, depth, memory);
#endif
}
int64_t Bits8::panel_bytes(int64_t depth) { return panel_bytes8(depth); }
void Bits8::multiply(int64_t count, const Row* rows, int64_t depth, const char* panel, float* sums, bool fetch) {
    multiply_chunk8(count, rows, depth, (const int8_t*)panel, sums, fetch);
}

template <bool TABLE, bool HALF>
void Bits4<TABLE, HALF>::prepare(std::vector<Row>& rows, int64_t depth, std::vector<char>& memory) {
#ifdef EMOE_TILES
    if (tiles_used && int64_t(rows.size()) > kFewTiles4) lay_out4(rows, depth, memory);
#endif
}
template <bool TABLE, bool HALF> int64_t Bits4<TABLE, HALF>::panel_bytes(int64_t depth) { return panel_bytes4(depth, TABLE); }
template <bool TABLE, bool HALF>
void Bits4<TABLE, HALF>::multiply(int64_t count, const Row* rows, int64_t depth, const char* panel, float* sums, bool fetch) {
    multiply_chunk4<TABLE, HALF>(count, rows, depth, panel, sums, fetch);
}

template struct Floats8<false>;
template struct Floats8<true>;
template struct Bits4<false, false>;
template struct Bits4<false, true>;
template struct Bits4<true, false>;

} // namespace emoe

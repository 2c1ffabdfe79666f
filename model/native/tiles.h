// Products by the CPU's matrix unit (Intel AMX), where the CPU has one and the kernel lets this process use it.
//
// A tile is up to 16 rows of 64 bytes. One instruction multiplies 16 rows by 32 steps of K of 16 columns: a tile of the
// columns is [16 pairs of K][16][2], as it lies in the panels of gemm.h. It adds up the products of the even steps of K and
// those of the odd steps apart, each in ascending order, and adds both sums to what was there. Denormal numbers are taken
// as zero. So the bits differ from those of vector.h's instructions. But they depend on nothing but the row and the
// column: products in bfloat16 therefore take this unit for any number of rows.
//
// Products with integers of 8 and of 4 bits are exact in any order, so they take it where it is faster. Rows are in 16 bits
// there (gemm8.h). A row is taken apart into its low and its high bytes, which are multiplied one after the other. A tile
// of columns has 4 steps of K of one column in 32 bits. Of 8 steps of K, these are first 0, 4, 1, 5 and then 2, 6, 3, 7, as
// 4-bit codes give them (gemm4.h).
//
// Each call configures the tiles of its thread and releases them: while tiles are in use, a switch to another thread has to
// store them.
#pragma once

#include "vector.h"

#include <initializer_list>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512VBMI__) && \
    defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define EMOE_TILES 1
#endif

namespace emoe {

// Whether the matrix unit is used. It is found out when the library is loaded (tiles.cpp).
extern bool tiles_used;

constexpr int64_t kTileRows = 16;  // most rows of a tile
constexpr int64_t kTileBytes = 64; // most bytes of a row of a tile
constexpr int64_t kLineBytes = 256; // from a row of sums, or of a panel's columns, to the next

// Whether the rows lie at equal distances, as the rows of a tile must.
inline bool evenly_spaced(int64_t count, const bf16* const* rows) {
    for (int64_t r = 2; r < count; ++r)
        if (rows[r] - rows[r - 1] != rows[1] - rows[0]) return false;
    return true;
}

#ifdef EMOE_TILES

// The sizes of the 8 tiles of a thread. Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 columns.
struct alignas(64) TileSizes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    // For up to 16 rows, whose sums are all four tiles. Tile 5 has columns too.
    static TileSizes one(int64_t rows) { return TileSizes({rows, rows, rows, rows, rows, 16, 16, 16}); }
    // For 17 to 32 rows: the first 16, whose sums are tiles 0 and 1, and the others.
    static TileSizes two(int64_t rows) {
        const int64_t rest = rows - kTileRows;
        return TileSizes({kTileRows, kTileRows, rest, rest, kTileRows, rest, 16, 16});
    }
    // the compilers' own function is said to read 8 bytes only
    void load() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }

  private:
    explicit TileSizes(std::initializer_list<int64_t> sizes) {
        std::copy(sizes.begin(), sizes.end(), rows);
        std::fill(row_bytes, row_bytes + sizes.size(), kTileBytes);
    }
};

// Rows of bfloat16 at equal distances, in bytes.
struct TileOperand {
    const char* data;
    int64_t stride;
};

// Compilers do not know that loads of tiles read memory. After this, all that was written before is there.
inline void written() { asm volatile("" ::: "memory"); }

// Loads the tiles 0 to 3, or clears them. Tiles 0 and 1 lie side by side, and 2 and 3 at `second`.
inline void begin_sums(float* first, float* second, bool more) {
    written();
    if (!more) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        return;
    }
    _tile_loadd(0, first, kLineBytes);
    _tile_loadd(1, first + 16, kLineBytes);
    _tile_loadd(2, second, kLineBytes);
    _tile_loadd(3, second + 16, kLineBytes);
}

inline void end_sums(float* first, float* second) {
    _tile_stored(0, first, kLineBytes);
    _tile_stored(1, first + 16, kLineBytes);
    _tile_stored(2, second, kLineBytes);
    _tile_stored(3, second + 16, kLineBytes);
}

// What one pass over some columns prefetches in each of its steps.
struct Ahead {
    const char* from;
    int64_t lines; // of the caches

    void step() {
        for (int64_t line = 0; line < lines; ++line, from += 64) _mm_prefetch(from, _MM_HINT_T0);
    }
};

// Multiplies up to 16 rows by 64 columns, over `steps` steps of 32 of K. The products are added to `sums` if `more` is
// true, else they replace it.
inline void multiply_1x4(TileOperand rows, const char* columns, int64_t steps, float* sums, bool more, Ahead ahead) {
    begin_sums(sums, sums + 32, more);
    for (int64_t k = 0; k < steps; ++k, columns += 16 * kLineBytes) {
        ahead.step();
        _tile_loadd(4, rows.data + k * kTileBytes, rows.stride);
        _tile_loadd(6, columns, kLineBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, columns + 64, kLineBytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, columns + 128, kLineBytes);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, columns + 192, kLineBytes);
        _tile_dpbf16ps(3, 4, 6);
    }
    end_sums(sums, sums + 32);
}

// As above, for 17 to 32 rows and 32 columns.
inline void multiply_2x2(TileOperand rows, const char* columns, int64_t steps, float* sums, bool more, Ahead ahead) {
    begin_sums(sums, sums + kTileRows * 64, more);
    const char* second = rows.data + kTileRows * rows.stride;
    for (int64_t k = 0; k < steps; ++k, columns += 16 * kLineBytes) {
        ahead.step();
        _tile_loadd(6, columns, kLineBytes);
        _tile_loadd(4, rows.data + k * kTileBytes, rows.stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, columns + 64, kLineBytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, second + k * kTileBytes, rows.stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    end_sums(sums, sums + kTileRows * 64);
}

#endif

} // namespace emoe

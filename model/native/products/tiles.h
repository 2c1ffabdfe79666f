// Products by the CPU's matrix unit (Intel AMX), where the CPU has one and the kernel lets this process use it.
//
// A tile is up to 16 rows of 64 bytes. One instruction multiplies 16 rows by 32 steps of K of 16 columns: a tile of the
// columns is [16 pairs of K][16][2], as it lies in the panels of gemm.h. It adds up the products of the even steps of K and
// those of the odd steps apart, each in ascending order, and adds both sums to what was there. Denormal numbers are taken
// as zero. So the bits differ from those of vector.h's instructions. But they depend on nothing but the row and the
// column: products in bfloat16 therefore take this unit for any number of rows.
//
// Sums of groups of weights of 8 bits (tiles8.h) and of 4 bits (tiles4.h) are exact in any order, so they take the unit where it
// is faster.
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

// Whether the rows lie at equal distances, as the rows of a tile must.
inline bool evenly_spaced(int64_t count, const bf16* const* rows) {
    for (int64_t r = 2; r < count; ++r)
        if (rows[r] - rows[r - 1] != rows[1] - rows[0]) return false;
    return true;
}

#ifdef EMOE_TILES

// The sizes of the 8 tiles of a thread. Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 columns. `depth_bytes` of each row are
// multiplied at a time.
struct alignas(64) TileSizes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    // For up to 16 rows, whose sums are all four tiles. Tile 5 has columns too.
    static TileSizes one(int64_t rows, int64_t depth_bytes = kTileBytes) {
        TileSizes sizes(rows, rows, depth_bytes);
        sizes.rows[5] = depth_bytes / 4;
        sizes.row_bytes[5] = kTileBytes;
        return sizes;
    }
    // For 17 to 32 rows: the first 16, whose sums are tiles 0 and 1, and the others.
    static TileSizes two(int64_t rows, int64_t depth_bytes = kTileBytes) {
        return TileSizes(kTileRows, rows - kTileRows, depth_bytes);
    }
    // For rows that are laid out anew (tiles8.h, tiles4.h).
    static TileSizes apart(int64_t depth_bytes = kTileBytes) { return TileSizes(kTileRows, kTileRows, depth_bytes); }
#ifdef EMOE_EMULATED_TILES // by tests
    void load() const { emulated::configure(this); }
#else
    // the compilers' own function is said to read 8 bytes only
    void load() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
#endif

  private:
    TileSizes(int64_t first, int64_t second, int64_t depth_bytes) {
        for (int tile = 0; tile < 8; ++tile) {
            rows[tile] = tile > 5 ? depth_bytes / 4 : tile == 5 || tile == 2 || tile == 3 ? second : first;
            row_bytes[tile] = tile == 4 || tile == 5 ? depth_bytes : kTileBytes;
        }
    }
};

// Rows of a product, `stride` bytes apart. `step` bytes of each are multiplied at a time.
struct TileRows {
    const char* data;
    int64_t stride, step = kTileBytes;
};

// Sums of 64 or of 32 columns: those of 16 columns each, and the bytes from a row to the next.
struct TileSums {
    float* columns[4];
    int64_t stride;

    TileSums(float* data, int64_t stride) : columns{data, data + 16, data + 32, data + 48}, stride(stride) {}
    float* below(int i) const { return columns[i] + kTileRows * stride / int64_t(sizeof(float)); } // of the 17th row
};

// Compilers do not know that loads of tiles read memory. After this, all that was written before is there.
inline void written() { asm volatile("" ::: "memory"); }

// Loads the tiles 0 to 3, or clears them.
inline void begin_sums(const float* const* at, int64_t stride, bool more) {
    written();
    if (!more) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        return;
    }
    _tile_loadd(0, at[0], stride);
    _tile_loadd(1, at[1], stride);
    _tile_loadd(2, at[2], stride);
    _tile_loadd(3, at[3], stride);
}

inline void end_sums(float* const* at, int64_t stride) {
    _tile_stored(0, at[0], stride);
    _tile_stored(1, at[1], stride);
    _tile_stored(2, at[2], stride);
    _tile_stored(3, at[3], stride);
}

// What one pass over some columns prefetches, `lines` of the caches at a time.
template <_mm_hint HINT> struct Ahead {
    const char* from = nullptr;
    int64_t lines = 0;

    void some() {
        for (int64_t line = 0; line < lines; ++line, from += 64) _mm_prefetch(from, HINT);
    }
};
using AheadOfItself = Ahead<_MM_HINT_T0>;
using AheadOfNext = Ahead<_MM_HINT_T1>;

// Multiplies up to 16 rows by 64 columns, over `steps` steps of K. The products are added to `sums` if `more` is true, else
// they replace it. `columns(i, k)` is the tile of the columns from 16 i on at step k, whose rows are `stride` bytes apart.
// Every step prefetches four times, since a burst would hold up the loads of tiles.
template <class Columns>
void multiply_1x4(TileRows rows, Columns columns, int64_t stride, int64_t steps, TileSums sums, bool more,
                  AheadOfItself ahead = {}) {
    begin_sums(sums.columns, sums.stride, more);
    for (int64_t k = 0; k < steps; ++k) {
        _tile_loadd(4, rows.data + k * rows.step, rows.stride);
        _tile_loadd(6, columns(0, k), stride);
        ahead.some();
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, columns(1, k), stride);
        ahead.some();
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, columns(2, k), stride);
        ahead.some();
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, columns(3, k), stride);
        ahead.some();
        _tile_dpbf16ps(3, 4, 6);
    }
    end_sums(sums.columns, sums.stride);
}

// As above, for 17 to 32 rows and 32 columns.
template <class Columns>
void multiply_2x2(TileRows rows, Columns columns, int64_t stride, int64_t steps, TileSums sums, bool more,
                  AheadOfNext ahead = {}) {
    float* const at[4] = {sums.columns[0], sums.columns[1], sums.below(0), sums.below(1)};
    begin_sums(at, sums.stride, more);
    const char* second = rows.data + kTileRows * rows.stride;
    for (int64_t k = 0; k < steps; ++k) {
        _tile_loadd(6, columns(0, k), stride);
        _tile_loadd(4, rows.data + k * rows.step, rows.stride);
        _tile_dpbf16ps(0, 4, 6);
        ahead.some();
        _tile_loadd(7, columns(1, k), stride);
        _tile_dpbf16ps(1, 4, 7);
        ahead.some();
        _tile_loadd(5, second + k * rows.step, rows.stride);
        _tile_dpbf16ps(2, 5, 6);
        ahead.some();
        _tile_dpbf16ps(3, 5, 7);
        ahead.some();
    }
    end_sums(at, sums.stride);
}

#endif

} // namespace emoe

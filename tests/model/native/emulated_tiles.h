// The instructions of the CPU's matrix unit (Intel AMX), one number after the other, for tests on CPUs that have no such unit. It
// is included before everything else.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_release
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbusd
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_release() emulated::release()
#define _tile_dpbf16ps(sums, rows, columns) emulated::multiply(sums, rows, columns, emulated::add_floats)
#define _tile_dpbssd(sums, rows, columns) emulated::multiply(sums, rows, columns, emulated::add_bytes<int8_t>)
#define _tile_dpbusd(sums, rows, columns) emulated::multiply(sums, rows, columns, emulated::add_bytes<uint8_t>)

namespace emulated {

struct Sizes { // as the unit reads them
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

struct Unit {
    Sizes sizes{};
    char tiles[8][16][64];
};
inline thread_local Unit unit;

inline void configure(const void* sizes) {
    std::memcpy(&unit.sizes, sizes, sizeof unit.sizes);
    std::memset(unit.tiles, 0, sizeof unit.tiles);
}
inline void release() { unit.sizes = {}; } // so that what is used later has no rows, and shows it

inline void zero(int tile) { std::memset(unit.tiles[tile], 0, sizeof unit.tiles[tile]); }
inline void load(int tile, const void* from, int64_t stride) {
    zero(tile);
    for (int r = 0; r < unit.sizes.rows[tile]; ++r)
        std::memcpy(unit.tiles[tile][r], (const char*)from + r * stride, unit.sizes.row_bytes[tile]);
}
inline void store(int tile, void* to, int64_t stride) {
    for (int r = 0; r < unit.sizes.rows[tile]; ++r)
        std::memcpy((char*)to + r * stride, unit.tiles[tile][r], unit.sizes.row_bytes[tile]);
}

// Adds four products of bytes.
template <class OfRows> void add_bytes(char* sum, const char* rows, const char* columns, int words) {
    int32_t total;
    std::memcpy(&total, sum, 4);
    for (int k = 0; k < words; ++k)
        for (int i = 0; i < 4; ++i) total += int32_t(OfRows(rows[4 * k + i])) * int8_t(columns[64 * k + i]);
    std::memcpy(sum, &total, 4);
}

inline float number(const char* from) { // of bfloat16; a denormal one is taken as zero
    uint16_t half;
    std::memcpy(&half, from, 2);
    const uint32_t bits = half & 0x7f80 ? uint32_t(half) << 16 : 0;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
// Adds pairs of products of bfloat16: those of the first numbers and those of the second ones apart.
inline void add_floats(char* sum, const char* rows, const char* columns, int words) {
    float total, parts[2] = {};
    std::memcpy(&total, sum, 4);
    for (int k = 0; k < words; ++k)
        for (int i = 0; i < 2; ++i) parts[i] = __builtin_fmaf(number(rows + 4 * k + 2 * i), number(columns + 64 * k + 2 * i), parts[i]);
    total += parts[0] + parts[1];
    std::memcpy(sum, &total, 4);
}

template <class Add> void multiply(int sums, int rows, int columns, Add add) {
    for (int r = 0; r < unit.sizes.rows[sums]; ++r)
        for (int c = 0; c < unit.sizes.row_bytes[sums] / 4; ++c)
            add(unit.tiles[sums][r] + 4 * c, unit.tiles[rows][r], unit.tiles[columns][0] + 4 * c, unit.sizes.row_bytes[rows] / 4);
}

} // namespace emulated

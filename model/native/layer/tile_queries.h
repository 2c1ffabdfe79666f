// Attention's products by the CPU's matrix unit.
#pragma once
#include "layer/cache_tiles.h"

#include <vector>

namespace emoe {

#ifdef EMOE_TILES

// Queries by the matrix unit (tiles.h).
class TileQueries {
  public:
    // Copies `count` queries of `size` numbers, filled up with zeros.
    void set(int64_t count, int64_t size, const bf16* const* queries) {
        count_ = count;
        size_ = size;
        stride_ = (size + 31) / 32 * 32;
        rows_.assign(count * stride_, 0);
        for (int64_t r = 0; r < count; ++r) std::copy(queries[r], queries[r] + size, rows_.begin() + r * stride_);
    }

    // Dot products with the keys of `count` tiles: scores [queries][kKeys]. Of 4 tiles, `tiles` always has all.
    void score(const bf16* const* tiles, int64_t count, float* scores) const {
        const bool few = count_ <= kTileRows;
        (few ? TileSizes::one(count_) : TileSizes::two(count_)).load();
        const int64_t whole = size_ / 32;
        alignas(64) bf16 last[4][kTile * 32]; // the last numbers of keys, filled up with zeros
        for (int64_t t = 0; t < count; t += few ? 4 : 2) {
            const TileSums sums{scores + t * kTile, kKeys * 4};
            multiply(few, 0, whole, [&](int i, int64_t k) { return tiles[t + i] + k * kTile * 32; }, sums);
            if (whole * 32 == size_) continue;
            for (int i = 0; i < (few ? 4 : 2); ++i) {
                std::memset(last[i], 0, sizeof last[i]);
                std::memcpy(last[i], tiles[t + i] + whole * kTile * 32, (size_ - whole * 32) * kTile * sizeof(bf16));
            }
            multiply(few, whole, 1, [&](int i, int64_t) { return last[i]; }, sums);
        }
        _tile_release();
    }

    // Adds weights [queries][kKeys] times the values of `count` tiles to out [queries][size].
    void combine(const bf16* weights, const bf16* const* tiles, int64_t count, int64_t size, float* out) const {
        constexpr int64_t kBytes = kTile * sizeof(bf16); // weights of a tile of values
        const bool few = count_ <= kTileRows;
        (few ? TileSizes::one(count_, kBytes) : TileSizes::two(count_, kBytes)).load();
        const TileRows rows{(const char*)weights, kKeys * sizeof(bf16), kBytes};
        for (int64_t c = 0; c < size; c += few ? 64 : 32) {
            // past the end, the last columns are computed again
            const auto column = [&](int i) { return std::min<int64_t>(c + i * 16, size - 16); };
            const auto values = [&](int i, int64_t t) { return (const char*)(tiles[t] + column(i) * 2); };
            TileSums sums(out, size * sizeof(float));
            for (int i = 0; i < 4; ++i) sums.columns[i] = out + column(i);
            if (few) multiply_1x4(rows, values, size * 4, count, sums, true);
            else multiply_2x2(rows, values, size * 4, count, sums, true);
        }
        _tile_release();
    }

  private:
    template <class Columns> void multiply(bool few, int64_t first, int64_t steps, Columns columns, TileSums sums) const {
        const TileRows rows{(const char*)(rows_.data() + first * 32), stride_ * int64_t(sizeof(bf16))};
        const auto at = [&](int i, int64_t k) { return (const char*)columns(i, k); };
        if (few) multiply_1x4(rows, at, kTile * 4, steps, sums, first > 0);
        else multiply_2x2(rows, at, kTile * 4, steps, sums, first > 0);
    }

    int64_t count_ = 0, size_ = 0, stride_ = 0;
    std::vector<bf16> rows_;
};

#endif

} // namespace emoe

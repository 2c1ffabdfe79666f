// Attention over the paged KV cache. Keys and values are read where they lie, without a copy.
//
// The cache is made of tiles of 16 tokens of one head. A tile of keys is [D/2][16][2], so that one instruction takes two
// dimensions of 16 keys. A tile of values is [8][D][2], so that one instruction takes two tokens of 16 dimensions. A
// layer has two caches, one for keys and one for values, each [blocks][key heads][tiles of a block].
//
// A cache of latents has keys only, of one head. The first numbers of a key are its value as well: tiles of values are
// made from tiles of keys whenever they are needed.
//
// The softmax takes keys in chunks and keeps a running maximum (Milakov and Gimelshein, arXiv 1805.02867; as in flash
// attention). Chunks begin at multiples of their size in the sequence, and masked keys add exact zeros. So a row's result
// is the same, bit for bit, whether the row is computed within a whole prompt, within a part of it, or alone.
#include "layer/cache_tiles.h"
#include "layer/tile_queries.h"

#include <omp.h>

#include <limits>
#include <vector>

namespace emoe {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Strided { // [heads][tokens][size], the last dimension dense
    const bf16* data;
    int64_t head, token;
    const bf16* at(int64_t h, int64_t t) const { return data + h * head + t * token; }
};

struct Sequence { // model/native/structs.py mirrors it
    int64_t first_row, start, end, table;
};

struct Call {
    Strided query, key, value;
    int64_t heads, key_heads, key_size, value_size;
    bf16 *keys, *values; // values is null for a cache of latents
    int64_t block_size;
    const Sequence* sequences;
    int64_t num_sequences;
    const int32_t* tables;
    float scale;
    int64_t window; // 0: none
    float softcap;  // 0: none
    const float* sinks;
    bf16* out; // [tokens][heads][value_size]

    // The number of the tile that holds `position` of the sequence for head `g`.
    int64_t tile(const Sequence& sequence, int64_t g, int64_t position) const {
        const int64_t per_block = block_size / kTile, block = tables[sequence.table + position / block_size];
        return (block * key_heads + g) * per_block + position % block_size / kTile;
    }
    bf16* key_tile(int64_t tile) const { return keys + tile * kTile * key_size; }
    bf16* value_tile(int64_t tile) const { return values + tile * kTile * value_size; }
};

// Writes keys and values of a sequence's new tokens into the cache, for head `g`. A tile is cleared before its first
// token is written: another sequence may have left an infinity there, and a weight of zero times infinity is not zero.
void write(const Call& call, const Sequence& sequence, int64_t g) {
    for (int64_t position = sequence.start; position < sequence.end; ++position) {
        const int64_t tile = call.tile(sequence, g, position), slot = position % kTile;
        const int64_t token = sequence.first_row + position - sequence.start;
        bf16 *keys = call.key_tile(tile), *values = call.values == nullptr ? nullptr : call.value_tile(tile);
        if (slot == 0) {
            std::memset(keys, 0, kTile * call.key_size * sizeof(bf16));
            if (values != nullptr) std::memset(values, 0, kTile * call.value_size * sizeof(bf16));
        }
        const int32_t* key = (const int32_t*)call.key.at(g, token);
        for (int64_t d = 0; d < call.key_size / 2; ++d) ((int32_t*)keys)[d * kTile + slot] = key[d];
        if (values == nullptr) continue;
        const bf16* value = call.value.at(g, token);
        bf16* to = values + slot / 2 * 2 * call.value_size + slot % 2;
        for (int64_t d = 0; d < call.value_size; ++d) to[2 * d] = value[d];
    }
}

// Dot products of R queries with the keys of 4 tiles: scores [R][kKeys].
template <int R>
void score(const bf16* const* queries, int64_t size, const bf16* const* tiles, float* scores) {
    constexpr int C = kColumns<R>;
    for (int64_t first = 0; first < 4 * kTile; first += C * kLanes) {
        Register acc[R][C];
        const bf16* at[C]; // keys of a register's lanes
        for (int c = 0; c < C; ++c) {
            const int64_t key = first + c * kLanes;
            at[c] = tiles[key / kTile] + key % kTile * 2;
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) acc[r][c] = no_sum();
        for (int64_t d = 0; d < size / 2; ++d) {
            Pairs keys[C];
            for (int c = 0; c < C; ++c) keys[c] = load_pairs(at[c] + d * 2 * kTile);
            for (int r = 0; r < R; ++r) {
                const Pairs pair = all_pairs(((const int32_t*)queries[r])[d]);
                for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], pair, keys[c]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) store_sum(scores + r * kKeys + first + c * kLanes, acc[r][c]);
    }
}

// Weights [R][kKeys] times the values of `count` tiles, added to up to 64 columns, from `first` on, of out [R][size].
template <int R>
void combine(const bf16* weights, const bf16* const* tiles, int64_t count, int64_t size, int64_t first, float* out) {
    constexpr int C = kColumns<R>;
    for (const int64_t end = std::min(first + 64, size); first < end; first += C * kLanes) {
        Register acc[R][C];
        int64_t column[C];
        for (int c = 0; c < C; ++c) column[c] = std::min(first + c * kLanes, size - kLanes); // past the end, the last columns are computed again
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) acc[r][c] = load_sum(out + r * size + column[c]);
        for (int64_t t = 0; t < count; ++t)
            for (int64_t k = 0; k < kTile / 2; ++k) {
                Pairs values[C];
                for (int c = 0; c < C; ++c) values[c] = load_pairs(tiles[t] + (k * size + column[c]) * 2);
                for (int r = 0; r < R; ++r) {
                    const int32_t* pairs = (const int32_t*)(weights + r * kKeys) + t * kTile / 2;
                    const Pairs pair = all_pairs(pairs[k]);
                    for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], pair, values[c]);
                }
            }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) store_sum(out + r * size + column[c], acc[r][c]);
    }
}

// Query rows that are computed together: two tiles of the matrix unit, or a few blocks of registers.
int64_t queries_together() { return tiles_used ? 2 * kTileRows : 24; }

// Up to kQueries query rows of one sequence and key head. Row i is query head i % members of the key head, for token
// i / members.
class Rows {
  public:
    Rows(const Call& call, const Sequence& sequence, int64_t g, int64_t first, int64_t count)
        : call_(call), sequence_(sequence), g_(g), first_(first), count_(count),
          members_(call.heads / call.key_heads), out_(count * call.value_size), turned_(memory()) {
        if (call.values == nullptr && int64_t(turned_.size()) < kKeys * call.value_size)
            turned_.resize(kKeys * call.value_size);
    }

    void run() {
        for (int64_t r = 0; r < count_; ++r) {
            query_[r] = call_.query.at(head(r), sequence_.first_row + token(r));
            maximum_[r] = kNone;
            total_[r] = zero();
        }
#ifdef EMOE_TILES
        if (tiles_used) tile_queries_.set(count_, call_.key_size, query_);
#endif
        const int64_t end = last(count_ - 1);
        for (int64_t key = begin(0) / kKeys * kKeys; key < end; key += kKeys) chunk(key, std::min(kKeys, end - key));
        for (int64_t r = 0; r < count_; ++r) finish(r);
    }

  private:
    int64_t token(int64_t r) const { return (first_ + r) / members_; }
    int64_t head(int64_t r) const { return g_ * members_ + (first_ + r) % members_; }
    // Row r sees the keys [begin, last).
    int64_t last(int64_t r) const { return sequence_.start + token(r) + 1; }
    int64_t begin(int64_t r) const { return call_.window == 0 ? 0 : std::max<int64_t>(0, last(r) - call_.window); }

    void chunk(int64_t first, int64_t count) {
        const int64_t tiles = (count + kTile - 1) / kTile;
        const bf16 *keys[kKeys / kTile], *values[kKeys / kTile];
        for (int64_t t = 0; t < kKeys / kTile; ++t) {
            // past the end, the last tile stands in; its scores there are not used
            const int64_t tile = call_.tile(sequence_, g_, first + std::min(t, tiles - 1) * kTile);
            keys[t] = call_.key_tile(tile);
            values[t] = call_.values == nullptr ? turned(t) : call_.value_tile(tile);
            if (call_.values == nullptr && t < tiles) turn(keys[t], call_.value_size, turned(t));
        }
        score_all(keys, tiles);
        for (int64_t r = 0; r < count_; ++r) soften(r, first, tiles * kTile);
        combine_all(values, tiles);
    }

    void score_all(const bf16* const* keys, int64_t tiles) {
#ifdef EMOE_TILES
        if (tiles_used) return tile_queries_.score(keys, tiles, scores_);
#endif
        for (int64_t r = 0; r < count_; r += kRows)
            for (int64_t t = 0; t < tiles; t += 4)
                with_rows<kRows>(count_ - r, [&](auto number) {
                    score<decltype(number)::value>(query_ + r, call_.key_size, keys + t, scores_ + r * kKeys + t * kTile);
                });
    }

    void combine_all(const bf16* const* values, int64_t tiles) {
#ifdef EMOE_TILES
        if (tiles_used) return tile_queries_.combine(weights_, values, tiles, call_.value_size, out_.data());
#endif
        for (int64_t r = 0; r < count_; r += kRows)
            for (int64_t c = 0; c < call_.value_size; c += 64)
                with_rows<kRows>(count_ - r, [&](auto number) {
                    combine<decltype(number)::value>(weights_ + r * kKeys, values, tiles, call_.value_size, c,
                                                     out_.data() + r * call_.value_size);
                });
    }

    bf16* turned(int64_t t) { return turned_.data() + t * kTile * call_.value_size; }

    // It is kept from call to call, since fresh memory costs page faults.
    static std::vector<bf16>& memory() {
        thread_local std::vector<bf16> kept;
        return kept;
    }

    // Turns the scores of a row over keys `first` .. first + count into weights, and scales the row's sums so far to the
    // new maximum.
    void soften(int64_t r, int64_t first, int64_t count) {
        float* scores = scores_ + r * kKeys;
        Floats highest = all(maximum_[r]);
        for (int64_t k = 0; k < count; k += 16) {
            const Lanes seen = lanes_before(first + k, last(r)) & Lanes(~lanes_before(first + k, begin(r)));
            Floats score = mul(load(scores + k), all(call_.scale));
            if (call_.softcap > 0) score = capped(score);
            score = chosen(seen, score, all(kNone));
            store(scores + k, score);
            highest = larger(highest, score);
        }
        const float before = maximum_[r];
        maximum_[r] = maximum(highest);
        bf16* weights = weights_ + r * kKeys;
        if (maximum_[r] == kNone) { // the row sees no key of this chunk and none of an earlier one
            std::memset(weights, 0, count * sizeof(bf16));
            return;
        }
        if (before != maximum_[r]) scale(r, before);
        const Floats shift = all(maximum_[r]);
        for (int64_t k = 0; k < count; k += 16) {
            const Floats score = load(scores + k);
            const Lanes seen = differ(score, all(kNone));
            const Floats weight = chosen(seen, exponential(sub(score, shift)), zero());
            total_[r] = add(total_[r], weight);
            store(weights + k, weight);
        }
    }

    // softcap * tanh(score / softcap)
    Floats capped(Floats score) const {
        const Floats cap = all(call_.softcap), one = all(1.f);
        const Floats twice = mul(div(score, cap), all(2.f));
        return mul(cap, sub(one, over_logistic(all(2.f), sub(zero(), twice))));
    }

    void scale(int64_t r, float before) {
        const Floats factor = exponential(all(before - maximum_[r]));
        total_[r] = mul(total_[r], factor);
        float* out = out_.data() + r * call_.value_size;
        for (int64_t c = 0; c < call_.value_size; c += 16)
            store(out + c, mul(load(out + c), factor));
    }

    void finish(int64_t r) {
        if (call_.sinks != nullptr && call_.sinks[head(r)] > maximum_[r]) {
            const float before = maximum_[r];
            maximum_[r] = call_.sinks[head(r)];
            scale(r, before);
        }
        Floats total = all(sum(total_[r]));
        if (call_.sinks != nullptr)
            total = add(total, exponential(all(call_.sinks[head(r)] - maximum_[r])));
        const float* from = out_.data() + r * call_.value_size;
        bf16* to = call_.out + ((sequence_.first_row + token(r)) * call_.heads + head(r)) * call_.value_size;
        for (int64_t c = 0; c < call_.value_size; c += 16)
            store(to + c, div(load(from + c), total));
    }

    const Call& call_;
    const Sequence& sequence_;
    const int64_t g_, first_, count_, members_;
    const bf16* query_[kQueries];
    float maximum_[kQueries];
    Floats total_[kQueries]; // sums of weights, lane by lane
#ifdef EMOE_TILES
    TileQueries tile_queries_;
#endif
    alignas(64) float scores_[kQueries * kKeys];
    alignas(64) bf16 weights_[kQueries * kKeys];
    std::vector<float> out_; // [count][value_size] weighted sums so far
    std::vector<bf16>& turned_; // tiles of values that were made from tiles of keys
};

struct Task {
    int64_t sequence, head, first;
};

// Writes the keys and values of all sequences, and computes attention for the first `attended` of them.
void run(const Call& call, int64_t attended, int threads) {
    std::vector<Task> tasks;
    for (int64_t s = 0; s < attended; ++s) {
        const int64_t rows = (call.sequences[s].end - call.sequences[s].start) * (call.heads / call.key_heads);
        for (int64_t g = 0; g < call.key_heads; ++g)
            for (int64_t first = 0; first < rows; first += queries_together()) tasks.push_back({s, g, first});
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < call.num_sequences * call.key_heads; ++i)
            write(call, call.sequences[i / call.key_heads], i % call.key_heads);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < int64_t(tasks.size()); ++i) {
            const Sequence& sequence = call.sequences[tasks[i].sequence];
            const int64_t rows = (sequence.end - sequence.start) * (call.heads / call.key_heads);
            Rows(call, sequence, tasks[i].head, tasks[i].first, std::min(queries_together(), rows - tasks[i].first)).run();
        }
    }
}

} // namespace
} // namespace emoe

using namespace emoe;

// Writes the step's keys and values to a layer's caches and computes attention: `out` [tokens][heads][value_size].
// `strides` are [head, token] in elements, for query, key and value in turn. `sequences` are [n][4]: first row, start,
// end, and where the sequence's block numbers begin in `tables`.
extern "C" void emoe_attention(const bf16* query, const bf16* key, const bf16* value, const int64_t* strides,
                               int64_t heads, int64_t key_heads, int64_t key_size, int64_t value_size, bf16* keys,
                               bf16* values, int64_t block_size, const void* sequences, int64_t num_sequences,
                               const int32_t* tables, float scale, int64_t window, float softcap, const float* sinks,
                               bf16* out, int threads) {
    const Call call{{query, strides[0], strides[1]}, {key, strides[2], strides[3]}, {value, strides[4], strides[5]},
                    heads, key_heads, key_size, value_size, keys, values, block_size, (const Sequence*)sequences,
                    num_sequences, tables, scale, window, softcap, sinks, out};
    run(call, num_sequences, threads);
}

// Writes keys and values alone: the arguments are as in emoe_attention, `strides` of key and value in turn.
extern "C" void emoe_attention_write(const bf16* key, const bf16* value, const int64_t* strides, int64_t key_heads,
                                     int64_t key_size, int64_t value_size, bf16* keys, bf16* values, int64_t block_size,
                                     const void* sequences, int64_t num_sequences, const int32_t* tables, int threads) {
    const Call call{{}, {key, strides[0], strides[1]}, {value, strides[2], strides[3]}, key_heads, key_heads, key_size,
                    value_size, keys, values, block_size, (const Sequence*)sequences, num_sequences, tables};
    run(call, 0, threads);
}

// Attention over a cache of latents, which all heads share. `key` [tokens][key_size] are the step's latents, of which the
// first `value_size` numbers are the value. Only the first `attended` sequences get an output.
extern "C" void emoe_latent_attention(const bf16* query, const bf16* key, const int64_t* strides, int64_t heads,
                                      int64_t key_size, int64_t value_size, bf16* keys, int64_t block_size,
                                      const void* sequences, int64_t num_sequences, int64_t attended,
                                      const int32_t* tables, float scale, int64_t window, float softcap,
                                      const float* sinks, bf16* out, int threads) {
    const Call call{{query, strides[0], strides[1]}, {key, 0, strides[2]}, {}, heads, 1, key_size, value_size, keys,
                    nullptr, block_size, (const Sequence*)sequences, num_sequences, tables, scale, window, softcap, sinks,
                    out};
    run(call, attended, threads);
}

// Writes the bytes of the structures that model/native/structs.py mirrors, in its order.
extern "C" void emoe_attention_sizes(int64_t* sizes) { sizes[0] = sizeof(Sequence); }

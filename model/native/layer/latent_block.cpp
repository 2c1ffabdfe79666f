// The attention half of a decoder layer whose cache holds latents, in one call: normalise, project, rotate, absorb the
// matrices that make keys, attend to latents, make values, project, add, normalise (model/trunk/latent.py has the formulas).
//
// The parts are the same that Python calls one by one, in the same order, so the result has the same bits.
#include "layer/block.h"
#include "layer/calls.h"

#include <vector>

using namespace emoe;

namespace {

// model/native/structs.py mirrors it. A latent is `latent` numbers and then `rotated` ones. A head's query is `made` numbers,
// which meet the part of a key that is made of a latent, and then `rotated` ones.
struct LatentBlock {
    int64_t hidden, heads, query_rank, made, rotated, latent, value_size;
    Norm before, query_norm, latent_norm, after;
    Matrix query_down, query, latents, out; // query_down is null where queries are made of hidden states at once
    const bf16 *key_up, *value_up;          // packed matrices of each head: [latent, made] and [value_size, latent]
    float scale;
    int32_t pairs; // whether neighbours are rotated against each other, and not halves
};

} // namespace

// Arguments are as in emoe_block. Keys of the cache are latents; cosines and sines are [T, rotated].
extern "C" void emoe_latent_block(const LatentBlock* block, const bf16* x, int64_t tokens, const bf16* cosines,
                                  const bf16* sines, bf16* keys, int64_t block_size, const void* sequences,
                                  int64_t num_sequences, const int32_t* tables, int64_t window, bf16* sum, bf16* normed,
                                  int threads) {
    const LatentBlock& b = *block;
    const int64_t head = b.made + b.rotated, key = b.latent + b.rotated;
    const int64_t sizes[] = {b.query_rank, b.heads * head, key, b.heads * key, b.heads * b.latent, b.heads * b.value_size};
    thread_local std::vector<bf16> scratch; // it is kept from call to call, since fresh memory costs page faults
    int64_t all = 0;
    for (const int64_t size : sizes) all += tokens * size;
    if (int64_t(scratch.size()) < all) scratch.resize(all);
    bf16* parts[6] = {scratch.data()};
    for (int i = 1; i < 6; ++i) parts[i] = parts[i - 1] + tokens * sizes[i - 1];
    auto [narrow, query, latents, absorbed, attended, values] = parts;
    const bool shared = threads > 1 && tokens >= 16;
    const auto turn = b.pairs ? rotate_pairs_row : rotate_row;

#pragma omp parallel for num_threads(threads) if (shared)
    for (int64_t t = 0; t < tokens; ++t) b.before(x + t * b.hidden, b.hidden, normed + t * b.hidden);
    const bool down = b.query_down.packed != nullptr;
    if (down) {
        project(normed, tokens, b.hidden, b.query_down, b.query_rank, narrow, threads);
        b.query_norm(narrow, tokens * b.query_rank, narrow);
    }
    project(down ? narrow : normed, tokens, down ? b.query_rank : b.hidden, b.query, b.heads * head, query, threads);
    project(normed, tokens, b.hidden, b.latents, key, latents, threads);
    emoe_linear_heads(query, b.heads, tokens, head, b.heads * head, b.made, b.key_up, b.latent, absorbed, key,
                      b.heads * key, threads);
#pragma omp parallel for num_threads(threads) if (shared)
    for (int64_t t = 0; t < tokens; ++t) {
        const bf16 *cosine = cosines + t * b.rotated, *sine = sines + t * b.rotated;
        for (int64_t h = 0; h < b.heads; ++h)
            turn(query + (t * b.heads + h) * head + b.made, cosine, sine, b.rotated,
                 absorbed + (t * b.heads + h) * key + b.latent);
        bf16* latent = latents + t * key;
        b.latent_norm(latent, b.latent, latent);
        bf16* turned = attended + t * b.heads * b.latent; // not in use yet
        turn(latent + b.latent, cosine, sine, b.rotated, turned);
        std::memcpy(latent + b.latent, turned, b.rotated * sizeof(bf16));
    }
    const int64_t strides[3] = {key, b.heads * key, key};
    emoe_latent_attention(absorbed, latents, strides, b.heads, key, b.latent, keys, block_size, sequences, num_sequences,
                          num_sequences, tables, b.scale, window, 0.f, nullptr, attended, threads);
    emoe_linear_heads(attended, b.heads, tokens, b.latent, b.heads * b.latent, b.latent, b.value_up, b.value_size, values,
                      b.value_size, b.heads * b.value_size, threads);
    project(values, tokens, b.heads * b.value_size, b.out, b.hidden, sum, threads);
    add_and_normalise(x, tokens, b.hidden, b.after, sum, normed, threads);
}

// Writes the bytes of the structures that model/native/structs.py mirrors, in its order.
extern "C" void emoe_latent_block_sizes(int64_t* sizes) { sizes[0] = sizeof(LatentBlock); }

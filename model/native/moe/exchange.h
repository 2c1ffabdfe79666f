// Carries rows to the experts of the workers of one node and back, through shared memory: publish, wait, read in place.
//
// Every rank owns one segment: a header of words, then what the rank publishes in a round. First come its tokens (choices,
// weights, hidden states), which every peer reads where they lie. Then come the partial sums of all ranks' tokens that
// have an expert on this rank, in the order of ranks and tokens. A rank that waits for a word sees everything that was
// written before the word.
//
// Each part has one buffer, which suffices. A rank writes its tokens of round n+1 when it has every peer's sums of round
// n, and a peer publishes these when it has read the rank's tokens of round n. A rank writes its sums of round n+1 when it
// has every peer's tokens of round n+1, and a peer publishes these when it has read the rank's sums of round n.
//
// Where experts have replicas, every rank knows all choices of a round before it takes any token, and all ranks choose the
// same replicas (replicas.h). Sums then have two pieces (experts.h), so rounds have half as many tokens at most.
//
// Where one rank alone has tokens in a step, and few of them, the others help it with the matrices of its trunk, which every
// rank has: it asks a question, and each rank that waits for it computes a share of the columns (block.cpp). A question lies
// where the asking rank's hidden states lie, and an answer where the helper's partial sums do. No read overlaps a write:
// - A question replaces tokens of the last round, whose sums the asking rank has from every peer, or a question whose
//   answers it has from every helper. Tokens replace a question for the same reason.
// - Sums of round n+1 replace sums of round n and answers to questions between the two rounds. Every rank that may read
//   these has published its tokens of round n+1, so it has read them.
// - An answer replaces the sums of the last round and an earlier answer. Within a step, only the asking rank reads these,
//   before it asks. But before the first round of a step, ranks with tokens in the step before may still read them, and
//   the asking rank may be another one. It asks if all of them wait for its questions, and so have read (ready_for).
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace emoe {

constexpr int64_t kLine = 64; // bytes of a cache line: two processes that write to one line slow each other down
constexpr int64_t kHelped = 4; // most tokens of a step in which other ranks help: more would have to wait for products instead of memory

// A number of a round or of a question in shared memory. It ascends, and wraps around.
struct alignas(kLine) Word {
    std::atomic<uint32_t> value;
    std::atomic<uint32_t> sleepers;
};

struct alignas(kLine) Header {
    Word tokens; // rounds whose tokens are published
    Word sums;   // rounds whose partial sums are published
    int64_t count; // tokens of this round
    Word ready;    // the question that this rank waits for, or the last one that it has waited for
    Word asked;    // the last question of this rank
    Word answered; // the last question that this rank has answered
    std::atomic<uint64_t> helpers; // a mask of the ranks that the question is for
    int64_t asked_rows; // rows of the question
};

// kMissing: an expert could not be read, and the step fails on this rank. It is kUnavailable of experts.h.
enum Status : int { kDone = 0, kAborted = 1, kSilent = 2, kDisagree = 3, kMissing = 4 };

// The offsets of a segment's parts, in bytes. One round carries up to `capacity` tokens of each rank.
struct Layout {
    int64_t size, capacity, hidden, top_k;

    int64_t begins_at() const { return sizeof(Header); }
    int64_t choices_at() const { return begins_at() + lines(size * 8); }
    int64_t weights_at() const { return choices_at() + lines(capacity * top_k * 4); }
    int64_t rows_at() const { return weights_at() + lines(capacity * top_k * 4); }
    int64_t sums_at() const { return rows_at() + lines(capacity * hidden * 2); }
    int64_t answer_size() const { return size * capacity * hidden * 2; } // numbers in 16 bits that an answer may have
    int64_t total() const { return sums_at() + size * capacity * hidden * 4; }
    static int64_t lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
};

// One rank's segment, mapped into this process.
struct Segment {
    char* base;
    Layout layout;

    Header& header() const { return *(Header*)base; }
    int64_t* sums_begin() const { return (int64_t*)(base + layout.begins_at()); } // [W] row of each rank's first sum
    int32_t* choices() const { return (int32_t*)(base + layout.choices_at()); }
    float* weights() const { return (float*)(base + layout.weights_at()); }
    uint16_t* rows() const { return (uint16_t*)(base + layout.rows_at()); }
    float* all_sums() const { return (float*)(base + layout.sums_at()); }
    uint16_t* answer() const { return (uint16_t*)all_sums(); }
    float* sums(int64_t rank, int64_t pieces) const {
        return all_sums() + sums_begin()[rank] * pieces * layout.hidden;
    }
};

// The questions between two rounds, in their order: the output head of the step before, and the products of a block.
enum Question : int { kHead = 0, kBefore = 1, kAfter = 2 };

struct Exchange {
    int64_t rank;
    Layout layout;
    std::vector<Segment> segments;
    int64_t timeout_ns;
    std::atomic<bool> aborted{false};
    uint32_t round = 0;
    std::vector<int64_t> step_tokens; // [W] tokens of each rank in the whole step
    std::vector<int64_t> counts;      // [W] tokens of each rank in the last round, or in this one
    int64_t waited_ns[2] = {0, 0};    // waited for tokens, waited for sums

    void begin_round();
    void publish(Word& word, uint32_t number);
    Status wait(Word& word, uint32_t number, int64_t& waited);
    // Waits until there() is true. The peer that makes it so publishes `number` in `word`, or does not wake sleepers.
    template <class There> Status wait_until(There there, Word& word, uint32_t number, int64_t& waited);
    Status wait_for_tokens(int64_t peer, int64_t count);
    Status wait_for_sums(int64_t peer);

    // The rank that may ask the others in this step, or -1.
    int64_t asker() const;
    // The number of a question. Numbers ascend from question to question and from round to round.
    uint32_t question(int which) const { return 3 * (round + 1) + which; }
    void ask(uint32_t question, uint64_t helpers);
    // A mask of the ranks that wait for a question. It is empty if a rank may still read what an answer would replace,
    // and if the question has been asked before.
    uint64_t ready_for(uint32_t question) const;
    // Waits until a peer has asked the question, a later one, or none and gone on to the next round. `mine` becomes
    // whether it has asked the question, and this rank is to help.
    Status wait_for_question(int64_t peer, uint32_t question, bool& mine);
    Status wait_for_answer(int64_t peer, uint32_t question);
};

} // namespace emoe

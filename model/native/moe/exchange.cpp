// How processes wait for and wake one another, and the exchange's functions that ctypes calls. See exchange.h.
#include "moe/exchange.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <new>

#include <immintrin.h>

namespace emoe {

namespace {

constexpr int64_t kSpinNs = 20'000;     // first, a waiting thread keeps its core
constexpr int64_t kYieldNs = 2'000'000; // then it yields the core; after this it sleeps. Waking it takes some 50 us
constexpr int64_t kLookNs = 5'000'000;  // a sleeper looks this often whether the exchange was aborted
constexpr uint32_t kOldest = 1 << 20;   // numbers of questions go on meanwhile, before an old number is replaced

int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return int64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

bool reached(const Word& word, uint32_t number) {
    return int32_t(word.value.load(std::memory_order_acquire) - number) >= 0;
}

void sleep_on(Word& word, uint32_t number) {
    word.sleepers.fetch_add(1);
    const uint32_t seen = word.value.load();
    if (int32_t(seen - number) < 0) {
        const timespec most{0, kLookNs};
        syscall(SYS_futex, &word.value, FUTEX_WAIT, seen, &most, nullptr, 0);
    }
    word.sleepers.fetch_sub(1);
}

} // namespace

void Exchange::begin_round() {
    ++round;
    // Questions between the rounds n-1 and n have the numbers 3 n + which. A number that stayed as it is for long would seem
    // to be a later one when numbers have wrapped around. Nobody waits any more for the number that replaces it.
    const uint32_t last = 3 * round + kAfter;
    Header& own = segments[rank].header();
    for (Word* word : {&own.ready, &own.asked, &own.answered})
        if (last - word->value.load(std::memory_order_relaxed) > kOldest) word->value.store(3 * round - 1);
}

void Exchange::publish(Word& word, uint32_t number) {
    word.value.store(number);
    // both operations are sequentially consistent: either we see the sleeper, or the sleeper sees the number
    if (word.sleepers.load()) syscall(SYS_futex, &word.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

template <class There> Status Exchange::wait_until(There there, Word& word, uint32_t number, int64_t& waited) {
    if (there()) return kDone;
    const int64_t begin = now_ns();
    for (int64_t now = begin; !there(); now = now_ns()) {
        if (aborted.load(std::memory_order_relaxed)) return kAborted;
        if (now - begin > timeout_ns) return kSilent;
        if (now - begin < kSpinNs)
            _mm_pause();
        else if (now - begin < kYieldNs)
            sched_yield();
        else
            sleep_on(word, number);
    }
    waited += now_ns() - begin;
    return kDone;
}

Status Exchange::wait(Word& word, uint32_t number, int64_t& waited) {
    return wait_until([&] { return reached(word, number); }, word, number, waited);
}

Status Exchange::wait_for_tokens(int64_t peer, int64_t count) {
    Header& header = segments[peer].header();
    const Status status = wait(header.tokens, round, waited_ns[0]);
    return status == kDone && header.count != count ? kDisagree : status;
}

Status Exchange::wait_for_sums(int64_t peer) { return wait(segments[peer].header().sums, round, waited_ns[1]); }

int64_t Exchange::asker() const {
    int64_t found = -1;
    for (int64_t rank = 0; rank < layout.size; ++rank) {
        if (step_tokens[rank] == 0) continue;
        if (found >= 0 || step_tokens[rank] > kHelped) return -1;
        found = rank;
    }
    return layout.size > 1 && layout.size <= 64 ? found : -1;
}

void Exchange::ask(uint32_t question, uint64_t helpers) {
    Header& own = segments[rank].header();
    own.helpers = helpers;
    publish(own.asked, question);
}

uint64_t Exchange::ready_for(uint32_t question) const {
    uint64_t ranks = 0;
    for (int64_t peer = 0; peer < layout.size; ++peer) {
        if (peer == rank) continue;
        const Word& ready = segments[peer].header().ready;
        if (ready.value.load(std::memory_order_acquire) == question) ranks |= uint64_t(1) << peer;
        // it had tokens in the last round, and is not known to have begun this step
        else if (counts[peer] > 0 && !reached(ready, this->question(kBefore))) return 0;
    }
    return ranks;
}

Status Exchange::wait_for_question(int64_t peer, uint32_t question, bool& mine) {
    segments[rank].header().ready.value.store(question);
    Header& header = segments[peer].header();
    const auto there = [&] { return reached(header.asked, question) || reached(header.tokens, round + 1); };
    const Status status = wait_until(there, header.asked, question, waited_ns[0]);
    mine = header.asked.value.load(std::memory_order_acquire) == question && (header.helpers.load() >> rank & 1);
    return status;
}

Status Exchange::wait_for_answer(int64_t peer, uint32_t question) {
    return wait(segments[peer].header().answered, question, waited_ns[1]);
}

} // namespace emoe

using namespace emoe;

extern "C" int64_t emoe_exchange_bytes(int64_t size, int64_t capacity, int64_t hidden, int64_t top_k) {
    return Layout{size, capacity, hidden, top_k}.total();
}

// `bases` [size] are the addresses at which the ranks' segments are mapped. The kernel has zeroed them.
extern "C" Exchange* emoe_exchange_new(int64_t rank, int64_t size, int64_t capacity, int64_t hidden, int64_t top_k,
                                       const int64_t* bases, int64_t timeout_ns) {
    auto* exchange = new Exchange{};
    exchange->rank = rank;
    exchange->layout = {size, capacity, hidden, top_k};
    exchange->timeout_ns = timeout_ns;
    exchange->counts.assign(size, 0);
    for (int64_t r = 0; r < size; ++r) exchange->segments.push_back({(char*)bases[r], exchange->layout});
    return exchange;
}

extern "C" void emoe_exchange_free(Exchange* exchange) { delete exchange; }

// Wakes this rank if it waits. Another thread calls it. The exchange cannot be used afterwards.
extern "C" void emoe_exchange_abort(Exchange* exchange) { exchange->aborted = true; }

// Runs a round without tokens. It returns when every rank has called it.
extern "C" int emoe_exchange_meet(Exchange* exchange) {
    exchange->begin_round();
    exchange->counts.assign(exchange->layout.size, 0);
    Header& own = exchange->segments[exchange->rank].header();
    own.count = 0;
    exchange->publish(own.tokens, exchange->round);
    exchange->publish(own.sums, exchange->round);
    for (int64_t peer = 0; peer < exchange->layout.size; ++peer) {
        if (peer == exchange->rank) continue;
        if (const Status status = exchange->wait_for_sums(peer)) return status;
    }
    return kDone;
}

// Begins a step in which each rank runs `tokens` [size] tokens.
extern "C" void emoe_exchange_begin(Exchange* exchange, const int64_t* tokens) {
    exchange->step_tokens.assign(tokens, tokens + exchange->layout.size);
}

// Ends a step on a rank that may have asked for help with its output head: who waits for that question goes on.
extern "C" void emoe_exchange_decline(Exchange* exchange) {
    const uint32_t question = exchange->question(kHead);
    const Header& own = exchange->segments[exchange->rank].header();
    if (exchange->asker() == exchange->rank && int32_t(own.asked.value.load() - question) < 0) exchange->ask(question, 0);
}

// Writes the nanoseconds that this rank has waited since the last call: for peers' tokens, and for their sums.
extern "C" void emoe_exchange_waited(Exchange* exchange, int64_t* out) {
    for (int i = 0; i < 2; ++i) {
        out[i] = exchange->waited_ns[i];
        exchange->waited_ns[i] = 0;
    }
}

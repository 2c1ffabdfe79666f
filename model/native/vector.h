// Operations on 16 floats at a time, in the registers that the CPU has: AVX-512 with bfloat16, or else AVX2.
//
// `Lanes` is a bit mask, and lane 0 is the lowest bit. Loads and stores may take the first lanes only; `lanes_before` makes
// that mask. Both instruction sets round alike. But sums of products differ in the last bits, since AVX-512's instruction
// for bfloat16 treats denormal numbers as zero.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace emoe {

using bf16 = uint16_t;
using Lanes = uint16_t;

inline float to_float(bf16 value) {
    uint32_t bits = uint32_t(value) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// The mask of those of the 16 columns from `first` on that lie before `end`.
inline Lanes lanes_before(int64_t first, int64_t end) {
    return end - first >= 16 ? 0xffff : Lanes((1u << std::max<int64_t>(end - first, 0)) - 1);
}

#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)

using Floats = __m512;
using Register = __m512;
using Pairs = __m512bh; // a register of pairs of bfloat16

#define EMOE_AVX512 1
#define EMOE_BYTES 1           // the CPU multiplies bytes of either sign, and adds up four products

constexpr int kLanes = 16;     // floats of a register
constexpr int kRegisters = 32; // vector registers of the CPU

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }          // a * b + c
inline Floats fused_negated(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); } // c - a * b
// If one of the two operands is not a number, the result is the second operand.
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
inline float maximum(Floats a) { return _mm512_reduce_max_ps(a); }
// The largest of both without their signs. It is infinite or not a number if one of them is.
inline float largest_size(Floats a, Floats b) {
    const __m512i size = _mm512_set1_epi32(0x7fffffff);
    const __m512i bits = _mm512_max_epi32(_mm512_and_si512((__m512i)a, size), _mm512_and_si512((__m512i)b, size));
    const int32_t largest = _mm512_reduce_max_epi32(bits); // floats without a sign are ordered as their bits are
    float out;
    std::memcpy(&out, &largest, 4);
    return out;
}
inline Floats nearest(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power_of_2(Floats a, Floats whole) { return _mm512_scalef_ps(a, whole); }
inline Lanes differ(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
inline Floats chosen(Lanes lanes, Floats there, Floats elsewhere) { return _mm512_mask_mov_ps(elsewhere, lanes, there); }

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load(const float* from, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
inline void store(float* to, Floats value, Lanes lanes) { _mm512_mask_storeu_ps(to, lanes, value); }
// Writes past the caches. `to` is aligned to 64 bytes. Other threads see it after `_mm_sfence`.
inline void stream(float* to, Floats value) { _mm512_stream_ps(to, value); }

inline Floats widened(__m256i raw) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)); }
inline __m256i narrowed(Floats value) { return (__m256i)_mm512_cvtneps_pbh(value); }
inline Floats load(const bf16* from, Lanes lanes = 0xffff) { return widened(_mm256_maskz_loadu_epi16(lanes, from)); }
inline void store(bf16* to, Floats value, Lanes lanes = 0xffff) { _mm256_mask_storeu_epi16(to, lanes, narrowed(value)); }

inline Pairs load_pairs(const bf16* from) { return (Pairs)_mm512_loadu_si512(from); }
inline void store_pairs(bf16* to, Pairs value) { _mm512_storeu_si512(to, (__m512i)value); }
inline Pairs all_pairs(int32_t pair) { return (Pairs)_mm512_set1_epi32(pair); }
// Adds both products of each pair to `so_far`.
inline Register dot(Register so_far, Pairs a, Pairs b) { return _mm512_dpbf16_ps(so_far, a, b); }
inline Register no_sum() { return _mm512_setzero_ps(); }
inline Register load_sum(const float* from) { return _mm512_loadu_ps(from); }
inline void store_sum(float* to, Register value) { _mm512_storeu_ps(to, value); }

using Integers = __m512i; // 32-bit integers, or pairs of 16-bit integers
// 16 sums of 32 bits. GCC 12 keeps such sums of a loop in memory if they are __m512i, which is a vector of 64-bit integers.
using IntegerSums = __v16si;
inline IntegerSums no_integers() { return (IntegerSums)_mm512_setzero_si512(); }
inline Integers all_integers(int32_t value) { return _mm512_set1_epi32(value); }
inline Integers load_bytes(const int8_t* from) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from)); }
inline Integers load_integers(const void* from) { return _mm512_loadu_si512(from); }
// Of two registers of pairs of bytes of 32 columns: fours of bytes, plus 128 each, of the columns from 0, 8, 16 and 24 on, and of
// those from 4, 12, 20 and 28 on. `in_order` puts such columns in order.
inline void take_fours(Integers first, Integers second, Integers& low, Integers& high) {
    const Integers sign = _mm512_set1_epi8(int8_t(0x80));
    low = _mm512_xor_si512(_mm512_unpacklo_epi16(first, second), sign);
    high = _mm512_xor_si512(_mm512_unpackhi_epi16(first, second), sign);
}
inline void in_order(Register& low, Register& high) {
    const Register even = _mm512_shuffle_f32x4(low, high, 0x44), odd = _mm512_shuffle_f32x4(low, high, 0xee);
    low = _mm512_shuffle_f32x4(even, even, 0xd8); // parts 0 and 1 of each, by turns
    high = _mm512_shuffle_f32x4(odd, odd, 0xd8);
}
inline void store_integers(void* to, Integers value) { _mm512_storeu_si512(to, value); }
// Of each byte, the lower or the upper four bits.
inline Integers low_halves(Integers bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline Integers high_halves(Integers bytes) { return low_halves(_mm512_srli_epi16(bytes, 4)); }
inline Integers load_table(const int8_t* from) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from)); }
// The bytes of a table of 16 at bytes below 16.
inline Integers at(Integers table, Integers where) { return _mm512_shuffle_epi8(table, where); }
// Sums of products of bytes, one without a sign and one with: four steps of K at a time. They hold any number of products.
using ByteSums = IntegerSums;
constexpr bool kSmallByteSums = false;
inline ByteSums no_bytes() { return no_integers(); }
inline ByteSums dot_bytes(ByteSums so_far, Integers codes, Integers bytes) {
    return (ByteSums)_mm512_dpbusd_epi32((__m512i)so_far, codes, bytes);
}
inline IntegerSums to_integers(ByteSums sums) { return sums; }
inline IntegerSums plus(IntegerSums a, IntegerSums b) { return (IntegerSums)_mm512_add_epi32((__m512i)a, (__m512i)b); }
inline __m128i to_bytes(Floats value) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value)); }
inline Integers load_words(const uint16_t* from) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)); }
// Four bits of each 32-bit integer, from bit `first` on.
inline Integers four_bits(Integers words, int first) {
    return _mm512_and_si512(_mm512_srl_epi32(words, _mm_cvtsi32_si128(first)), _mm512_set1_epi32(15));
}
inline Register load_bf16(const uint16_t* from) { return _mm512_castsi512_ps(_mm512_slli_epi32(load_words(from), 16)); }
inline Register load_f16(const uint16_t* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
inline Register to_register(IntegerSums a) { return _mm512_cvtepi32_ps((__m512i)a); }
inline Register to_register(Integers a) { return _mm512_cvtepi32_ps(a); }
inline Register all_lanes(float value) { return _mm512_set1_ps(value); }
inline Register times(Register a, Register b) { return _mm512_mul_ps(a, b); }
inline Register times_plus(Register a, Register b, Register so_far) { return _mm512_fmadd_ps(a, b, so_far); } // a * b + so_far
inline Register less_product(Register a, Register b, Register c) { return _mm512_fnmadd_ps(b, c, a); }         // a - b * c

#else

struct Floats {
    __m256 low, high;
};
using Register = __m256;
using Pairs = __m256i;

constexpr int kLanes = 8;
constexpr int kRegisters = 16;

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats fused(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fused_negated(Floats a, Floats b, Floats c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline float sum(Floats a) {
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float maximum(Floats a) {
    const __m256 eight = _mm256_max_ps(a.low, a.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline float largest_size(Floats a, Floats b) {
    const __m256i size = _mm256_set1_epi32(0x7fffffff);
    const auto bits = [&](__m256 value) { return _mm256_and_si256(_mm256_castps_si256(value), size); };
    const __m256i eight = _mm256_max_epi32(_mm256_max_epi32(bits(a.low), bits(a.high)), _mm256_max_epi32(bits(b.low), bits(b.high)));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(four));
}
inline Floats nearest(Floats a) {
    constexpr int kHow = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, kHow), _mm256_round_ps(a.high, kHow)};
}
// Multiplies in two steps, since 2^whole may be too large or too small for a normal number where the product is not.
inline __m256 times_power_of_2(__m256 a, __m256 whole) {
    const __m256i power = _mm256_cvtps_epi32(whole), half = _mm256_srai_epi32(power, 1), bias = _mm256_set1_epi32(127);
    const __m256i rest = _mm256_sub_epi32(power, half);
    a = _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
inline Floats times_power_of_2(Floats a, Floats whole) {
    return {times_power_of_2(a.low, whole.low), times_power_of_2(a.high, whole.high)};
}
inline Lanes differ(Floats a, Floats b) {
    return Lanes(_mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_NEQ_UQ)) |
                 _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_NEQ_UQ)) << 8);
}
inline __m256i mask_of(Lanes lanes, int first) { // all bits of a lane are 1 if `lanes` has it; 8 lanes from `first` on
    const __m256i bits = _mm256_slli_epi32(_mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), first);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(lanes), bits), bits);
}
inline Floats chosen(Lanes lanes, Floats there, Floats elsewhere) {
    return {_mm256_blendv_ps(elsewhere.low, there.low, _mm256_castsi256_ps(mask_of(lanes, 0))),
            _mm256_blendv_ps(elsewhere.high, there.high, _mm256_castsi256_ps(mask_of(lanes, 8)))};
}

inline Floats load(const float* from, Lanes lanes = 0xffff) {
    if (lanes == 0xffff) return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
    return {_mm256_maskload_ps(from, mask_of(lanes, 0)), _mm256_maskload_ps(from + 8, mask_of(lanes, 8))};
}
inline void store(float* to, Floats value, Lanes lanes = 0xffff) {
    if (lanes == 0xffff) {
        _mm256_storeu_ps(to, value.low);
        _mm256_storeu_ps(to + 8, value.high);
        return;
    }
    _mm256_maskstore_ps(to, mask_of(lanes, 0), value.low);
    _mm256_maskstore_ps(to + 8, mask_of(lanes, 8), value.high);
}

inline void stream(float* to, Floats value) {
    _mm256_stream_ps(to, value.low);
    _mm256_stream_ps(to + 8, value.high);
}

inline Floats widened(__m256i raw) {
    const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(raw));
    const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(raw, 1));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
}
inline __m256i narrowed(__m256 value) { // bfloat16, in the low halves of 8 lanes
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    // rounding by addition could turn a not-a-number into a number, so those keep their bits
    const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, none), 16);
}
inline __m256i narrowed(Floats value) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(narrowed(value.low), narrowed(value.high)), 0xd8);
}
inline int count_of(Lanes lanes) { return __builtin_popcount(lanes); }
inline Floats load(const bf16* from, Lanes lanes = 0xffff) {
    if (lanes == 0xffff) return widened(_mm256_loadu_si256((const __m256i*)from));
    alignas(32) bf16 some[16] = {};
    std::memcpy(some, from, count_of(lanes) * sizeof(bf16));
    return widened(_mm256_load_si256((const __m256i*)some));
}
inline void store(bf16* to, Floats value, Lanes lanes = 0xffff) {
    if (lanes == 0xffff) return _mm256_storeu_si256((__m256i*)to, narrowed(value));
    alignas(32) bf16 some[16];
    _mm256_store_si256((__m256i*)some, narrowed(value));
    std::memcpy(to, some, count_of(lanes) * sizeof(bf16));
}

inline Pairs load_pairs(const bf16* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline void store_pairs(bf16* to, Pairs value) { _mm256_storeu_si256((__m256i*)to, value); }
inline Pairs all_pairs(int32_t pair) { return _mm256_set1_epi32(pair); }
inline Register first_of(Pairs pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline Register second_of(Pairs pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int32_t(0xffff0000))));
}
inline Register dot(Register so_far, Pairs a, Pairs b) {
    so_far = _mm256_fmadd_ps(first_of(a), first_of(b), so_far);
    return _mm256_fmadd_ps(second_of(a), second_of(b), so_far);
}
inline Register no_sum() { return _mm256_setzero_ps(); }
inline Register load_sum(const float* from) { return _mm256_loadu_ps(from); }
inline void store_sum(float* to, Register value) { _mm256_storeu_ps(to, value); }

using Integers = __m256i;
using IntegerSums = __v8si; // as with AVX-512
inline IntegerSums no_integers() { return (IntegerSums)_mm256_setzero_si256(); }
inline Integers all_integers(int32_t value) { return _mm256_set1_epi32(value); }
inline Integers load_bytes(const int8_t* from) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from)); }
inline IntegerSums dot(IntegerSums so_far, Integers a, Integers b) { return so_far + (IntegerSums)_mm256_madd_epi16(a, b); }
// The nearest integers, ties to even, of numbers that fit into 16 bits.
inline void store_nearest(int16_t* to, Floats value) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(value.low), _mm256_cvtps_epi32(value.high));
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(words, 0xd8));
}
inline Integers load_integers(const void* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline void store_integers(void* to, Integers value) { _mm256_storeu_si256((__m256i*)to, value); }
inline Integers low_halves(Integers bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
inline Integers high_halves(Integers bytes) { return low_halves(_mm256_srli_epi16(bytes, 4)); }
inline Integers load_table(const int8_t* from) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from)); }
inline Integers at(Integers table, Integers where) { return _mm256_shuffle_epi8(table, where); }
// Sums in 16 bits, unless the CPU has the instruction: of 32 steps of K with codes up to 15, or of 16 with codes up to 24.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__) || defined(__AVXVNNI__)
using ByteSums = IntegerSums;
constexpr bool kSmallByteSums = false;
inline ByteSums no_bytes() { return no_integers(); }
inline ByteSums dot_bytes(ByteSums so_far, Integers codes, Integers bytes) {
#ifdef __AVXVNNI__
    return (ByteSums)_mm256_dpbusd_avx_epi32((__m256i)so_far, codes, bytes);
#else
    return (ByteSums)_mm256_dpbusd_epi32((__m256i)so_far, codes, bytes);
#endif
}
inline IntegerSums to_integers(ByteSums sums) { return sums; }
#else
using ByteSums = __v16hi;
constexpr bool kSmallByteSums = true;
inline ByteSums no_bytes() { return (ByteSums)_mm256_setzero_si256(); }
inline ByteSums dot_bytes(ByteSums so_far, Integers codes, Integers bytes) {
    return so_far + (ByteSums)_mm256_maddubs_epi16(codes, bytes);
}
inline IntegerSums to_integers(ByteSums sums) { return (IntegerSums)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
#endif
inline IntegerSums plus(IntegerSums a, IntegerSums b) { return a + b; }
inline __m128i to_bytes(Floats value) {
    // packed, each half of a register has 4 numbers of low and then 4 of high
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(value.low), _mm256_cvtps_epi32(value.high));
    const __m256i even = _mm256_permute4x64_epi64(words, 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(even), _mm256_extracti128_si256(even, 1));
}
inline Integers load_words(const uint16_t* from) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)); }
inline Integers four_bits(Integers words, int first) {
    return _mm256_and_si256(_mm256_srl_epi32(words, _mm_cvtsi32_si128(first)), _mm256_set1_epi32(15));
}
inline Register load_bf16(const uint16_t* from) { return _mm256_castsi256_ps(_mm256_slli_epi32(load_words(from), 16)); }
inline Register load_f16(const uint16_t* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
inline Register to_register(IntegerSums a) { return _mm256_cvtepi32_ps((__m256i)a); }
inline Register to_register(Integers a) { return _mm256_cvtepi32_ps(a); }
inline Register all_lanes(float value) { return _mm256_set1_ps(value); }
inline Register times(Register a, Register b) { return _mm256_mul_ps(a, b); }
inline Register times_plus(Register a, Register b, Register so_far) { return _mm256_fmadd_ps(a, b, so_far); }
inline Register less_product(Register a, Register b, Register c) { return _mm256_fnmadd_ps(b, c, a); }

#endif

// Writes 16 whole numbers from -127 to 127 as bytes, or of each 8 those of the places 0, 4, 1, 5, 2, 6, 3, 7.
inline void store_bytes(int8_t* to, Floats whole) { _mm_storeu_si128((__m128i*)to, to_bytes(whole)); }
inline void store_eights(int8_t* to, Floats whole) {
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(to_bytes(whole), order));
}

// Rounds to the nearest bfloat16, ties to even, as torch does. A not-a-number stays one.
inline Floats rounded(Floats value) { return widened(narrowed(value)); }

// e^x with an error of about 1 unit in the last place. It is 0 for very negative x and infinite above 89; a not-a-number
// stays one. x is reduced to [-ln 2 / 2, ln 2 / 2], where Taylor's polynomial of degree 6 has an error below 2^-26.
inline Floats exponential(Floats x) {
    x = smaller(all(89.f), larger(all(-104.f), x));
    const Floats n = nearest(mul(x, all(1.44269504089f)));
    Floats r = fused_negated(n, all(0.693359375f), x);
    r = fused_negated(n, all(-2.12194440e-4f), r);
    Floats y = all(1.f / 720);
    y = fused(y, r, all(1.f / 120));
    y = fused(y, r, all(1.f / 24));
    y = fused(y, r, all(1.f / 6));
    y = fused(y, r, all(0.5f));
    y = fused(y, r, all(1.f));
    y = fused(y, r, all(1.f));
    return times_power_of_2(y, n);
}

// top / (1 + e^-x)
inline Floats over_logistic(Floats top, Floats x) {
    return div(top, add(all(1.f), exponential(sub(zero(), x))));
}

// gelu, approximated by tanh: (1 + tanh y) / 2 is the logistic function of 2 y.
inline Floats gelu(Floats x) {
    const Floats cubic = mul(x, fused(mul(x, x), all(0.044715f), all(1.f)));
    return over_logistic(x, mul(cubic, all(1.59576912161f)));
}

// What rounding takes off the sum of a and b, exactly (Knuth).
inline Floats lost(Floats a, Floats b, Floats sum) {
    const Floats rest = sub(sum, a);
    return add(sub(a, sub(sum, rest)), sub(b, rest));
}

} // namespace emoe

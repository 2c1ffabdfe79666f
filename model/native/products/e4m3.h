// Numbers of 8 and 4 bits in E4M3, E8M0 and E2M1, brought to bfloat16 and to float32.
#pragma once

#include "vector.h"

namespace emoe {

constexpr float kE4m3Scale = 256.f; // what load_e4m3 leaves out

#ifdef EMOE_AVX512

// Of 16 columns: what to take off the bits of numbers that `bits_of_e4m3<kMost>` gives, for both numbers of a pair.
using Powers = __m512i;

constexpr int kLeast = 112 << 7;        // so the exponents of bfloat16 are larger, with numbers divided by 256
constexpr int kMost = kLeast + 0x4000; // a little more than with the largest power, 2^127

// The powers of 2 of the columns whose words begin at `words`: byte number `byte` of each word.
inline Powers load_powers(const uint32_t* words, int byte) {
    const __m512i shifted = _mm512_srl_epi32(_mm512_loadu_si512(words), _mm_cvtsi32_si128(8 * byte));
    const __m512i exponents = _mm512_and_si512(shifted, _mm512_set1_epi32(255));
    const __m512i less = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(127 + (0x4000 >> 7)), exponents), 7);
    return _mm512_or_si512(less, _mm512_slli_epi32(less, 16));
}
// Sizes of numbers in E4M3 as bits of bfloat16. `wide` are the numbers with their sign in 16 bits. Their 4 bits of exponent and 3
// of mantissa are those of bfloat16, except that exponents are larger by MORE. But numbers below the smallest normal one are
// looked up, and 0 stays 0.
template <int MORE> __m512i bits_of_e4m3(__m512i wide) {
    constexpr auto small = [](int bits) { return bf16(bits - kLeast + MORE); };
    alignas(64) static constexpr bf16 kSmall[32] = {0,             small(0x3700), small(0x3780), small(0x37c0),
                                                    small(0x3800), small(0x3820), small(0x3840), small(0x3860)};
    static_assert((MORE & 0x7f0) == 0);
    constexpr int kSomeOrMore = 0xea; // a and b, or c
    const __m512i bits = _mm512_ternarylogic_epi32(_mm512_slli_epi16(wide, 4), _mm512_set1_epi16(0x7f0),
                                                   _mm512_set1_epi16(int16_t(MORE)), kSomeOrMore);
    const __mmask32 few = _mm512_cmplt_epu16_mask(bits, _mm512_set1_epi16(int16_t(MORE + 0x80)));
    return _mm512_mask_permutexvar_epi16(bits, few, wide, _mm512_load_si512(kSmall));
}
inline Pairs with_sign_of(__m512i sizes, __m512i wide) {
    constexpr int kWithSign = 0xf8; // a, or b and c
    return (Pairs)_mm512_ternarylogic_epi32(sizes, wide, _mm512_set1_epi16(int16_t(0x8000)), kWithSign);
}
// Numbers in E4M3, divided by 256.
inline Pairs load_e4m3(const int8_t* from) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
    return with_sign_of(bits_of_e4m3<kLeast>(wide), wide);
}
// The same times powers of 2. What is too small for a normal number becomes 0, or a denormal one that products take for 0.
inline Pairs load_e4m3(const int8_t* from, Powers powers) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
    return with_sign_of(_mm512_subs_epu16(bits_of_e4m3<kMost>(wide), powers), wide);
}

// Numbers in E4M3, divided by 256: byte number `byte` of each word.
inline Register e4m3_of_words(const uint32_t* words, int byte) {
    const __m512i some = _mm512_srl_epi32(_mm512_loadu_si512(words), _mm_cvtsi32_si128(8 * byte));
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(some, _mm512_set1_epi32(0x80)), 8);
    const __m512i half = _mm512_or_si512(sign, _mm512_slli_epi32(_mm512_and_si512(some, _mm512_set1_epi32(0x7f)), 7));
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(half));
}
inline Integers shifted(Integers words, int bits) { return _mm512_srl_epi32(words, _mm_cvtsi32_si128(bits)); }
// The values of E2M1 in the lowest four bits of words.
inline Register e2m1(Integers words) {
    return _mm512_permutexvar_ps(words, _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6));
}
// Pairs of numbers that bfloat16 has all bits of.
inline Pairs paired(Register first, Register second) {
    return (Pairs)_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32((__m512i)first, 16), (__m512i)second);
}

#else

struct Powers { // of 8 columns, for both numbers of a pair
    __m256 low, high;
};

inline Powers load_powers(const uint32_t* words, int byte) {
    const __m256i shifted = _mm256_srl_epi32(_mm256_loadu_si256((const __m256i*)words), _mm_cvtsi32_si128(8 * byte));
    const __m256i exponents = _mm256_and_si256(shifted, _mm256_set1_epi32(255));
    const __m256i powers = _mm256_slli_epi32(exponents, 23); // 2^-127 becomes 0
    const __m256i low = _mm256_permutevar8x32_epi32(powers, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    const __m256i high = _mm256_permutevar8x32_epi32(powers, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
    return {_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)};
}
// As numbers of 16 bits with 5 of exponent, which have all of E4M3's, they become 32 bits wide.
inline void widen_e4m3(const int8_t* from, __m256& low, __m256& high) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xbf80)));
    low = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
    high = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
}
inline Pairs upper_halves(__m256 low, __m256 high) { // bfloat16 has all bits that are not 0
    const __m256i a = _mm256_srli_epi32(_mm256_castps_si256(low), 16), b = _mm256_srli_epi32(_mm256_castps_si256(high), 16);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
}
inline Pairs load_e4m3(const int8_t* from) {
    __m256 low, high;
    widen_e4m3(from, low, high);
    return upper_halves(low, high);
}
inline Pairs load_e4m3(const int8_t* from, const Powers& powers) {
    __m256 low, high;
    widen_e4m3(from, low, high);
    return upper_halves(_mm256_mul_ps(low, powers.low), _mm256_mul_ps(high, powers.high));
}
inline Register e4m3_of_words(const uint32_t* words, int byte) {
    const __m256i some = _mm256_srl_epi32(_mm256_loadu_si256((const __m256i*)words), _mm_cvtsi32_si128(8 * byte));
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(some, _mm256_set1_epi32(0x80)), 8);
    const __m256i half = _mm256_or_si256(sign, _mm256_slli_epi32(_mm256_and_si256(some, _mm256_set1_epi32(0x7f)), 7));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
inline Integers shifted(Integers words, int bits) { return _mm256_srl_epi32(words, _mm_cvtsi32_si128(bits)); }
inline Register e2m1(Integers words) {
    const __m256 size = _mm256_permutevar8x32_ps(_mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6), words);
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(words, 28), _mm256_set1_epi32(int32_t(0x80000000)));
    return _mm256_or_ps(size, _mm256_castsi256_ps(sign));
}
inline Pairs paired(Register first, Register second) {
    return _mm256_blend_epi16(_mm256_srli_epi32(_mm256_castps_si256(first), 16), _mm256_castps_si256(second), 0xaa);
}

#endif

} // namespace emoe

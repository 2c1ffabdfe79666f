// Numbers of 8 bits in E4M3, with and without powers of 2 in E8M0, brought to bfloat16.
#pragma once

#include "vector.h"

namespace emoe {

constexpr float kE4m3Scale = 256.f; // what load_e4m3 leaves out
// A byte of E8M0 up to this one, 2^-110, counts as 0: with a smaller power, not all numbers divided by 256 would be normal.
constexpr int kTooSmall = 17;

#ifdef EMOE_AVX512

// Of 16 columns: what to add to the bits of numbers that `bits_of_e4m3<kOfPowers>` gives, for both numbers of a pair. The largest
// bit is set; or it is 0, and numbers become 0.
using Powers = __m512i;

constexpr uint16_t kSmallest = 0x3700;            // bits of 2^-17, the smallest size of E4M3 divided by 256
constexpr uint16_t kOfPowers = 0x8000 - kSmallest; // what is added so that all sizes but 0 have the largest bit

// The powers of 2 of the columns whose words begin at `words`: byte number `byte` of each word.
inline Powers load_powers(const uint32_t* words, int byte) {
    static_assert(127 - kTooSmall == kSmallest >> 7);
    const __m512i shifted = _mm512_srl_epi32(_mm512_loadu_si512(words), _mm_cvtsi32_si128(8 * byte));
    const __m512i exponents = _mm512_and_si512(shifted, _mm512_set1_epi32(255));
    const __m512i bits = _mm512_add_epi32(_mm512_slli_epi32(exponents, 7), _mm512_set1_epi32(0x8000 - (kTooSmall << 7)));
    const __m512i both = _mm512_or_si512(bits, _mm512_slli_epi32(bits, 16));
    return _mm512_maskz_mov_epi32(_mm512_cmpgt_epi32_mask(exponents, _mm512_set1_epi32(kTooSmall)), both);
}
// Sizes of numbers in E4M3, divided by 256, in bfloat16, plus ADDED if they are not 0. `wide` are the numbers with their sign in 16
// bits. Their 4 bits of exponent and 3 of mantissa are those of bfloat16, whose exponents are larger. But numbers below the
// smallest normal one, multiples of 2^-17 now, are looked up.
template <uint16_t ADDED> __m512i bits_of_e4m3(__m512i wide) {
    constexpr auto plus = [](int bits) { return bf16(bits + ADDED); };
    alignas(64) static constexpr bf16 kSmall[32] = {0,            plus(0x3700), plus(0x3780), plus(0x37c0),
                                                    plus(0x3800), plus(0x3820), plus(0x3840), plus(0x3860)};
    const __m512i size = _mm512_and_si512(_mm512_slli_epi16(wide, 4), _mm512_set1_epi16(0x7f0));
    const __mmask32 small = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(0x80));
    return _mm512_mask_permutexvar_epi16(_mm512_add_epi16(size, _mm512_set1_epi16(int16_t(plus(112 << 7)))), small, wide,
                                         _mm512_load_si512(kSmall));
}
inline Pairs with_sign_of(__m512i sizes, __m512i wide) {
    constexpr int kWithSign = 0xf8; // a, or b and c
    return (Pairs)_mm512_ternarylogic_epi32(sizes, wide, _mm512_set1_epi16(int16_t(0x8000)), kWithSign);
}
// Numbers in E4M3, divided by 256.
inline Pairs load_e4m3(const int8_t* from) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
    return with_sign_of(bits_of_e4m3<0>(wide), wide);
}
// The same times powers of 2.
inline Pairs load_e4m3(const int8_t* from, Powers powers) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from)), sizes = bits_of_e4m3<kOfPowers>(wide);
    // both largest bits make one that 16 bits have no room for
    return with_sign_of(_mm512_maskz_add_epi16(_mm512_test_epi16_mask(sizes, powers), sizes, powers), wide);
}

#else

struct Powers { // of 8 columns, for both numbers of a pair
    __m256 low, high;
};

inline Powers load_powers(const uint32_t* words, int byte) {
    const __m256i shifted = _mm256_srl_epi32(_mm256_loadu_si256((const __m256i*)words), _mm_cvtsi32_si128(8 * byte));
    const __m256i exponents = _mm256_and_si256(shifted, _mm256_set1_epi32(255));
    const __m256i some = _mm256_and_si256(exponents, _mm256_cmpgt_epi32(exponents, _mm256_set1_epi32(kTooSmall)));
    const __m256i powers = _mm256_slli_epi32(some, 23);
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

#endif

} // namespace emoe

// Sixteen numbers at once, in the instructions of this very CPU: bfloat16 in memory, float32 in sums.
//
// Sources: as in numbers.h, which has the same for one number.
// There are two kinds of CPU: one that multiplies pairs of bfloat16 (AVX512-BF16, sixteen lanes in one register), and
// one that multiplies float32 only (AVX2 with FMA, two registers of eight), for which numbers are widened on their way
// in. On any other, LANES is not defined.
//
// It does not know what is computed: products.cpp and flash.cpp do, and what answers (inference/).

#pragma once

#include <initializer_list>

#include "numbers.h"

#if defined(__AVX512BF16__)
#define LANES 512
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 256
#endif

#ifdef LANES

#include <immintrin.h>

namespace {

#if LANES == 512

using Passed = bf16;            // what one product hands to the next
constexpr long ROWS = 12;       // rows whose sums are held in registers at once ...
constexpr int ABREAST = 2;      // ... with so many tiles
constexpr int FEATURES = 4;     // tiles of values that attention adds up at once, for 6 rows
using Lanes = __m512;
using Mask = __mmask16;
using Line = __m512bh;          // sixteen pairs
using Pair = __m512bh;          // one pair, sixteen times
constexpr int TURNS = 1;        // that it takes to multiply pairs

inline Lanes zero() { return _mm512_setzero_ps(); }
inline Lanes all(float x) { return _mm512_set1_ps(x); }
inline Lanes load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* to, Lanes x) { _mm512_storeu_ps(to, x); }
inline Lanes plus(Lanes x, Lanes y) { return _mm512_add_ps(x, y); }
inline Lanes minus(Lanes x, Lanes y) { return _mm512_sub_ps(x, y); }
inline Lanes times(Lanes x, Lanes y) { return _mm512_mul_ps(x, y); }
inline Lanes over(Lanes x, Lanes y) { return _mm512_div_ps(x, y); }
inline Lanes fused(Lanes x, Lanes y, Lanes z) { return _mm512_fmadd_ps(x, y, z); }        // x y + z
inline Lanes fused_less(Lanes x, Lanes y, Lanes z) { return _mm512_fmsub_ps(x, y, z); }   // x y - z
inline Lanes larger(Lanes x, Lanes y) { return _mm512_max_ps(x, y); }
inline Lanes smaller(Lanes x, Lanes y) { return _mm512_min_ps(x, y); }
inline float sum_of(Lanes x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Lanes x) { return _mm512_reduce_max_ps(x); }

inline Mask within(Lanes x, Lanes from, Lanes until) {  // from <= x < until
    return Mask(_mm512_cmp_ps_mask(x, from, _CMP_GE_OQ) & _mm512_cmp_ps_mask(x, until, _CMP_LT_OQ));
}
inline Lanes either(Mask where, Lanes x, Lanes y) { return _mm512_mask_mov_ps(y, where, x); }

inline Lanes wide(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline Lanes wide(const bf16* x) { return wide(_mm256_loadu_si256((const __m256i*)x)); }
inline Lanes wide(const float* x) { return load(x); }
inline Mask first(long count) { return count < 16 ? Mask((1u << count) - 1) : Mask(0xffff); }
inline Lanes wide(long count, const bf16* x) { return wide(_mm256_maskz_loadu_epi16(first(count), x)); }
inline __m256i narrow(Lanes x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline Lanes rounded(Lanes x) { return wide(narrow(x)); }
inline void put(bf16* to, Lanes x) { _mm256_storeu_si256((__m256i*)to, narrow(x)); }
inline void put(long count, bf16* to, Lanes x) { _mm256_mask_storeu_epi16(to, first(count), narrow(x)); }

inline Lanes whole(Lanes x) { return _mm512_roundscale_ps(x, 0); }
inline Lanes doubled(Lanes x, Lanes times) { return _mm512_scalef_ps(x, times); }  // x 2^times, of whole numbers

inline Line line_of(const bf16* w, int) { return (__m512bh)_mm512_loadu_si512(w); }
inline Line line_of(const int8_t* w, int) {  // bfloat16 holds every int8
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)w)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)w + 1)));
    return _mm512_cvtne2ps_pbh(high, low);
}
inline Pair pair_of(const bf16* x, int) {
    int32_t both;
    std::memcpy(&both, x, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}
inline Lanes dot(Lanes sum, Line w, Pair x) { return _mm512_dpbf16_ps(sum, w, x); }
inline Lanes line_of(const float* w, int) { return load(w); }
inline Lanes pair_of(const float* x, int) { return all(*x); }
inline Lanes dot(Lanes sum, Lanes w, Lanes x) { return fused(w, x, sum); }

inline void transpose(Lanes* row) {  // 16 by 16: within quarters of a register, then quarters themselves
    Lanes two[16];
    for (int i = 0; i < 16; i += 2) {
        two[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
        two[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            const __m512d one = _mm512_castps_pd(two[i + j]), other = _mm512_castps_pd(two[i + j + 2]);
            row[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(one, other));
            row[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(one, other));
        }
    for (int j = 0; j < 4; ++j) {
        const Lanes even = _mm512_shuffle_f32x4(row[j], row[j + 4], 0x88), odd = _mm512_shuffle_f32x4(row[j], row[j + 4], 0xdd);
        const Lanes even_too = _mm512_shuffle_f32x4(row[j + 8], row[j + 12], 0x88);
        const Lanes odd_too = _mm512_shuffle_f32x4(row[j + 8], row[j + 12], 0xdd);
        row[j] = _mm512_shuffle_f32x4(even, even_too, 0x88), row[j + 8] = _mm512_shuffle_f32x4(even, even_too, 0xdd);
        row[j + 4] = _mm512_shuffle_f32x4(odd, odd_too, 0x88), row[j + 12] = _mm512_shuffle_f32x4(odd, odd_too, 0xdd);
    }
}

inline bf16 kept(bf16 x) { return x; }  // as it lies in the cache
inline void pass(const bf16* x, Passed* to, long count) { std::memcpy(to, x, sizeof(bf16) * count); }

#else

using Passed = float;           // numbers of bfloat16, widened once
constexpr long ROWS = 6;
constexpr int ABREAST = 1;
constexpr int FEATURES = 1;
struct Lanes { __m256 low, high; };
struct Mask { __m256 low, high; };
using Line = Lanes;
using Pair = __m256;
constexpr int TURNS = 2;        // the even numbers of pairs, then the odd ones

inline Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline void store(float* to, Lanes x) { _mm256_storeu_ps(to, x.low), _mm256_storeu_ps(to + 8, x.high); }
inline Lanes plus(Lanes x, Lanes y) { return {_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)}; }
inline Lanes minus(Lanes x, Lanes y) { return {_mm256_sub_ps(x.low, y.low), _mm256_sub_ps(x.high, y.high)}; }
inline Lanes times(Lanes x, Lanes y) { return {_mm256_mul_ps(x.low, y.low), _mm256_mul_ps(x.high, y.high)}; }
inline Lanes over(Lanes x, Lanes y) { return {_mm256_div_ps(x.low, y.low), _mm256_div_ps(x.high, y.high)}; }
inline Lanes fused(Lanes x, Lanes y, Lanes z) {
    return {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
}
inline Lanes fused_less(Lanes x, Lanes y, Lanes z) {
    return {_mm256_fmsub_ps(x.low, y.low, z.low), _mm256_fmsub_ps(x.high, y.high, z.high)};
}
inline Lanes larger(Lanes x, Lanes y) { return {_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)}; }
inline Lanes smaller(Lanes x, Lanes y) { return {_mm256_min_ps(x.low, y.low), _mm256_min_ps(x.high, y.high)}; }
inline float sum_of(Lanes x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest_of(Lanes x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline Mask within(Lanes x, Lanes from, Lanes until) {
    const auto half = [](__m256 a, __m256 b, __m256 c) {
        return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ), _mm256_cmp_ps(a, c, _CMP_LT_OQ));
    };
    return {half(x.low, from.low, until.low), half(x.high, from.high, until.high)};
}
inline Lanes either(Mask where, Lanes x, Lanes y) {
    return {_mm256_blendv_ps(y.low, x.low, where.low), _mm256_blendv_ps(y.high, x.high, where.high)};
}

inline __m256 wide(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline Lanes wide(const bf16* x) {
    return {wide(_mm_loadu_si128((const __m128i*)x)), wide(_mm_loadu_si128((const __m128i*)x + 1))};
}
inline Lanes wide(const float* x) { return load(x); }
inline __m256 rounded(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(int(0xffff0000))));
}
inline Lanes rounded(Lanes x) { return {rounded(x.low), rounded(x.high)}; }
inline void put(float* to, Lanes x) { store(to, rounded(x)); }
inline void put(bf16* to, Lanes x) {
    const Lanes y = rounded(x);
    const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(y.low), 16), high = _mm256_srli_epi32(_mm256_castps_si256(y.high), 16);
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8));
}
template <class N>
inline Lanes wide(long count, const N* x) {
    N some[16] = {};
    std::memcpy(some, x, sizeof(N) * (count < 16 ? count : 16));
    return wide(some);
}
inline void put(long count, float* to, Lanes x) {
    float some[16];
    put(some, x);
    std::memcpy(to, some, sizeof(float) * (count < 16 ? count : 16));
}

inline Lanes whole(Lanes x) { return {_mm256_round_ps(x.low, 8), _mm256_round_ps(x.high, 8)}; }
inline Lanes doubled(Lanes x, Lanes times) {
    const auto half = [](__m256 a, __m256 b) {
        const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(b), _mm256_set1_epi32(127)), 23);
        return _mm256_mul_ps(a, _mm256_castsi256_ps(power));
    };
    return {half(x.low, times.low), half(x.high, times.high)};
}

inline Line line_of(const bf16* w, int turn) {
    const auto half = [turn](__m256i x) {
        return _mm256_castsi256_ps(turn ? _mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000))) : _mm256_slli_epi32(x, 16));
    };
    return {half(_mm256_loadu_si256((const __m256i*)w)), half(_mm256_loadu_si256((const __m256i*)w + 1))};
}
inline Line line_of(const int8_t* w, int turn) {
    const auto half = [turn](__m128i x) {
        const __m256i pairs = _mm256_cvtepi16_epi32(x);
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(turn ? pairs : _mm256_slli_epi32(pairs, 24), turn ? 8 : 24));
    };
    return {half(_mm_loadu_si128((const __m128i*)w)), half(_mm_loadu_si128((const __m128i*)w + 1))};
}
inline Line line_of(const float* w, int) { return load(w); }
inline Pair pair_of(const float* x, int turn) { return _mm256_broadcast_ss(x + turn); }
inline Lanes dot(Lanes sum, Line w, Line x) { return fused(w, x, sum); }
inline Lanes dot(Lanes sum, Line w, Pair x) { return {_mm256_fmadd_ps(w.low, x, sum.low), _mm256_fmadd_ps(w.high, x, sum.high)}; }

inline void transpose(Lanes* row) {  // 16 by 16, in four pieces of 8 by 8
    __m256 piece[2][2][8];  // by half of the columns, half of the rows
    for (int low = 0; low < 2; ++low)
        for (int top = 0; top < 2; ++top) {
            __m256 two[8], four[8], *to = piece[low][top];
            for (int i = 0; i < 8; i += 2) {
                const Lanes one = row[8 * top + i], other = row[8 * top + i + 1];
                two[i] = _mm256_unpacklo_ps(low ? one.high : one.low, low ? other.high : other.low);
                two[i + 1] = _mm256_unpackhi_ps(low ? one.high : one.low, low ? other.high : other.low);
            }
            for (int i = 0; i < 8; i += 4)
                for (int j = 0; j < 2; ++j) {
                    four[i + 2 * j] = _mm256_shuffle_ps(two[i + j], two[i + j + 2], 0x44);
                    four[i + 2 * j + 1] = _mm256_shuffle_ps(two[i + j], two[i + j + 2], 0xee);
                }
            for (int j = 0; j < 4; ++j) {
                to[j] = _mm256_permute2f128_ps(four[j], four[j + 4], 0x20);
                to[j + 4] = _mm256_permute2f128_ps(four[j], four[j + 4], 0x31);
            }
        }
    for (int i = 0; i < 16; ++i) row[i] = {piece[i / 8][0][i % 8], piece[i / 8][1][i % 8]};
}

inline bf16 kept(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bf16(bits >> 16);
}
inline void pass(const bf16* x, Passed* to, long count) {
    for (long i = 0; i < count; ++i) to[i] = wide(x[i]);
}

#endif

inline Lanes power(Lanes x) {  // e to the x
    x = larger(smaller(x, all(88.0f)), all(-87.0f));
    const Lanes steps = whole(times(x, all(1.44269504f)));
    Lanes rest = fused(steps, all(-0.693359375f), x);
    rest = fused(steps, all(2.12194440e-4f), rest);
    Lanes y = all(1.9875691500e-4f);
    for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = fused(y, rest, all(next));
    return doubled(plus(fused(times(y, rest), rest, rest), all(1.0f)), steps);
}

}  // namespace

#endif

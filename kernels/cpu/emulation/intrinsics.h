// AVX-512 and AVX-VNNI on AVX2, by SIMDe, and AMX by a software tile: for testing the arithmetic of an ISA file where
// the processor lacks the ISA. Never part of the library that is shipped.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

// What SIMDe lacks (0.7.4), by halves.
namespace dlb {
namespace {

inline simde__m512i join(__m256i low, __m256i high) {
    simde__m512i_private both;
    both.m256i[0] = low;
    both.m256i[1] = high;
    return simde__m512i_from_private(both);
}

inline simde__m512 join(__m256 low, __m256 high) {
    simde__m512_private both;
    both.m256[0] = low;
    both.m256[1] = high;
    return simde__m512_from_private(both);
}

inline simde__m512 cvtepi32_ps(simde__m512i a) {
    const simde__m512i_private halves = simde__m512i_to_private(a);
    return join(_mm256_cvtepi32_ps(halves.m256i[0]), _mm256_cvtepi32_ps(halves.m256i[1]));
}

inline simde__m512i srai_epi32(simde__m512i a, int by) {
    const simde__m512i_private halves = simde__m512i_to_private(a);
    return join(_mm256_srai_epi32(halves.m256i[0], by), _mm256_srai_epi32(halves.m256i[1], by));
}

inline simde__m512 cvtph_ps(__m256i a) {
    return join(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}

inline simde__m512i cvtepu8_epi32(__m128i a) {
    return join(_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8)));
}

inline simde__m512i cvtepi8_epi32(__m128i a) {
    return join(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)));
}

inline simde__m512i cvtepu16_epi32(__m256i a) {
    return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}

// Quarters of a, a, b, b, by two bits each.
inline simde__m512 shuffle_f32x4(simde__m512 a, simde__m512 b, int which) {
    const simde__m512_private from[2] = {simde__m512_to_private(a), simde__m512_to_private(b)};
    simde__m512_private all;
    for (int i = 0; i < 4; i++) all.m128[i] = from[i / 2].m128[which >> 2 * i & 3];
    return simde__m512_from_private(all);
}

inline __m256 extractf32x8_ps(simde__m512 a, int which) { return simde__m512_to_private(a).m256[which]; }

// Calls, not inlined: unrolled kernels hold thousands, and would compile for minutes.
__attribute__((noinline)) inline simde__m512i dpbusd(simde__m512i sum, simde__m512i codes, simde__m512i x) {
    return simde_mm512_dpbusd_epi32(sum, codes, x);
}

__attribute__((noinline)) inline __m256i dpbusd(__m256i sum, __m256i codes, __m256i x) {
    return simde_mm256_dpbusd_epi32(sum, codes, x);
}

}  // namespace
}  // namespace dlb

#undef _mm512_shuffle_f32x4
#undef _mm512_extractf32x8_ps
#undef _mm512_dpbusd_epi32
#undef _mm256_dpbusd_avx_epi32
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtph_ps
#undef _mm512_srai_epi32
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_shuffle_f32x4(a, b, which) ::dlb::shuffle_f32x4(a, b, which)
#define _mm512_extractf32x8_ps(a, which) ::dlb::extractf32x8_ps(a, which)
#define _mm512_dpbusd_epi32(sum, codes, x) ::dlb::dpbusd(sum, codes, x)
#define _mm256_dpbusd_avx_epi32(sum, codes, x) ::dlb::dpbusd(sum, codes, x)
#define _mm512_cvtepi32_ps(a) ::dlb::cvtepi32_ps(a)
#define _mm512_cvtph_ps(a) ::dlb::cvtph_ps(a)
#define _mm512_srai_epi32(a, by) ::dlb::srai_epi32(a, by)
#define _mm512_cvtepu8_epi32(a) ::dlb::cvtepu8_epi32(a)
#define _mm512_cvtepi8_epi32(a) ::dlb::cvtepi8_epi32(a)
#define _mm512_cvtepu16_epi32(a) ::dlb::cvtepu16_epi32(a)

#include "amx_tile.h"

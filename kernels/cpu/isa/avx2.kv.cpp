// Rotary embedding and the cache's number types in AVX2 and F16C, with the bits of scalar.kv.cpp (so no FMA).
#include <immintrin.h>

#include <cstring>

#include "../kv_kernels.h"

namespace dlb {
namespace {

using V = __m256;

// The first `count` of eight floats, the others zero.
inline __m256i first(int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}
inline V load(const float* x, int64_t count) {
    return count >= 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, first(count));
}
inline void store(float* x, int64_t count, V value) {
    if (count >= 8)
        _mm256_storeu_ps(x, value);
    else
        _mm256_maskstore_ps(x, first(count), value);
}

void rope_halves(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i += 8) {
        const int64_t left = half - i;
        const V a = load(x + i, left), b = load(x + i + half, left), c = load(cos + i, left), s = load(sin + i, left);
        store(x + i, left, _mm256_sub_ps(_mm256_mul_ps(a, c), _mm256_mul_ps(b, s)));
        store(x + i + half, left, _mm256_add_ps(_mm256_mul_ps(b, c), _mm256_mul_ps(a, s)));
    }
}

void rope_pairs(float* x, const float* cos, const float* sin, int64_t half) {
    int64_t i = 0;
    for (; i + 4 <= half; i += 4) {
        const V ab = _mm256_loadu_ps(x + 2 * i);
        const __m128 c4 = _mm_loadu_ps(cos + i), s4 = _mm_loadu_ps(sin + i);
        const V c = _mm256_set_m128(_mm_unpackhi_ps(c4, c4), _mm_unpacklo_ps(c4, c4));
        const V s = _mm256_set_m128(_mm_unpackhi_ps(s4, s4), _mm_unpacklo_ps(s4, s4));
        const V ba = _mm256_permute_ps(ab, 0xb1);
        _mm256_storeu_ps(x + 2 * i, _mm256_addsub_ps(_mm256_mul_ps(ab, c), _mm256_mul_ps(ba, s)));
    }
    for (; i < half; i++) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cos[i] - b * sin[i];
        x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
}

void clip(float* x, int64_t n, float limit) {
    const V high = _mm256_set1_ps(limit), low = _mm256_set1_ps(-limit);
    for (int64_t i = 0; i < n; i += 8)  // the second operand is returned where one is NaN
        store(x + i, n - i, _mm256_max_ps(low, _mm256_min_ps(high, load(x + i, n - i))));
}

inline __m128i halves(V x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

inline __m128i bfloats(V x) {
    const __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(sum, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

void narrow(const float* x, int32_t kv_type, void* out, int64_t n) {
    if (kv_type == DLB_KV_FP32) {
        std::memcpy(out, x, static_cast<size_t>(n) * 4);
        return;
    }
    uint16_t* half = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < n; i += 8) {
        const V value = load(x + i, n - i);
        const __m128i eight = kv_type == DLB_KV_FP16 ? halves(value) : bfloats(value);
        if (n - i >= 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), eight);
        else
            std::memcpy(half + i, &eight, static_cast<size_t>(n - i) * 2);
    }
}

// The greatest magnitude as an integer, on top of which NaN and Inf come out.
inline int32_t peak_bits(const float* x, int64_t n) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i top = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 8)
        top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(load(x + i, n - i)), magnitude));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtsi128_si32(four);
}

void narrow_int8(const float* x, int8_t* q, uint16_t* scale, int64_t n) {
    const int32_t bits = peak_bits(x, n);
    const __m128 peak = _mm_castsi128_ps(_mm_cvtsi32_si128(bits));
    const __m128i half = _mm_cvtps_ph(_mm_div_ss(peak, _mm_set_ss(127.0f)), _MM_FROUND_TO_NEAREST_INT);
    *scale = static_cast<uint16_t>(bits >= 0x7f800000 ? 0x7e00 : _mm_cvtsi128_si32(half) & 0xffff);
    if (*scale == 0 || *scale == 0x7e00) {
        std::memset(q, 0, static_cast<size_t>(n));
        return;
    }
    const V step = _mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(*scale)));
    const V high = _mm256_set1_ps(127.0f), low = _mm256_set1_ps(-127.0f);
    for (int64_t i = 0; i < n; i += 8) {
        V code = _mm256_div_ps(load(x + i, n - i), step);
        code = _mm256_max_ps(low, _mm256_min_ps(high, code));
        const __m256i whole = _mm256_cvtps_epi32(code);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        const __m128i bytes = _mm_packs_epi16(words, words);
        const int64_t left = n - i < 8 ? n - i : 8;
        std::memcpy(q + i, &bytes, static_cast<size_t>(left));
    }
}

void widen_int8(const int8_t* q, const uint16_t* scale, float* out, int64_t n) {
    const V step = _mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(*scale)));
    for (int64_t i = 0; i < n; i += 8) {
        const int64_t left = n - i < 8 ? n - i : 8;
        int64_t eight = 0;
        if (left == 8)
            std::memcpy(&eight, q + i, 8);
        else
            std::memcpy(&eight, q + i, static_cast<size_t>(left));
        const V value = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(eight)));
        store(out + i, left, _mm256_mul_ps(value, step));
    }
}

// Eight stored numbers as floats, by the type of a cache.
template <int32_t type>
struct Stored;
template <>
struct Stored<DLB_KV_FP32> {
    using T = float;
    static inline V load(const T* p, V) { return _mm256_loadu_ps(p); }
};
template <>
struct Stored<DLB_KV_FP16> {
    using T = uint16_t;
    static inline V load(const T* p, V) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
};
template <>
struct Stored<DLB_KV_BF16> {
    using T = uint16_t;
    static inline V load(const T* p, V) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
};
template <>
struct Stored<DLB_KV_INT8> {
    using T = int8_t;
    static inline V load(const T* p, V step) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)), step);
    }
};

// The scale of key j, one where there are none.
template <int32_t type>
inline V step_of(const uint16_t* scales, int j) {
    if (type != DLB_KV_INT8) return _mm256_setzero_ps();
    return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(scales[j])));
}

// Lanes 8..15 have been added to 0..7; the rest of the tree for four sums at once: 4, 2, 1.
inline __m128 tree4(V a, V b, V c, V d) {
    const __m128 a4 = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 b4 = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    const __m128 c4 = _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
    const __m128 d4 = _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
    const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a4, b4), _mm_unpackhi_ps(a4, b4));
    const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c4, d4), _mm_unpackhi_ps(c4, d4));
    return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}

// Four keys of which `count` count; the others are the last one again.
template <int32_t type>
inline __m128 four_scores(const float* q, const typename Stored<type>::T* k, int64_t stride, const uint16_t* scales,
                          int count, int dim) {
    using S = Stored<type>;
    const typename S::T* row[4];
    V step[4], lo[4], hi[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const int j = i < count ? i : count - 1;
        row[i] = k + j * stride;
        step[i] = step_of<type>(scales, j);
        lo[i] = hi[i] = _mm256_setzero_ps();
    }
    for (int d = 0; d < dim; d += 16) {
        const V a = _mm256_loadu_ps(q + d), b = _mm256_loadu_ps(q + d + 8);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            lo[i] = _mm256_add_ps(lo[i], _mm256_mul_ps(a, S::load(row[i] + d, step[i])));
            hi[i] = _mm256_add_ps(hi[i], _mm256_mul_ps(b, S::load(row[i] + d + 8, step[i])));
        }
    }
    return tree4(_mm256_add_ps(lo[0], hi[0]), _mm256_add_ps(lo[1], hi[1]), _mm256_add_ps(lo[2], hi[2]),
                 _mm256_add_ps(lo[3], hi[3]));
}

template <int32_t type>
void scores_of(const float* q, const void* base, int64_t stride, const uint16_t* scales, int keys, int dim, float scale,
               float* s) {
    const typename Stored<type>::T* k = static_cast<const typename Stored<type>::T*>(base);
    for (int j = 0; j < keys; j += 4) {
        const int count = keys - j < 4 ? keys - j : 4;
        const uint16_t* own = type == DLB_KV_INT8 ? scales + j : scales;
        const __m128 four =
            _mm_mul_ps(four_scores<type>(q, k + j * stride, stride, own, count, dim), _mm_set1_ps(scale));
        if (count == 4) {
            _mm_storeu_ps(s + j, four);
            continue;
        }
        float tail[4];
        _mm_storeu_ps(tail, four);
        std::memcpy(s + j, tail, static_cast<size_t>(count) * 4);
    }
}

// 8 * `width` columns, held in registers over all keys.
template <int32_t type, int width>
inline void accumulate_columns(const float* p, const typename Stored<type>::T* v, int64_t stride,
                               const uint16_t* scales, int keys, float* o) {
    // Unrolled before the array is taken apart: else GCC keeps its sums in memory.
    V acc[width];
#pragma GCC unroll 8
    for (int i = 0; i < width; i++) acc[i] = _mm256_loadu_ps(o + 8 * i);
    for (int j = 0; j < keys; j++) {
        const V weight = _mm256_broadcast_ss(p + j), step = step_of<type>(scales, j);
#pragma GCC unroll 8
        for (int i = 0; i < width; i++)
            acc[i] = _mm256_add_ps(acc[i], _mm256_mul_ps(weight, Stored<type>::load(v + j * stride + 8 * i, step)));
    }
#pragma GCC unroll 8
    for (int i = 0; i < width; i++) _mm256_storeu_ps(o + 8 * i, acc[i]);
}

template <int32_t type>
void accumulate_of(const float* p, const void* base, int64_t stride, const uint16_t* scales, int keys, int dim,
                   float* o) {
    const typename Stored<type>::T* v = static_cast<const typename Stored<type>::T*>(base);
    int d = 0;
    for (; d + 64 <= dim; d += 64) accumulate_columns<type, 8>(p, v + d, stride, scales, keys, o + d);
    for (; d < dim; d += 16) accumulate_columns<type, 2>(p, v + d, stride, scales, keys, o + d);
}

#include "../generic/stored.h"

}  // namespace

const KvKernels kv_avx2 = {rope_halves,   rope_pairs,        clip,      narrow, narrow_int8,
                           scores_stored, accumulate_stored, widen_int8};

}  // namespace dlb

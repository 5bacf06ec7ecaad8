// Attention's inner loops in AVX-512: the sixteen lanes of a sum are one register. The bits of scalar.float.cpp and
// scalar.kv.cpp (so no FMA).
#include <string.h>

#include "../exp_poly.h"
#include "../intrinsics.h"
#include "../kernel_table.h"

namespace dlb {
namespace {

using V = __m512;

// Four lanes of 128 bits, each the sum over one quarter of the tree (8, 4, 2, 1) of four of the sixteen sums: lane i,
// place j has the sum of a[4 j + i].
inline V tree16(const V* a) {
    V eight[8], four[4], two[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x44),
                                 _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xee));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(eight[2 * i], eight[2 * i + 1], 0x88),
                                _mm512_shuffle_f32x4(eight[2 * i], eight[2 * i + 1], 0xdd));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const __m512d x = _mm512_castps_pd(four[2 * i]), y = _mm512_castps_pd(four[2 * i + 1]);
        two[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    return _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd));
}

inline float tree1(V a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline void store4(float* to, __m128 value, int count) {
    if (count == 4) return _mm_storeu_ps(to, value);
    float four[4];
    _mm_storeu_ps(four, value);
    memcpy(to, four, static_cast<size_t>(count) * 4);
}

// `rows` query rows by four keys, of which `count` count; the others are the last one again.
template <int rows>
inline void scores_tile(const float* q, int64_t q_stride, const float* k, int64_t k_stride, int count, int dim, V scale,
                        float* s, int64_t s_stride) {
    const float* key[4];
    V acc[16];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) key[j] = k + (j < count ? j : count - 1) * k_stride;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_ps();
    for (int d = 0; d < dim; d += 16) {
        V x[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) x[r] = _mm512_loadu_ps(q + r * q_stride + d);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const V y = _mm512_loadu_ps(key[j] + d);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) acc[4 * j + r] = _mm512_add_ps(acc[4 * j + r], _mm512_mul_ps(x[r], y));
        }
    }
    const V all = _mm512_mul_ps(tree16(acc), scale);
    store4(s, _mm512_castps512_ps128(all), count);
    if (rows > 1) store4(s + s_stride, _mm512_extractf32x4_ps(all, 1), count);
    if (rows > 2) store4(s + 2 * s_stride, _mm512_extractf32x4_ps(all, 2), count);
    if (rows > 3) store4(s + 3 * s_stride, _mm512_extractf32x4_ps(all, 3), count);
}

template <int rows>
void scores_rows(const float* q, int64_t q_stride, const float* k, int64_t k_stride, int keys, int dim, V scale,
                 float* s, int64_t s_stride) {
    for (int j = 0; j < keys; j += 4)
        scores_tile<rows>(q, q_stride, k + j * k_stride, k_stride, keys - j < 4 ? keys - j : 4, dim, scale, s + j,
                          s_stride);
}

void scores(const float* q, int64_t q_stride, int rows, const float* k, int64_t k_stride, int keys, int dim,
            float scale, float* s, int64_t s_stride) {
    const V factor = _mm512_set1_ps(scale);
    int r = 0;
    for (; r + 4 <= rows; r += 4)
        scores_rows<4>(q + r * q_stride, q_stride, k, k_stride, keys, dim, factor, s + r * s_stride, s_stride);
    const auto rest = rows - r == 3 ? scores_rows<3> : rows - r == 2 ? scores_rows<2> : scores_rows<1>;
    if (r < rows) rest(q + r * q_stride, q_stride, k, k_stride, keys, dim, factor, s + r * s_stride, s_stride);
}

inline V exp16(V x) {
    const V t = _mm512_add_ps(_mm512_mul_ps(x, _mm512_set1_ps(DLB_EXP_LOG2E)), _mm512_set1_ps(DLB_EXP_MAGIC));
    const V n = _mm512_sub_ps(t, _mm512_set1_ps(DLB_EXP_MAGIC));
    V r = _mm512_sub_ps(x, _mm512_mul_ps(n, _mm512_set1_ps(DLB_EXP_LN2_HI)));
    r = _mm512_sub_ps(r, _mm512_mul_ps(n, _mm512_set1_ps(DLB_EXP_LN2_LO)));
    V y = _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(DLB_EXP_C6), r), _mm512_set1_ps(DLB_EXP_C5));
    y = _mm512_add_ps(_mm512_mul_ps(y, r), _mm512_set1_ps(DLB_EXP_C4));
    y = _mm512_add_ps(_mm512_mul_ps(y, r), _mm512_set1_ps(DLB_EXP_C3));
    y = _mm512_add_ps(_mm512_mul_ps(y, r), _mm512_set1_ps(DLB_EXP_C2));
    y = _mm512_mul_ps(y, r);
    y = _mm512_add_ps(_mm512_mul_ps(y, r), r);
    y = _mm512_add_ps(y, _mm512_set1_ps(1.0f));
    const __m512i bias = _mm512_set1_epi32(static_cast<int>(127u - DLB_EXP_MAGIC_BITS));
    const V power = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(t), bias), 23));
    // "Not less than" is true for NaN too, which must stay NaN.
    const __mmask16 keep = _mm512_cmp_ps_mask(x, _mm512_set1_ps(DLB_EXP_LOWEST), _CMP_NLT_UQ);
    return _mm512_maskz_mul_ps(keep, y, power);
}

void softmax(float* s, int n, float* max, float* sum) {
    V top = _mm512_loadu_ps(s);
    for (int j = 16; j < n; j += 16) top = _mm512_max_ps(_mm512_loadu_ps(s + j), top);
    __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(top), _mm512_extractf32x8_ps(top, 1));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    four = _mm_max_ss(four, _mm_movehdup_ps(four));
    *max = _mm_cvtss_f32(four);
    const V all = _mm512_set1_ps(*max);
    V total = _mm512_setzero_ps();
    for (int j = 0; j < n; j += 16) {
        const V a = exp16(_mm512_sub_ps(_mm512_loadu_ps(s + j), all));
        _mm512_storeu_ps(s + j, a);
        total = _mm512_add_ps(total, a);
    }
    *sum = tree1(total);
}

// `rows` rows by 16 * `width` columns, held in registers over all keys.
template <int rows, int width>
inline void accumulate_tile(const float* p, int64_t p_stride, const float* v, int64_t v_stride, int keys, float* o,
                            int64_t o_stride) {
    V acc[rows][width];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < width; i++) acc[r][i] = _mm512_loadu_ps(o + r * o_stride + 16 * i);
    for (int j = 0; j < keys; j++) {
        V x[width];
#pragma GCC unroll 4
        for (int i = 0; i < width; i++) x[i] = _mm512_loadu_ps(v + j * v_stride + 16 * i);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const V weight = _mm512_set1_ps(p[r * p_stride + j]);
#pragma GCC unroll 4
            for (int i = 0; i < width; i++) acc[r][i] = _mm512_add_ps(acc[r][i], _mm512_mul_ps(weight, x[i]));
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < width; i++) _mm512_storeu_ps(o + r * o_stride + 16 * i, acc[r][i]);
}

template <int rows>
void accumulate_rows(const float* p, int64_t p_stride, const float* v, int64_t v_stride, int keys, int dim, float* o,
                     int64_t o_stride) {
    int d = 0;
    for (; d + 64 <= dim; d += 64) accumulate_tile<rows, 4>(p, p_stride, v + d, v_stride, keys, o + d, o_stride);
    for (; d < dim; d += 16) accumulate_tile<rows, 1>(p, p_stride, v + d, v_stride, keys, o + d, o_stride);
}

void accumulate(const float* p, int64_t p_stride, int rows, const float* v, int64_t v_stride, int keys, int dim,
                float* o, int64_t o_stride) {
    int r = 0;
    for (; r + 4 <= rows; r += 4)
        accumulate_rows<4>(p + r * p_stride, p_stride, v, v_stride, keys, dim, o + r * o_stride, o_stride);
    const auto rest = rows - r == 3 ? accumulate_rows<3> : rows - r == 2 ? accumulate_rows<2> : accumulate_rows<1>;
    if (r < rows) rest(p + r * p_stride, p_stride, v, v_stride, keys, dim, o + r * o_stride, o_stride);
}

// Sixteen stored numbers as floats, by the type of a cache.
template <int32_t type>
struct Stored;
template <>
struct Stored<DLB_KV_FP32> {
    using T = float;
    static inline V load(const T* p, V) { return _mm512_loadu_ps(p); }
};
template <>
struct Stored<DLB_KV_FP16> {
    using T = uint16_t;
    static inline V load(const T* p, V) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
};
template <>
struct Stored<DLB_KV_BF16> {
    using T = uint16_t;
    static inline V load(const T* p, V) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
};
template <>
struct Stored<DLB_KV_INT8> {
    using T = int8_t;
    static inline V load(const T* p, V step) {
        const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(wide), step);
    }
};

// The scale of key j, one where there are none.
template <int32_t type>
inline V step_of(const uint16_t* scales, int j) {
    if (type != DLB_KV_INT8) return _mm512_setzero_ps();
    return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(scales[j])));
}

// Sixteen keys of which `count` count; the others are the last one again. Place i of the result is key i.
template <int32_t type>
inline V scores16(const float* q, const typename Stored<type>::T* k, int64_t stride, const uint16_t* scales, int count,
                  int dim) {
    V acc[16], step[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        acc[i] = _mm512_setzero_ps();
        step[i] = step_of<type>(scales, i < count ? i : count - 1);
    }
    for (int d = 0; d < dim; d += 16) {
        const V a = _mm512_loadu_ps(q + d);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const int64_t j = i < count ? i : count - 1;
            const int at = i % 4 * 4 + i / 4;  // where tree16 looks for what it puts in place i
            acc[at] = _mm512_add_ps(acc[at], _mm512_mul_ps(a, Stored<type>::load(k + j * stride + d, step[i])));
        }
    }
    return tree16(acc);
}

template <int32_t type>
void scores_of(const float* q, const void* base, int64_t stride, const uint16_t* scales, int keys, int dim, float scale,
               float* s) {
    const typename Stored<type>::T* k = static_cast<const typename Stored<type>::T*>(base);
    const V factor = _mm512_set1_ps(scale);
    for (int j = 0; j < keys; j += 16) {
        const int count = keys - j < 16 ? keys - j : 16;
        const uint16_t* own = type == DLB_KV_INT8 ? scales + j : scales;
        const V all = _mm512_mul_ps(scores16<type>(q, k + j * stride, stride, own, count, dim), factor);
        float tail[16];
        _mm512_storeu_ps(count == 16 ? s + j : tail, all);
        if (count < 16) memcpy(s + j, tail, static_cast<size_t>(count) * 4);
    }
}

// 16 * `width` columns, held in registers over all keys.
template <int32_t type, int width>
inline void accumulate_columns(const float* p, const typename Stored<type>::T* v, int64_t stride,
                               const uint16_t* scales, int keys, float* o) {
    V acc[width];
#pragma GCC unroll 8
    for (int i = 0; i < width; i++) acc[i] = _mm512_loadu_ps(o + 16 * i);
    for (int j = 0; j < keys; j++) {
        const V weight = _mm512_set1_ps(p[j]), step = step_of<type>(scales, j);
#pragma GCC unroll 8
        for (int i = 0; i < width; i++)
            acc[i] = _mm512_add_ps(acc[i], _mm512_mul_ps(weight, Stored<type>::load(v + j * stride + 16 * i, step)));
    }
#pragma GCC unroll 8
    for (int i = 0; i < width; i++) _mm512_storeu_ps(o + 16 * i, acc[i]);
}

template <int32_t type>
void accumulate_of(const float* p, const void* base, int64_t stride, const uint16_t* scales, int keys, int dim,
                   float* o) {
    const typename Stored<type>::T* v = static_cast<const typename Stored<type>::T*>(base);
    int d = 0;
    for (; d + 128 <= dim; d += 128) accumulate_columns<type, 8>(p, v + d, stride, scales, keys, o + d);
    for (; d + 64 <= dim; d += 64) accumulate_columns<type, 4>(p, v + d, stride, scales, keys, o + d);
    for (; d < dim; d += 16) accumulate_columns<type, 1>(p, v + d, stride, scales, keys, o + d);
}

template <int32_t type>
void widen_of(const void* source, float* out, int64_t n) {
    const typename Stored<type>::T* from = static_cast<const typename Stored<type>::T*>(source);
    const V none = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) _mm512_storeu_ps(out + i, Stored<type>::load(from + i, none));
    if (i == n) return;
    typename Stored<type>::T tail[16] = {};
    float wide[16];
    memcpy(tail, from + i, static_cast<size_t>(n - i) * sizeof(tail[0]));
    _mm512_storeu_ps(wide, Stored<type>::load(tail, none));
    memcpy(out + i, wide, static_cast<size_t>(n - i) * sizeof(float));
}

void widen(const void* source, int32_t kv_type, float* out, int64_t n) {
    if (kv_type == DLB_KV_FP32) return widen_of<DLB_KV_FP32>(source, out, n);
    if (kv_type == DLB_KV_FP16) return widen_of<DLB_KV_FP16>(source, out, n);
    widen_of<DLB_KV_BF16>(source, out, n);
}

#include "../generic/stored.h"

}  // namespace

void fill_attention(KernelTable& table) {
    table.floats.scores = scores;
    table.floats.softmax = softmax;
    table.floats.accumulate = accumulate;
    table.floats.widen = widen;
    table.kv.scores_stored = scores_stored;
    table.kv.accumulate_stored = accumulate_stored;
}

}  // namespace dlb

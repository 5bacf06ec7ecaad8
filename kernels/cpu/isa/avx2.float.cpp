// The fp32 inner loops (attention, norms, activations) in AVX2 and F16C; no FMA, so that the bits are those of
// scalar.float.cpp.
#include <immintrin.h>

#include <cstring>

#include "../exp_poly.h"
#include "../float_kernels.h"
#include "../fused.h"
#include "../gelu_poly.h"

namespace dlb {
namespace {

using V = __m256;

inline V exp8(V x) {
    const V t = _mm256_add_ps(_mm256_mul_ps(x, _mm256_set1_ps(DLB_EXP_LOG2E)), _mm256_set1_ps(DLB_EXP_MAGIC));
    const V n = _mm256_sub_ps(t, _mm256_set1_ps(DLB_EXP_MAGIC));
    V r = _mm256_sub_ps(x, _mm256_mul_ps(n, _mm256_set1_ps(DLB_EXP_LN2_HI)));
    r = _mm256_sub_ps(r, _mm256_mul_ps(n, _mm256_set1_ps(DLB_EXP_LN2_LO)));
    V y = _mm256_add_ps(_mm256_mul_ps(_mm256_set1_ps(DLB_EXP_C6), r), _mm256_set1_ps(DLB_EXP_C5));
    y = _mm256_add_ps(_mm256_mul_ps(y, r), _mm256_set1_ps(DLB_EXP_C4));
    y = _mm256_add_ps(_mm256_mul_ps(y, r), _mm256_set1_ps(DLB_EXP_C3));
    y = _mm256_add_ps(_mm256_mul_ps(y, r), _mm256_set1_ps(DLB_EXP_C2));
    y = _mm256_mul_ps(y, r);
    y = _mm256_add_ps(_mm256_mul_ps(y, r), r);
    y = _mm256_add_ps(y, _mm256_set1_ps(1.0f));
    const __m256i bias = _mm256_set1_epi32(static_cast<int>(127u - DLB_EXP_MAGIC_BITS));
    const V power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(t), bias), 23));
    // "Not less than" is true for NaN too, which must stay NaN.
    const V keep = _mm256_cmp_ps(x, _mm256_set1_ps(DLB_EXP_LOWEST), _CMP_NLT_UQ);
    return _mm256_and_ps(_mm256_mul_ps(y, power), keep);
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

inline float tree1(V a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Sixteen lanes of one dot product.
struct Dot {
    V lo = _mm256_setzero_ps(), hi = _mm256_setzero_ps();
    inline void step(V q_lo, V q_hi, V k_lo, V k_hi) {
        lo = _mm256_add_ps(lo, _mm256_mul_ps(q_lo, k_lo));
        hi = _mm256_add_ps(hi, _mm256_mul_ps(q_hi, k_hi));
    }
    inline V half() const { return _mm256_add_ps(lo, hi); }
};

inline __m128 dots_1x4(const float* q, const float* k, int64_t stride, int dim) {
    Dot a, b, c, e;
    for (int d = 0; d < dim; d += 16) {
        const V x = _mm256_loadu_ps(q + d), y = _mm256_loadu_ps(q + d + 8);
        a.step(x, y, _mm256_loadu_ps(k + d), _mm256_loadu_ps(k + d + 8));
        b.step(x, y, _mm256_loadu_ps(k + stride + d), _mm256_loadu_ps(k + stride + d + 8));
        c.step(x, y, _mm256_loadu_ps(k + 2 * stride + d), _mm256_loadu_ps(k + 2 * stride + d + 8));
        e.step(x, y, _mm256_loadu_ps(k + 3 * stride + d), _mm256_loadu_ps(k + 3 * stride + d + 8));
    }
    return tree4(a.half(), b.half(), c.half(), e.half());
}

// Two rows, two keys: {r0k0, r0k1, r1k0, r1k1}.
inline __m128 dots_2x2(const float* q, int64_t q_stride, const float* k, int64_t k_stride, int dim) {
    Dot a, b, c, e;
    for (int d = 0; d < dim; d += 16) {
        const V k0 = _mm256_loadu_ps(k + d), k0h = _mm256_loadu_ps(k + d + 8);
        const V k1 = _mm256_loadu_ps(k + k_stride + d), k1h = _mm256_loadu_ps(k + k_stride + d + 8);
        const V x = _mm256_loadu_ps(q + d), xh = _mm256_loadu_ps(q + d + 8);
        const V y = _mm256_loadu_ps(q + q_stride + d), yh = _mm256_loadu_ps(q + q_stride + d + 8);
        a.step(x, xh, k0, k0h);
        b.step(x, xh, k1, k1h);
        c.step(y, yh, k0, k0h);
        e.step(y, yh, k1, k1h);
    }
    return tree4(a.half(), b.half(), c.half(), e.half());
}

inline float dot_one(const float* q, const float* k, int dim) {
    Dot a;
    for (int d = 0; d < dim; d += 16)
        a.step(_mm256_loadu_ps(q + d), _mm256_loadu_ps(q + d + 8), _mm256_loadu_ps(k + d), _mm256_loadu_ps(k + d + 8));
    return tree1(a.half());
}

void scores(const float* q, int64_t q_stride, int rows, const float* k, int64_t k_stride, int keys, int dim,
            float scale, float* s, int64_t s_stride) {
    const __m128 factor = _mm_set1_ps(scale);
    int r = 0;
    for (; r + 2 <= rows; r += 2) {
        const float* a = q + r * q_stride;
        float *s0 = s + r * s_stride, *s1 = s0 + s_stride;
        int j = 0;
        for (; j + 2 <= keys; j += 2) {
            const __m128 four = _mm_mul_ps(dots_2x2(a, q_stride, k + j * k_stride, k_stride, dim), factor);
            _mm_storel_pi(reinterpret_cast<__m64*>(s0 + j), four);
            _mm_storeh_pi(reinterpret_cast<__m64*>(s1 + j), four);
        }
        if (j < keys) {
            s0[j] = dot_one(a, k + j * k_stride, dim) * scale;
            s1[j] = dot_one(a + q_stride, k + j * k_stride, dim) * scale;
        }
    }
    for (; r < rows; r++) {
        const float* a = q + r * q_stride;
        int j = 0;
        for (; j + 4 <= keys; j += 4)
            _mm_storeu_ps(s + r * s_stride + j, _mm_mul_ps(dots_1x4(a, k + j * k_stride, k_stride, dim), factor));
        for (; j < keys; j++) s[r * s_stride + j] = dot_one(a, k + j * k_stride, dim) * scale;
    }
}

void softmax(float* s, int n, float* max, float* sum) {
    V m8 = _mm256_loadu_ps(s);
    for (int j = 8; j < n; j += 8) m8 = _mm256_max_ps(_mm256_loadu_ps(s + j), m8);
    __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
    m4 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
    m4 = _mm_max_ss(m4, _mm_movehdup_ps(m4));
    const float m = _mm_cvtss_f32(m4);
    const V all = _mm256_set1_ps(m);
    V lo = _mm256_setzero_ps(), hi = _mm256_setzero_ps();
    for (int j = 0; j < n; j += 16) {
        const V a = exp8(_mm256_sub_ps(_mm256_loadu_ps(s + j), all)),
                b = exp8(_mm256_sub_ps(_mm256_loadu_ps(s + j + 8), all));
        _mm256_storeu_ps(s + j, a);
        _mm256_storeu_ps(s + j + 8, b);
        lo = _mm256_add_ps(lo, a);
        hi = _mm256_add_ps(hi, b);
    }
    *max = m;
    *sum = tree1(_mm256_add_ps(lo, hi));
}

// `count` rows (1 or 2) by 8 * `width` columns, held in registers over all keys.
template <int count, int width>
inline void accumulate_tile(const float* p, int64_t p_stride, const float* v, int64_t v_stride, int keys, float* o,
                            int64_t o_stride) {
    // Unrolled before the array is taken apart: else GCC keeps its sums in memory.
    V acc[count][width];
#pragma GCC unroll 8
    for (int r = 0; r < count; r++)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++) acc[r][i] = _mm256_loadu_ps(o + r * o_stride + 8 * i);
    for (int j = 0; j < keys; j++) {
        V weight[count];
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) weight[r] = _mm256_broadcast_ss(p + r * p_stride + j);
#pragma GCC unroll 8
        for (int i = 0; i < width; i++) {
            const V x = _mm256_loadu_ps(v + j * v_stride + 8 * i);
#pragma GCC unroll 8
            for (int r = 0; r < count; r++) acc[r][i] = _mm256_add_ps(acc[r][i], _mm256_mul_ps(weight[r], x));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < count; r++)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++) _mm256_storeu_ps(o + r * o_stride + 8 * i, acc[r][i]);
}

void accumulate(const float* p, int64_t p_stride, int rows, const float* v, int64_t v_stride, int keys, int dim,
                float* o, int64_t o_stride) {
    int r = 0;
    for (; r + 2 <= rows; r += 2) {
        const float* w = p + r * p_stride;
        float* out = o + r * o_stride;
        int d = 0;
        for (; d + 32 <= dim; d += 32) accumulate_tile<2, 4>(w, p_stride, v + d, v_stride, keys, out + d, o_stride);
        for (; d < dim; d += 16) accumulate_tile<2, 2>(w, p_stride, v + d, v_stride, keys, out + d, o_stride);
    }
    for (; r < rows; r++) {
        const float* w = p + r * p_stride;
        float* out = o + r * o_stride;
        int d = 0;
        for (; d + 64 <= dim; d += 64) accumulate_tile<1, 8>(w, p_stride, v + d, v_stride, keys, out + d, o_stride);
        for (; d < dim; d += 16) accumulate_tile<1, 2>(w, p_stride, v + d, v_stride, keys, out + d, o_stride);
    }
}

void merge(float* o, const float* c, float a, float b, int dim) {
    const V x = _mm256_set1_ps(a), y = _mm256_set1_ps(b);
    for (int d = 0; d < dim; d += 8)
        _mm256_storeu_ps(
            o + d, _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(o + d), x), _mm256_mul_ps(_mm256_loadu_ps(c + d), y)));
}

void softcap(float* s, int n, float cap) {
    const V c = _mm256_set1_ps(cap), one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    for (int j = 0; j < n; j += 8) {
        const V x = _mm256_div_ps(_mm256_loadu_ps(s + j), c);
        const V t = exp8(_mm256_mul_ps(_mm256_set1_ps(-2.0f), _mm256_andnot_ps(sign, x)));
        const V tanh = _mm256_div_ps(_mm256_sub_ps(one, t), _mm256_add_ps(one, t));
        const V signed_tanh = _mm256_or_ps(_mm256_andnot_ps(sign, tanh), _mm256_and_ps(sign, x));
        _mm256_storeu_ps(s + j, _mm256_mul_ps(c, signed_tanh));
    }
}

void exp_all(const float* x, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, exp8(_mm256_loadu_ps(x + i)));
    if (i == n) return;
    float tail[8] = {};
    std::memcpy(tail, x + i, static_cast<size_t>(n - i) * 4);
    _mm256_storeu_ps(tail, exp8(_mm256_loadu_ps(tail)));
    std::memcpy(out + i, tail, static_cast<size_t>(n - i) * 4);
}

inline V sigmoid8(V x) {
    const V sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    const V t = exp8(_mm256_or_ps(x, sign));
    const V below = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ);
    return _mm256_div_ps(_mm256_blendv_ps(one, t, below), _mm256_add_ps(one, t));
}

inline V times_plus(V y, V q, float c) { return _mm256_add_ps(_mm256_mul_ps(y, q), _mm256_set1_ps(c)); }

inline V normal_distribution8(V x) {
    const V one = _mm256_set1_ps(1.0f), center = _mm256_set1_ps(DLB_GELU_CENTER);
    // The second operand of min is what comes out where one is NaN.
    const V a = _mm256_min_ps(_mm256_set1_ps(DLB_GELU_LARGEST), _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x));
    const V q = _mm256_div_ps(_mm256_sub_ps(a, center), _mm256_add_ps(a, center));
    V y = times_plus(_mm256_set1_ps(DLB_GELU_P9), q, DLB_GELU_P8);
    y = times_plus(y, q, DLB_GELU_P7);
    y = times_plus(y, q, DLB_GELU_P6);
    y = times_plus(y, q, DLB_GELU_P5);
    y = times_plus(y, q, DLB_GELU_P4);
    y = times_plus(y, q, DLB_GELU_P3);
    y = times_plus(y, q, DLB_GELU_P2);
    y = times_plus(y, q, DLB_GELU_P1);
    y = times_plus(y, q, DLB_GELU_P0);
    const V power = exp8(_mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(-0.5f), a), a));
    const V tail = _mm256_mul_ps(power, _mm256_div_ps(y, _mm256_add_ps(one, a)));
    const V below = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ);
    return _mm256_blendv_ps(_mm256_sub_ps(one, tail), tail, below);
}

template <int Activation>
inline V activate8(V x) {
    if constexpr (Activation == DLB_ACT_SILU) return _mm256_mul_ps(x, sigmoid8(x));
    if constexpr (Activation == DLB_ACT_GELU_ERF) return _mm256_mul_ps(x, normal_distribution8(x));
    if constexpr (Activation == DLB_ACT_GELU_TANH) {
        const V cubic = _mm256_mul_ps(_mm256_set1_ps(DLB_GELU_TANH_C2), _mm256_mul_ps(x, x));
        const V inner = _mm256_mul_ps(x, _mm256_add_ps(_mm256_set1_ps(DLB_GELU_TANH_C1), cubic));
        return _mm256_mul_ps(x, sigmoid8(inner));
    }
    if constexpr (Activation == DLB_ACT_QUICK_GELU)
        return _mm256_mul_ps(x, sigmoid8(_mm256_mul_ps(_mm256_set1_ps(DLB_QUICK_GELU_C), x)));
    if constexpr (Activation == DLB_ACT_RELU)
        return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ), x);
    if constexpr (Activation == DLB_ACT_SIGMOID) return sigmoid8(x);
    return x;
}

// The last n < 8 floats of a row, zeros behind them.
struct Tail {
    float value[8] = {};
    inline Tail(const float* x, int64_t n) { std::memcpy(value, x, static_cast<size_t>(n) * 4); }
    inline V load() const { return _mm256_loadu_ps(value); }
};

inline void store_tail(float* out, V value, int64_t n) {
    float tail[8];
    _mm256_storeu_ps(tail, value);
    std::memcpy(out, tail, static_cast<size_t>(n) * 4);
}

template <int Activation>
void activate_as(const float* x, const float* up, float* out, int64_t n) {
    int64_t i = 0;
    if (up != nullptr)
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(out + i,
                             _mm256_mul_ps(activate8<Activation>(_mm256_loadu_ps(x + i)), _mm256_loadu_ps(up + i)));
    else
        for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, activate8<Activation>(_mm256_loadu_ps(x + i)));
    if (i == n) return;
    V value = activate8<Activation>(Tail(x + i, n - i).load());
    if (up != nullptr) value = _mm256_mul_ps(value, Tail(up + i, n - i).load());
    store_tail(out + i, value, n - i);
}

void activate(int32_t activation, const float* x, const float* up, float* out, int64_t n) {
    if (activation == DLB_ACT_NONE) activate_as<DLB_ACT_NONE>(x, up, out, n);
    if (activation == DLB_ACT_SILU) activate_as<DLB_ACT_SILU>(x, up, out, n);
    if (activation == DLB_ACT_GELU_ERF) activate_as<DLB_ACT_GELU_ERF>(x, up, out, n);
    if (activation == DLB_ACT_GELU_TANH) activate_as<DLB_ACT_GELU_TANH>(x, up, out, n);
    if (activation == DLB_ACT_QUICK_GELU) activate_as<DLB_ACT_QUICK_GELU>(x, up, out, n);
    if (activation == DLB_ACT_RELU) activate_as<DLB_ACT_RELU>(x, up, out, n);
    if (activation == DLB_ACT_SIGMOID) activate_as<DLB_ACT_SIGMOID>(x, up, out, n);
}

// Sixteen floats from x on, zeros from n on.
struct Pair {
    V lo, hi;
    inline Pair(const float* x, int64_t n) {
        if (n >= 16) {
            lo = _mm256_loadu_ps(x);
            hi = _mm256_loadu_ps(x + 8);
            return;
        }
        float tail[16] = {};
        std::memcpy(tail, x, static_cast<size_t>(n) * 4);
        lo = _mm256_loadu_ps(tail);
        hi = _mm256_loadu_ps(tail + 8);
    }
};

// 1 / sqrt(sum / k + eps), each operation rounded
inline float root_of_mean(float sum, int64_t k, float eps) {
    const __m128 mean = _mm_add_ss(_mm_div_ss(_mm_set_ss(sum), _mm_set_ss(static_cast<float>(k))), _mm_set_ss(eps));
    return 1.0f / _mm_cvtss_f32(_mm_sqrt_ss(mean));
}

template <bool Centered, bool Weighted>
inline V norm8(V x, V mean, V factor, V weight, V offset) {
    if constexpr (Centered) x = _mm256_sub_ps(x, mean);
    x = _mm256_mul_ps(x, factor);
    return Weighted ? _mm256_mul_ps(x, _mm256_add_ps(weight, offset)) : x;
}

template <bool Centered, bool Weighted>
void apply_norm(const float* x, float mean_, float factor_, const float* weight, float offset_, const float* bias,
                float* out, int64_t k) {
    const V mean = _mm256_set1_ps(mean_), factor = _mm256_set1_ps(factor_), offset = _mm256_set1_ps(offset_);
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        const V w = Weighted ? _mm256_loadu_ps(weight + i) : offset;
        V value = norm8<Centered, Weighted>(_mm256_loadu_ps(x + i), mean, factor, w, offset);
        if (bias != nullptr) value = _mm256_add_ps(value, _mm256_loadu_ps(bias + i));
        _mm256_storeu_ps(out + i, value);
    }
    if (i == k) return;
    const V w = Weighted ? Tail(weight + i, k - i).load() : offset;
    V value = norm8<Centered, Weighted>(Tail(x + i, k - i).load(), mean, factor, w, offset);
    if (bias != nullptr) value = _mm256_add_ps(value, Tail(bias + i, k - i).load());
    store_tail(out + i, value, k - i);
}

void rms_norm(const float* x, const float* weight, float offset, float eps, float* out, int64_t k) {
    Dot dot;
    for (int64_t i = 0; i < k; i += 16) {
        const Pair a(x + i, k - i);
        dot.step(a.lo, a.hi, a.lo, a.hi);
    }
    const float factor = root_of_mean(tree1(dot.half()), k, eps);
    const auto apply = weight != nullptr ? apply_norm<false, true> : apply_norm<false, false>;
    apply(x, 0.0f, factor, weight, offset, nullptr, out, k);
}

void layer_norm(const float* x, const float* weight, float offset, const float* bias, float eps, float* out,
                int64_t k) {
    V lo = _mm256_setzero_ps(), hi = lo;
    for (int64_t i = 0; i < k; i += 16) {
        const Pair a(x + i, k - i);
        lo = _mm256_add_ps(lo, a.lo);
        hi = _mm256_add_ps(hi, a.hi);
    }
    const float mean = tree1(_mm256_add_ps(lo, hi)) / static_cast<float>(k);
    const V center = _mm256_set1_ps(mean);
    Dot dot;
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
        const Pair a(x + i, 16);
        const V d = _mm256_sub_ps(a.lo, center), e = _mm256_sub_ps(a.hi, center);
        dot.step(d, e, d, e);
    }
    if (i < k) {
        // Behind the row's end the difference is 0, not -mean.
        float tail[16] = {};
        for (int64_t j = i; j < k; j++) tail[j - i] = x[j] - mean;
        const Pair a(tail, 16);
        dot.step(a.lo, a.hi, a.lo, a.hi);
    }
    const float factor = root_of_mean(tree1(dot.half()), k, eps);
    const auto apply = weight != nullptr ? apply_norm<true, true> : apply_norm<true, false>;
    apply(x, mean, factor, weight, offset, bias, out, k);
}

// To nearest even; a NaN keeps its upper bits and becomes quiet.
inline __m128i narrow8(V value, int32_t type) {
    if (type == DLB_FLOAT16) return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}

void finish(const float* x, const float* bias, const float* residual, int32_t type, void* y, int64_t n) {
    const int64_t size = type == DLB_FLOAT32 ? 4 : 2;
    uint8_t* out = static_cast<uint8_t*>(y);
    for (int64_t i = 0; i < n; i += 8) {
        const bool whole = i + 8 <= n;
        const auto load = [&](const float* p) { return whole ? _mm256_loadu_ps(p + i) : Tail(p + i, n - i).load(); };
        V value = load(x);
        if (bias != nullptr) value = _mm256_add_ps(value, load(bias));
        if (residual != nullptr) value = _mm256_add_ps(value, load(residual));
        uint8_t tail[32];
        uint8_t* to = whole ? out + i * size : tail;
        if (type == DLB_FLOAT32)
            _mm256_storeu_ps(reinterpret_cast<float*>(to), value);
        else
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow8(value, type));
        if (!whole) std::memcpy(out + i * size, tail, static_cast<size_t>((n - i) * size));
    }
}

void scaled_sum(const float* a, const float* b, float w, float* out, int64_t n) {
    const V wide = _mm256_set1_ps(w);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_loadu_ps(a + i), _mm256_mul_ps(wide, _mm256_loadu_ps(b + i))));
    for (; i < n; i++) out[i] = a[i] + w * b[i];
}

inline V widen8(const uint16_t* source, int32_t kv_type) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    if (kv_type == DLB_KV_FP16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

void widen(const void* source, int32_t kv_type, float* out, int64_t n) {
    if (kv_type == DLB_KV_FP32) {
        std::memcpy(out, source, static_cast<size_t>(n) * 4);
        return;
    }
    const uint16_t* half = static_cast<const uint16_t*>(source);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, widen8(half + i, kv_type));
    if (i == n) return;
    uint16_t tail[8] = {};
    float wide[8];
    std::memcpy(tail, half + i, static_cast<size_t>(n - i) * 2);
    _mm256_storeu_ps(wide, widen8(tail, kv_type));
    std::memcpy(out + i, wide, static_cast<size_t>(n - i) * 4);
}

}  // namespace

const FloatKernels float_avx2 = {scores,   softmax,  accumulate, merge,  softcap,    exp_all,
                                 activate, rms_norm, layer_norm, finish, scaled_sum, widen};

}  // namespace dlb

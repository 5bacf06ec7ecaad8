// The fp32 inner loops (attention, norms, activations) in plain C++: what every other ISA must equal bit for bit.
#include <cmath>
#include <cstring>

#include "../exp_poly.h"
#include "../float_kernels.h"
#include "../fused.h"
#include "../gelu_poly.h"

namespace dlb {
namespace {

#include "../generic/half.h"

constexpr int LANES = 16;

float tree(const float* lane) {
    float t[LANES];
    for (int l = 0; l < LANES; l++) t[l] = lane[l];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) t[l] = t[l] + t[l + half];
    return t[0];
}

float exp_one(float x) {
    if (x < DLB_EXP_LOWEST) return 0.0f;
    float t = x * DLB_EXP_LOG2E + DLB_EXP_MAGIC;
    float n = t - DLB_EXP_MAGIC;
    float r = x - n * DLB_EXP_LN2_HI;
    r = r - n * DLB_EXP_LN2_LO;
    float y = DLB_EXP_C6 * r + DLB_EXP_C5;
    y = y * r + DLB_EXP_C4;
    y = y * r + DLB_EXP_C3;
    y = y * r + DLB_EXP_C2;
    y = y * r;
    y = y * r + r;
    y = y + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &t, 4);
    bits = (bits - DLB_EXP_MAGIC_BITS + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return y * power;
}

void scores(const float* q, int64_t q_stride, int rows, const float* k, int64_t k_stride, int keys, int dim,
            float scale, float* s, int64_t s_stride) {
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < keys; j++) {
            const float *a = q + r * q_stride, *b = k + j * k_stride;
            float lane[LANES] = {};
            for (int d = 0; d < dim; d += LANES)
                for (int l = 0; l < LANES; l++) lane[l] = lane[l] + a[d + l] * b[d + l];
            s[r * s_stride + j] = tree(lane) * scale;
        }
}

void softmax(float* s, int n, float* max, float* sum) {
    float m = s[0];
    for (int j = 1; j < n; j++) m = s[j] > m ? s[j] : m;
    float lane[LANES] = {};
    for (int j = 0; j < n; j++) {
        s[j] = exp_one(s[j] - m);
        lane[j % LANES] = lane[j % LANES] + s[j];
    }
    *max = m;
    *sum = tree(lane);
}

void accumulate(const float* p, int64_t p_stride, int rows, const float* v, int64_t v_stride, int keys, int dim,
                float* o, int64_t o_stride) {
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < keys; j++) {
            const float w = p[r * p_stride + j];
            for (int d = 0; d < dim; d++) o[r * o_stride + d] = o[r * o_stride + d] + w * v[j * v_stride + d];
        }
}

void merge(float* o, const float* c, float a, float b, int dim) {
    for (int d = 0; d < dim; d++) o[d] = o[d] * a + c[d] * b;
}

void softcap(float* s, int n, float cap) {
    for (int j = 0; j < n; j++) {
        const float x = s[j] / cap;
        const float t = exp_one(-2.0f * std::fabs(x));
        s[j] = cap * std::copysign((1.0f - t) / (1.0f + t), x);
    }
}

void exp_all(const float* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = exp_one(x[i]);
}

float sigmoid(float x) {
    const float t = exp_one(-std::fabs(x));
    return (x < 0 ? t : 1.0f) / (1.0f + t);
}

float normal_distribution(float x) {
    float a = std::fabs(x);
    a = a > DLB_GELU_LARGEST ? DLB_GELU_LARGEST : a;
    const float q = (a - DLB_GELU_CENTER) / (a + DLB_GELU_CENTER);
    float y = DLB_GELU_P9 * q + DLB_GELU_P8;
    y = y * q + DLB_GELU_P7;
    y = y * q + DLB_GELU_P6;
    y = y * q + DLB_GELU_P5;
    y = y * q + DLB_GELU_P4;
    y = y * q + DLB_GELU_P3;
    y = y * q + DLB_GELU_P2;
    y = y * q + DLB_GELU_P1;
    y = y * q + DLB_GELU_P0;
    const float tail = exp_one(-0.5f * a * a) * (y / (1.0f + a));
    return x < 0 ? tail : 1.0f - tail;
}

float activate_one(int32_t activation, float x) {
    if (activation == DLB_ACT_SILU) return x * sigmoid(x);
    if (activation == DLB_ACT_GELU_ERF) return x * normal_distribution(x);
    if (activation == DLB_ACT_GELU_TANH) return x * sigmoid(x * (DLB_GELU_TANH_C1 + DLB_GELU_TANH_C2 * (x * x)));
    if (activation == DLB_ACT_QUICK_GELU) return x * sigmoid(DLB_QUICK_GELU_C * x);
    if (activation == DLB_ACT_RELU) return x < 0 ? 0.0f : x;
    if (activation == DLB_ACT_SIGMOID) return sigmoid(x);
    return x;
}

void activate(int32_t activation, const float* x, const float* up, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float value = activate_one(activation, x[i]);
        out[i] = up != nullptr ? value * up[i] : value;
    }
}

// 1 / sqrt(mean of squares of x - mean + eps)
float norm_factor(const float* x, float mean, float eps, int64_t k) {
    float lane[LANES] = {};
    for (int64_t i = 0; i < k; i++) {
        const float d = x[i] - mean;
        lane[i % LANES] = lane[i % LANES] + d * d;
    }
    return 1.0f / std::sqrt(tree(lane) / static_cast<float>(k) + eps);
}

void apply_norm(const float* x, float mean, float factor, const float* weight, float offset, const float* bias,
                float* out, int64_t k) {
    for (int64_t i = 0; i < k; i++) {
        float value = (x[i] - mean) * factor;
        if (weight != nullptr) value = value * (weight[i] + offset);
        if (bias != nullptr) value = value + bias[i];
        out[i] = value;
    }
}

void rms_norm(const float* x, const float* weight, float offset, float eps, float* out, int64_t k) {
    apply_norm(x, 0.0f, norm_factor(x, 0.0f, eps, k), weight, offset, nullptr, out, k);
}

void layer_norm(const float* x, const float* weight, float offset, const float* bias, float eps, float* out,
                int64_t k) {
    float lane[LANES] = {};
    for (int64_t i = 0; i < k; i++) lane[i % LANES] = lane[i % LANES] + x[i];
    const float mean = tree(lane) / static_cast<float>(k);
    apply_norm(x, mean, norm_factor(x, mean, eps, k), weight, offset, bias, out, k);
}

void finish(const float* x, const float* bias, const float* residual, int32_t type, void* y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float value = x[i];
        if (bias != nullptr) value = value + bias[i];
        if (residual != nullptr) value = value + residual[i];
        if (type == DLB_FLOAT32)
            static_cast<float*>(y)[i] = value;
        else
            static_cast<uint16_t*>(y)[i] = type == DLB_FLOAT16 ? float_to_half(value) : float_to_bfloat(value);
    }
}

void scaled_sum(const float* a, const float* b, float w, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = a[i] + w * b[i];
}

void widen(const void* source, int32_t kv_type, float* out, int64_t n) {
    const uint16_t* half = static_cast<const uint16_t*>(source);
    if (kv_type == DLB_KV_FP32)
        std::memcpy(out, source, static_cast<size_t>(n) * 4);
    else if (kv_type == DLB_KV_FP16)
        for (int64_t i = 0; i < n; i++) out[i] = half_to_float(half[i]);
    else
        for (int64_t i = 0; i < n; i++) out[i] = bfloat_to_float(half[i]);
}

}  // namespace

const FloatKernels float_scalar = {scores,   softmax,  accumulate, merge,  softcap,    exp_all,
                                   activate, rms_norm, layer_norm, finish, scaled_sum, widen};

}  // namespace dlb

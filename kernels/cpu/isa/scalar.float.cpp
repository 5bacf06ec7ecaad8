// The fp32 inner loops (attention, norms, activations) in plain C++: what every other ISA must equal bit for bit.
#include <cmath>
#include <cstring>

#include "../exp_poly.h"
#include "../float_kernels.h"

namespace dlb {
namespace {

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

void silu_mul(const float* gate, const float* up, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float x = gate[i], t = exp_one(-std::fabs(x));
        out[i] = x * ((x < 0 ? t : 1.0f) / (1.0f + t)) * up[i];
    }
}

void rms_norm(const float* x, const float* weight, float eps, float* out, int64_t k) {
    float lane[LANES] = {};
    for (int64_t i = 0; i < k; i++) lane[i % LANES] = lane[i % LANES] + x[i] * x[i];
    const float factor = 1.0f / std::sqrt(tree(lane) / static_cast<float>(k) + eps);
    for (int64_t i = 0; i < k; i++) out[i] = x[i] * factor * weight[i];
}

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

float widen_half(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7FFFu;
    if (rest >= 0x7C00u)
        return from_bits(sign | 0x7F800000u | (rest & 0x3FFu) << 13 | ((rest & 0x3FFu) ? 0x400000u : 0u));
    // Subnormals too: as an integer times 2^-24, exact.
    if (rest < 0x400u) return std::copysign(static_cast<float>(rest) * 0x1p-24f, from_bits(sign | 0x3F800000u));
    return from_bits(sign | ((rest << 13) + (112u << 23)));
}

void widen(const void* source, int32_t kv_type, float* out, int64_t n) {
    const uint16_t* half = static_cast<const uint16_t*>(source);
    if (kv_type == DLB_KV_FP32)
        std::memcpy(out, source, static_cast<size_t>(n) * 4);
    else if (kv_type == DLB_KV_FP16)
        for (int64_t i = 0; i < n; i++) out[i] = widen_half(half[i]);
    else
        for (int64_t i = 0; i < n; i++) out[i] = from_bits(static_cast<uint32_t>(half[i]) << 16);
}

}  // namespace

const FloatKernels float_scalar = {scores, softmax, accumulate, merge, softcap, exp_all, silu_mul, rms_norm, widen};

}  // namespace dlb

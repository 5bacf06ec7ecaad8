// Rotary embedding and the cache's number types in plain C++: what every other ISA must equal bit for bit.
#include <cmath>
#include <cstring>

#include "../kv_kernels.h"

namespace dlb {
namespace {

#include "../generic/half.h"

void rope_halves(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

void rope_pairs(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cos[i] - b * sin[i];
        x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
}

void clip(float* x, int64_t n, float limit) {
    for (int64_t i = 0; i < n; i++) x[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
}

void narrow(const float* x, int32_t kv_type, void* out, int64_t n) {
    uint16_t* half = static_cast<uint16_t*>(out);
    if (kv_type == DLB_KV_FP32)
        std::memcpy(out, x, static_cast<size_t>(n) * 4);
    else if (kv_type == DLB_KV_FP16)
        for (int64_t i = 0; i < n; i++) half[i] = float_to_half(x[i]);
    else
        for (int64_t i = 0; i < n; i++) half[i] = float_to_bfloat(x[i]);
}

void narrow_int8(const float* x, int8_t* q, uint16_t* scale, int64_t n) {
    uint32_t top = 0;  // magnitudes compare as integers, and NaN and Inf come out on top
    for (int64_t i = 0; i < n; i++) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
        top = magnitude > top ? magnitude : top;
    }
    *scale = top >= 0x7f800000u ? 0x7e00u : float_to_half(float_of(top) / 127.0f);
    const float step = half_to_float(*scale);
    if (!(step > 0.0f)) {
        std::memset(q, 0, static_cast<size_t>(n));
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        const float code = std::nearbyint(x[i] / step);
        q[i] = static_cast<int8_t>(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code);
    }
}

void widen_int8(const int8_t* q, const uint16_t* scale, float* out, int64_t n) {
    const float step = half_to_float(*scale);
    for (int64_t i = 0; i < n; i++) out[i] = static_cast<float>(q[i]) * step;
}

// Element i of a row as it is stored.
float stored(const void* row, int32_t kv_type, int64_t i, const uint16_t* scale) {
    const uint16_t* half = static_cast<const uint16_t*>(row);
    if (kv_type == DLB_KV_FP32) return static_cast<const float*>(row)[i];
    if (kv_type == DLB_KV_FP16) return half_to_float(half[i]);
    if (kv_type == DLB_KV_BF16) return bfloat_to_float(half[i]);
    return static_cast<float>(static_cast<const int8_t*>(row)[i]) * half_to_float(*scale);
}

const void* row_at(const void* base, int32_t kv_type, int64_t element) {
    const int64_t bytes = kv_type == DLB_KV_FP32 ? 4 : kv_type == DLB_KV_INT8 ? 1 : 2;
    return static_cast<const char*>(base) + element * bytes;
}

void scores_stored(const float* q, const void* k, int32_t kv_type, int64_t k_stride, const uint16_t* scales, int keys,
                   int dim, float scale, float* s) {
    for (int j = 0; j < keys; j++) {
        const void* row = row_at(k, kv_type, j * k_stride);
        float lane[16] = {};
        for (int d = 0; d < dim; d++) lane[d % 16] = lane[d % 16] + q[d] * stored(row, kv_type, d, scales + j);
        for (int half = 8; half > 0; half /= 2)
            for (int l = 0; l < half; l++) lane[l] = lane[l] + lane[l + half];
        s[j] = lane[0] * scale;
    }
}

void accumulate_stored(const float* p, const void* v, int32_t kv_type, int64_t v_stride, const uint16_t* scales,
                       int keys, int dim, float* o) {
    for (int j = 0; j < keys; j++) {
        const void* row = row_at(v, kv_type, j * v_stride);
        for (int d = 0; d < dim; d++) o[d] = o[d] + p[j] * stored(row, kv_type, d, scales + j);
    }
}

}  // namespace

const KvKernels kv_scalar = {rope_halves,   rope_pairs,        clip,      narrow, narrow_int8,
                             scores_stored, accumulate_stored, widen_int8};

}  // namespace dlb

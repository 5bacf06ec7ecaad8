// The fp32 steps between the matrix products, one table per ISA, in an order of operations fixed to the bit.
#pragma once

#include <stdint.h>

enum { DLB_KV_FP32 = 0, DLB_KV_FP16 = 1, DLB_KV_BF16 = 2, DLB_KV_INT8 = 3 };

namespace dlb {

// What an ISA file provides; every one gives the bits of scalar.float.cpp.
struct FloatKernels {
    // Dims of scores, accumulate and merge are multiples of 16, padded with zeros.
    // s[r][j] = scale * dot(q[r], k[j]): 16 lanes by element mod 16, in sequence within a lane, then the tree 8, 4,
    // 2, 1.
    void (*scores)(const float* q, int64_t q_stride, int rows, const float* k, int64_t k_stride, int keys, int dim,
                   float scale, float* s, int64_t s_stride);
    // In place s[j] = exp_poly(s[j] - max); returns max and the sum in 16 lanes by j mod 16, then the tree. n % 16 ==
    // 0.
    void (*softmax)(float* s, int n, float* max, float* sum);
    // o[r][d] = o[r][d] + p[r][j] * v[j][d], j in sequence.
    void (*accumulate)(const float* p, int64_t p_stride, int rows, const float* v, int64_t v_stride, int keys, int dim,
                       float* o, int64_t o_stride);
    // o[d] = o[d] * a + c[d] * b
    void (*merge)(float* o, const float* c, float a, float b, int dim);
    // s[j] = cap * tanh(s[j] / cap), tanh(x) = sign(x) (1 - t) / (1 + t), t = exp_poly(-2 |x|). n % 16 == 0.
    void (*softcap)(float* s, int n, float cap);
    void (*exp)(const float* x, float* out, int64_t n);
    // out[i] = activation(x[i]), times up[i] where `up` is not null (dlb_activation in fused.h has the formulas). `out`
    // may be x or up.
    void (*activate)(int32_t activation, const float* x, const float* up, float* out, int64_t n);
    // Sum of squares in 16 lanes by element mod 16, then the tree; out = (x * (1 / sqrt(sum / k + eps))) * weight'.
    // weight' = weight + offset, or nothing where weight is null. `out` may be x.
    void (*rms_norm)(const float* x, const float* weight, float offset, float eps, float* out, int64_t k);
    // d = x - sum(x) / k, sums as above; out = (d * (1 / sqrt(sum(d d) / k + eps))) * weight' [+ bias].
    void (*layer_norm)(const float* x, const float* weight, float offset, const float* bias, float eps, float* out,
                       int64_t k);
    // y[i] = cast((x[i] + bias[i]) + residual[i]) to a dlb_float as generic/half.h does; null: not added. y may be
    // residual or x where it is fp32.
    void (*finish)(const float* x, const float* bias, const float* residual, int32_t type, void* y, int64_t n);
    // out[i] = a[i] + w * b[i]; `out` may be a or b.
    void (*scaled_sum)(const float* a, const float* b, float w, float* out, int64_t n);
    // n numbers of a DLB_KV_* type to float; exact.
    void (*widen)(const void* source, int32_t kv_type, float* out, int64_t n);
};

extern const FloatKernels float_scalar;
extern const FloatKernels float_avx2;

// The ones for the ISA that is active (dlb_isa_select): kernel_table.h.
const FloatKernels& float_kernels();

}  // namespace dlb

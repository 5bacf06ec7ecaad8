// Elementwise steps of a decoder layer (float_kernels.h has the arithmetic). Contiguous fp32; `out` may be an input.
#pragma once

#include "api.h"

// out[i] = exp_poly(x[i]), x <= 88: the exponential of attention and the activations.
DLB_API void dlb_exp_poly(const float* x, float* out, int64_t n);

// out = silu(gate) * up
DLB_API void dlb_silu_mul(const float* gate, const float* up, float* out, int64_t n);

// Each of `rows` rows of k: out = x / sqrt(mean(x^2) + eps) * weight[k].
DLB_API void dlb_rms_norm(const float* x, const float* weight, float eps, float* out, int64_t rows, int64_t k);

// The exponential of the elementwise steps by itself, for tests of its bits; fused.h has the steps.
#pragma once

#include "api.h"

// out[i] = exp_poly(x[i]), x <= 88: the exponential of attention and the activations. Contiguous; `out` may be x.
DLB_API void dlb_exp_poly(const float* x, float* out, int64_t n);

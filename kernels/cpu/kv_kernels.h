// What happens to a head's numbers on their way into and out of the cache, one table per ISA, the same bits in each.
// Included by ISA files, so it holds no code at all.
#pragma once

#include <stdint.h>

#include "float_kernels.h"

namespace dlb {

struct KvKernels {
    // In place, i < half, each operation rounded: a, b = x[i], x[i + half]; x[i] = a cos[i] - b sin[i],
    // x[i + half] = b cos[i] + a sin[i].
    void (*rope_halves)(float* x, const float* cos, const float* sin, int64_t half);
    // The same for a, b = x[2 i], x[2 i + 1].
    void (*rope_pairs)(float* x, const float* cos, const float* sin, int64_t half);
    // In place: x = min(max(x, -limit), limit), NaN stays.
    void (*clip)(float* x, int64_t n, float limit);
    // n numbers to fp16 or bf16 (a DLB_KV_* type, also fp32: a copy) as generic/half.h does.
    void (*narrow)(const float* x, int32_t kv_type, void* out, int64_t n);
    // n numbers to int8 and one fp16 scale: scale = fp16(max|x| / 127); q = x / scale to nearest even, within +-127; 0
    // where the scale is 0. A NaN or an infinity among them makes the scale NaN; a number above about 127 * 65504,
    // whose scale fp16 cannot hold, makes it infinite, and the row is read as NaN.
    void (*narrow_int8)(const float* x, int8_t* q, uint16_t* scale, int64_t n);
    // FloatKernels.scores and accumulate for one query row and keys or values as they are stored, of a DLB_KV_* type;
    // `scales` has one for each key (int8). dim % 16 == 0.
    void (*scores_stored)(const float* q, const void* k, int32_t kv_type, int64_t k_stride, const uint16_t* scales,
                          int keys, int dim, float scale, float* s);
    void (*accumulate_stored)(const float* p, const void* v, int32_t kv_type, int64_t v_stride, const uint16_t* scales,
                              int keys, int dim, float* o);
    // out = q * scale, exact.
    void (*widen_int8)(const int8_t* q, const uint16_t* scale, float* out, int64_t n);
};

extern const KvKernels kv_scalar;
extern const KvKernels kv_avx2;

// The ones for the ISA that is active (dlb_isa_select).
const KvKernels& kv_kernels();

}  // namespace dlb

// The C interface that Python calls: pointers, shapes and strides, nothing of torch.
// Every function returns 0 (or a pointer, a count) on success and a negative dlb_status on refusal.
#pragma once

#include <stdint.h>

#define DLB_API extern "C" __attribute__((visibility("default")))

enum dlb_status { DLB_OK = 0, DLB_BAD_SPEC = -1, DLB_BAD_BUFFER = -2, DLB_NO_MEMORY = -3, DLB_BAD_SHAPE = -4 };
enum dlb_codec {
    DLB_AFFINE = 0,   // w = (code - center) scale, code scale + min, or (code - zero_point) scale
    DLB_TABLE = 1,    // w = table[code] (scale multiplier), codes of at most 4 bits
    DLB_ELEMENT = 2,  // w = element (scale multiplier), or the element itself
};
enum dlb_element { DLB_E5M2 = 0, DLB_E4M3 = 1, DLB_FP16 = 2, DLB_BF16 = 3, DLB_FP32 = 4, DLB_ELEMENTS = 5 };
enum dlb_offset { DLB_OFFSET_NONE = 0, DLB_OFFSET_MIN = 1, DLB_OFFSET_ZERO_POINT = 2 };
enum dlb_compute { DLB_COMPUTE_INT8 = 0, DLB_COMPUTE_FP32 = 1 };  // what activations are rounded to; elements: fp32
enum dlb_scale { DLB_SCALE_FP16 = 0, DLB_SCALE_FP32 = 1, DLB_SCALE_NONE = 2 };

// What a matrix is and how its sums are cut. Also the start of every packed buffer's header.
struct dlb_linear_spec {
    int64_t n, k;
    int64_t group_size;  // elements of K per scale; -1: one scale per row, or none; summation blocks of 64
    int32_t codec;       // dlb_codec
    int32_t bits;        // of a code: 1 2 3 4 5 6 8
    int32_t offset;      // dlb_offset
    int32_t center;      // affine: code that stands for 0 where offset is DLB_OFFSET_NONE
    int32_t scale;       // dlb_scale, of the scales and mins; DLB_SCALE_NONE only with elements
    int32_t element;     // dlb_element
    float multiplier;    // of the scales, where the codec says so
    int8_t table[16];    // integers in +-127, times the multiplier: what int8 activations meet
    float values[16];    // the same entries as they are: what fp32 activations meet
    int32_t compute;     // dlb_compute, of codes
    int64_t cuts[9];  // ends of the eight segments along K: cuts[0] = 0, cuts[8] = k, inner ones multiples of the block
};

// Canonical parts, contiguous, row by row. A null pointer stands for a part that the format lacks.
struct dlb_linear_parts {
    uint8_t* planes[2];  // bit planes, low bits first; elements are planes[0]
    void* scale;
    void* offset;  // mins (same type as the scales) or zero points (uint8)
};

DLB_API int dlb_abi_version(void);

// Instruction sets, weakest first. `select` returns DLB_BAD_SPEC for one that this CPU lacks.
DLB_API int dlb_isa_count(void);
DLB_API const char* dlb_isa_name(int isa);
DLB_API int dlb_isa_supported(int isa);
DLB_API int dlb_isa_active(void);
DLB_API int dlb_isa_select(int isa);

// The pool: `count` threads including the caller; workers are pinned to cpus[1..] where n_cpus >= count, else unpinned.
DLB_API int dlb_threads_start(int count, const int* cpus, int n_cpus);
DLB_API int dlb_threads_count(void);

// Linear y[M,N] = x[M,K] * w[N,K]^T: codes meet activations rounded to int8 per block, or as they are where the spec
// says so; elements meet fp32 (see linear.cpp for the arithmetic).
DLB_API const char* dlb_linear_why_not(const dlb_linear_spec* spec);  // null: taken
DLB_API int64_t dlb_linear_packed_bytes(const dlb_linear_spec* spec);
DLB_API int dlb_linear_prepack(const dlb_linear_spec* spec, const dlb_linear_parts* parts, void* packed);
DLB_API int dlb_linear_spec_of(const void* packed, int64_t bytes, dlb_linear_spec* spec);
DLB_API int dlb_linear_unpack(const void* packed, int64_t bytes, const dlb_linear_parts* parts);
// x is [m, k], y [m, n]; k and n must be those of the weight. Strides count elements. x and y must not overlap.
DLB_API int dlb_linear_run(const void* packed, int64_t bytes, const float* x, int64_t x_stride, int64_t m, int64_t k,
                           float* y, int64_t y_stride, int64_t n);

// Read `bytes` once with the pool's threads and the active ISA; returns a checksum. For measuring read bandwidth.
DLB_API uint64_t dlb_read_all(const void* data, int64_t bytes);

// What an ISA file may implement: plain structs of pointers and a table of function pointers.
// Included by ISA files, so it holds no code at all.
#pragma once

#include <stdint.h>

#include "float_kernels.h"
#include "kv_kernels.h"

namespace dlb {

constexpr int kPanelRows = 16;  // rows of N stored together
constexpr int kLineBytes = 64;  // 16 rows x 4 bytes: the unit of every plane (see layout.h)
constexpr int kSegments = 8;
constexpr int kMaxBits = 8;
constexpr int kElements = 5;

// The tokens of a vector ISA's largest tile. A sanitized build keeps tiles small: it would compile for many minutes.
#ifdef DLB_MOST_TOKENS
#define DLB_TOKENS(most) ((most) < DLB_MOST_TOKENS ? (most) : DLB_MOST_TOKENS)
#else
#define DLB_TOKENS(most) (most)
#endif

// A number as a type, to choose an overload.
template <int Value>
struct Const {};

// A packed weight, its geometry resolved. Offsets are bytes from the start of a panel.
struct LinearView {
    const uint8_t* panels;
    int64_t panel_bytes;
    int64_t offset_offset;
    int64_t plane_offset[2];
    int64_t n, k;
    int64_t block;                // elements of K per summation block, a multiple of 32 but for the last
    int64_t last_chunks;          // chunks of 32 in the last block
    int64_t cuts[kSegments + 1];  // in blocks
    int32_t bits;
    int32_t center;      // subtracted from every code where offset is none
    int32_t offset;      // dlb_offset
    int32_t scale_type;  // dlb_scale
    int32_t element;     // dlb_element
    float multiplier;    // of every scale of a table or of elements
    bool full_bytes;     // whether codes, or a table's entries, take all eight bits
    uint8_t table[16];   // center + the integer that a code stands for
    float values[16];    // what it stands for with fp32 activations
    int32_t scale_step;  // groups per block: 1, or 0 where one scale serves the whole row
};

// Quantized activations: q int8 [M, q_stride], zeros beyond K; scale, sum and start [M, blocks].
struct ActView {
    const int8_t* q;
    const float* scale;
    const int32_t* sum;    // of q
    const int32_t* start;  // what the dot product of a block begins with: sum times start_factor of the weight
    int64_t q_stride;
    int64_t blocks;
};

// Quantize one row of k floats to int8 per block; writes q up to the next multiple of 32, zeros beyond k.
using QuantizeFn = void (*)(const float* x, int64_t k, int64_t block, int8_t* q, float* scale, int32_t* sum);

// Where results go: token m and row n of the weight to y[m * stride + n]. segment_stride 0: the sum of the segments.
// Else segment s to y[s * segment_stride + m * stride + n], and nothing is written for an empty one.
struct LinearOut {
    float* y;
    int64_t stride;
    int64_t segment_stride;
};

// y[m, n] for the rows of panels [panel_begin, panel_end) and the tokens [m_begin, m_end).
using LinearFn = void (*)(const LinearView& w, const ActView& x, int64_t panel_begin, int64_t panel_end,
                          int64_t m_begin, int64_t m_end, const LinearOut& out);

// The same for fp32 activations x[m, k].
using FloatFn = void (*)(const LinearView& w, const float* x, int64_t x_stride, int64_t panel_begin, int64_t panel_end,
                         int64_t m_begin, int64_t m_end, const LinearOut& out);

using ReadFn = uint64_t (*)(const uint8_t* data, int64_t bytes);

struct KernelTable {
    const char* name;
    bool signed_bytes;  // whether linear_affine[8] and linear_table multiply by the codes minus 128
    QuantizeFn quantize;
    LinearFn linear_affine[kMaxBits + 1];  // by bits of a code
    LinearFn linear_table[kMaxBits + 1];   // by bits of a code, at most 4
    FloatFn linear_element[kElements];     // by dlb_element
    FloatFn linear_affine_fp32[kMaxBits + 1];
    FloatFn linear_table_fp32[kMaxBits + 1];
    ReadFn read_all;
    FloatKernels floats;
    KvKernels kv;
};

// Each ISA file defines `void fill_NAME(KernelTable&)`, which overwrites only the slots it is good at.
#define DLB_ISA(name, condition, flags) void fill_##name(KernelTable& table);
#include "isa.def"
#undef DLB_ISA

const KernelTable& active_table();

}  // namespace dlb

// What a decoder layer calls: products whose input is normed or activated on the way in and whose output is biased,
// added and cast on the way out; stacked experts; routing. For C++ callers and for ctypes: plain structs, no C++ types.
//
// All of it has the bits of its separate steps, for every ISA, M, number of threads and way to call:
//   rows    float_kernels.h and dist_lowbit/ops/elementwise.py define norms and activations, each step rounded to fp32
//   product linear.cpp; for codes, rows are rounded to int8 per summation block first
//   out     y = cast((product + bias) + residual): each sum rounded to fp32, the cast to nearest even; what is null is
//           left out
// Nothing here waits for other ranks. Where K is cut over ranks, the caller asks for an fp32 y without bias and
// residual, reduces it, and finishes with dlb_rows_apply.
//
// Every function runs on the pool of the process (threadpool.h) and returns when all is done; scratch memory belongs to
// the calling threads, grows with the largest call and is kept, so a steady state allocates nothing. x must not overlap
// y, except where a function says so; a residual may be y itself (same address, stride and type fp32). Structs start
// out zeroed: zero means "none" in every field. Strides count elements. Errors: enum dlb_status, found before anything
// is written, except DLB_NO_MEMORY, which may leave y written in part.
#pragma once

#include "api.h"

enum dlb_float { DLB_FLOAT32 = 0, DLB_FLOAT16 = 1, DLB_BFLOAT16 = 2 };

// sigmoid(x) = (x < 0 ? t : 1) / (1 + t), t = exp_poly(-|x|). c are constants rounded to fp32.
enum dlb_activation {
    DLB_ACT_NONE = 0,        // x
    DLB_ACT_SILU = 1,        // x sigmoid(x)
    DLB_ACT_GELU_ERF = 2,    // x Phi(x), Phi the normal distribution: elementwise.py has the polynomial and its bound
    DLB_ACT_GELU_TANH = 3,   // x sigmoid(x (c1 + c2 (x x))): 0.5 x (1 + tanh(...)) written without its cancellation
    DLB_ACT_QUICK_GELU = 4,  // x sigmoid(1.702 x)
    DLB_ACT_RELU = 5,        // x < 0 ? 0 : x
    DLB_ACT_SIGMOID = 6,     // sigmoid(x), for the gate of a shared expert
    DLB_ACTIVATIONS = 7,
};

enum dlb_rows_kind {
    DLB_ROWS_AS_IS = 0,
    DLB_ROWS_RMS_NORM = 1,    // (x (1 / sqrt(mean(x^2) + eps))) (weight + weight_offset)
    DLB_ROWS_LAYER_NORM = 2,  // d = x - mean(x); (d (1 / sqrt(mean(d^2) + eps))) (weight + weight_offset) + bias
    DLB_ROWS_ACTIVATION = 3,  // activation(x)
    DLB_ROWS_GATED = 4,       // activation(x) up; gate and up may be two halves of one buffer: up = x + k
    DLB_ROWS_KINDS = 5,
};

// m rows of k numbers, and what is done to them before they are used.
struct dlb_rows_in {
    const float* x;
    int64_t x_stride;
    int64_t m, k;
    int32_t kind;         // dlb_rows_kind
    int32_t activation;   // dlb_activation, where kind has one
    const float* weight;  // [k] of a norm; null: ones
    const float* bias;    // [k] of a layer norm; null: none
    float eps;            // of a norm
    float weight_offset;  // 1 where a family stores weight - 1 (Gemma), else 0
    const float* up;      // [m, k] of DLB_ROWS_GATED
    int64_t up_stride;    //
    float* rows_out;      // null, or where the finished rows are wanted as well, fp32 [m, k] (a router, a parallel
    int64_t rows_stride;  // block). May be x itself (same stride).
};

// Where m rows of n results go.
struct dlb_rows_out {
    void* y;
    int64_t y_stride;
    int32_t y_type;  // dlb_float
    int32_t reserved;
    const float* bias;      // [n] or null
    const float* residual;  // [m, n] or null; may be y where that is fp32
    int64_t residual_stride;
};

// One product: a packed weight (dlb_linear_prepack) and where its results go.
struct dlb_linear_out {
    const void* packed;
    int64_t bytes;
    dlb_rows_out out;
};

constexpr int kDlbMaxProducts = 16;

// y_i = rows(in) w_i^T for i < count: q, k and v, or gate and up, as one call. All weights have K = in->k, each has its
// own N, format and group size; rows are made once and rounded once for each summation block among the weights, then
// all panels are one loop of the pool. count <= 16. DLB_BAD_SHAPE: another K. m = 0 does nothing.
DLB_API int dlb_linear_fused(const dlb_rows_in* in, const dlb_linear_out* products, int count);

// y = cast((rows(in) + bias) + residual), n = in->k. Without a product: a last norm, a norm of heads (m = tokens times
// heads), what follows a reduction over ranks. y may be x or up (fp32, same stride).
DLB_API int dlb_rows_apply(const dlb_rows_in* in, const dlb_rows_out* out);

// An expert's weights, all packed by dlb_linear_prepack. I is the K of `down`.
struct dlb_expert {
    const void* gate;  // [I, K], or gate above up in one weight [2 I, K] where `up` is null; [I, K] alone: no gate
    int64_t gate_bytes;
    const void* up;  // [I, K] or null
    int64_t up_bytes;
    const void* down;  // [N, I]
    int64_t down_bytes;
};

// Rows and the experts that each of them goes to.
struct dlb_moe_in {
    const float* x;  // [m, k], after the norm
    int64_t x_stride;
    int64_t m, k;
    const dlb_expert* experts;
    int64_t expert_count;
    const int32_t* ids;    // [m, slots]: experts of a row, in any order, each at most once; -1: an unused slot
    const float* weights;  // [m, slots]
    int64_t slots;
    int32_t activation;  // dlb_activation
    int32_t reserved;
};

// y[m, N] = sum over a row's experts of weight * down(activation(gate(x)) * up(x)).
// For each row and segment s of I: segment[s] starts from +0; for the row's experts in ascending index,
// segment[s] = segment[s] + weight * p_e[s], two roundings, p_e[s] segment s of the down product of expert e; then the
// tree over the segments. So tp = 1, 2, 4, 8 give the same bits where every rank holds the segments of each expert.
// A shared expert is one more expert, the last, of another I if need be, with weight sigmoid(its gate) in a slot of its
// own. Rows are grouped by expert: each expert's weights are read once for all its rows (of a slice of 512 tokens). A
// row without experts is +0. Cost at m = 1: three loops of the pool. All `down` have one N, all `gate` K = in->k; an
// expert that no row asks for need not be looked at.
DLB_API int dlb_moe(const dlb_moe_in* in, const dlb_rows_out* out);

constexpr int64_t kDlbMaxExperts = 1024;

// Choose top_k experts for each of m rows of router logits [m, experts]: the largest logits in descending order, ties
// to the lower index. weight = p_i = e_i / sum e, e_i = exp_poly(logit_i - max), the sum over all experts in 16 lanes
// by index mod 16 and their tree. normalize != 0: p_i / (sum of the chosen p, in sequence in the order chosen). ids and
// weights [m, *] with strides, so that a slot for a shared expert can follow. A row with NaN has valid ids and NaN
// weights. 1 <= top_k <= experts <= kDlbMaxExperts.
DLB_API int dlb_route(const float* logits, int64_t logits_stride, int64_t m, int64_t experts, int64_t top_k,
                      int32_t normalize, int32_t* ids, int64_t ids_stride, float* weights, int64_t weights_stride);

// out[r, i] = x[r, i] + sigmoid(gate[r]) s[r, i], each operation rounded: a shared expert whose product was reduced by
// itself. Strides of x, s and out alike; out may be x or s.
DLB_API int dlb_sigmoid_add(const float* x, const float* s, const float* gate, int64_t gate_stride, float* out,
                            int64_t stride, int64_t rows, int64_t k);

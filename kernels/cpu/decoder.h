// A decoder: one call runs a whole step of a model, from token ids to logits (dist_lowbit/decoder/program.py says what
// a step computes; this is the same program as plain structs).
//
// A decoder holds pointers to what it is given and copies of all that is small: weights, norms, biases and the rank
// table must live as long as it does. It is used by one thread at a time. Where the model is cut over ranks, all of
// them call together with the same rows, and the collectives are called in place. Its workspace grows with the largest
// step and is kept, so a steady state allocates nothing. Results have the bits of the separate steps.
#pragma once

#include "api.h"
#include "attention.h"
#include "collective.h"
#include "fused.h"

enum { DLB_DECODER_ABI = 1 };

// What dlb_decoder_step refuses before anything is written, besides the statuses of api.h.
enum dlb_step_status {
    DLB_STEP_FAULT = -16,     // a collective failed; the cache holds a part of the step
    DLB_STEP_ROWS = -17,      // row_begin does not cut the rows into sequences of at least one row
    DLB_STEP_LENGTH = -18,    // a length below the sequence's rows, or beyond its table
    DLB_STEP_TABLE = -19,     // a block that the store does not have
    DLB_STEP_ID = -20,        // a token id that is not in the vocabulary
    DLB_STEP_POSITION = -21,  // a position without rope or learned embedding
    DLB_STEP_WANTED = -22,    // wanted rows that are not ascending rows of the step
};

// Everything zeroed means "none". Sizes count elements.
struct dlb_matrix {
    const void* packed;  // dlb_linear_prepack; null: there is no such matrix
    int64_t bytes;
    const float* bias;      // [n], the whole one where results are summed over the ranks
    int32_t reduce;         // results are summed over the ranks
    int32_t gather;         // results of all ranks are joined
    const int64_t* widths;  // [ranks], where gathered: how many results each has
};

struct dlb_norm {
    int32_t kind;  // dlb_rows_kind: AS_IS (no norm), RMS_NORM or LAYER_NORM
    float eps;
    const float* weight;  // [size], or [heads, size] for a norm that differs from head to head
    const float* bias;    // the same, or null
    int64_t size;
    int64_t head_stride;  // of weight and bias, for norms of heads: 0 or size
};

// The number type of a table of rows: DLB_KV_FP32, DLB_KV_FP16 or DLB_KV_BF16.
struct dlb_table {
    const void* rows;
    int64_t count, width;
    int32_t type;
    int32_t reserved;
};

struct dlb_mlp {
    dlb_matrix up[2];  // gate and up; or one [gate, up]; or up alone where not gated
    dlb_matrix down;
    int32_t activation;  // dlb_activation
    int32_t gated;
    int32_t up_first;  // the first half (or matrix) is up
    int32_t reserved;
};

struct dlb_routed {
    dlb_matrix router;  // null: no experts
    dlb_matrix shared_gate;
    const dlb_expert* experts;  // `count` of them, and the shared one after them if has_shared
    int64_t count, top_k;
    int32_t renormalise, has_shared, activation;
    int32_t reduce;  // as dlb_matrix.reduce, of the experts' results
};

struct dlb_layer {
    dlb_norm attn_norm, mlp_norm, attn_post_norm, mlp_post_norm;
    dlb_norm q_norm, k_norm;  // over each head
    dlb_matrix qkv[3];        // one fused, or three; their results lie side by side
    dlb_matrix o;
    dlb_mlp mlp;  // where there are no routed experts
    dlb_routed routed;
    const int32_t* q_at;      // [heads]: where a head begins in a row of qkv results
    const int32_t* k_at;      // [kv_heads]
    const int32_t* v_at;      // [kv_heads]
    const int32_t* kv_index;  // [heads]
    const float* alibi;       // [heads] or null
    int64_t heads, kv_heads, head_dim;
    int64_t window;
    int32_t rope;  // index of a rope, or -1
    float scale, softcap, clip;
    int32_t parallel, norm_after, residual_normed;
    int32_t reserved;
};

struct dlb_rope {
    int64_t dim;  // elements of a head that turn
    int32_t interleaved;
    int32_t reserved;
};

struct dlb_program {
    int32_t abi;  // DLB_DECODER_ABI
    int32_t reserved;
    int64_t sizes[4];  // sizeof dlb_program, dlb_layer, dlb_step and dlb_expert
    int64_t hidden, vocab, layer_count, rope_count;
    const dlb_layer* layers;
    const dlb_rope* ropes;
    dlb_table embed;  // this rank's rows of the vocabulary, [embed_begin, embed_begin + count)
    int64_t embed_begin;
    int64_t ids;           // how many there are over all ranks
    int32_t embed_reduce;  // the vocabulary is cut: ranks add up
    float embed_scale;
    dlb_norm embed_norm;
    dlb_matrix embed_project;
    dlb_table positions;  // learned ones; rows null: none
    int64_t position_offset;
    dlb_norm final_norm;
    dlb_matrix final_project;
    dlb_matrix lm_head;
    float logit_scale, logit_softcap;
    const dlb_collective* ranks;  // null: one rank
};

// cos and sin, fp32 [count, dim / 2]: of each position, or of each row of the step.
struct dlb_rope_table {
    const float *cos, *sin;
    int64_t count;
    int32_t by_row;
    int32_t reserved;
};

struct dlb_step {
    int64_t rows, sequences, wanted_count;
    const int32_t* ids;        // [rows], or null and
    const float* embeds;       // [rows, width of the embedding]: instead of embed(ids) * embed_scale
    const int32_t* positions;  // [rows]
    const int32_t* row_begin;  // [sequences + 1]
    const int32_t* lengths;    // [sequences]: tokens in the cache when the step is done
    const int32_t* table;      // [sequences, table_stride]: blocks
    int64_t table_stride;
    const int64_t* wanted;        // [wanted_count]
    const dlb_rope_table* ropes;  // [rope_count]
    // The store: per layer, [blocks, kv_heads, block_slots, head_dim], and [blocks, kv_heads, block_slots] fp16 scales.
    void* const* keys;
    void* const* values;
    uint16_t* const* key_scales;  // null but for int8
    uint16_t* const* value_scales;
    int64_t blocks, block_slots;
    int32_t kv_type;
    int32_t logits;  // 1: out is [wanted, vocab]; 0: [wanted, width of the final norm or projection]
    float* out;
    int64_t out_stride;
};

// Where the time of all steps went, in nanoseconds; `reduce` holds `wait`, the time until the last rank had come.
struct dlb_decoder_times {
    int64_t linear, attention, reduce, wait, other, total;
    int64_t steps, rows;
};

struct dlb_decoder;

// Return a decoder, or null and a status in *status (DLB_BAD_SPEC: the program does not fit together).
DLB_API dlb_decoder* dlb_decoder_create(const dlb_program* program, int* status);
DLB_API int dlb_decoder_step(dlb_decoder* decoder, const dlb_step* step);
DLB_API void dlb_decoder_times_of(dlb_decoder* decoder, dlb_decoder_times* times, int reset);
DLB_API int64_t dlb_decoder_workspace_bytes(const dlb_decoder* decoder);
DLB_API void dlb_decoder_destroy(dlb_decoder* decoder);

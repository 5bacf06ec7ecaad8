// Attention over cached keys and values, in an order of operations that depends on nothing but the query row and the
// keys it sees (docs/numerics.md): not on the batch, other rows, the number of heads, threads, the chunking of a
// prefill or the ISA.
#pragma once

#include <stdint.h>

#include "api.h"
#include "float_kernels.h"

enum { DLB_MASK_NONE = 0, DLB_MASK_BOOL = 1, DLB_MASK_ADD = 2 };
// Values of causal_offset that are no offset.
enum { DLB_CAUSAL_NONE = -1, DLB_CAUSAL_TAIL = -2 };

// Everything in elements, never bytes. The last axis (dim of q, k, v, out; slots of mask) has stride 1.
struct dlb_attention_args {
    const float* q;  // [batch, heads, rows, head_dim]
    const void* k;   // [batch, kv_heads, slots, head_dim], or blocks of slots when block_table is set
    const void* v;   // the same with value_dim
    float* out;      // [batch, heads, rows, value_dim] in whatever order out_stride says
    const void*
        mask;  // null, or [batch, heads, rows, slots] uint8 (0 = not visible) or float (added; -inf = not visible)
    const int32_t* kv_index;  // [heads]: the KV head that a query head reads
    const int32_t*
        kv_start;        // null, or [batch]: position of slot 0 (negative where the batch row is padded on the left)
    const float* alibi;  // null, or [heads]: slope * (key's position - query's slot's position) is added
    const int32_t*
        block_table;  // null, or [batch, block_table_stride]: the block that holds slots [i, i + 1) * block_size
    const int32_t* slot_count;  // null, or [batch]: slots in use, at most `slots`
    const int32_t*
        row_begin;  // null, or [batch + 1]: sequence b has rows [row_begin[b], row_begin[b + 1]) of one packed axis
    int64_t q_stride[3];  // batch, head, row
    int64_t k_stride[3];  // batch (or block), KV head, slot
    int64_t v_stride[3];
    int64_t out_stride[3];   // batch, head, row
    int64_t mask_stride[3];  // batch, head, row; 0 where the mask is shared
    int64_t batch, heads, kv_heads, rows, slots, head_dim, value_dim;
    int64_t block_size, block_table_stride;
    int64_t causal_offset;  // row i sees slots <= i + causal_offset; NONE: all; TAIL: the last row sees the last slot
    int64_t window;         // 0, or how many slots back a row sees, itself included; needs a causal offset
    float scale;            // of the dot products
    float softcap;          // 0, or c: score = c tanh(score / c)
    int32_t kv_type;
    int32_t mask_type;
};

// Returns 0, DLB_BAD_SPEC for arguments that do not fit together, or DLB_NO_MEMORY, with out written in part.
// Rows that see nothing give 0. NaN in a visible score gives a NaN row. Streams K and V once per KV head and block of
// 32 rows.
DLB_API int dlb_attention(const dlb_attention_args* args);

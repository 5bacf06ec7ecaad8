// Attention inside the library: the call, and its plan of blocks. A decoder keeps one Attention for all its layers, so
// that a step allocates nothing.
#pragma once

#include <memory>
#include <new>
#include <vector>

#include "attention.h"

namespace dlb {

constexpr int64_t kKeyChunk = 256;  // positions whose softmax is taken together; part of the definition of the result
constexpr int64_t kKeyTile = 32;    // keys widened to fp32 at a time; any even value gives the same bits
constexpr int64_t kQueryRows = 32;  // query rows that share one reading of K and V

struct FreeBuffer {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<float[], FreeBuffer>;

// Null where there is no memory.
inline Buffer make_buffer(int64_t floats) {
    const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
    return Buffer(static_cast<float*>(::operator new[](bytes, std::align_val_t(64), std::nothrow)));
}

// What is attended to, and what a decoder's step does to rows on their way. The hooks are called by any thread; those
// that are set need args.row_begin.
struct AttentionCall {
    dlb_attention_args args;  // args.q may be null where load_query is set; kv_type may be DLB_KV_INT8
    const uint16_t* k_scale;  // int8: fp16 [blocks, KV heads, slots of a block]
    const uint16_t* v_scale;  // the same
    int64_t scale_stride[2];  // of both: block, KV head
    void* context;            // of the hooks
    // Write head_dim floats of query head `head` of packed row `row`; null: they are copied from args.q.
    void (*load_query)(void* context, int64_t row, int64_t head, float* out);
    // Put the keys and values of packed rows [row, row + rows), all of one sequence, into the cache; null: they are in.
    void (*store)(void* context, int64_t sequence, int64_t kv_head, int64_t row, int64_t rows);
};

// One sequence: its rows, its slots and the causal offset between them.
struct AttentionSequence {
    int64_t rows, first_row, slots, start, causal;
};

// Query rows that read the same KV head of the same sequence: heads x rows, row r = head (r / row_count), row (r %
// row_count).
struct AttentionBlock {
    int64_t batch, kv_head, head_begin, head_count, row_begin, row_count;
    int64_t chunk_begin, chunk_end;
    int64_t rows() const { return head_count * row_count; }
};

// A chunk of a block (index into blocks), where chunks are shared out; rows to store otherwise.
struct AttentionItem {
    int64_t block, chunk;
};
struct AttentionStore {
    int64_t sequence, kv_head, row, rows;
};

class Attention {
  public:
    // Run a call that attention_fits. A dlb_status: DLB_NO_MEMORY leaves results, and what is stored, in part.
    int run(const AttentionCall& call);

    // For the runs of blocks.
    const AttentionCall* call = nullptr;
    std::vector<AttentionSequence> sequences;
    std::vector<int32_t> heads;  // query heads ordered by the KV head that they read
    std::vector<AttentionBlock> blocks;
    int64_t dim = 0, value_dim = 0;  // padded to 16

  private:
    void plan();
    void add_blocks(int64_t b, int64_t kv_head, int64_t head_begin, int64_t head_end);
    bool worth_sharing() const;
    bool stores_fit(bool share) const;
    void store_first();
    void store_block(const AttentionBlock& block) const;
    int run_blocks(bool store);
    int run_chunks(bool store);

    std::vector<int64_t> begin_;  // [KV heads + 1]: the heads of each
    std::vector<AttentionItem> items_;
    std::vector<int64_t> first_item_;  // of each block
    std::vector<int32_t> left_;        // chunks of each block that are not done
    std::vector<AttentionStore> stores_;
    Buffer parts_;
    int64_t parts_room_ = 0;
    std::unique_ptr<bool[]> any_;
    int64_t any_room_ = 0;
};

// Whether the arguments fit together.
bool attention_fits(const dlb_attention_args& args, int32_t widest_kv_type);

// Slots [lo, hi) that row i of a sequence may see, the mask aside.
void visible_slots(const dlb_attention_args& a, const AttentionSequence& s, int64_t i, int64_t* lo, int64_t* hi);

}  // namespace dlb

// Attention: which keys a row sees, chunks of 256 positions, and the order in which their results meet.
#include "attention.h"

#include <atomic>

#include "attention_block.h"
#include "threadpool.h"

namespace dlb {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

AttentionSequence sequence_of(const dlb_attention_args& a, int64_t b) {
    AttentionSequence s;
    s.first_row = a.row_begin ? a.row_begin[b] : 0;
    s.rows = a.row_begin ? a.row_begin[b + 1] - a.row_begin[b] : a.rows;
    s.slots = a.slot_count ? a.slot_count[b] : a.slots;
    s.start = a.kv_start ? a.kv_start[b] : 0;
    s.causal = a.causal_offset == DLB_CAUSAL_TAIL ? s.slots - s.rows : a.causal_offset;
    return s;
}

}  // namespace

void visible_slots(const dlb_attention_args& a, const AttentionSequence& s, int64_t i, int64_t* lo, int64_t* hi) {
    const bool causal = a.causal_offset != DLB_CAUSAL_NONE;
    *hi = causal ? std::max<int64_t>(0, std::min(s.slots, i + s.causal + 1)) : s.slots;
    *lo = causal && a.window > 0 ? std::max<int64_t>(0, i + s.causal + 1 - a.window) : 0;
}

void Attention::add_blocks(int64_t b, int64_t kv_head, int64_t head_begin, int64_t head_end) {
    const AttentionSequence& s = sequences[b];
    for (int64_t h = head_begin; h < head_end; h += kQueryRows) {
        const int64_t count = std::min(head_end - h, kQueryRows), step = std::max<int64_t>(1, kQueryRows / count);
        for (int64_t i = 0; i < s.rows; i += step) {
            AttentionBlock block{b, kv_head, h, count, i, std::min(step, s.rows - i), 0, 0};
            int64_t lo, hi, ignored;
            visible_slots(call->args, s, i, &lo, &ignored);
            visible_slots(call->args, s, i + block.row_count - 1, &ignored, &hi);
            if (lo < hi) {
                block.chunk_begin = floor_div(lo + s.start, kKeyChunk);
                block.chunk_end = floor_div(hi - 1 + s.start, kKeyChunk) + 1;
            }
            blocks.push_back(block);
        }
    }
}

void Attention::plan() {
    const dlb_attention_args& a = call->args;
    dim = pad16(a.head_dim);
    value_dim = pad16(a.value_dim);
    sequences.clear();
    heads.clear();
    blocks.clear();
    begin_.assign(static_cast<size_t>(a.kv_heads) + 1, a.heads);
    for (int64_t g = 0; g < a.kv_heads; g++) {
        begin_[g] = static_cast<int64_t>(heads.size());
        for (int64_t h = 0; h < a.heads; h++)
            if (a.kv_index[h] == g) heads.push_back(static_cast<int32_t>(h));
    }
    for (int64_t b = 0; b < a.batch; b++) {
        sequences.push_back(sequence_of(a, b));
        for (int64_t g = 0; g < a.kv_heads; g++) add_blocks(b, g, begin_[g], begin_[g + 1]);
    }
    // Rows that come last see most: taken first, they leave short work for the end of the first thread's range, where
    // the others help.
    if (a.causal_offset != DLB_CAUSAL_NONE) std::reverse(blocks.begin(), blocks.end());
}

// Whether chunks, not blocks, are dealt to the threads: there are too few blocks (decode over a long context).
bool Attention::worth_sharing() const {
    int64_t longest = 0;
    for (const AttentionBlock& block : blocks) longest = std::max(longest, block.chunk_end - block.chunk_begin);
    const int64_t few = 2 * thread_count();
    return thread_count() > 1 && longest > 1 && static_cast<int64_t>(blocks.size()) < few;
}

// Whether every block can store its own rows: no other block reads them, and no other chunk where chunks are shared.
bool Attention::stores_fit(bool share) const {
    if (static_cast<int64_t>(blocks.size()) != call->args.batch * call->args.kv_heads) return false;
    for (const AttentionBlock& block : blocks) {
        const AttentionSequence& s = sequences[block.batch];
        if (block.row_count != s.rows || block.chunk_begin >= block.chunk_end) return false;
        if (share && floor_div(s.slots - s.rows + s.start, kKeyChunk) < block.chunk_end - 1) return false;
    }
    return true;
}

// All keys and values into the cache, before anybody reads.
void Attention::store_first() {
    stores_.clear();
    for (size_t b = 0; b < sequences.size(); b++)
        for (int64_t g = 0; g < call->args.kv_heads; g++)
            for (int64_t i = 0; i < sequences[b].rows; i += kQueryRows)
                stores_.push_back({static_cast<int64_t>(b), g, sequences[b].first_row + i,
                                   std::min(kQueryRows, sequences[b].rows - i)});
    auto body = [this](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            call->store(call->context, stores_[i].sequence, stores_[i].kv_head, stores_[i].row, stores_[i].rows);
    };
    parallel(static_cast<int64_t>(stores_.size()), 4, body);
}

void Attention::store_block(const AttentionBlock& block) const {
    const AttentionSequence& s = sequences[block.batch];
    call->store(call->context, block.batch, block.kv_head, s.first_row, s.rows);
}

// Each block by one thread, chunk after chunk.
int Attention::run_blocks(bool store) {
    const int64_t count = static_cast<int64_t>(blocks.size());
    std::atomic<bool> failed{false};
    auto body = [&](int64_t begin, int64_t end) {
        Scratch* own = scratch_of(*this);
        if (own == nullptr) return failed.store(true);
        Scratch& scratch = *own;
        for (int64_t i = begin; i < end; i++) {
            const AttentionBlock& block = blocks[i];
            if (store) store_block(block);
            BlockRun run(*this, block, scratch);
            run.start(scratch.total);
            const ChunkOf after = i + 1 < count ? first_of(blocks[i + 1]) : ChunkOf{};
            for (int64_t c = block.chunk_begin; c < block.chunk_end; c++) {
                run.chunk(c, scratch.part, c + 1 < block.chunk_end ? ChunkOf{&block, c + 1} : after);
                run.merge(scratch.total, scratch.part);
            }
            run.finish(scratch.total);
        }
    };
    parallel(count, std::max<int64_t>(1, count / (8 * thread_count())), body, Deal::kStreams);
    return failed.load() ? DLB_NO_MEMORY : DLB_OK;
}

// Chunks are shared out; whoever ends a block's last one merges them, in the same ascending order. Without memory for
// their results, each block by one thread.
int Attention::run_chunks(bool store) {
    items_.clear();
    first_item_.clear();
    left_.clear();
    for (size_t i = 0; i < blocks.size(); i++) {
        first_item_.push_back(static_cast<int64_t>(items_.size()));
        left_.push_back(static_cast<int32_t>(blocks[i].chunk_end - blocks[i].chunk_begin));
        for (int64_t c = blocks[i].chunk_begin; c < blocks[i].chunk_end; c++)
            items_.push_back({static_cast<int64_t>(i), c});
    }
    const int64_t stride = kQueryRows * (value_dim + 2), count = static_cast<int64_t>(items_.size());
    if (count * stride > parts_room_) {
        parts_ = make_buffer(count * stride);
        parts_room_ = parts_ ? count * stride : 0;
    }
    if (count * kQueryRows > any_room_) {
        any_.reset(new (std::nothrow) bool[static_cast<size_t>(count * kQueryRows)]);
        any_room_ = any_ ? count * kQueryRows : 0;
    }
    if (!parts_ || !any_) return run_blocks(store);
    Scratch* mine = scratch_of(*this);
    if (mine == nullptr) return DLB_NO_MEMORY;
    std::atomic<bool> failed{false};
    auto part_of = [&](int64_t i) {
        float* at = parts_.get() + i * stride;
        return Gathered{at, at + kQueryRows, at + 2 * kQueryRows, any_.get() + i * kQueryRows};
    };
    auto body = [&](int64_t begin, int64_t end) {
        Scratch* own = scratch_of(*this);
        if (own == nullptr) return failed.store(true);
        Scratch& scratch = *own;
        for (int64_t i = begin; i < end; i++) {
            const int64_t b = items_[i].block;
            const AttentionBlock& block = blocks[b];
            if (store && items_[i].chunk == block.chunk_end - 1) store_block(block);
            BlockRun run(*this, block, scratch);
            const AttentionItem* after = i + 1 < count ? &items_[i + 1] : nullptr;
            run.chunk(items_[i].chunk, part_of(i), after ? ChunkOf{&blocks[after->block], after->chunk} : ChunkOf{});
            if (__atomic_sub_fetch(&left_[b], 1, __ATOMIC_ACQ_REL) != 0) continue;
            run.start(scratch.total);
            for (int64_t c = 0; c < block.chunk_end - block.chunk_begin; c++)
                run.merge(scratch.total, part_of(first_item_[b] + c));
            run.finish(scratch.total);
        }
    };
    parallel(count, 1, body);
    // A block that sees no key has no chunk, so nobody ended it.
    for (const AttentionBlock& block : blocks) {
        if (block.chunk_begin < block.chunk_end) continue;
        BlockRun run(*this, block, *mine);
        run.start(mine->total);
        run.finish(mine->total);
    }
    return failed.load() ? DLB_NO_MEMORY : DLB_OK;
}

int Attention::run(const AttentionCall& what) {
    call = &what;
    plan();
    const bool share = worth_sharing(), store = call->store != nullptr && stores_fit(share);
    if (call->store != nullptr && !store) store_first();
    return share ? run_chunks(store) : run_blocks(store);
}

bool attention_fits(const dlb_attention_args& a, int32_t widest_kv_type) {
    const bool sizes = a.batch >= 0 && a.heads >= 0 && a.kv_heads > 0 && a.rows >= 0 && a.slots >= 0 &&
                       a.head_dim > 0 && a.value_dim > 0;
    const bool kinds = a.kv_type >= DLB_KV_FP32 && a.kv_type <= widest_kv_type && a.mask_type >= DLB_MASK_NONE &&
                       a.mask_type <= DLB_MASK_ADD && (a.mask_type == DLB_MASK_NONE) == (a.mask == nullptr);
    const bool spans = a.causal_offset >= DLB_CAUSAL_TAIL && a.window >= 0 &&
                       (a.window == 0 || a.causal_offset != DLB_CAUSAL_NONE) && (!a.block_table || a.block_size > 0);
    if (!sizes || !kinds || !spans || (a.row_begin && a.mask)) return false;
    for (int64_t h = 0; h < a.heads; h++)
        if (a.kv_index[h] < 0 || a.kv_index[h] >= a.kv_heads) return false;
    return true;
}

}  // namespace dlb

int dlb_attention(const dlb_attention_args* args) {
    if (!dlb::attention_fits(*args, DLB_KV_BF16)) return DLB_BAD_SPEC;
    dlb::AttentionCall call = {};
    call.args = *args;
    return dlb::Attention().run(call);
}

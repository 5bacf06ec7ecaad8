// The work on one block of attention: scores, softmax and values of one chunk of positions, and the merge of chunks.
// For inclusion by attention.cpp alone.
#pragma once

#include <math.h>
#include <string.h>

#include <algorithm>

#include "attention_plan.h"
#include "kv_kernels.h"

namespace dlb {
namespace {

// Bytes of the cache between what is read and what is asked for: one row has no arithmetic to do meanwhile.
constexpr int64_t kAheadBytes = 8 << 10, kAheadBytesOfOne = 24 << 10;

inline int64_t pad16(int64_t n) { return (n + 15) / 16 * 16; }
inline int64_t kv_bytes(int32_t kv_type) { return kv_type == DLB_KV_FP32 ? 4 : kv_type == DLB_KV_INT8 ? 1 : 2; }

// What the rows of a block have gathered: over one chunk, or merged over several.
struct Gathered {
    float *m, *l, *o;  // [rows], [rows], [rows, value_dim]
    bool* any;         // [rows]: the row saw a key
};

// One thread's memory for one block.
struct Scratch {
    Buffer memory;
    float *q, *s, *tile;
    Gathered total, part;
    uint8_t visible[kQueryRows][kKeyChunk];
    bool flags[2][kQueryRows];
    int64_t lo[kQueryRows], hi[kQueryRows];  // keys of the current chunk that each row sees
    bool holes[kQueryRows];                  // and whether some between them are masked

    int64_t dim, value_dim;

    Scratch(int64_t k, int64_t v) : dim(k), value_dim(v) {
        const int64_t sizes[] = {kQueryRows * k, kQueryRows * kKeyChunk, kKeyTile * std::max(k, v),
                                 kQueryRows * v, kQueryRows * v,         4 * kQueryRows};
        int64_t all = 0;
        for (int64_t size : sizes) all += size;
        memory = make_buffer(all);
        if (!memory) return;
        float* at = memory.get();
        q = at, at += sizes[0];
        s = at, at += sizes[1];
        tile = at, at += sizes[2];
        total.o = at, at += sizes[3];
        part.o = at, at += sizes[4];
        total.m = at, total.l = at + kQueryRows, part.m = at + 2 * kQueryRows, part.l = at + 3 * kQueryRows;
        total.any = flags[0], part.any = flags[1];
    }
};

// A thread keeps its memory from call to call: a decode step allocates nothing here. Null where there is no memory.
Scratch* scratch_of(const Attention& plan) {
    thread_local std::unique_ptr<Scratch> own;
    if (!own || own->dim != plan.dim || own->value_dim != plan.value_dim) {
        own.reset(new (std::nothrow) Scratch(plan.dim, plan.value_dim));
        if (own && !own->memory) own.reset();
    }
    return own.get();
}

// A chunk of a block; without a block, none.
struct ChunkOf {
    const AttentionBlock* block;
    int64_t chunk;
};

inline ChunkOf first_of(const AttentionBlock& block) {
    return block.chunk_begin < block.chunk_end ? ChunkOf{&block, block.chunk_begin} : ChunkOf{};
}

class BlockRun {
  public:
    BlockRun(const Attention& plan, const AttentionBlock& block, Scratch& scratch)
        : plan_(plan),
          call_(*plan.call),
          args_(plan.call->args),
          block_(block),
          sequence_(plan.sequences[block.batch]),
          scratch_(scratch) {
        for (int64_t r = 0; r < block_.rows(); r++) {
            float* q = scratch_.q + r * plan_.dim;
            load_query(r, q);
            memset(q + args_.head_dim, 0, static_cast<size_t>(plan_.dim - args_.head_dim) * sizeof(float));
        }
    }

    // `next` is the chunk that this thread will probably take after this one: its first keys are asked for.
    void chunk(int64_t c, const Gathered& part, const ChunkOf& next) {
        first_ = c * kKeyChunk - sequence_.start;
        int64_t lo = kKeyChunk, hi = 0;
        for (int64_t r = 0; r < block_.rows(); r++) {
            part.any[r] = find_visible(r);
            if (!part.any[r]) continue;
            lo = std::min(lo, scratch_.lo[r]);
            hi = std::max(hi, scratch_.hi[r]);
        }
        if (lo >= hi) return;
        look_ahead(lo, hi, next);
        scores(lo, hi);
        for (int64_t r = 0; r < block_.rows(); r++)
            if (part.any[r]) softmax(r, part);
        values(lo, hi, part);
    }

    void start(const Gathered& total) {
        std::fill_n(total.m, block_.rows(), -INFINITY);
        std::fill_n(total.l, block_.rows(), 0.0f);
        std::fill_n(total.any, block_.rows(), false);
        std::fill_n(total.o, block_.rows() * plan_.value_dim, 0.0f);
    }

    void merge(const Gathered& total, const Gathered& part) {
        float x[2 * kQueryRows], w[2 * kQueryRows];
        const int64_t rows = block_.rows();
        for (int64_t r = 0; r < rows; r++) {
            x[2 * r] = x[2 * r + 1] = 0.0f;
            if (!part.any[r]) continue;
            const float m = part.m[r] > total.m[r] ? part.m[r] : total.m[r];
            x[2 * r] = total.m[r] - m;
            x[2 * r + 1] = part.m[r] - m;
            total.m[r] = m;
        }
        kernels_.exp(x, w, 2 * rows);
        for (int64_t r = 0; r < rows; r++) {
            if (!part.any[r]) continue;
            total.l[r] = total.l[r] * w[2 * r] + part.l[r] * w[2 * r + 1];
            const int64_t at = r * plan_.value_dim;
            kernels_.merge(total.o + at, part.o + at, w[2 * r], w[2 * r + 1], static_cast<int>(plan_.value_dim));
            total.any[r] = true;
        }
    }

    void finish(const Gathered& total) {
        for (int64_t r = 0; r < block_.rows(); r++) {
            float* __restrict out = args_.out + query_batch() * args_.out_stride[0] + head(r) * args_.out_stride[1] +
                                    (sequence_.first_row + row(r)) * args_.out_stride[2];
            const float* __restrict o = total.o + r * plan_.value_dim;
            const float l = total.l[r];
            if (!total.any[r]) {
                std::fill_n(out, args_.value_dim, 0.0f);
                continue;
            }
            for (int64_t d = 0; d < args_.value_dim; d++) out[d] = o[d] / l;
        }
    }

  private:
    void load_query(int64_t r, float* q) const {
        const int64_t at = sequence_.first_row + row(r);
        if (call_.load_query) return call_.load_query(call_.context, at, head(r), q);
        const float* source =
            args_.q + query_batch() * args_.q_stride[0] + head(r) * args_.q_stride[1] + at * args_.q_stride[2];
        memcpy(q, source, static_cast<size_t>(args_.head_dim) * sizeof(float));
    }

    int64_t query_batch() const { return args_.row_begin ? 0 : block_.batch; }
    int64_t head(int64_t r) const { return plan_.heads[block_.head_begin + r / block_.row_count]; }
    int64_t row(int64_t r) const { return block_.row_begin + r % block_.row_count; }

    const char* mask_row(int64_t r) const {
        const int64_t at = block_.batch * args_.mask_stride[0] + head(r) * args_.mask_stride[1] +
                           row(r) * args_.mask_stride[2] + first_;
        return static_cast<const char*>(args_.mask) + at * (args_.mask_type == DLB_MASK_BOOL ? 1 : 4);
    }

    // Sets lo, hi, holes (and visible, if there are holes) of a row for the current chunk.
    bool find_visible(int64_t r) {
        int64_t lo, hi;
        visible_slots(args_, sequence_, row(r), &lo, &hi);
        lo = std::max<int64_t>(lo - first_, 0);
        hi = std::min(hi - first_, kKeyChunk);
        scratch_.holes[r] = false;
        if (lo < hi && args_.mask_type != DLB_MASK_NONE) {
            uint8_t* see = scratch_.visible[r];
            const char* mask = mask_row(r);
            if (args_.mask_type == DLB_MASK_BOOL) {
                memcpy(see + lo, mask + lo, static_cast<size_t>(hi - lo));
            } else {
                const float* add = reinterpret_cast<const float*>(mask);
                for (int64_t j = lo; j < hi; j++) see[j] = add[j] != -INFINITY;
            }
            while (lo < hi && !see[lo]) lo++;
            while (lo < hi && !see[hi - 1]) hi--;
            scratch_.holes[r] = lo < hi && memchr(see + lo, 0, static_cast<size_t>(hi - lo)) != nullptr;
        }
        scratch_.lo[r] = lo;
        scratch_.hi[r] = hi;
        return lo < hi;
    }

    const char* slot(const void* base, const int64_t* stride, int64_t s) const {
        return slot_of(block_, base, stride, s);
    }

    const char* slot_of(const AttentionBlock& block, const void* base, const int64_t* stride, int64_t s) const {
        int64_t at = block.kv_head * stride[1];
        if (args_.block_table) {
            const int32_t* table = args_.block_table + block.batch * args_.block_table_stride;
            at += table[s / args_.block_size] * stride[0] + s % args_.block_size * stride[2];
        } else {
            at += block.batch * stride[0] + s * stride[2];
        }
        return static_cast<const char*>(base) + at * kv_bytes(args_.kv_type);
    }

    // The scales of int8 keys (or values) from slot s on, which end with its block of the table.
    const uint16_t* scales_at(const uint16_t* scales, int64_t s) const {
        const int32_t* table = args_.block_table + block_.batch * args_.block_table_stride;
        return scales + table[s / args_.block_size] * call_.scale_stride[0] + block_.kv_head * call_.scale_stride[1] +
               s % args_.block_size;
    }

    // How many keys from j on are worked on between two requests of memory, none of them behind a block of the cache
    // whose slots are a multiple of theirs. Few rows pass over many in no time.
    int64_t tile_keys(int64_t j, int64_t hi) const {
        const int64_t most = 2 * block_.rows() <= kQueryRows ? kKeyTile / 2 : kKeyTile;
        return std::min(most - (first_ + j) % most, hi - j);
    }

    // Keys (or values) [j, j + n) of the chunk as fp32 rows padded with zeros: in place where that is what they are.
    const float* tile(const void* base, const int64_t* stride, const uint16_t* scales, int64_t j, int64_t n,
                      int64_t width, int64_t padded, int64_t* row_stride) {
        const int64_t s = first_ + j;
        const bool together = !args_.block_table || s / args_.block_size == (s + n - 1) / args_.block_size;
        if (args_.kv_type == DLB_KV_FP32 && width == padded && together) {
            *row_stride = stride[2];
            return reinterpret_cast<const float*>(slot(base, stride, s));
        }
        *row_stride = padded;
        if (args_.kv_type != DLB_KV_INT8 && together && width == padded && stride[2] == width) {
            kernels_.widen(slot(base, stride, s), args_.kv_type, scratch_.tile, n * width);
            return scratch_.tile;
        }
        for (int64_t i = 0; i < n; i++) {
            float* out = scratch_.tile + i * padded;
            const char* source = slot(base, stride, s + i);
            if (args_.kv_type == DLB_KV_INT8)
                kv_.widen_int8(reinterpret_cast<const int8_t*>(source), scales_at(scales, s + i), out, width);
            else
                kernels_.widen(source, args_.kv_type, out, width);
            memset(out + width, 0, static_cast<size_t>(padded - width) * sizeof(float));
        }
        return scratch_.tile;
    }

    // One query row reads keys as they are stored: nothing is widened twice, so nothing need be kept.
    bool direct(int64_t s, int64_t n, int64_t width, int64_t padded) const {
        const bool together = !args_.block_table || s / args_.block_size == (s + n - 1) / args_.block_size;
        return block_.rows() == 1 && together && width == padded;
    }

    const uint16_t* scales_or_null(const uint16_t* scales, int64_t s) const {
        return args_.kv_type == DLB_KV_INT8 ? scales_at(scales, s) : nullptr;
    }

    // Slots of the cache whose keys or values will be read. Blocks of a cache lie apart, where no prefetcher goes.
    struct Stretch {
        const AttentionBlock* block;
        const void* base;
        const int64_t* stride;
        int64_t begin, end, width;
    };

    // What is read from now on: this chunk's keys, its values, the next one's keys.
    void look_ahead(int64_t lo, int64_t hi, const ChunkOf& next) {
        ahead_[0] = {&block_, args_.k, args_.k_stride, first_ + lo, first_ + hi, args_.head_dim};
        ahead_[1] = {&block_, args_.v, args_.v_stride, first_ + lo, first_ + hi, args_.value_dim};
        ahead_[2] = {&block_, args_.k, args_.k_stride, 0, 0, args_.head_dim};
        if (next.block != nullptr) {
            const AttentionSequence& sequence = plan_.sequences[next.block->batch];
            const int64_t first = next.chunk * kKeyChunk - sequence.start;
            visible_slots(args_, sequence, next.block->row_begin, &ahead_[2].begin, &ahead_[2].end);
            ahead_[2].begin = std::max(first, ahead_[2].begin);
            ahead_[2].end = std::min(first + kKeyChunk, ahead_[2].end);
            ahead_[2].block = next.block;
        }
        left_ = 0;
        ask(block_.rows() == 1 ? kAheadBytesOfOne : kAheadBytes);
    }

    // Move on to the next slots that lie together; false behind the last.
    __attribute__((noinline)) bool find_more() {
        for (Stretch& from : ahead_) {
            if (from.begin >= from.end || from.stride[2] != from.width) continue;
            const int64_t size = args_.block_table ? args_.block_size : from.end;
            const int64_t end = std::min(from.end, (from.begin / size + 1) * size);
            at_ = slot_of(*from.block, from.base, from.stride, from.begin);
            left_ = (end - from.begin) * from.width * kv_bytes(args_.kv_type);
            from.begin = end;
            return true;
        }
        return false;
    }

    // Ask for so many more bytes: a little at a time, so that arithmetic goes on while memory answers. Inlined, because
    // GCC 12 takes what does nothing but prefetch for a function without effect and drops its calls.
    inline __attribute__((always_inline)) void ask(int64_t bytes) {
        for (;;) {
            const int64_t lines = (std::min(left_, bytes) + 63) / 64;
            for (int64_t i = 0; i < lines; i++) __builtin_prefetch(at_ + 64 * i);
            const int64_t asked = std::min(left_, 64 * lines);
            at_ += asked;
            left_ -= asked;
            bytes -= 64 * lines;
            if (bytes <= 0 || !find_more()) return;
        }
    }

    void scores(int64_t lo, int64_t hi) {
        const int64_t bytes = args_.head_dim * kv_bytes(args_.kv_type);
        for (int64_t j = lo, n; j < hi; j += n) {
            n = tile_keys(j, hi);
            ask(n * bytes / 2);
            if (direct(first_ + j, n, args_.head_dim, plan_.dim)) {
                kv_.scores_stored(scratch_.q, slot(args_.k, args_.k_stride, first_ + j), args_.kv_type,
                                  args_.k_stride[2], scales_or_null(call_.k_scale, first_ + j), static_cast<int>(n),
                                  static_cast<int>(plan_.dim), args_.scale, scratch_.s + j);
                ask(n * bytes / 2);
                continue;
            }
            int64_t stride;
            const float* k = tile(args_.k, args_.k_stride, call_.k_scale, j, n, args_.head_dim, plan_.dim, &stride);
            ask(n * bytes / 2);
            kernels_.scores(scratch_.q, plan_.dim, static_cast<int>(block_.rows()), k, stride, static_cast<int>(n),
                            static_cast<int>(plan_.dim), args_.scale, scratch_.s + j, kKeyChunk);
        }
    }

    void softmax(int64_t r, const Gathered& part) {
        const int64_t lo = scratch_.lo[r], hi = scratch_.hi[r];
        // Lanes go by position mod 16, so the ends are filled up with keys that weigh nothing.
        const int64_t begin = lo / 16 * 16, end = pad16(hi);
        float* s = scratch_.s + r * kKeyChunk;
        std::fill(s + begin, s + lo, -INFINITY);
        std::fill(s + hi, s + end, -INFINITY);
        if (args_.softcap > 0) kernels_.softcap(s + begin, static_cast<int>(end - begin), args_.softcap);
        if (args_.alibi) {
            const float slope = args_.alibi[head(r)];
            const int64_t own = args_.causal_offset == DLB_CAUSAL_NONE ? 0 : row(r) + sequence_.causal;
            for (int64_t j = lo; j < hi; j++) s[j] = s[j] + slope * static_cast<float>(first_ + j - own);
        }
        if (args_.mask_type == DLB_MASK_ADD) {
            const float* add = reinterpret_cast<const float*>(mask_row(r));
            for (int64_t j = lo; j < hi; j++) s[j] = s[j] + add[j];
        }
        if (scratch_.holes[r])
            for (int64_t j = lo; j < hi; j++)
                if (!scratch_.visible[r][j]) s[j] = -INFINITY;
        if (args_.softcap > 0) {  // which makes -cap of -inf
            std::fill(s + begin, s + lo, -INFINITY);
            std::fill(s + hi, s + end, -INFINITY);
        }
        kernels_.softmax(s + begin, static_cast<int>(end - begin), part.m + r, part.l + r);
    }

    // o = sum over keys of p v. A masked key is left out, not weighed with 0: its V may be anything.
    void values(int64_t lo, int64_t hi, const Gathered& part) {
        const int64_t width = plan_.value_dim, bytes = args_.value_dim * kv_bytes(args_.kv_type);
        std::fill_n(part.o, block_.rows() * width, 0.0f);
        for (int64_t j = lo, n; j < hi; j += n) {
            n = tile_keys(j, hi);
            ask(n * bytes / 2);
            if (direct(first_ + j, n, args_.value_dim, width) && !scratch_.holes[0]) {
                kv_.accumulate_stored(scratch_.s + j, slot(args_.v, args_.v_stride, first_ + j), args_.kv_type,
                                      args_.v_stride[2], scales_or_null(call_.v_scale, first_ + j), static_cast<int>(n),
                                      static_cast<int>(width), part.o);
                ask(n * bytes / 2);
                continue;
            }
            int64_t stride;
            const float* v = tile(args_.v, args_.v_stride, call_.v_scale, j, n, args_.value_dim, width, &stride);
            ask(n * bytes / 2);
            // Keys in front of `common` are seen by all rows.
            int64_t common = j + n;
            for (int64_t r = 0; r < block_.rows(); r++) {
                const bool sees_first = part.any[r] && !scratch_.holes[r] && scratch_.lo[r] <= j;
                common = std::min(common, sees_first ? std::max(j, scratch_.hi[r]) : j);
            }
            if (common > j)
                kernels_.accumulate(scratch_.s + j, kKeyChunk, static_cast<int>(block_.rows()), v, stride,
                                    static_cast<int>(common - j), static_cast<int>(width), part.o, width);
            for (int64_t r = 0; common < j + n && r < block_.rows(); r++)
                if (part.any[r]) row_values(r, common, j + n, v + (common - j) * stride, stride, part.o + r * width);
        }
    }

    // Keys [begin, end), as far as the row sees them; v is the first one's.
    void row_values(int64_t r, int64_t begin, int64_t end, const float* v, int64_t stride, float* o) {
        end = std::min(end, scratch_.hi[r]);
        for (int64_t a = std::max(begin, scratch_.lo[r]); a < end;) {
            int64_t b = end;
            if (scratch_.holes[r]) {
                while (a < end && !scratch_.visible[r][a]) a++;
                for (b = a; b < end && scratch_.visible[r][b];) b++;
            }
            kernels_.accumulate(scratch_.s + r * kKeyChunk + a, kKeyChunk, 1, v + (a - begin) * stride, stride,
                                static_cast<int>(b - a), static_cast<int>(plan_.value_dim), o, plan_.value_dim);
            a = b;
        }
    }

    const FloatKernels& kernels_ = float_kernels();
    const KvKernels& kv_ = kv_kernels();
    const Attention& plan_;
    const AttentionCall& call_;
    const dlb_attention_args& args_;
    const AttentionBlock& block_;
    const AttentionSequence& sequence_;
    Scratch& scratch_;
    int64_t first_ = 0;  // slot of the current chunk's first position; may be negative
    Stretch ahead_[3];
    const char* at_ = nullptr;  // of ahead_, what lies together and is to be asked for next
    int64_t left_ = 0;          // bytes of it
};

}  // namespace
}  // namespace dlb

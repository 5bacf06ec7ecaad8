// Attention: which keys a row sees, chunks of 256 positions, and the order in which their results meet.
#include "attention.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "threadpool.h"

namespace dlb {
namespace {

constexpr int64_t kChunk = 256;     // positions whose softmax is taken together; part of the definition of the result
constexpr int64_t kTile = 16;       // keys widened to fp32 at a time; any value gives the same bits
constexpr int64_t kBlockRows = 32;  // query rows that share one reading of K and V

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

using Args = dlb_attention_args;

struct FreeBuffer {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<float[], FreeBuffer>;

// Null where there is no memory.
Buffer make_buffer(int64_t floats) {
    const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
    return Buffer(static_cast<float*>(::operator new[](bytes, std::align_val_t(64), std::nothrow)));
}

// One sequence: its rows, its slots and the causal offset between them.
struct Sequence {
    int64_t rows, first_row, slots, start, causal;
};

// Query rows that read the same KV head of the same sequence: heads x rows, row r = head (r / row_count), row (r %
// row_count).
struct Block {
    int64_t batch, kv_head, head_begin, head_count, row_begin, row_count;
    int64_t chunk_begin, chunk_end;
    int64_t rows() const { return head_count * row_count; }
};

struct Plan {
    const Args* args;
    std::vector<Sequence> sequences;
    std::vector<int32_t> heads;  // query heads ordered by the KV head that they read
    std::vector<Block> blocks;
    int64_t dim, value_dim;  // padded to 16
};

Sequence sequence_of(const Args& a, int64_t b) {
    Sequence s;
    s.first_row = a.row_begin ? a.row_begin[b] : 0;
    s.rows = a.row_begin ? a.row_begin[b + 1] - a.row_begin[b] : a.rows;
    s.slots = a.slot_count ? a.slot_count[b] : a.slots;
    s.start = a.kv_start ? a.kv_start[b] : 0;
    s.causal = a.causal_offset == DLB_CAUSAL_TAIL ? s.slots - s.rows : a.causal_offset;
    return s;
}

// Slots [lo, hi) that row i of a sequence may see, the mask aside.
void visible_slots(const Args& a, const Sequence& s, int64_t i, int64_t* lo, int64_t* hi) {
    const bool causal = a.causal_offset != DLB_CAUSAL_NONE;
    *hi = causal ? std::max<int64_t>(0, std::min(s.slots, i + s.causal + 1)) : s.slots;
    *lo = causal && a.window > 0 ? std::max<int64_t>(0, i + s.causal + 1 - a.window) : 0;
}

void add_blocks(Plan& plan, int64_t b, int64_t kv_head, int64_t head_begin, int64_t head_end) {
    const Sequence& s = plan.sequences[b];
    for (int64_t h = head_begin; h < head_end; h += kBlockRows) {
        const int64_t heads = std::min(head_end - h, kBlockRows), step = std::max<int64_t>(1, kBlockRows / heads);
        for (int64_t i = 0; i < s.rows; i += step) {
            Block block{b, kv_head, h, heads, i, std::min(step, s.rows - i), 0, 0};
            int64_t lo, hi, ignored;
            visible_slots(*plan.args, s, i, &lo, &ignored);
            visible_slots(*plan.args, s, i + block.row_count - 1, &ignored, &hi);
            if (lo < hi) {
                block.chunk_begin = floor_div(lo + s.start, kChunk);
                block.chunk_end = floor_div(hi - 1 + s.start, kChunk) + 1;
            }
            plan.blocks.push_back(block);
        }
    }
}

Plan make_plan(const Args& a) {
    Plan plan{&a, {}, {}, {}, round_up(a.head_dim, 16), round_up(a.value_dim, 16)};
    std::vector<int64_t> begin(static_cast<size_t>(a.kv_heads) + 1);
    for (int64_t g = 0; g < a.kv_heads; g++) {
        begin[g] = static_cast<int64_t>(plan.heads.size());
        for (int64_t h = 0; h < a.heads; h++)
            if (a.kv_index[h] == g) plan.heads.push_back(static_cast<int32_t>(h));
    }
    begin[a.kv_heads] = a.heads;
    for (int64_t b = 0; b < a.batch; b++) {
        plan.sequences.push_back(sequence_of(a, b));
        for (int64_t g = 0; g < a.kv_heads; g++) add_blocks(plan, b, g, begin[g], begin[g + 1]);
    }
    // Rows that come last see most: taken first, they leave the short work for the end.
    if (a.causal_offset != DLB_CAUSAL_NONE) std::reverse(plan.blocks.begin(), plan.blocks.end());
    return plan;
}

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
    uint8_t visible[kBlockRows][kChunk];
    bool flags[2][kBlockRows];
    int64_t lo[kBlockRows], hi[kBlockRows];  // keys of the current chunk that each row sees
    bool holes[kBlockRows];                  // and whether some between them are masked

    int64_t dim, value_dim;

    Scratch(int64_t k, int64_t v) : dim(k), value_dim(v) {
        const int64_t sizes[] = {kBlockRows * k, kBlockRows * kChunk, kTile * std::max(k, v),
                                 kBlockRows * v, kBlockRows * v,      4 * kBlockRows};
        int64_t all = 0;
        for (int64_t size : sizes) all += size;
        memory = make_buffer(all);
        if (!memory) abort();  // some 100 KB: nothing else would get further
        float* at = memory.get();
        q = at, at += sizes[0];
        s = at, at += sizes[1];
        tile = at, at += sizes[2];
        total.o = at, at += sizes[3];
        part.o = at, at += sizes[4];
        total.m = at, total.l = at + kBlockRows, part.m = at + 2 * kBlockRows, part.l = at + 3 * kBlockRows;
        total.any = flags[0], part.any = flags[1];
    }
};

// A thread keeps its memory from call to call: a decode step allocates nothing here.
Scratch& scratch_of(const Plan& plan) {
    thread_local std::unique_ptr<Scratch> own;
    if (!own || own->dim != plan.dim || own->value_dim != plan.value_dim)
        own.reset(new Scratch(plan.dim, plan.value_dim));
    return *own;
}

class BlockRun {
  public:
    BlockRun(const Plan& plan, const Block& block, Scratch& scratch)
        : plan_(plan), args_(*plan.args), block_(block), sequence_(plan.sequences[block.batch]), scratch_(scratch) {
        for (int64_t r = 0; r < block_.rows(); r++) {
            const float* source = args_.q + query_batch() * args_.q_stride[0] + head(r) * args_.q_stride[1] +
                                  (sequence_.first_row + row(r)) * args_.q_stride[2];
            float* q = scratch_.q + r * plan_.dim;
            memcpy(q, source, static_cast<size_t>(args_.head_dim) * sizeof(float));
            memset(q + args_.head_dim, 0, static_cast<size_t>(plan_.dim - args_.head_dim) * sizeof(float));
        }
    }

    void chunk(int64_t c, const Gathered& part) {
        first_ = c * kChunk - sequence_.start;
        int64_t lo = kChunk, hi = 0;
        for (int64_t r = 0; r < block_.rows(); r++) {
            part.any[r] = find_visible(r);
            if (!part.any[r]) continue;
            lo = std::min(lo, scratch_.lo[r]);
            hi = std::max(hi, scratch_.hi[r]);
        }
        if (lo >= hi) return;
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
        for (int64_t r = 0; r < block_.rows(); r++) {
            if (!part.any[r]) continue;
            const float m = part.m[r] > total.m[r] ? part.m[r] : total.m[r];
            const float x[2] = {total.m[r] - m, part.m[r] - m};
            float w[2];
            kernels_.exp(x, w, 2);
            total.l[r] = total.l[r] * w[0] + part.l[r] * w[1];
            const int64_t at = r * plan_.value_dim;
            kernels_.merge(total.o + at, part.o + at, w[0], w[1], static_cast<int>(plan_.value_dim));
            total.m[r] = m;
            total.any[r] = true;
        }
    }

    void finish(const Gathered& total) {
        for (int64_t r = 0; r < block_.rows(); r++) {
            float* out = args_.out + query_batch() * args_.out_stride[0] + head(r) * args_.out_stride[1] +
                         (sequence_.first_row + row(r)) * args_.out_stride[2];
            const float* o = total.o + r * plan_.value_dim;
            for (int64_t d = 0; d < args_.value_dim; d++) out[d] = total.any[r] ? o[d] / total.l[r] : 0.0f;
        }
    }

  private:
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
        hi = std::min(hi - first_, kChunk);
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
        int64_t at = block_.kv_head * stride[1];
        if (args_.block_table) {
            const int32_t* table = args_.block_table + block_.batch * args_.block_table_stride;
            at += table[s / args_.block_size] * stride[0] + s % args_.block_size * stride[2];
        } else {
            at += block_.batch * stride[0] + s * stride[2];
        }
        return static_cast<const char*>(base) + at * (args_.kv_type == DLB_KV_FP32 ? 4 : 2);
    }

    // Keys (or values) [j, j + n) of the chunk as fp32 rows padded with zeros: in place where that is what they are.
    const float* tile(const void* base, const int64_t* stride, int64_t j, int64_t n, int64_t width, int64_t padded,
                      int64_t* row_stride) {
        const int64_t s = first_ + j;
        const bool together = !args_.block_table || s / args_.block_size == (s + n - 1) / args_.block_size;
        if (args_.kv_type == DLB_KV_FP32 && width == padded && together) {
            *row_stride = stride[2];
            return reinterpret_cast<const float*>(slot(base, stride, s));
        }
        *row_stride = padded;
        if (together && width == padded && stride[2] == width) {
            kernels_.widen(slot(base, stride, s), args_.kv_type, scratch_.tile, n * width);
            return scratch_.tile;
        }
        for (int64_t i = 0; i < n; i++) {
            float* out = scratch_.tile + i * padded;
            kernels_.widen(slot(base, stride, s + i), args_.kv_type, out, width);
            memset(out + width, 0, static_cast<size_t>(padded - width) * sizeof(float));
        }
        return scratch_.tile;
    }

    void scores(int64_t lo, int64_t hi) {
        for (int64_t j = lo; j < hi; j += kTile) {
            const int64_t n = std::min(kTile, hi - j);
            int64_t stride;
            const float* k = tile(args_.k, args_.k_stride, j, n, args_.head_dim, plan_.dim, &stride);
            kernels_.scores(scratch_.q, plan_.dim, static_cast<int>(block_.rows()), k, stride, static_cast<int>(n),
                            static_cast<int>(plan_.dim), args_.scale, scratch_.s + j, kChunk);
        }
    }

    void softmax(int64_t r, const Gathered& part) {
        const int64_t lo = scratch_.lo[r], hi = scratch_.hi[r];
        // Lanes go by position mod 16, so the ends are filled up with keys that weigh nothing.
        const int64_t begin = lo / 16 * 16, end = round_up(hi, 16);
        float* s = scratch_.s + r * kChunk;
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
        const int64_t width = plan_.value_dim;
        std::fill_n(part.o, block_.rows() * width, 0.0f);
        for (int64_t j = lo; j < hi; j += kTile) {
            const int64_t n = std::min(kTile, hi - j);
            int64_t stride;
            const float* v = tile(args_.v, args_.v_stride, j, n, args_.value_dim, width, &stride);
            bool whole = true;
            for (int64_t r = 0; r < block_.rows(); r++)
                whole = whole && part.any[r] && !scratch_.holes[r] && scratch_.lo[r] <= j && j + n <= scratch_.hi[r];
            if (whole)
                kernels_.accumulate(scratch_.s + j, kChunk, static_cast<int>(block_.rows()), v, stride,
                                    static_cast<int>(n), static_cast<int>(width), part.o, width);
            else
                for (int64_t r = 0; r < block_.rows(); r++)
                    if (part.any[r]) row_values(r, j, n, v, stride, part.o + r * width);
        }
    }

    void row_values(int64_t r, int64_t j, int64_t n, const float* v, int64_t stride, float* o) {
        const int64_t end = std::min(j + n, scratch_.hi[r]);
        for (int64_t a = std::max(j, scratch_.lo[r]); a < end;) {
            int64_t b = end;
            if (scratch_.holes[r]) {
                while (a < end && !scratch_.visible[r][a]) a++;
                for (b = a; b < end && scratch_.visible[r][b];) b++;
            }
            kernels_.accumulate(scratch_.s + r * kChunk + a, kChunk, 1, v + (a - j) * stride, stride,
                                static_cast<int>(b - a), static_cast<int>(plan_.value_dim), o, plan_.value_dim);
            a = b;
        }
    }

    const FloatKernels& kernels_ = float_kernels();
    const Plan& plan_;
    const Args& args_;
    const Block& block_;
    const Sequence& sequence_;
    Scratch& scratch_;
    int64_t first_ = 0;  // slot of the current chunk's first position; may be negative
};

// Each block by one thread, chunk after chunk.
void run_blocks(const Plan& plan) {
    auto body = [&plan](int64_t begin, int64_t end) {
        Scratch& scratch = scratch_of(plan);
        for (int64_t i = begin; i < end; i++) {
            const Block& block = plan.blocks[i];
            BlockRun run(plan, block, scratch);
            run.start(scratch.total);
            for (int64_t c = block.chunk_begin; c < block.chunk_end; c++) {
                run.chunk(c, scratch.part);
                run.merge(scratch.total, scratch.part);
            }
            run.finish(scratch.total);
        }
    };
    const int64_t count = static_cast<int64_t>(plan.blocks.size());
    parallel(count, std::max<int64_t>(1, count / (8 * thread_count())), body);
}

// Fewer blocks than threads (decode over a long context): chunks are shared out, then merged in the same ascending
// order. False where there is no memory for their results.
bool run_chunks(const Plan& plan) {
    struct Item {
        int64_t block, chunk;
    };
    std::vector<Item> items;
    std::vector<int64_t> first;
    for (size_t i = 0; i < plan.blocks.size(); i++) {
        first.push_back(static_cast<int64_t>(items.size()));
        for (int64_t c = plan.blocks[i].chunk_begin; c < plan.blocks[i].chunk_end; c++)
            items.push_back({static_cast<int64_t>(i), c});
    }
    const int64_t stride = kBlockRows * (plan.value_dim + 2);
    const int64_t count = static_cast<int64_t>(items.size());
    Buffer memory = make_buffer(count * stride);
    std::unique_ptr<bool[]> any(new (std::nothrow) bool[static_cast<size_t>(count * kBlockRows)]);
    if (!memory || !any) return false;
    auto part_of = [&](int64_t i) {
        float* at = memory.get() + i * stride;
        return Gathered{at, at + kBlockRows, at + 2 * kBlockRows, any.get() + i * kBlockRows};
    };
    auto gather = [&](int64_t begin, int64_t end) {
        Scratch& scratch = scratch_of(plan);
        for (int64_t i = begin; i < end; i++)
            BlockRun(plan, plan.blocks[items[i].block], scratch).chunk(items[i].chunk, part_of(i));
    };
    parallel(count, 1, gather);
    auto unite = [&](int64_t begin, int64_t end) {
        Scratch& scratch = scratch_of(plan);
        for (int64_t b = begin; b < end; b++) {
            const Block& block = plan.blocks[b];
            BlockRun run(plan, block, scratch);
            run.start(scratch.total);
            for (int64_t c = block.chunk_begin; c < block.chunk_end; c++)
                run.merge(scratch.total, part_of(first[b] + c - block.chunk_begin));
            run.finish(scratch.total);
        }
    };
    parallel(static_cast<int64_t>(plan.blocks.size()), 1, unite);
    return true;
}

bool fits(const Args& a) {
    const bool sizes = a.batch >= 0 && a.heads >= 0 && a.kv_heads > 0 && a.rows >= 0 && a.slots >= 0 &&
                       a.head_dim > 0 && a.value_dim > 0;
    const bool kinds = a.kv_type >= DLB_KV_FP32 && a.kv_type <= DLB_KV_BF16 && a.mask_type >= DLB_MASK_NONE &&
                       a.mask_type <= DLB_MASK_ADD && (a.mask_type == DLB_MASK_NONE) == (a.mask == nullptr);
    const bool spans = a.causal_offset >= DLB_CAUSAL_TAIL && a.window >= 0 &&
                       (a.window == 0 || a.causal_offset != DLB_CAUSAL_NONE) && (!a.block_table || a.block_size > 0);
    if (!sizes || !kinds || !spans || (a.row_begin && a.mask)) return false;
    for (int64_t h = 0; h < a.heads; h++)
        if (a.kv_index[h] < 0 || a.kv_index[h] >= a.kv_heads) return false;
    return true;
}

}  // namespace
}  // namespace dlb

int dlb_attention(const dlb_attention_args* args) {
    if (!dlb::fits(*args)) return DLB_BAD_SPEC;
    const dlb::Plan plan = dlb::make_plan(*args);
    int64_t longest = 0;
    for (const dlb::Block& block : plan.blocks) longest = std::max(longest, block.chunk_end - block.chunk_begin);
    const int64_t few = 2 * dlb::thread_count();
    const bool share = dlb::thread_count() > 1 && longest > 1 && static_cast<int64_t>(plan.blocks.size()) < few;
    if (!share || !dlb::run_chunks(plan)) dlb::run_blocks(plan);
    return DLB_OK;
}

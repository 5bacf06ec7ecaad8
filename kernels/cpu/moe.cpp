// Stacked experts (fused.h): rows grouped by expert, all gates and ups as one loop of the pool, the activation of all
// pairs as one, and all downs as one, summed inside the segments. A pair is a row and one of its experts.
#include <string.h>

#include <algorithm>

#include "fused.h"
#include "layout.h"
#include "linear_jobs.h"
#include "threadpool.h"

namespace dlb {
namespace {

constexpr int64_t kSliceRows = 512;        // rows at a time, so that scratch memory is bounded ...
constexpr int64_t kSliceBytes = 64 << 20;  // ... and about how much of it
constexpr int64_t kGatherGrain = 16;       // pairs worth waking a thread for

// An expert that has rows.
struct Active {
    int32_t expert;
    int64_t first, count;  // pairs
    Weight gate, up, down;
    bool has_up, gated;
    int64_t inner;             // I
    int gate_index, up_index;  // of the summation block of x, -1: fp32
    float* h;                  // [count, width]: gate, then up where there is one
    int64_t width;
};

// Check an expert of rows of k numbers and results of n, and take what it is made of. A dlb_status.
int open_expert(const KernelTable& table, const dlb_expert& given, int64_t k, int64_t n, Active* a) {
    int status = open_weight(table, given.gate, given.gate_bytes, &a->gate);
    if (status == DLB_OK) status = open_weight(table, given.down, given.down_bytes, &a->down);
    a->has_up = given.up != nullptr;
    if (status == DLB_OK && a->has_up) status = open_weight(table, given.up, given.up_bytes, &a->up);
    if (status != DLB_OK) return status;
    a->inner = a->down.view.k;
    a->gated = a->has_up || a->gate.view.n != a->inner;
    a->width = (a->gated ? 2 : 1) * a->inner;
    const int64_t up_n = a->has_up ? a->up.view.n : 0, up_k = a->has_up ? a->up.view.k : k;
    if (a->has_up && up_n != a->inner) return DLB_BAD_SHAPE;
    if (a->gate.view.n + up_n != a->width || a->gate.view.k != k || up_k != k || a->down.view.n != n)
        return DLB_BAD_SHAPE;
    return DLB_OK;
}

// Note what an expert wants of the rows that it takes. A dlb_status: there may be too many kinds of summation blocks.
int note_need(Active* a, RowsNeed* need) {
    a->gate_index = need_of(a->gate, need);
    a->up_index = a->has_up ? need_of(a->up, need) : -1;
    return need->blocks < kDlbMaxProducts - 1 ? DLB_OK : DLB_BAD_SPEC;  // the next expert may need two more
}

// Experts one after the other that agree in shape: one activation call makes the rows of all their downs.
struct Run {
    int64_t begin, end;  // actives
    dlb_rows_in in;
    RowsNeed need;
    int index;
    Rows rows;
};

struct Books {
    int64_t* start;  // [experts + 1]: first pair of an expert
    int32_t* row;    // [pairs], ascending within an expert
    float* factor;   // [pairs]
    Active* active;
    Run* runs;
    Job* jobs;
    SegmentTerm* terms;
};

Books place_books(int64_t experts, int64_t pairs, Arena& arena) {
    const int64_t most = std::min(experts, pairs);
    Books books;
    books.start = arena.take<int64_t>(experts + 1);
    books.row = arena.take<int32_t>(pairs);
    books.factor = arena.take<float>(pairs);
    books.active = arena.take<Active>(most);
    books.runs = arena.take<Run>(most);
    books.jobs = arena.take<Job>(2 * most);
    books.terms = arena.take<SegmentTerm>(most);
    return books;
}

Scratch& book_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

class Moe {
  public:
    Moe(const dlb_moe_in& in, const dlb_rows_out& out, int64_t begin, int64_t m, int64_t n)
        : in_(in), out_(out), begin_(begin), m_(m), n_(n), table_(active_table()) {}

    int run() {
        int status = group();
        if (status == DLB_OK) status = open();
        if (status == DLB_OK) status = place();
        if (status == DLB_OK) status = make_rows(x_, m_, need_, rows_);
        if (status != DLB_OK) return status;
        gather();
        run_gates();
        for (int64_t i = 0; i < runs_ && status == DLB_OK; ++i)
            status = make_rows(books_.runs[i].in, books_.runs[i].in.m, books_.runs[i].need, books_.runs[i].rows);
        return status == DLB_OK ? run_downs() : status;
    }

  private:
    const int32_t* ids(int64_t row) const { return in_.ids + (begin_ + row) * in_.slots; }

    // Sort the pairs by expert.
    int group() {
        const int64_t pairs = m_ * in_.slots;
        Arena size(nullptr);
        place_books(in_.expert_count, pairs, size);
        void* memory = book_scratch().get(size.bytes());
        if (memory == nullptr) return DLB_NO_MEMORY;
        Arena arena(memory);
        books_ = place_books(in_.expert_count, pairs, arena);
        int64_t* start = books_.start;
        memset(start, 0, static_cast<size_t>(in_.expert_count + 1) * sizeof *start);
        for (int64_t i = 0; i < pairs; ++i) {
            const int32_t id = ids(0)[i];
            if (id >= 0) ++start[id + 1];
        }
        for (int64_t e = 0; e < in_.expert_count; ++e) start[e + 1] += start[e];
        for (int64_t r = 0; r < m_; ++r)
            for (int64_t s = 0; s < in_.slots; ++s) {
                const int32_t id = ids(r)[s];
                if (id < 0) continue;
                const int64_t at = start[id]++;
                books_.row[at] = static_cast<int32_t>(r);
                books_.factor[at] = in_.weights[(begin_ + r) * in_.slots + s];
            }
        // Each start has moved on to the next one's place.
        for (int64_t e = in_.expert_count; e > 0; --e) start[e] = start[e - 1];
        start[0] = 0;
        pairs_ = start[in_.expert_count];
        return DLB_OK;
    }

    int open() {
        for (int64_t e = 0; e < in_.expert_count; ++e) {
            const int64_t first = books_.start[e], count = books_.start[e + 1] - first;
            if (count == 0) continue;
            Active* a = &books_.active[actives_++];
            *a = Active();
            a->expert = static_cast<int32_t>(e);
            a->first = first;
            a->count = count;
            int status = open_expert(table_, in_.experts[e], in_.k, n_, a);
            if (status == DLB_OK) status = note_need(a, &need_);
            if (status != DLB_OK) return status;
            gathers_ |= !consecutive(*a);
        }
        return DLB_OK;
    }

    bool consecutive(const Active& a) const {
        return books_.row[a.first + a.count - 1] - books_.row[a.first] == a.count - 1;
    }

    static bool alike(const Active& a, const Active& b) {
        return a.inner == b.inner && a.width == b.width && a.down.view.block == b.down.view.block &&
               a.down.start_factor == b.down.start_factor && (a.down.codes != nullptr) == (b.down.codes != nullptr);
    }

    // Cut the actives into runs; their input is placed by place_all.
    void find_runs() {
        for (int64_t i = 0; i < actives_; ++i) {
            if (i > 0 && alike(books_.active[i - 1], books_.active[i])) {
                ++books_.runs[runs_ - 1].end;
                continue;
            }
            Run* run = &books_.runs[runs_++];
            *run = Run();
            run->begin = i;
            run->end = i + 1;
            run->index = need_of(books_.active[i].down, &run->need);
        }
    }

    void place_run(Run* run, Arena& arena) {
        const Active &head = books_.active[run->begin], &tail = books_.active[run->end - 1];
        memset(&run->in, 0, sizeof run->in);
        run->in.m = tail.first + tail.count - head.first;
        run->in.k = head.inner;
        run->in.kind = head.gated ? DLB_ROWS_GATED : DLB_ROWS_ACTIVATION;
        run->in.activation = in_.activation;
        float* h = arena.take<float>(run->in.m * head.width);
        run->in.x_stride = run->in.up_stride = head.width;
        run->in.x = h;
        if (h != nullptr && head.gated) run->in.up = h + head.inner;
        for (int64_t i = run->begin; i < run->end && h != nullptr; ++i)
            books_.active[i].h = h + (books_.active[i].first - head.first) * head.width;
        run->rows = place_rows(run->in, run->in.m, run->need, arena);
    }

    void place_all(Arena& arena) {
        rows_ = place_rows(x_, m_, need_, arena);
        if (gathers_) {
            // As if there were `pairs` rows of another kind: their fp32 too has a place of its own.
            dlb_rows_in pairs = x_;
            pairs.kind = DLB_ROWS_ACTIVATION;
            gathered_ = place_rows(pairs, pairs_, need_, arena);
        }
        for (int64_t i = 0; i < runs_; ++i) place_run(&books_.runs[i], arena);
    }

    int place() {
        memset(&x_, 0, sizeof x_);
        x_.x = in_.x + begin_ * in_.x_stride;
        x_.x_stride = in_.x_stride;
        x_.m = m_;
        x_.k = in_.k;
        find_runs();
        Arena size(nullptr);
        place_all(size);
        void* memory = call_scratch().get(size.bytes());
        if (memory == nullptr) return DLB_NO_MEMORY;
        Arena arena(memory);
        place_all(arena);
        return DLB_OK;
    }

    void gather_pair(int64_t pair) {
        const int64_t row = books_.row[pair];
        if (need_.floats)
            memcpy(gathered_.made + pair * gathered_.made_stride, x_.x + row * x_.x_stride,
                   static_cast<size_t>(in_.k) * 4);
        for (int i = 0; i < need_.blocks; ++i) {
            const Quantized &from = rows_.quantized[i], &to = gathered_.quantized[i];
            const size_t table = static_cast<size_t>(to.blocks) * 4;
            memcpy(to.start + pair * to.blocks, from.start + row * from.blocks, table);
            if (need_.shared(i)) continue;
            memcpy(to.q + pair * to.q_stride, from.q + row * from.q_stride, static_cast<size_t>(to.q_stride));
            memcpy(to.scale + pair * to.blocks, from.scale + row * from.blocks, table);
            memcpy(to.sum + pair * to.blocks, from.sum + row * from.blocks, table);
        }
    }

    // Put the rows of each expert one behind the other, where they are not already.
    void gather() {
        if (!gathers_ || in_.k == 0) return;
        auto body = [&](int64_t begin, int64_t end) {
            for (int64_t pair = begin; pair < end; ++pair) gather_pair(pair);
        };
        parallel(pairs_, kGatherGrain, body);
    }

    Job job_of(const Active& a, const Weight& weight, int index, float* to) {
        Job job;
        memset(static_cast<void*>(&job), 0, sizeof job);
        job.weight = weight;
        const bool there = !gathers_ || consecutive(a);
        take_rows(&job, there ? rows_ : gathered_, index, there ? books_.row[a.first] : a.first);
        job.m = a.count;
        job.out.y = to;
        job.out.y_stride = a.width;
        return job;
    }

    void run_gates() {
        int64_t count = 0;
        for (int64_t i = 0; i < actives_; ++i) {
            const Active& a = books_.active[i];
            books_.jobs[count++] = job_of(a, a.gate, a.gate_index, a.h);
            if (a.has_up) books_.jobs[count++] = job_of(a, a.up, a.up_index, a.h + a.inner);
        }
        run_jobs(books_.jobs, count);
    }

    int run_downs() {
        for (int64_t r = 0; r < runs_; ++r) {
            const Run& run = books_.runs[r];
            for (int64_t i = run.begin; i < run.end; ++i) {
                const Active& a = books_.active[i];
                SegmentTerm* term = &books_.terms[i];
                memset(static_cast<void*>(term), 0, sizeof *term);
                term->job.weight = a.down;
                take_rows(&term->job, run.rows, run.index, a.first - books_.active[run.begin].first);
                term->job.m = a.count;
                term->row = books_.row + a.first;
                term->factor = books_.factor + a.first;
            }
        }
        return sum_segments(books_.terms, actives_, m_, n_, out_at(out_, begin_, 0));
    }

    const dlb_moe_in& in_;
    const dlb_rows_out& out_;
    const int64_t begin_, m_, n_;
    const KernelTable& table_;
    Books books_;
    dlb_rows_in x_;
    RowsNeed need_;
    Rows rows_, gathered_;
    int64_t pairs_ = 0, actives_ = 0, runs_ = 0;
    bool gathers_ = false;
};

int why_not(const dlb_moe_in& in, const dlb_rows_out& out) {
    if (in.activation < DLB_ACT_NONE || in.activation >= DLB_ACTIVATIONS) return DLB_BAD_SPEC;
    if (in.m < 0 || in.k < 0 || in.slots < 0) return DLB_BAD_SHAPE;
    if (in.expert_count < 1 || in.experts == nullptr) return DLB_BAD_SPEC;
    for (int64_t row = 0; row < in.m; ++row) {
        const int32_t* ids = in.ids + row * in.slots;
        for (int64_t i = 0; i < in.slots; ++i) {
            if (ids[i] < -1 || ids[i] >= in.expert_count) return DLB_BAD_SPEC;
            for (int64_t j = 0; j < i; ++j)
                if (ids[i] >= 0 && ids[i] == ids[j]) return DLB_BAD_SPEC;  // an expert counts once in a row
        }
    }
    return out_why_not(out);
}

// Rows at a time: what the scratch of the first expert's shape takes, for all slots.
int64_t slice_of(const dlb_moe_in& in, int64_t inner) {
    const int64_t bytes = 2 * in.k + std::max<int64_t>(1, in.slots) * (2 * in.k + 10 * inner);
    return std::max<int64_t>(24, std::min(kSliceRows, kSliceBytes / bytes));
}

}  // namespace

int experts_why_not(const dlb_expert* experts, int64_t count, int64_t k, int64_t n) {
    RowsNeed need;
    for (int64_t e = 0; e < count; ++e) {
        Active a = {};
        int status = open_expert(active_table(), experts[e], k, n, &a);
        if (status == DLB_OK) status = note_need(&a, &need);
        if (status != DLB_OK) return status;
    }
    return DLB_OK;
}

}  // namespace dlb

DLB_API int dlb_moe(const dlb_moe_in* in, const dlb_rows_out* out) {
    int status = dlb::why_not(*in, *out);
    if (status != DLB_OK) return status;
    dlb::Weight down;
    status = dlb::open_weight(dlb::active_table(), in->experts[0].down, in->experts[0].down_bytes, &down);
    if (status != DLB_OK) return status;
    const int64_t step = dlb::slice_of(*in, down.view.k);
    // A slice checks its experts before it writes; of several, the first may not have those of the next.
    if (in->m > step) status = dlb::experts_why_not(in->experts, in->expert_count, in->k, down.view.n);
    for (int64_t first = 0; first < in->m && status == DLB_OK; first += step)
        status = dlb::Moe(*in, *out, first, std::min(step, in->m - first), down.view.n).run();
    return status;
}

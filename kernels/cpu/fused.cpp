// Products with what comes before and after them (fused.h).
#include "fused.h"

#include <string.h>

#include <algorithm>
#include <atomic>

#include "float_kernels.h"
#include "layout.h"
#include "linear_jobs.h"
#include "threadpool.h"

namespace dlb {
namespace {

constexpr int64_t kApplyGrain = 8192;  // numbers worth waking a thread for

// The weights of a call, and what they want of the rows.
struct Products {
    Job jobs[kDlbMaxProducts];
    int index[kDlbMaxProducts];
    RowsNeed need;
};

int open_products(const dlb_rows_in& in, const dlb_linear_out* products, int count, Products* all) {
    const KernelTable& table = active_table();
    for (int i = 0; i < count; ++i) {
        Job& job = all->jobs[i];
        int status = open_weight(table, products[i].packed, products[i].bytes, &job.weight);
        if (status == DLB_OK) status = out_why_not(products[i].out);
        if (status != DLB_OK) return status;
        if (job.weight.view.k != in.k) return DLB_BAD_SHAPE;
        all->index[i] = need_of(job.weight, &all->need);
    }
    return DLB_OK;
}

int64_t bytes_of(const dlb_rows_in& in, int64_t m, const RowsNeed& need) {
    Arena arena(nullptr);
    place_rows(in, m, need, arena);
    return arena.bytes();
}

int run_slice(const dlb_rows_in& in, const dlb_linear_out* products, int count, int64_t first, int64_t m,
              Products* all) {
    const dlb_rows_in slice = rows_from(in, first);
    void* memory = call_scratch().get(bytes_of(slice, m, all->need));
    if (memory == nullptr) return DLB_NO_MEMORY;
    Arena arena(memory);
    const Rows rows = place_rows(slice, m, all->need, arena);
    const int status = make_rows(slice, m, all->need, rows);
    if (status != DLB_OK) return status;
    for (int i = 0; i < count; ++i) {
        Job& job = all->jobs[i];
        take_rows(&job, rows, all->index[i], 0);
        job.m = m;
        job.out = out_at(products[i].out, first, 0);
    }
    run_jobs(all->jobs, count);
    return DLB_OK;
}

// The rows [begin, end) of dlb_rows_apply, whole rows at a time.
bool apply_rows(const dlb_rows_in& in, const dlb_rows_out& out, int64_t begin, int64_t end) {
    const FloatKernels& kernels = float_kernels();
    const bool plain = out.bias == nullptr && out.residual == nullptr && out.y_type == DLB_FLOAT32;
    float* buffer = nullptr;
    if (!plain && in.rows_out == nullptr && in.kind != DLB_ROWS_AS_IS) {
        buffer = static_cast<float*>(task_scratch().get(in.k * 4));
        if (buffer == nullptr) return false;
    }
    for (int64_t r = begin; r < end; ++r) {
        const dlb_rows_out to = out_at(out, r, 0);
        float* place = in.rows_out != nullptr ? in.rows_out + r * in.rows_stride
                       : plain                ? static_cast<float*>(to.y)
                                              : buffer;
        const float* x = finish_row(kernels, in, r, place);
        if (in.rows_out != nullptr && x != place) memcpy(place, x, static_cast<size_t>(in.k) * 4);
        if (!plain || x != to.y) kernels.finish(x, to.bias, to.residual, to.y_type, to.y, in.k);
    }
    return true;
}

}  // namespace
}  // namespace dlb

DLB_API int dlb_linear_fused(const dlb_rows_in* in, const dlb_linear_out* products, int count) {
    if (count < 0 || count > kDlbMaxProducts) return DLB_BAD_SPEC;
    int status = dlb::rows_why_not(*in);
    if (status != DLB_OK) return status;
    dlb::Products all;
    status = dlb::open_products(*in, products, count, &all);
    const int64_t step = dlb::slice_rows(in->m, dlb::bytes_of(*in, 1, all.need));
    for (int64_t first = 0; first < in->m && status == DLB_OK; first += step)
        status = dlb::run_slice(*in, products, count, first, std::min(step, in->m - first), &all);
    return status;
}

DLB_API int dlb_rows_apply(const dlb_rows_in* in, const dlb_rows_out* out) {
    int status = dlb::rows_why_not(*in);
    if (status == DLB_OK) status = dlb::out_why_not(*out);
    if (status != DLB_OK || in->m == 0 || in->k == 0) return status;
    std::atomic<bool> failed{false};
    auto body = [&](int64_t begin, int64_t end) {
        if (!dlb::apply_rows(*in, *out, begin, end)) failed.store(true);
    };
    dlb::parallel(in->m, std::max<int64_t>(1, dlb::kApplyGrain / in->k), body);
    return failed.load() ? DLB_NO_MEMORY : DLB_OK;
}

// Runs packed Linears: rows are made ready (activations.cpp), then panels of 16 rows of the weights go to the pool.
//
// The arithmetic for codes, the same in every ISA to the last bit (docs/numerics.md): per summation block of a row of x
//   inv = 127 / max|x|, q = rne(x inv), x_scale = max|x| / 127, sum = sum q
//   dot = sum q (c - center)  or  sum q c - zero_point sum  (int32, exact)
//   acc = acc + float(dot) (w_scale x_scale) [+ float(sum) (min x_scale)]      every operation rounded to fp32
// blocks in sequence within a segment, then a balanced tree over the eight segments, empty ones left out. A block with
// NaN or Inf gives NaN; one below 1e-30 counts as zero, so that no reciprocal overflows. A table replaces c - center by
// its integer and w_scale by w_scale multiplier.
//
// For elements, and for codes where the spec says fp32, x stays as it is: four sums by k mod 4 in each block, by FMA
// (where the ISA has none, by generic/fma.h), then (s0 + s1) + (s2 + s3), times w_scale (multiplier) where there are
// scales; blocks and segments as above. Codes enter as c - center, c - zero_point or table value, and as fma(c,
// w_scale, min), which needs no scale behind the sum.
#include <string.h>

#include <algorithm>

#include "float_kernels.h"
#include "layout.h"
#include "linear_jobs.h"
#include "threadpool.h"

namespace dlb {
namespace {

constexpr int64_t kPanelsBytes = 32 << 10;       // weights of a task when M is small
constexpr int64_t kTasksTogether = 4;            // tasks that a thread takes at a time, but for the last
constexpr int64_t kActivationBytes = 256 << 10;  // activations that stay in a core's L2 cache while weights pass
constexpr int64_t kSerialWork = 1 << 16;         // multiplications below which waking others costs more than it saves
constexpr int64_t kSliceBytes = 8 << 20;         // scratch of a call, about
constexpr int64_t kTileFloats = 4096;            // results on their way through bias, residual and cast

// Set a job's task sizes and return how many tasks it is.
int64_t cut_job(Job* job) {
    const LinearView& w = job->weight.view;
    const int64_t panels = ceil_div(w.n, kPanelRows);
    // Tokens at a time: what the L2 cache holds, in multiples of 24, which every ISA's tiles divide.
    const int64_t token_bytes = job->weight.codes != nullptr ? job->act.q_stride + 8 * job->act.blocks : w.k * 4;
    const int64_t fit = kActivationBytes / std::max<int64_t>(1, token_bytes);
    job->m_step = job->m <= fit ? job->m : std::max<int64_t>(24, fit / 24 * 24);
    const int64_t rows = job->m_step < 8 ? 1 : job->m_step / 4;
    job->panel_step = ceil_div(kPanelsBytes, std::max<int64_t>(1, w.panel_bytes * rows));
    if (w.n * w.k * job->m < kSerialWork) job->panel_step = std::max<int64_t>(1, panels);
    job->panel_tasks = ceil_div(panels, job->panel_step);
    return job->m > 0 ? job->panel_tasks * ceil_div(job->m, job->m_step) : 0;
}

// A tile of results with bias, residual and cast: by way of a buffer that stays in the L1 cache.
void finish_tile(const FloatKernels& kernels, const Job& job, int64_t p0, int64_t p1, int64_t m0, int64_t m1) {
    float tile[kTileFloats];
    const int64_t first = p0 * kPanelRows, columns = std::min(job.weight.view.n, p1 * kPanelRows) - first;
    const int64_t width = (p1 - p0) * kPanelRows, rows = kTileFloats / width;
    for (int64_t m = m0; m < m1; m += rows) {
        const int64_t end = std::min(m1, m + rows);
        run_tile(job, p0, p1, m, end, {tile, width, 0});
        for (int64_t i = m; i < end; ++i) {
            const dlb_rows_out out = out_at(job.out, i, first);
            kernels.finish(tile + (i - m) * width, out.bias, out.residual, out.y_type, out.y, columns);
        }
    }
}

void run_task(const FloatKernels& kernels, const Job& job, int64_t task) {
    const int64_t panels = ceil_div(job.weight.view.n, kPanelRows);
    const int64_t p0 = task % job.panel_tasks * job.panel_step, p1 = std::min(panels, p0 + job.panel_step);
    const int64_t m0 = task / job.panel_tasks * job.m_step, m1 = std::min(job.m, m0 + job.m_step);
    const dlb_rows_out& out = job.out;
    if (out.bias == nullptr && out.residual == nullptr && out.y_type == DLB_FLOAT32) {
        float* y = static_cast<float*>(out.y) + m0 * out.y_stride + p0 * kPanelRows;
        run_tile(job, p0, p1, m0, m1, {y, out.y_stride, 0});
        return;
    }
    // All panels at once while a few rows of them fit, so that memory is read in one stream.
    const int64_t together = std::max<int64_t>(1, kTileFloats / kPanelRows / std::min<int64_t>(m1 - m0, 256));
    for (int64_t p = p0; p < p1; p += together) finish_tile(kernels, job, p, std::min(p1, p + together), m0, m1);
}

}  // namespace

int open_weight(const KernelTable& table, const void* packed, int64_t bytes, Weight* weight) {
    dlb_linear_spec spec;
    if (packed == nullptr) return DLB_BAD_SPEC;
    const int status = dlb_linear_spec_of(packed, bytes, &spec);
    if (status != DLB_OK) return status;
    weight->view = view_of(spec, packed);
    const bool is_table = spec.codec == DLB_TABLE;
    weight->codes = nullptr;
    weight->floats = nullptr;
    if (spec.codec == DLB_ELEMENT)
        weight->floats = table.linear_element[spec.element];
    else if (spec.compute == DLB_COMPUTE_FP32)
        weight->floats = (is_table ? table.linear_table_fp32 : table.linear_affine_fp32)[spec.bits];
    else
        weight->codes = (is_table ? table.linear_table : table.linear_affine)[spec.bits];
    weight->start_factor = start_factor(weight->view, table.signed_bytes);
    return DLB_OK;
}

int need_of(const Weight& weight, RowsNeed* need) {
    if (weight.codes != nullptr) return need->index_of(weight.view.block, weight.start_factor);
    need->floats = true;
    return -1;
}

void take_rows(Job* job, const Rows& rows, int index, int64_t row) {
    if (index >= 0) job->act = rows.quantized[index].view(row);
    job->x = rows.x == nullptr ? nullptr : rows.x + row * rows.x_stride;
    job->x_stride = rows.x_stride;
}

void run_tile(const Job& job, int64_t p0, int64_t p1, int64_t m0, int64_t m1, const LinearOut& out) {
    LinearView w = job.weight.view;
    w.panels += p0 * w.panel_bytes;
    w.n -= p0 * kPanelRows;
    if (w.k == 0) {  // a sum of nothing
        if (out.segment_stride != 0) return;
        const int64_t columns = std::min(w.n, (p1 - p0) * kPanelRows);
        for (int64_t i = 0; i < m1 - m0; ++i) memset(out.y + i * out.stride, 0, static_cast<size_t>(columns) * 4);
    } else if (job.weight.floats != nullptr) {
        job.weight.floats(w, job.x + m0 * job.x_stride, job.x_stride, 0, p1 - p0, 0, m1 - m0, out);
    } else {
        const ActView& a = job.act;
        const ActView act = {a.q + m0 * a.q_stride,
                             a.scale + m0 * a.blocks,
                             a.sum + m0 * a.blocks,
                             a.start + m0 * a.blocks,
                             a.q_stride,
                             a.blocks};
        job.weight.codes(w, act, 0, p1 - p0, 0, m1 - m0, out);
    }
}

void run_jobs(Job* jobs, int64_t count) {
    int64_t tasks = 0, work = 0;
    for (int64_t i = 0; i < count; ++i) {
        jobs[i].first_task = tasks;
        tasks += cut_job(&jobs[i]);
        work += jobs[i].weight.view.n * jobs[i].weight.view.k * jobs[i].m;
    }
    const FloatKernels& kernels = float_kernels();
    auto body = [&](int64_t begin, int64_t end) {
        // The last job that starts at or before the first task; jobs without tasks are stepped over.
        int64_t low = 0, high = count;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (jobs[middle].first_task <= begin ? low : high) = middle;
        }
        for (int64_t task = begin; task < end; ++task) {
            while (low + 1 < count && jobs[low + 1].first_task <= task) ++low;
            run_task(kernels, jobs[low], task - jobs[low].first_task);
        }
    };
    const int64_t together = std::min(kTasksTogether, std::max<int64_t>(1, tasks / (4 * thread_count())));
    parallel(tasks, work < kSerialWork ? tasks : together, body, Deal::kStreams);
}

int64_t slice_rows(int64_t m, int64_t bytes_per_row) {
    const int64_t fit = kSliceBytes / std::max<int64_t>(1, bytes_per_row);
    return m <= fit ? m : std::max<int64_t>(24, fit / 24 * 24);
}

}  // namespace dlb

DLB_API int dlb_linear_run(const void* packed, int64_t bytes, const float* x, int64_t x_stride, int64_t m, int64_t k,
                           float* y, int64_t y_stride, int64_t n) {
    dlb_linear_spec spec;
    const int status = dlb_linear_spec_of(packed, bytes, &spec);
    if (status != DLB_OK) return status;
    if (n != spec.n) return DLB_BAD_SHAPE;
    dlb_rows_in in;
    memset(&in, 0, sizeof in);
    in.x = x;
    in.x_stride = x_stride;
    in.m = m;
    in.k = k;
    dlb_linear_out product;
    memset(&product, 0, sizeof product);
    product.packed = packed;
    product.bytes = bytes;
    product.out.y = y;
    product.out.y_stride = y_stride;
    return dlb_linear_fused(&in, &product, 1);
}

DLB_API uint64_t dlb_read_all(const void* data, int64_t bytes) {
    const dlb::KernelTable& table = dlb::active_table();
    const uint8_t* first = static_cast<const uint8_t*>(data);
    constexpr int64_t kPiece = 32 << 10;  // so that no thread is left waiting for another's last piece
    uint64_t total = 0;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t left = bytes - i * kPiece;
            const uint64_t sum = table.read_all(first + i * kPiece, left < kPiece ? left : kPiece);
            __atomic_fetch_add(&total, sum, __ATOMIC_RELAXED);
        }
    };
    dlb::parallel(dlb::ceil_div(bytes, kPiece), 4, body, dlb::Deal::kStreams);
    return total;
}

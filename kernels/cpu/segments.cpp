// Sums of products inside each of the eight segments, then the tree: the experts of a row. Every rank that holds whole
// segments computes a subtree of the same tree (docs/numerics.md).
#include <string.h>

#include <algorithm>
#include <atomic>

#include "float_kernels.h"
#include "layout.h"
#include "linear_jobs.h"
#include "threadpool.h"

namespace dlb {
namespace {

constexpr int64_t kTileFloats = 4096;     // segments of a few rows on their way into the sums
constexpr int64_t kTasksPerThread = 4;    // enough that nobody waits long for the last one
constexpr int64_t kSerialWork = 1 << 16;  // multiplications below which waking others costs more than it saves

struct Sum {
    const SegmentTerm* terms;
    int64_t count, m, n;
    const dlb_rows_out& out;
    const FloatKernels& kernels;
    int64_t panel_step, panels, panel_tasks;
};

// All rows at once: each term's weights are then read once.
void cut_tasks(Sum* sum) {
    sum->panels = ceil_div(sum->n, kPanelRows);
    // As many panels of a term one after the other as may be: memory is read fastest in long stretches.
    const int64_t columns = kTileFloats / kSegments / std::min<int64_t>(sum->m, 32);
    const int64_t share = sum->panels / (kTasksPerThread * thread_count());
    sum->panel_step = std::max<int64_t>(1, std::min(columns / kPanelRows, share));
    sum->panel_tasks = ceil_div(sum->panels, sum->panel_step);
}

// Add a term's segments, from a tile [rows][segments][width], to the sums of the rows they belong to.
void add_tile(const Sum& sum, const SegmentTerm& term, const float* tile, int64_t first, int64_t rows, int64_t width,
              float* acc) {
    const LinearView& w = term.job.weight.view;
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = term.row[first + i];
        const float factor = term.factor[first + i];
        for (int s = 0; s < kSegments;) {
            int end = s;
            while (end < kSegments && w.cuts[end] < w.cuts[end + 1]) ++end;
            const int64_t at = s * width, size = (end - s) * width;
            float* to = acc + row * kSegments * width + at;
            if (end > s) sum.kernels.scaled_sum(to, tile + i * kSegments * width + at, factor, to, size);
            s = end + 1;
        }
    }
}

void add_term(const Sum& sum, const SegmentTerm& term, int64_t p0, int64_t p1, float* acc) {
    float tile[kTileFloats];
    const int64_t width = (p1 - p0) * kPanelRows, chunk = kTileFloats / kSegments / width;
    // Columns beyond N are added too, and never stored: let them be numbers.
    if (p1 == sum.panels && sum.n % kPanelRows != 0) memset(tile, 0, sizeof tile);
    for (int64_t i = 0; i < term.job.m; i += chunk) {
        const int64_t end = std::min(term.job.m, i + chunk);
        run_tile(term.job, p0, p1, i, end, {tile, kSegments * width, width});
        add_tile(sum, term, tile, i, end - i, width, acc);
    }
}

// In place: the tree over the segments of one row, into the first.
void add_tree(float* acc, int64_t width) {
    for (int step = 1; step < kSegments; step *= 2)
        for (int s = 0; s < kSegments; s += 2 * step)
            for (int64_t i = 0; i < width; ++i) acc[s * width + i] = acc[s * width + i] + acc[(s + step) * width + i];
}

bool run_task(const Sum& sum, int64_t task) {
    const int64_t p0 = task * sum.panel_step, p1 = std::min(sum.panels, p0 + sum.panel_step);
    const int64_t width = (p1 - p0) * kPanelRows, bytes = sum.m * kSegments * width * 4;
    float* acc = static_cast<float*>(task_scratch().get(bytes));
    if (acc == nullptr) return false;
    memset(acc, 0, static_cast<size_t>(bytes));
    for (int64_t i = 0; i < sum.count; ++i) add_term(sum, sum.terms[i], p0, p1, acc);
    const int64_t first = p0 * kPanelRows, columns = std::min(sum.n - first, width);
    for (int64_t i = 0; i < sum.m; ++i) {
        float* row = acc + i * kSegments * width;
        add_tree(row, width);
        const dlb_rows_out out = out_at(sum.out, i, first);
        sum.kernels.finish(row, out.bias, out.residual, out.y_type, out.y, columns);
    }
    return true;
}

}  // namespace

int sum_segments(const SegmentTerm* terms, int64_t count, int64_t m, int64_t n, const dlb_rows_out& out) {
    if (m <= 0 || n <= 0) return DLB_OK;
    Sum sum = {terms, count, m, n, out, float_kernels(), 0, 0, 0};
    cut_tasks(&sum);
    int64_t work = 0;
    for (int64_t i = 0; i < count; ++i) work += n * terms[i].job.weight.view.k * terms[i].job.m;
    std::atomic<bool> failed{false};
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
            if (!run_task(sum, task)) failed.store(true);
    };
    parallel(sum.panel_tasks, work < kSerialWork ? sum.panel_tasks : 1, body);
    return failed.load() ? DLB_NO_MEMORY : DLB_OK;
}

}  // namespace dlb

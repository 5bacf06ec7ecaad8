// Runs a packed Linear: activations to int8 once, then panels of 16 rows on the pool.
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
// where the ISA has it (so in all but scalar), then (s0 + s1) + (s2 + s3), times w_scale (multiplier) where there are
// scales; blocks and segments as above. Codes enter as c - center, c - zero_point or table value, and as fma(c,
// w_scale, min), which needs no scale behind the sum.
#include <stdlib.h>

#include "layout.h"
#include "threadpool.h"

namespace dlb {
namespace {

constexpr int64_t kPanelsBytes = 128 << 10;      // weights that a thread takes at a time when M is small
constexpr int64_t kActivationBytes = 256 << 10;  // activations that stay in a core's L2 cache while weights pass
constexpr int64_t kSerialWork = 1 << 16;         // multiplications below which waking others costs more than it saves

// Scratch memory of the calling thread: grows, is kept, and is never shared.
struct Scratch {
    void* data = nullptr;
    int64_t bytes = 0;

    void* get(int64_t wanted) {
        if (wanted > bytes) {
            free(data);
            bytes = round_up(wanted + wanted / 4, 4096);
            data = aligned_alloc(64, static_cast<size_t>(bytes));
            if (data == nullptr) bytes = 0;
        }
        return data;
    }
    ~Scratch() { free(data); }
};
thread_local Scratch scratch;

struct Activations {
    int8_t* q;
    float* scale = nullptr;
    int32_t* sum = nullptr;
    int32_t* start = nullptr;
    int64_t q_stride, blocks;

    // A line more than K needs keeps rows of a power of two out of one cache set.
    Activations(int64_t m, int64_t k, int64_t block) {
        q_stride = round_up(k, kLineBytes) + kLineBytes;
        blocks = ceil_div(k, block);
        const int64_t q_bytes = m * q_stride, table_bytes = round_up(m * blocks * 4, kLineBytes);
        q = static_cast<int8_t*>(scratch.get(q_bytes + 3 * table_bytes));
        if (q == nullptr) return;
        scale = reinterpret_cast<float*>(q + q_bytes);
        sum = reinterpret_cast<int32_t*>(q + q_bytes + table_bytes);
        start = reinterpret_cast<int32_t*>(q + q_bytes + 2 * table_bytes);
    }
    ActView view() const { return {q, scale, sum, start, q_stride, blocks}; }
};

void quantize_rows(const KernelTable& table, const LinearView& w, const float* x, int64_t x_stride, int64_t m,
                   const Activations& a) {
    const int32_t factor = start_factor(w, table.signed_bytes);
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            table.quantize(x + i * x_stride, w.k, w.block, a.q + i * a.q_stride, a.scale + i * a.blocks,
                           a.sum + i * a.blocks);
            for (int64_t b = i * a.blocks; b < (i + 1) * a.blocks; ++b) a.start[b] = factor * a.sum[b];
        }
    };
    const int64_t rows_at_a_time = w.k > 0 ? ceil_div(kSerialWork, w.k) : m;
    parallel(m, rows_at_a_time, body);
}

// Cut M and N into tasks: body(panel_begin, panel_end, m_begin, m_end). token_bytes: of one row of activations.
template <class Body>
void for_tiles(const LinearView& w, int64_t m, int64_t token_bytes, const Body& body) {
    const int64_t panels = ceil_div(w.n, kPanelRows);
    // Tokens at a time: what the L2 cache holds, in multiples of 24, which every ISA's tiles divide.
    const int64_t fit = kActivationBytes / token_bytes;
    const int64_t m_step = m <= fit ? m : (fit < 24 ? 24 : fit / 24 * 24);
    int64_t panel_step = ceil_div(kPanelsBytes, w.panel_bytes * (m_step < 8 ? 1 : m_step / 4));
    if (w.n * w.k * m < kSerialWork) panel_step = panels;
    const int64_t panel_tasks = ceil_div(panels, panel_step), m_tasks = ceil_div(m, m_step);
    auto tasks = [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t p = task % panel_tasks * panel_step, i = task / panel_tasks * m_step;
            body(p, p + panel_step < panels ? p + panel_step : panels, i, i + m_step < m ? i + m_step : m);
        }
    };
    parallel(panel_tasks * m_tasks, 1, tasks);
}

int run_codes(const KernelTable& table, const dlb_linear_spec& spec, const LinearView& view, const float* x,
              int64_t x_stride, int64_t m, float* y, int64_t y_stride) {
    const Activations activations(m, spec.k, view.block);
    if (activations.q == nullptr) return DLB_NO_MEMORY;
    quantize_rows(table, view, x, x_stride, m, activations);
    const LinearFn run = (spec.codec == DLB_TABLE ? table.linear_table : table.linear_affine)[spec.bits];
    const ActView a = activations.view();
    const LinearOut out = {y, y_stride, 0};
    for_tiles(view, m, a.q_stride + 8 * a.blocks,
              [&](int64_t p0, int64_t p1, int64_t m0, int64_t m1) { run(view, a, p0, p1, m0, m1, out); });
    return DLB_OK;
}

FloatFn float_kernel(const KernelTable& table, const dlb_linear_spec& spec) {
    if (spec.codec == DLB_ELEMENT) return table.linear_element[spec.element];
    return (spec.codec == DLB_TABLE ? table.linear_table_fp32 : table.linear_affine_fp32)[spec.bits];
}

int run_floats(FloatFn run, const LinearView& view, const float* x, int64_t x_stride, int64_t m, float* y,
               int64_t y_stride) {
    const LinearOut out = {y, y_stride, 0};
    for_tiles(view, m, view.k * 4,
              [&](int64_t p0, int64_t p1, int64_t m0, int64_t m1) { run(view, x, x_stride, p0, p1, m0, m1, out); });
    return DLB_OK;
}

}  // namespace
}  // namespace dlb

DLB_API int dlb_linear_run(const void* packed, int64_t bytes, const float* x, int64_t x_stride, int64_t m, int64_t k,
                           float* y, int64_t y_stride, int64_t n) {
    dlb_linear_spec spec;
    const int status = dlb_linear_spec_of(packed, bytes, &spec);
    if (status != DLB_OK) return status;
    if (k != spec.k || n != spec.n) return DLB_BAD_SHAPE;
    if (m <= 0 || spec.n == 0) return DLB_OK;
    if (spec.k == 0) {
        for (int64_t i = 0; i < m; ++i) memset(y + i * y_stride, 0, static_cast<size_t>(spec.n) * sizeof(float));
        return DLB_OK;
    }
    const dlb::KernelTable& table = dlb::active_table();
    const dlb::LinearView view = dlb::view_of(spec, packed);
    if (spec.codec == DLB_ELEMENT || spec.compute == DLB_COMPUTE_FP32)
        return dlb::run_floats(dlb::float_kernel(table, spec), view, x, x_stride, m, y, y_stride);
    return dlb::run_codes(table, spec, view, x, x_stride, m, y, y_stride);
}

DLB_API uint64_t dlb_read_all(const void* data, int64_t bytes) {
    const dlb::KernelTable& table = dlb::active_table();
    const uint8_t* first = static_cast<const uint8_t*>(data);
    constexpr int64_t kPiece = 1 << 20;
    uint64_t total = 0;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t left = bytes - i * kPiece;
            const uint64_t sum = table.read_all(first + i * kPiece, left < kPiece ? left : kPiece);
            __atomic_fetch_add(&total, sum, __ATOMIC_RELAXED);
        }
    };
    dlb::parallel(dlb::ceil_div(bytes, kPiece), 1, body);
    return total;
}

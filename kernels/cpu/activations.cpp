// Rows on their way into a product: a norm takes a whole row at a time, everything else pieces of rows, so that the
// activation of a single token is shared by all threads too.
#include "activations.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#include "float_kernels.h"
#include "layout.h"
#include "threadpool.h"

namespace dlb {
namespace {

constexpr int64_t kPiece = 4096;          // numbers of a row that are taken at a time, about
constexpr int64_t kNormGrain = 16384;     // numbers worth waking a thread for: normed or rounded
constexpr int64_t kActivateGrain = 4096;  // numbers worth waking a thread for: exponentials

bool is_norm(const dlb_rows_in& in) { return in.kind == DLB_ROWS_RMS_NORM || in.kind == DLB_ROWS_LAYER_NORM; }

int64_t common_multiple(int64_t a, int64_t b) {
    int64_t x = a, y = b;
    while (y != 0) {
        const int64_t rest = x % y;
        x = y;
        y = rest;
    }
    return a / x * b;
}

// How much of a row is taken at a time: whole blocks of every size, or all of it.
int64_t piece_of(const dlb_rows_in& in, const RowsNeed& need) {
    if (is_norm(in)) return in.k;
    int64_t multiple = kChunk;
    for (int i = 0; i < need.blocks; ++i) {
        multiple = common_multiple(multiple, need.block[i]);
        if (multiple >= in.k) return in.k;  // before the next one could overflow: K has 31 bits, a block at most 16
    }
    return std::min(in.k, round_up(kPiece, multiple));
}

// The numbers [at, at + count) of row r, finished; at `buffer`, or where they already are.
const float* finish_piece(const FloatKernels& kernels, const dlb_rows_in& in, int64_t r, int64_t at, int64_t count,
                          float* buffer) {
    const float* x = in.x + r * in.x_stride + at;
    if (in.kind == DLB_ROWS_RMS_NORM) kernels.rms_norm(x, in.weight, in.weight_offset, in.eps, buffer, count);
    if (in.kind == DLB_ROWS_LAYER_NORM)
        kernels.layer_norm(x, in.weight, in.weight_offset, in.bias, in.eps, buffer, count);
    if (in.kind == DLB_ROWS_ACTIVATION) kernels.activate(in.activation, x, nullptr, buffer, count);
    if (in.kind == DLB_ROWS_GATED) kernels.activate(in.activation, x, in.up + r * in.up_stride + at, buffer, count);
    return in.kind == DLB_ROWS_AS_IS ? x : buffer;
}

}  // namespace

void* Scratch::get(int64_t wanted) {
    if (wanted > bytes_ || data_ == nullptr) {  // nothing wanted is no lack of memory
        free(data_);
        bytes_ = round_up(wanted + wanted / 4 + 1, 4096);
        data_ = aligned_alloc(64, static_cast<size_t>(bytes_));
        if (data_ == nullptr) bytes_ = 0;
    }
    return data_;
}

Scratch::~Scratch() { free(data_); }

Scratch& call_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

Scratch& task_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

int RowsNeed::index_of(int64_t size, int32_t start_factor) {
    for (int i = 0; i < blocks; ++i)
        if (block[i] == size && factor[i] == start_factor) return i;
    block[blocks] = size;
    factor[blocks] = start_factor;
    return blocks++;
}

bool RowsNeed::shared(int i) const { return std::find(block, block + i, block[i]) != block + i; }

int rows_why_not(const dlb_rows_in& in) {
    if (in.kind < DLB_ROWS_AS_IS || in.kind >= DLB_ROWS_KINDS) return DLB_BAD_SPEC;
    if (in.activation < DLB_ACT_NONE || in.activation >= DLB_ACTIVATIONS) return DLB_BAD_SPEC;
    if (in.m < 0 || in.k < 0) return DLB_BAD_SHAPE;
    if (in.m == 0 || in.k == 0) return DLB_OK;
    return in.x == nullptr || (in.kind == DLB_ROWS_GATED && in.up == nullptr) ? DLB_BAD_SPEC : DLB_OK;
}

int out_why_not(const dlb_rows_out& out) {
    return out.y_type < DLB_FLOAT32 || out.y_type > DLB_BFLOAT16 ? DLB_BAD_SPEC : DLB_OK;
}

dlb_rows_in rows_from(const dlb_rows_in& in, int64_t first) {
    dlb_rows_in rest = in;
    rest.m -= first;
    if (in.x != nullptr) rest.x += first * in.x_stride;
    if (in.up != nullptr) rest.up += first * in.up_stride;
    if (in.rows_out != nullptr) rest.rows_out += first * in.rows_stride;
    return rest;
}

dlb_rows_out out_at(const dlb_rows_out& out, int64_t row, int64_t column) {
    dlb_rows_out rest = out;
    const int64_t size = out.y_type == DLB_FLOAT32 ? 4 : 2;
    rest.y = static_cast<uint8_t*>(out.y) + (row * out.y_stride + column) * size;
    if (out.bias != nullptr) rest.bias += column;
    if (out.residual != nullptr) rest.residual += row * out.residual_stride + column;
    return rest;
}

const float* finish_row(const FloatKernels& kernels, const dlb_rows_in& in, int64_t r, float* place) {
    return finish_piece(kernels, in, r, 0, in.k, place);
}

Rows place_rows(const dlb_rows_in& in, int64_t m, const RowsNeed& need, Arena& arena) {
    Rows rows;
    if (in.rows_out != nullptr) {
        rows.made = in.rows_out;
        rows.made_stride = in.rows_stride;
    } else if (need.floats && in.kind != DLB_ROWS_AS_IS) {
        rows.made_stride = round_up(in.k, 16) + 16;
        rows.made = arena.take<float>(m * rows.made_stride);
    }
    const bool as_is = in.kind == DLB_ROWS_AS_IS;
    rows.x = as_is ? in.x : rows.made;
    rows.x_stride = as_is ? in.x_stride : rows.made_stride;
    for (int i = 0; i < need.blocks; ++i) {
        Quantized& a = rows.quantized[i];
        // A line more than K needs keeps rows of a power of two out of one cache set.
        a.q_stride = round_up(in.k, kLineBytes) + kLineBytes;
        a.blocks = ceil_div(in.k, need.block[i]);
        if (need.shared(i)) {
            a = rows.quantized[std::find(need.block, need.block + i, need.block[i]) - need.block];
        } else {
            a.q = arena.take<int8_t>(m * a.q_stride);
            a.scale = arena.take<float>(m * a.blocks);
            a.sum = arena.take<int32_t>(m * a.blocks);
        }
        a.start = arena.take<int32_t>(m * a.blocks);
    }
    return rows;
}

int make_rows(const dlb_rows_in& in, int64_t m, const RowsNeed& need, const Rows& rows) {
    const bool as_is = in.kind == DLB_ROWS_AS_IS;
    if (m <= 0 || in.k == 0 || (as_is && need.blocks == 0 && rows.made == nullptr)) return DLB_OK;
    const FloatKernels& kernels = float_kernels();
    const KernelTable& table = active_table();
    const int64_t piece = piece_of(in, need), pieces = ceil_div(in.k, piece);
    std::atomic<bool> failed{false};
    auto body = [&](int64_t begin, int64_t end) {
        float* buffer = nullptr;
        if (!as_is && rows.made == nullptr) {
            buffer = static_cast<float*>(task_scratch().get(piece * 4));
            if (buffer == nullptr) return failed.store(true);
        }
        for (int64_t task = begin; task < end; ++task) {
            const int64_t r = task / pieces, at = task % pieces * piece, count = std::min(piece, in.k - at);
            float* place = rows.made != nullptr ? rows.made + r * rows.made_stride + at : buffer;
            const float* x = finish_piece(kernels, in, r, at, count, place);
            for (int i = 0; i < need.blocks; ++i) {
                const Quantized& a = rows.quantized[i];
                const int64_t block = at / need.block[i] + r * a.blocks, blocks = ceil_div(count, need.block[i]);
                if (!need.shared(i))
                    table.quantize(x, count, need.block[i], a.q + r * a.q_stride + at, a.scale + block, a.sum + block);
                for (int64_t b = block; b < block + blocks; ++b) a.start[b] = need.factor[i] * a.sum[b];
            }
            if (as_is && rows.made != nullptr && x != place) memcpy(place, x, static_cast<size_t>(count) * 4);
        }
    };
    const bool cheap = as_is || is_norm(in) || in.activation == DLB_ACT_NONE || in.activation == DLB_ACT_RELU;
    parallel(m * pieces, std::max<int64_t>(1, (cheap ? kNormGrain : kActivateGrain) / piece), body);
    return failed.load() ? DLB_NO_MEMORY : DLB_OK;
}

}  // namespace dlb

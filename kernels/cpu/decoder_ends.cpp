// The two ends of a step: token ids to rows, and rows to logits.
#include "decoder_state.h"

using dlb::kLinear;
using dlb::kOther;

namespace {

int64_t type_bytes(int32_t type) { return type == DLB_KV_FP32 ? 4 : 2; }

const char* row_of(const dlb_table& table, int64_t row) {
    return static_cast<const char*>(table.rows) + row * table.width * type_bytes(table.type);
}

}  // namespace

// The embeddings that this rank holds, zeros for the others, scaled.
void dlb_decoder::look_up(const Slice& slice, float* out, int64_t width) const {
    const dlb_table& table = program_.embed;
    const dlb_step& step = *slice.step;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            float* x = out + i * width;
            if (step.ids == nullptr) {
                memcpy(x, step.embeds + (slice.begin + i) * width, static_cast<size_t>(width) * sizeof(float));
                continue;
            }
            const int64_t row = step.ids[slice.begin + i] - program_.embed_begin;
            if (row >= 0 && row < table.count)
                dlb::float_kernels().widen(row_of(table, row), table.type, x, width);
            else
                memset(x, 0, static_cast<size_t>(width) * sizeof(float));
            if (program_.embed_scale != 1.0f)
                for (int64_t j = 0; j < width; j++) x[j] = x[j] * program_.embed_scale;
        }
    };
    dlb::parallel(slice.rows, 1 + dlb::kCopyGrain / width, body);
}

void dlb_decoder::add_positions(const Slice& slice, float* x, int64_t width) const {
    const dlb_table& table = program_.positions;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t row = slice.step->positions[slice.begin + i] + program_.position_offset;
            const char* source = row_of(table, row);
            float part[256];
            for (int64_t j = 0; j < width; j += 256) {
                const int64_t n = std::min<int64_t>(256, width - j);
                dlb::float_kernels().widen(source + j * type_bytes(table.type), table.type, part, n);
                for (int64_t e = 0; e < n; e++) x[i * width + j + e] = x[i * width + j + e] + part[e];
            }
        }
    };
    dlb::parallel(slice.rows, 1 + dlb::kCopyGrain / width, body);
}

int dlb_decoder::embed(const Slice& slice) {
    const int64_t width = program_.embed.width;
    float* x = embed_project_.exists() ? b_ : x_;
    look_up(slice, x, width);
    clock.stamp(kOther);
    if (program_.embed_reduce && ranks_ != nullptr && ranks_->size > 1 && slice.step->ids != nullptr) {
        const int status = reduce(x, m_ * width);
        if (status != DLB_OK) return status;
    }
    int status = DLB_OK;
    if (embed_project_.exists()) {
        const dlb_norm none = {};
        status = project(rows_of(x, width, nullptr), embed_project_, none, nullptr, x_);
    }
    if (status == DLB_OK && program_.positions.rows != nullptr) add_positions(slice, x_, program_.hidden);
    if (status == DLB_OK && program_.embed_norm.kind != DLB_ROWS_AS_IS) {
        dlb_rows_out out = {};
        out.y = x_;
        out.y_stride = program_.hidden;
        status = apply(rows_of(x_, program_.hidden, &program_.embed_norm), out);
    }
    clock.stamp(kOther);
    return status;
}

// In place: the cap of logits, cap tanh(x / cap), of their scaled values.
void dlb_decoder::cap(float* x, int64_t stride, int64_t rows, int64_t n) const {
    const float scale = program_.logit_scale, limit = program_.logit_softcap;
    if (scale == 1.0f && limit <= 0.0f) return;
    const int64_t pieces = (n + 4095) / 4096;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t first = i % pieces * 4096, count = std::min<int64_t>(4096, n - first);
            float* part = x + i / pieces * stride + first;
            if (scale != 1.0f)
                for (int64_t j = 0; j < count; j++) part[j] = part[j] * scale;
            if (limit <= 0.0f) continue;
            const int64_t whole = count / 16 * 16;
            dlb::float_kernels().softcap(part, static_cast<int>(whole), limit);
            float tail[16] = {};
            memcpy(tail, part + whole, static_cast<size_t>(count - whole) * sizeof(float));
            dlb::float_kernels().softcap(tail, 16, limit);
            memcpy(part + whole, tail, static_cast<size_t>(count - whole) * sizeof(float));
        }
    };
    dlb::parallel(rows * pieces, 4, body);
}

// Join the ranks' logits [rows, own n] to out [rows, vocab].
int dlb_decoder::gather(const float* own, int64_t rows, float* out, int64_t out_stride) {
    const int64_t* widths = lm_head_.given.widths;
    for (int r = 0; r < ranks_->size; r++) counts_[r] = rows * widths[r];
    float* all = rows == 1 ? out : all_logits_;
    const int status = ranks_->all_gather(ranks_->context, own, all, counts_.data());
    clock.stamp_reduce(ranks_->waited);
    if (status != 0) return DLB_STEP_FAULT;
    if (rows == 1) return DLB_OK;
    int64_t at = 0;
    for (int r = 0; r < ranks_->size; at += widths[r], r++) {
        for (int64_t i = 0; i < rows; i++)
            memcpy(out + i * out_stride + at, all + i * widths[r], static_cast<size_t>(widths[r]) * sizeof(float));
        all += rows * widths[r];
    }
    clock.stamp(kOther);
    return DLB_OK;
}

int dlb_decoder::logits(const dlb_rows_in& rows, float* out, int64_t out_stride) {
    const bool join = lm_head_.given.gather && ranks_ != nullptr && ranks_->size > 1;
    const int64_t step = join ? dlb::kGatherRows : rows.m;
    for (int64_t i = 0; i < rows.m; i += step) {
        dlb_rows_in in = rows;
        in.x += i * in.x_stride;
        in.m = std::min(step, rows.m - i);
        float* y = out + i * out_stride;
        dlb_rows_out to = {};
        to.y = join ? own_logits_ : y;
        to.y_stride = join ? lm_head_.n : out_stride;
        to.bias = lm_head_.given.bias;
        int status = product(in, lm_head_, to);
        if (status == DLB_OK && join) status = gather(own_logits_, in.m, y, out_stride);
        if (status != DLB_OK) return status;
        cap(y, out_stride, in.m, lm_head_.total);
    }
    clock.stamp(kOther);
    return DLB_OK;
}

// The wanted rows, now the only ones: last norm, projection, logits.
int dlb_decoder::finish(const Slice& slice) {
    if (m_ == 0) return DLB_OK;
    const dlb_step& step = *slice.step;
    float* out = step.out + slice.first_wanted * step.out_stride;
    dlb_rows_in rows = rows_of(x_, program_.hidden, &program_.final_norm);
    dlb_rows_out to = {};
    to.y = step.logits ? o_ : out;
    to.y_stride = step.logits ? final_project_.n : step.out_stride;
    int status = DLB_OK;
    if (final_project_.exists()) {
        to.bias = final_project_.given.bias;
        status = product(rows, final_project_, to);
        rows = rows_of(o_, final_project_.n, nullptr);
    } else if (!step.logits) {
        status = apply(rows, to);
    }
    return status == DLB_OK && step.logits ? logits(rows, out, step.out_stride) : status;
}

// A layer: products with what stands before and after them, and the sums over the ranks in their places.
#include "decoder_state.h"

using dlb::kAttention;
using dlb::kLinear;
using dlb::kOther;

namespace {

const dlb_norm kNoNorm = {};

dlb_rows_out rows_to(float* y, int64_t n, const float* bias, const float* residual) {
    dlb_rows_out out = {};
    out.y = y;
    out.y_stride = n;
    out.bias = bias;
    out.residual = residual;
    out.residual_stride = n;
    return out;
}

}  // namespace

dlb_rows_in dlb_decoder::rows_of(const float* x, int64_t k, const dlb_norm* norm) const {
    dlb_rows_in in = {};
    in.x = x;
    in.x_stride = k;
    in.m = m_;
    in.k = k;
    if (norm == nullptr || norm->kind == DLB_ROWS_AS_IS) return in;
    in.kind = norm->kind;
    in.weight = norm->weight;
    in.bias = norm->bias;
    in.eps = norm->eps;
    return in;
}

int dlb_decoder::apply(const dlb_rows_in& in, const dlb_rows_out& out) {
    const int status = dlb_rows_apply(&in, &out);
    clock.stamp(kOther);
    return status;
}

int dlb_decoder::product(const dlb_rows_in& in, const Matrix& w, const dlb_rows_out& out) {
    if (in.m == 0 || w.n == 0) return DLB_OK;
    int status = DLB_OK;
    if (w.k == 0) {  // a rank without heads or without a part of the MLP adds nothing to the sum
        float* y = static_cast<float*>(out.y);
        for (int64_t i = 0; i < in.m; i++) memset(y + i * out.y_stride, 0, static_cast<size_t>(w.n) * sizeof(float));
    } else {
        const dlb_linear_out one = {w.given.packed, w.given.bytes, out};
        status = dlb_linear_fused(&in, &one, 1);
    }
    clock.stamp(kLinear);
    return status;
}

int dlb_decoder::reduce(float* data, int64_t count) {
    if (count == 0) return DLB_OK;
    const int status = ranks_->all_reduce(ranks_->context, data, count);
    clock.stamp_reduce(ranks_->waited);
    if (status != 0) return DLB_STEP_FAULT;
    return DLB_OK;
}

int dlb_decoder::add_up(float* partial, const float* bias, const dlb_norm& post, const float* residual, float* y) {
    const int64_t n = program_.hidden;
    if (post.kind == DLB_ROWS_AS_IS) return apply(rows_of(partial, n, nullptr), rows_to(y, n, bias, residual));
    if (bias != nullptr) {
        const int status = apply(rows_of(partial, n, nullptr), rows_to(partial, n, bias, nullptr));
        if (status != DLB_OK) return status;
    }
    return apply(rows_of(partial, n, &post), rows_to(y, n, nullptr, residual));
}

int dlb_decoder::project(const dlb_rows_in& in, const Matrix& w, const dlb_norm& post, const float* residual,
                         float* y) {
    const int64_t n = program_.hidden;
    if (!summed(w) && post.kind == DLB_ROWS_AS_IS) return product(in, w, rows_to(y, n, w.given.bias, residual));
    int status = product(in, w, rows_to(o_, n, summed(w) ? nullptr : w.given.bias, nullptr));
    if (status == DLB_OK && summed(w)) status = reduce(o_, m_ * n);
    if (status != DLB_OK) return status;
    return add_up(o_, summed(w) ? w.given.bias : nullptr, post, residual, y);
}

// q, k and v, the MLP's first matrices, or all of them, which take the same rows, in one call.
int dlb_decoder::project_rows(const Layer& layer, const dlb_rows_in& in, bool qkv, bool up) {
    dlb_linear_out products[5];
    int count = 0;
    auto add = [&](const Matrix& w, float* y, int64_t stride) {
        if (w.n == 0) return;
        products[count] = {w.given.packed, w.given.bytes, rows_to(y, stride, w.given.bias, nullptr)};
        ++count;
    };
    float* at = qkv_;
    for (int i = 0; qkv && i < layer.qkv_count; at += layer.qkv[i].n, i++) add(layer.qkv[i], at, layer.qkv_width);
    at = up_;
    for (int i = 0; up && i < layer.up_count; at += layer.up[i].n, i++) add(layer.up[i], at, layer.up_width);
    int status = DLB_OK;
    if (count > 0) status = dlb_linear_fused(&in, products, count);
    clock.stamp(kLinear);
    if (count > 0 || in.rows_out == nullptr) return status;
    dlb_rows_in rows = in;
    rows.rows_out = nullptr;
    return apply(rows, rows_to(in.rows_out, in.k, nullptr, nullptr));
}

// What the MLP's last matrix takes: the activation of what project_rows left in up_.
dlb_rows_in dlb_decoder::down_rows(const Layer& layer) const {
    const dlb_mlp& given = layer.given.mlp;
    dlb_rows_in in = rows_of(up_, layer.down.k, nullptr);
    in.x_stride = layer.up_width;
    in.kind = given.gated ? DLB_ROWS_GATED : DLB_ROWS_ACTIVATION;
    in.activation = given.activation;
    if (!given.gated) return in;
    in.up = up_ + layer.down.k;
    in.up_stride = layer.up_width;
    if (given.up_first) std::swap(in.x, in.up);
    return in;
}

// Routed experts over rows(in): y = sum + residual, of this rank's segments. The shared expert is the last one.
int dlb_decoder::route(const Layer& layer, const dlb_rows_in& given, float* y, const float* residual) {
    const dlb_routed& r = layer.given.routed;
    const int64_t slots = r.top_k + (r.has_shared ? 1 : 0);
    dlb_rows_in in = given;
    if (in.rows_out == nullptr && in.kind != DLB_ROWS_AS_IS) {
        in.rows_out = b_;
        in.rows_stride = in.k;
    }
    const float* rows = in.rows_out ? in.rows_out : in.x;
    dlb_linear_out products[2] = {{layer.router.given.packed, layer.router.given.bytes,
                                   rows_to(scores_, r.count, layer.router.given.bias, nullptr)},
                                  {layer.shared_gate.given.packed, layer.shared_gate.given.bytes,
                                   rows_to(weights_ + r.top_k, slots, layer.shared_gate.given.bias, nullptr)}};
    int status = dlb_linear_fused(&in, products, layer.shared_gate.exists() ? 2 : 1);
    clock.stamp(kLinear);
    if (status != DLB_OK) return status;
    status = dlb_route(scores_, r.count, m_, r.count, r.top_k, r.renormalise, chosen_, slots, weights_, slots);
    if (status != DLB_OK) return status;
    for (int64_t i = 0; r.has_shared && i < m_; i++) {
        chosen_[i * slots + r.top_k] = static_cast<int32_t>(r.count);
        if (!layer.shared_gate.exists()) weights_[i * slots + r.top_k] = 1.0f;
    }
    if (layer.shared_gate.exists()) {
        dlb_rows_in gate = rows_of(weights_ + r.top_k, 1, nullptr);
        gate.x_stride = slots;
        gate.kind = DLB_ROWS_ACTIVATION;
        gate.activation = DLB_ACT_SIGMOID;
        status = apply(gate, rows_to(weights_ + r.top_k, slots, nullptr, nullptr));
        if (status != DLB_OK) return status;
    }
    clock.stamp(kOther);
    dlb_moe_in moe = {};
    moe.x = rows;
    moe.x_stride = in.k;
    moe.m = m_;
    moe.k = in.k;
    moe.experts = layer.experts.data();
    moe.expert_count = static_cast<int64_t>(layer.experts.size());
    moe.ids = chosen_;
    moe.weights = weights_;
    moe.slots = slots;
    moe.activation = r.activation;
    const dlb_rows_out out = rows_to(y, program_.hidden, nullptr, residual);
    status = dlb_moe(&moe, &out);
    clock.stamp(kLinear);
    return status;
}

// y = residual + post(MLP of rows(in)).
int dlb_decoder::mlp(const Layer& layer, const dlb_rows_in& in, const float* residual, float* y) {
    const dlb_norm& post = layer.given.mlp_post_norm;
    if (!layer.routed()) {
        const int status = project_rows(layer, in, false, true);
        return status != DLB_OK ? status : project(down_rows(layer), layer.down, post, residual, y);
    }
    const bool sum = layer.given.routed.reduce && ranks_ != nullptr && ranks_->size > 1;
    if (!sum && post.kind == DLB_ROWS_AS_IS) return route(layer, in, y, residual);
    int status = route(layer, in, o_, nullptr);
    if (status == DLB_OK && sum) status = reduce(o_, m_ * program_.hidden);
    return status != DLB_OK ? status : add_up(o_, nullptr, post, residual, y);
}

// Attention's output, then the MLP, which reads the sum.
int dlb_decoder::in_sequence(const Layer& layer, const float* base) {
    const dlb_layer& g = layer.given;
    const int64_t n = program_.hidden;
    const dlb_rows_in attended = rows_of(att_, layer.attended, nullptr);
    int status = project(attended, layer.o, g.attn_post_norm, base, g.norm_after ? o_ : x_);
    if (status == DLB_OK && g.norm_after)
        status = apply(rows_of(o_, n, &g.attn_norm), rows_to(x_, n, nullptr, nullptr));
    if (status != DLB_OK) return status;
    if (g.norm_after) {
        status = mlp(layer, rows_of(x_, n, nullptr), x_, o_);
        return status != DLB_OK ? status : apply(rows_of(o_, n, &g.mlp_norm), rows_to(x_, n, nullptr, nullptr));
    }
    dlb_rows_in in = rows_of(x_, n, &g.mlp_norm);
    const float* residual = x_;
    if (g.residual_normed && in.kind != DLB_ROWS_AS_IS) {
        in.rows_out = a_;
        in.rows_stride = n;
        residual = a_;
    }
    return mlp(layer, in, residual, x_);
}

// Attention's output and an MLP that does not see it: over ranks, one sum for both.
int dlb_decoder::side_by_side(const Layer& layer, const float* normed, const float* base, bool up_is_done) {
    const dlb_layer& g = layer.given;
    const int64_t n = program_.hidden;
    const dlb_rows_in attended = rows_of(att_, layer.attended, nullptr);
    const bool own = g.mlp_norm.kind != DLB_ROWS_AS_IS;
    const dlb_rows_in in = own ? rows_of(x_, n, &g.mlp_norm) : rows_of(normed, n, nullptr);
    int status = layer.routed() || up_is_done ? DLB_OK : project_rows(layer, in, false, true);
    if (status != DLB_OK) return status;
    const bool sum_o = summed(layer.o);
    const bool sum_mlp = layer.routed() ? g.routed.reduce && ranks_ != nullptr && ranks_->size > 1 : summed(layer.down);
    // x + (o + mlp), in this order.
    if (!sum_o && !sum_mlp && !layer.routed() && !g.attn_post_norm.kind && !g.mlp_post_norm.kind) {
        status = project(attended, layer.o, kNoNorm, nullptr, o_);
        if (status == DLB_OK) status = project(down_rows(layer), layer.down, kNoNorm, o_, o_);
        return status != DLB_OK ? status : add_up(o_, nullptr, kNoNorm, base, x_);
    }
    const float *o_bias = layer.o.given.bias, *bias = layer.routed() ? nullptr : layer.down.given.bias;
    status = layer.routed()
                 ? route(layer, in, beside(), nullptr)
                 : product(down_rows(layer), layer.down, rows_to(beside(), n, sum_mlp ? nullptr : bias, nullptr));
    if (status == DLB_OK) status = product(attended, layer.o, rows_to(o_, n, sum_o ? nullptr : o_bias, nullptr));
    if (status == DLB_OK && (sum_o || sum_mlp))
        status = reduce(sum_o ? o_ : beside(), (sum_o && sum_mlp ? 2 : 1) * m_ * n);
    if (status == DLB_OK) status = add_up(o_, sum_o ? o_bias : nullptr, g.attn_post_norm, nullptr, o_);
    if (status == DLB_OK) status = add_up(beside(), sum_mlp ? bias : nullptr, g.mlp_post_norm, o_, o_);
    return status != DLB_OK ? status : add_up(o_, nullptr, kNoNorm, base, x_);
}

// Only wanted rows go on behind the last attention: nobody reads the others.
void dlb_decoder::keep_wanted(const Slice& slice, int64_t attended, bool normed) {
    if (slice.wanted_count == m_) return;
    const int64_t n = program_.hidden;
    auto move = [](float* rows, int64_t to, int64_t from, int64_t width) {
        if (to != from) memmove(rows + to * width, rows + from * width, static_cast<size_t>(width) * sizeof(float));
    };
    for (int64_t i = 0; i < slice.wanted_count; i++) {
        const int64_t row = slice.wanted[i] - slice.begin;
        move(x_, i, row, n);
        move(att_, i, row, attended);
        if (normed) move(a_, i, row, n);
    }
    m_ = slice.wanted_count;
}

int dlb_decoder::run_layer(const Layer& layer, const Slice& slice, int64_t index) {
    const dlb_layer& g = layer.given;
    const bool last = index + 1 == static_cast<int64_t>(layers_.size());
    dlb_rows_in in = rows_of(x_, program_.hidden, g.norm_after ? nullptr : &g.attn_norm);
    const bool shares_rows = g.parallel && g.mlp_norm.kind == DLB_ROWS_AS_IS;
    const bool with_up = shares_rows && !layer.routed() && (!last || slice.wanted_count == m_);
    const bool normed = in.kind != DLB_ROWS_AS_IS && (g.residual_normed || (shares_rows && !with_up));
    if (normed) {
        in.rows_out = a_;
        in.rows_stride = program_.hidden;
    }
    int status = project_rows(layer, in, true, with_up);
    if (status == DLB_OK) status = attend(layer, slice, index);
    clock.stamp(kAttention);
    if (status != DLB_OK) return status;
    if (last) keep_wanted(slice, layer.attended, normed);
    if (m_ == 0) return DLB_OK;
    const float *rows = normed ? a_ : x_, *base = g.residual_normed ? rows : x_;
    return g.parallel ? side_by_side(layer, rows, base, with_up) : in_sequence(layer, base);
}

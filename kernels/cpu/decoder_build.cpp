// From a program's structs to a decoder, and its memory.
#include <time.h>

#include <new>

#include "decoder_state.h"
#include "linear_jobs.h"

namespace dlb {
namespace {

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

bool norm_fits(const dlb_norm& norm, int64_t size) {
    if (norm.kind == DLB_ROWS_AS_IS) return true;
    return (norm.kind == DLB_ROWS_RMS_NORM || norm.kind == DLB_ROWS_LAYER_NORM) && norm.size == size && norm.weight;
}

bool table_fits(const dlb_table& table) {
    return table.type >= DLB_KV_FP32 && table.type <= DLB_KV_BF16 && table.count >= 0 && table.width > 0;
}

}  // namespace

bool Workspace::reserve(int64_t bytes) {
    if (bytes <= bytes_) return true;
    free(data_);
    data_ = static_cast<char*>(aligned_alloc(64, static_cast<size_t>((bytes + 4095) / 4096 * 4096)));
    bytes_ = data_ ? bytes : 0;
    return data_ != nullptr;
}

Clock::Clock() : first_ticks_(ticks()), first_ns_(now_ns()) {}

void Clock::read(dlb_decoder_times* times, bool reset) {
    // The counter's rate is what it did since the clock was made.
    const double passed = static_cast<double>(ticks() - first_ticks_);
    const double rate = passed > 0 ? static_cast<double>(now_ns() - first_ns_) / passed : 0;
    int64_t* into[kParts] = {&times->linear, &times->attention, &times->reduce, &times->wait, &times->other};
    times->total = 0;
    for (int i = 0; i < kParts; i++) {
        *into[i] = static_cast<int64_t>(static_cast<double>(spent_[i]) * rate);
        times->total += *into[i];
        if (reset) spent_[i] = 0;
    }
    times->reduce += times->wait;
}

}  // namespace dlb

bool dlb_decoder::take_matrix(const dlb_matrix& given, Matrix* out) const {
    *out = Matrix();
    out->given = given;
    if (given.packed == nullptr) return true;
    dlb_linear_spec spec;
    if (dlb_linear_spec_of(given.packed, given.bytes, &spec) != DLB_OK) return false;
    out->n = out->total = spec.n;
    out->k = spec.k;
    if (ranks_ == nullptr || ranks_->size == 1) return spec.k > 0;
    if (given.gather) {
        if (given.widths == nullptr || given.widths[ranks_->rank] != spec.n) return false;
        out->total = 0;
        for (int r = 0; r < ranks_->size; r++) out->total += given.widths[r];
    }
    return spec.k > 0 || given.reduce;
}

// Heads, their places in a row of results, and the norms over them.
bool dlb_decoder::take_attention(Layer* layer) const {
    const dlb_layer& g = layer->given;
    layer->qkv_count = 0;
    layer->qkv_width = 0;
    for (int i = 0; i < 3 && g.qkv[i].packed != nullptr; i++) {
        Matrix& w = layer->qkv[i];
        if (!take_matrix(g.qkv[i], &w) || w.k != program_.hidden || w.given.reduce || w.given.gather) return false;
        layer->qkv_width += w.n;
        ++layer->qkv_count;
    }
    if (g.heads < 0 || g.kv_heads < 0 || g.head_dim <= 0 || g.head_dim > 1024 || g.window < 0) return false;
    if (g.heads > 0 && g.kv_heads == 0) return false;
    layer->attended = g.heads * g.head_dim;
    if (!take_matrix(g.o, &layer->o) || layer->o.k != layer->attended || layer->o.n != program_.hidden) return false;
    layer->q_at.assign(g.q_at, g.q_at + g.heads);
    layer->k_at.assign(g.k_at, g.k_at + g.kv_heads);
    layer->v_at.assign(g.v_at, g.v_at + g.kv_heads);
    layer->kv_index.assign(g.kv_index, g.kv_index + g.heads);
    if (g.alibi) layer->alibi.assign(g.alibi, g.alibi + g.heads);
    for (const std::vector<int32_t>* places : {&layer->q_at, &layer->k_at, &layer->v_at})
        for (int32_t at : *places)
            if (at < 0 || at + g.head_dim > layer->qkv_width) return false;
    for (int32_t head : layer->kv_index)
        if (head < 0 || head >= g.kv_heads) return false;
    if (!dlb::norm_fits(g.q_norm, g.head_dim) || !dlb::norm_fits(g.k_norm, g.head_dim)) return false;
    if (g.rope >= static_cast<int32_t>(ropes_.size())) return false;
    return g.rope < 0 || ropes_[g.rope].dim <= g.head_dim;
}

bool dlb_decoder::take_mlp(Layer* layer) const {
    const dlb_layer& g = layer->given;
    const dlb_routed& r = g.routed;
    if (!take_matrix(r.router, &layer->router) || !take_matrix(r.shared_gate, &layer->shared_gate)) return false;
    layer->up_count = 0;
    layer->up_width = 0;
    if (layer->routed()) {
        if (layer->router.k != program_.hidden || layer->router.n != r.count || r.top_k < 1 || r.top_k > r.count)
            return false;
        const Matrix& gate = layer->shared_gate;
        if (gate.exists() && (gate.k != program_.hidden || gate.n != 1 || !r.has_shared)) return false;
        if (r.count > kDlbMaxExperts || r.activation < 0 || r.activation >= DLB_ACTIVATIONS) return false;
        layer->experts.assign(r.experts, r.experts + r.count + (r.has_shared ? 1 : 0));
        // A step must not find out about an expert with a part of its keys in the cache.
        const int64_t count = static_cast<int64_t>(layer->experts.size());
        return dlb::experts_why_not(layer->experts.data(), count, program_.hidden, program_.hidden) == DLB_OK;
    }
    for (int i = 0; i < 2 && g.mlp.up[i].packed != nullptr; i++) {
        Matrix& w = layer->up[i];
        if (!take_matrix(g.mlp.up[i], &w) || w.k != program_.hidden || w.given.reduce || w.given.gather) return false;
        layer->up_width += w.n;
        ++layer->up_count;
    }
    if (!take_matrix(g.mlp.down, &layer->down) || layer->down.n != program_.hidden) return false;
    if (g.mlp.activation < 0 || g.mlp.activation >= DLB_ACTIVATIONS) return false;
    return layer->up_width == layer->down.k * (g.mlp.gated ? 2 : 1);
}

bool dlb_decoder::take_layer(const dlb_layer& given, Layer* out) const {
    out->given = given;
    for (const dlb_norm* norm : {&given.attn_norm, &given.mlp_norm, &given.attn_post_norm, &given.mlp_post_norm})
        if (!dlb::norm_fits(*norm, program_.hidden)) return false;
    if (given.norm_after && (given.parallel || given.residual_normed)) return false;
    return take_attention(out) && take_mlp(out);
}

int dlb_decoder::create(const dlb_program& program) {
    program_ = program;
    ranks_ = program.ranks;
    if (ranks_ != nullptr) counts_.resize(static_cast<size_t>(ranks_->size));
    ropes_.assign(program.ropes, program.ropes + program.rope_count);
    for (const dlb_rope& rope : ropes_)
        if (rope.dim <= 0 || rope.dim % 2 != 0) return DLB_BAD_SPEC;
    if (!take_matrix(program.embed_project, &embed_project_) || !take_matrix(program.final_project, &final_project_) ||
        !take_matrix(program.lm_head, &lm_head_))
        return DLB_BAD_SPEC;
    const int64_t width = program.embed.width, last = final_project_.exists() ? final_project_.n : program.hidden;
    const bool entrance = dlb::table_fits(program.embed) && dlb::norm_fits(program.embed_norm, program.hidden) &&
                          (embed_project_.exists() ? embed_project_.k == width && embed_project_.n == program.hidden
                                                   : width == program.hidden);
    const dlb_table& p = program.positions;
    const bool places = p.rows == nullptr || (dlb::table_fits(p) && p.width == program.hidden);
    const bool exit = dlb::norm_fits(program.final_norm, program.hidden) && lm_head_.k == last &&
                      (!final_project_.exists() || final_project_.k == program.hidden) && !lm_head_.given.reduce &&
                      lm_head_.total == program.vocab;
    for (const Matrix* w : {&embed_project_, &final_project_})
        if (w->given.reduce || w->given.gather) return DLB_BAD_SPEC;
    if (!entrance || !places || !exit) return DLB_BAD_SPEC;
    layers_.resize(static_cast<size_t>(program.layer_count));
    for (int64_t i = 0; i < program.layer_count; i++)
        if (!take_layer(program.layers[i], &layers_[i])) return DLB_BAD_SPEC;
    program_.layers = nullptr;  // the caller's; the copies are what counts
    program_.ropes = nullptr;
    return DLB_OK;
}

// Cut the workspace for so many rows.
bool dlb_decoder::make_room(int64_t rows) {
    if (rows <= room_) return true;
    int64_t qkv = 0, attended = 0, up = 0, experts = 0, slots = 0;
    for (const Layer& layer : layers_) {
        qkv = std::max(qkv, layer.qkv_width);
        attended = std::max(attended, layer.attended);
        up = std::max(up, layer.up_width);
        if (!layer.routed()) continue;
        experts = std::max(experts, layer.given.routed.count);
        slots = std::max(slots, layer.given.routed.top_k + 1);
    }
    const int64_t wide = std::max({program_.hidden, program_.embed.width, final_project_.n});
    const bool join = lm_head_.given.gather && ranks_ != nullptr && ranks_->size > 1;
    const int64_t joined = join ? dlb::kGatherRows : 0;
    struct Piece {
        float** at;
        int64_t count;
    };
    const Piece pieces[] = {{&x_, rows * wide},
                            {&a_, rows * wide},
                            {&b_, rows * wide},
                            {&o_, 2 * rows * wide},
                            {&qkv_, rows * qkv},
                            {&att_, rows * attended},
                            {&up_, rows * up},
                            {&scores_, rows * experts},
                            {&weights_, rows * slots},
                            {reinterpret_cast<float**>(&chosen_), rows * slots},
                            {&own_logits_, joined * lm_head_.n},
                            {&all_logits_, joined * lm_head_.total}};
    auto line = [](int64_t count) { return (count + 15) / 16 * 16; };
    int64_t all = 0;
    for (const Piece& piece : pieces) all += line(piece.count);
    room_ = 0;
    if (!workspace_.reserve(all * static_cast<int64_t>(sizeof(float)))) return false;
    float* at = reinterpret_cast<float*>(workspace_.data());
    for (const Piece& piece : pieces) {
        *piece.at = at;
        at += line(piece.count);
    }
    room_ = rows;
    return true;
}

dlb_decoder* dlb_decoder_create(const dlb_program* program, int* status) {
    *status = DLB_BAD_SPEC;
    const int64_t sizes[4] = {sizeof(dlb_program), sizeof(dlb_layer), sizeof(dlb_step), sizeof(dlb_expert)};
    if (program->abi != DLB_DECODER_ABI || memcmp(program->sizes, sizes, sizeof sizes) != 0) return nullptr;
    dlb_decoder* decoder = new (std::nothrow) dlb_decoder();
    if (decoder == nullptr) {
        *status = DLB_NO_MEMORY;
        return nullptr;
    }
    *status = decoder->create(*program);
    if (*status == DLB_OK) return decoder;
    delete decoder;
    return nullptr;
}

void dlb_decoder_destroy(dlb_decoder* decoder) { delete decoder; }

int64_t dlb_decoder_workspace_bytes(const dlb_decoder* decoder) { return decoder->workspace_bytes(); }

void dlb_decoder_times_of(dlb_decoder* decoder, dlb_decoder_times* times, int reset) {
    decoder->clock.read(times, reset != 0);
    times->steps = decoder->steps_done;
    times->rows = decoder->rows_done;
    if (reset) decoder->steps_done = decoder->rows_done = 0;
}

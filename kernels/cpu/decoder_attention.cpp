// A layer's attention: what happens to heads between the products and the cache, and the call itself.
#include "decoder_state.h"

namespace dlb {
namespace {

constexpr int64_t kMaxHeadDim = 1024;

// What the hooks of attention need to know.
struct Heads {
    const Layer* layer;
    const Slice* slice;
    const float* qkv;
    const dlb_rope* rope;          // null: none
    const dlb_rope_table* angles;  // of that rope
    char *keys, *values;
    uint16_t *key_scales, *value_scales;
};

// Norm and rope of one head of a row, in place.
void turn(const Heads& h, const dlb_norm& norm, int64_t head, int64_t row, float* x) {
    const int64_t dim = h.layer->given.head_dim;
    const FloatKernels& kernels = float_kernels();
    if (norm.kind != DLB_ROWS_AS_IS) {
        const float* weight = norm.weight ? norm.weight + head * norm.head_stride : nullptr;
        const float* bias = norm.bias ? norm.bias + head * norm.head_stride : nullptr;
        if (norm.kind == DLB_ROWS_RMS_NORM)
            kernels.rms_norm(x, weight, 0.0f, norm.eps, x, dim);
        else
            kernels.layer_norm(x, weight, 0.0f, bias, norm.eps, x, dim);
    }
    if (h.rope == nullptr) return;
    const int64_t half = h.rope->dim / 2, step_row = h.slice->begin + row;
    const int64_t at = (h.angles->by_row ? step_row : h.slice->step->positions[step_row]) * half;
    const KvKernels& kv = kv_kernels();
    (h.rope->interleaved ? kv.rope_pairs : kv.rope_halves)(x, h.angles->cos + at, h.angles->sin + at, half);
}

void load_query(void* context, int64_t row, int64_t head, float* out) {
    const Heads& h = *static_cast<const Heads*>(context);
    const float* source = h.qkv + row * h.layer->qkv_width + h.layer->q_at[head];
    memcpy(out, source, static_cast<size_t>(h.layer->given.head_dim) * sizeof(float));
    turn(h, h.layer->given.q_norm, head, row, out);
}

void put(const Heads& h, const float* x, char* base, uint16_t* scales, int64_t slot) {
    const int64_t dim = h.layer->given.head_dim;
    const int32_t type = h.slice->step->kv_type;
    if (type == DLB_KV_INT8)
        kv_kernels().narrow_int8(x, reinterpret_cast<int8_t*>(base) + slot * dim, scales + slot, dim);
    else
        kv_kernels().narrow(x, type, base + slot * dim * (type == DLB_KV_FP32 ? 4 : 2), dim);
}

void store(void* context, int64_t sequence, int64_t kv_head, int64_t row, int64_t rows) {
    const Heads& h = *static_cast<const Heads*>(context);
    const Slice& slice = *h.slice;
    const dlb_step& step = *slice.step;
    const int64_t dim = h.layer->given.head_dim;
    const int64_t count = slice.row_begin[sequence + 1] - slice.row_begin[sequence];
    const int64_t first_slot = slice.lengths[sequence] - count - slice.row_begin[sequence];
    const int32_t* table = step.table + (slice.first_sequence + sequence) * step.table_stride;
    float key[kMaxHeadDim];
    for (int64_t i = row; i < row + rows; i++) {
        const int64_t position = first_slot + i;
        const int64_t block = table[position / step.block_slots];
        const int64_t slot =
            (block * h.layer->given.kv_heads + kv_head) * step.block_slots + position % step.block_slots;
        const float* source = h.qkv + i * h.layer->qkv_width;
        memcpy(key, source + h.layer->k_at[kv_head], static_cast<size_t>(dim) * sizeof(float));
        turn(h, h.layer->given.k_norm, kv_head, i, key);
        put(h, key, h.keys, h.key_scales, slot);
        put(h, source + h.layer->v_at[kv_head], h.values, h.value_scales, slot);
    }
}

dlb_attention_args arguments(const Layer& layer, const Slice& slice, float* out) {
    const dlb_layer& g = layer.given;
    const dlb_step& step = *slice.step;
    dlb_attention_args a = {};
    a.out = out;
    a.kv_index = layer.kv_index.data();
    a.alibi = layer.alibi.empty() ? nullptr : layer.alibi.data();
    a.block_table = step.table + slice.first_sequence * step.table_stride;
    a.block_table_stride = step.table_stride;
    a.block_size = step.block_slots;
    a.slot_count = slice.lengths;
    a.row_begin = slice.row_begin;
    a.k_stride[2] = a.v_stride[2] = g.head_dim;
    a.k_stride[1] = a.v_stride[1] = g.head_dim * step.block_slots;
    a.k_stride[0] = a.v_stride[0] = a.k_stride[1] * g.kv_heads;
    a.out_stride[1] = g.head_dim;
    a.out_stride[2] = layer.attended;
    a.batch = slice.sequences;
    a.heads = g.heads;
    a.kv_heads = g.kv_heads;
    a.head_dim = a.value_dim = g.head_dim;
    a.causal_offset = DLB_CAUSAL_TAIL;
    a.window = g.window;
    a.scale = g.scale;
    a.softcap = g.softcap;
    a.kv_type = step.kv_type;
    return a;
}

}  // namespace
}  // namespace dlb

// att_ = attention of what project_rows left in qkv_, with the slice's keys and values put into the cache.
int dlb_decoder::attend(const Layer& layer, const Slice& slice, int64_t index) {
    const dlb_layer& g = layer.given;
    if (g.heads == 0) return DLB_OK;
    if (g.clip > 0.0f) {
        auto body = [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++)
                dlb::kv_kernels().clip(qkv_ + i * layer.qkv_width, layer.qkv_width, g.clip);
        };
        dlb::parallel(m_, 1 + dlb::kCopyGrain / layer.qkv_width, body);
    }
    const dlb_step& step = *slice.step;
    const bool scaled = step.kv_type == DLB_KV_INT8;
    dlb::Heads heads = {&layer,
                        &slice,
                        qkv_,
                        g.rope >= 0 ? &ropes_[g.rope] : nullptr,
                        g.rope >= 0 ? &step.ropes[g.rope] : nullptr,
                        static_cast<char*>(step.keys[index]),
                        static_cast<char*>(step.values[index]),
                        scaled ? step.key_scales[index] : nullptr,
                        scaled ? step.value_scales[index] : nullptr};
    dlb::AttentionCall call = {};
    call.args = dlb::arguments(layer, slice, att_);
    call.args.k = heads.keys;
    call.args.v = heads.values;
    call.k_scale = heads.key_scales;
    call.v_scale = heads.value_scales;
    call.scale_stride[1] = step.block_slots;
    call.scale_stride[0] = step.block_slots * g.kv_heads;
    call.context = &heads;
    call.load_query = dlb::load_query;
    call.store = dlb::store;
    return attention_.run(call);
}

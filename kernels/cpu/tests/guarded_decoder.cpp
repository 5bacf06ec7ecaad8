// Small whole decoders (guarded.cpp says what is driven and why): of two families of opposite choices, alone and as one
// of two ranks. Slots of the cache that hold nothing are NaN where the type has one, so whoever reads them is found
// out.
#include <cmath>

#include "../decoder.h"
#include "guarded.h"

namespace guarded {
namespace {

constexpr int64_t kHidden = 48, kVocab = 37, kHeads = 3, kInner = 70, kLayers = 2, kPlaces = 640, kBlockSlots = 8;

// Two equal ranks: the other one always has what this one has.
int add_twice(void*, float* data, int64_t count) {
    for (int64_t i = 0; i < count; ++i) data[i] += data[i];
    return 0;
}

int join_twice(void*, const float* own, float* out, const int64_t* counts) {
    for (int r = 0; r < 2; ++r) memcpy(out + r * counts[0], own, static_cast<size_t>(counts[0]) * sizeof(float));
    return 0;
}

// A model: RMS norms, rope, norms of heads, gates and, in the second layer, experts; or (`plain`) layer norms, biases,
// learned positions, alibi, a window, one fused qkv and attention beside the MLP.
struct Model {
    bool plain, ranks;
    int64_t kv_heads, head_dim, qkv_width;
    std::vector<Packed> weights;
    std::vector<std::unique_ptr<Guarded<float>>> floats;
    std::vector<std::unique_ptr<Guarded<int32_t>>> places;
    std::vector<dlb_expert> experts;
    Guarded<uint8_t> embed, learned;
    dlb_layer layers[kLayers];
    dlb_rope rope;
    dlb_collective both;
    int64_t widths[2] = {kVocab, kVocab};
    dlb_program program;

    Model(bool plain_, bool ranks_);
    const float* numbers(int64_t count) {
        floats.push_back(std::make_unique<Guarded<float>>(count));
        fill_floats(*floats.back());
        return floats.back()->data();
    }
    const int32_t* indices(int64_t count, int64_t first, int64_t step) {
        places.push_back(std::make_unique<Guarded<int32_t>>(count));
        for (int64_t i = 0; i < count; ++i)
            (*places.back())[static_cast<size_t>(i)] = static_cast<int32_t>(first + i * step);
        return places.back()->data();
    }
    const void* pack(const Code& code, int64_t n, int64_t k, int64_t* bytes) {
        weights.push_back(packed_weight(code, n, k, 32));
        *bytes = bytes_of(weights.back());
        return weights.back()->data();
    }
    dlb_matrix matrix(const Code& code, int64_t n, int64_t k, bool reduce) {
        dlb_matrix made = zeroed<dlb_matrix>();
        made.packed = pack(code, n, k, &made.bytes);
        if (plain) made.bias = numbers(n);
        made.reduce = reduce && ranks;
        return made;
    }
    dlb_norm norm(int64_t size, int64_t heads) {
        dlb_norm made = zeroed<dlb_norm>();
        made.kind = plain ? DLB_ROWS_LAYER_NORM : DLB_ROWS_RMS_NORM;
        made.eps = 1e-5f;
        made.weight = numbers(size * heads);
        if (plain) made.bias = numbers(size * heads);
        made.size = size;
        made.head_stride = heads > 1 ? size : 0;
        return made;
    }
    dlb_layer layer(bool routed);
    void route(dlb_routed* routed);
};

void Model::route(dlb_routed* routed) {
    constexpr int64_t count = 4;
    routed->router = matrix(kFp16, count, kHidden, false);
    routed->shared_gate = matrix(kFp16, 1, kHidden, false);
    for (int64_t e = 0; e <= count; ++e) {
        dlb_expert expert = zeroed<dlb_expert>();
        expert.gate = pack(kSym4, 2 * kInner, kHidden, &expert.gate_bytes);
        expert.down = pack(kSym4, kHidden, kInner, &expert.down_bytes);
        experts.push_back(expert);
    }
    routed->experts = experts.data();
    routed->count = count;
    routed->top_k = 2;
    routed->renormalise = routed->has_shared = 1;
    routed->activation = DLB_ACT_SILU;
    routed->reduce = ranks;
}

dlb_layer Model::layer(bool routed) {
    dlb_layer made = zeroed<dlb_layer>();
    made.attn_norm = norm(kHidden, 1);
    made.mlp_norm = norm(kHidden, 1);
    const int64_t kv_width = kv_heads * head_dim;
    if (plain) {
        made.qkv[0] = matrix(kAsym5, qkv_width, kHidden, false);
        made.alibi = numbers(kHeads);
        made.window = 9;
        made.rope = -1;
        made.parallel = 1;
        made.clip = 3.0f;
    } else {
        made.qkv[0] = matrix(kSym4, kHeads * head_dim, kHidden, false);
        for (int i = 1; i < 3; ++i) made.qkv[i] = matrix(kSym4, kv_width, kHidden, false);
        made.q_norm = norm(head_dim, kHeads);
        made.k_norm = norm(head_dim, 1);
        made.attn_post_norm = norm(kHidden, 1);
        made.softcap = 7.0f;
    }
    made.o = matrix(kSym8, kHidden, kHeads * head_dim, true);
    made.q_at = indices(kHeads, 0, head_dim);
    made.k_at = indices(kv_heads, kHeads * head_dim, head_dim);
    made.v_at = indices(kv_heads, kHeads * head_dim + kv_width, head_dim);
    made.kv_index = indices(kHeads, 0, kv_heads == 1 ? 0 : 1);
    made.heads = kHeads;
    made.kv_heads = kv_heads;
    made.head_dim = head_dim;
    made.scale = 0.25f;
    if (routed) {
        route(&made.routed);
        return made;
    }
    made.mlp.gated = !plain;
    made.mlp.activation = plain ? DLB_ACT_GELU_ERF : DLB_ACT_SILU;
    for (int i = 0; i < (plain ? 1 : 2); ++i) made.mlp.up[i] = matrix(kTable4, kInner, kHidden, false);
    made.mlp.down = matrix(kSym4, kHidden, kInner, true);
    return made;
}

Model::Model(bool plain_, bool ranks_)
    : plain(plain_),
      ranks(ranks_),
      kv_heads(plain ? kHeads : 1),
      head_dim(plain ? 16 : 20),
      qkv_width((kHeads + 2 * kv_heads) * head_dim),
      embed(kVocab * kHidden * 2),
      learned(plain ? (kPlaces + 2) * kHidden * 2 : 0) {
    for (Guarded<uint8_t>* table : {&embed, &learned}) fill_scales(*table, DLB_SCALE_FP16);
    for (int64_t i = 0; i < kLayers; ++i) layers[i] = layer(!plain && i == 1);
    rope = zeroed<dlb_rope>();
    rope.dim = 12;
    program = zeroed<dlb_program>();
    program.abi = DLB_DECODER_ABI;
    const int64_t sizes[4] = {sizeof(dlb_program), sizeof(dlb_layer), sizeof(dlb_step), sizeof(dlb_expert)};
    memcpy(program.sizes, sizes, sizeof sizes);
    program.hidden = kHidden;
    program.vocab = ranks ? 2 * kVocab : kVocab;
    program.ids = kVocab;
    program.layer_count = kLayers;
    program.layers = layers;
    program.rope_count = plain ? 0 : 1;
    program.ropes = &rope;
    program.embed = {embed.data(), kVocab, kHidden, DLB_KV_FP16, 0};
    program.embed_scale = 2.0f;
    program.embed_reduce = ranks;
    if (plain) {
        program.positions = {learned.data(), kPlaces + 2, kHidden, DLB_KV_BF16, 0};
        program.position_offset = 2;
    }
    program.final_norm = norm(kHidden, 1);
    program.lm_head = matrix(kSym4, kVocab, kHidden, false);
    program.lm_head.gather = ranks;
    program.lm_head.widths = widths;
    program.logit_scale = 1.0f;
    program.logit_softcap = plain ? 0.0f : 30.0f;
    both = {nullptr, 0, 2, add_twice, join_twice, nullptr};
    if (ranks) program.ranks = &both;
}

constexpr int64_t kSequences = 3, kRowBlocks = kPlaces / kBlockSlots;

int64_t sum_of(const std::vector<int64_t>& counts) {
    int64_t sum = 0;
    for (const int64_t count : counts) sum += count;
    return sum;
}

int64_t present_of(const std::vector<int64_t>& counts) {
    int64_t present = 0;
    for (const int64_t count : counts) present += count > 0;
    return present;
}

// What a step is given, for so many more tokens of each sequence; `length` moves on by them.
struct Batch {
    int64_t rows, present;
    Guarded<int32_t> ids, positions, row_begin, lengths, table;
    Guarded<int64_t> wanted;

    Batch(const std::vector<int64_t>& counts, int64_t* length, Guarded<int32_t>& blocks)
        : rows(sum_of(counts)),
          present(present_of(counts)),
          ids(rows),
          positions(rows),
          row_begin(present + 1),
          lengths(present),
          table(present * kRowBlocks),
          wanted(present) {
        size_t row = 0, at = 0;
        row_begin[0] = 0;
        for (int64_t s = 0; s < kSequences; ++s) {
            const int64_t count = counts[static_cast<size_t>(s)];
            if (count == 0) continue;
            for (int64_t i = 0; i < count; ++i, ++row) {
                const int64_t position = length[s]++;
                ids[row] = static_cast<int32_t>((position * position + 11 * s + 3) % kVocab);
                positions[row] = static_cast<int32_t>(position);
            }
            for (int64_t b = 0; b < kRowBlocks; ++b)
                table[at * kRowBlocks + static_cast<size_t>(b)] = blocks[static_cast<size_t>(s * kRowBlocks + b)];
            lengths[at] = static_cast<int32_t>(length[s]);
            wanted[at] = static_cast<int64_t>(row) - 1;
            row_begin[++at] = static_cast<int32_t>(row);
        }
    }

    dlb_step step() {
        dlb_step made = zeroed<dlb_step>();
        made.rows = rows;
        made.sequences = made.wanted_count = present;
        made.ids = ids.data();
        made.positions = positions.data();
        made.row_begin = row_begin.data();
        made.lengths = lengths.data();
        made.table = table.data();
        made.table_stride = kRowBlocks;
        made.wanted = wanted.data();
        made.block_slots = kBlockSlots;
        made.logits = 1;
        return made;
    }
};

// A decoder, its cache, and how long its sequences are by now.
class Session {
  public:
    Session(Model& model, int kv_type)
        : model_(model),
          kv_type_(kv_type),
          blocks_(kSequences * kRowBlocks),
          table_(blocks_),
          cos_(kPlaces * 6),
          sin_(kPlaces * 6) {
        int status = 0;
        decoder_ = dlb_decoder_create(&model.program, &status);
        check(decoder_ != nullptr && status == DLB_OK, "decoder", "create", status, 0, 0);
        if (decoder_ == nullptr) exit(1);
        const int64_t slots = blocks_ * model.kv_heads * kBlockSlots;
        const int64_t width = kv_type == DLB_KV_INT8 ? 1 : kv_type == DLB_KV_FP32 ? 4 : 2;
        for (int64_t i = 0; i < 2 * kLayers; ++i) {
            caches_.push_back(std::make_unique<Guarded<uint8_t>>(slots * model.head_dim * width));
            scales_.push_back(std::make_unique<Guarded<uint16_t>>(kv_type == DLB_KV_INT8 ? slots : 0));
            memset(caches_.back()->data(), 0xff, caches_.back()->size());
            memset(scales_.back()->data(), 0xff, scales_.back()->size() * 2);
        }
        // Blocks in no order: 7 has no factor in common with their number.
        for (int64_t i = 0; i < blocks_; ++i) table_[static_cast<size_t>(i)] = static_cast<int32_t>(i * 7 % blocks_);
        for (size_t i = 0; i < cos_.size(); ++i) {
            const float angle = static_cast<float>(i / 6) / static_cast<float>(1 + i % 6);
            cos_[i] = std::cos(angle);
            sin_[i] = std::sin(angle);
        }
    }
    ~Session() { dlb_decoder_destroy(decoder_); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    // So many more tokens of each sequence, none of some; appends the logits of each one's last row to `logits`.
    void step(const std::vector<int64_t>& counts, std::vector<float>* logits) {
        Batch batch(counts, length_, table_);
        const int64_t vocab = model_.program.vocab, stride = vocab + 1;
        Guarded<float> out((batch.present - 1) * stride + vocab);
        dlb_rope_table angles = zeroed<dlb_rope_table>();
        angles.cos = cos_.data();
        angles.sin = sin_.data();
        angles.count = kPlaces;
        void* caches[2 * kLayers];
        uint16_t* scales[2 * kLayers];
        for (size_t i = 0; i < 2 * kLayers; ++i) {
            caches[i] = caches_[i]->data();
            scales[i] = scales_[i]->data();
        }
        dlb_step given = batch.step();
        given.ropes = &angles;
        given.keys = caches;
        given.values = caches + kLayers;
        if (kv_type_ == DLB_KV_INT8) {
            given.key_scales = scales;
            given.value_scales = scales + kLayers;
        }
        given.blocks = blocks_;
        given.kv_type = kv_type_;
        given.out = out.data();
        given.out_stride = stride;
        const int status = dlb_decoder_step(decoder_, &given);
        check(status == DLB_OK, "decoder step", dlb_isa_name(dlb_isa_active()), status, batch.rows, kv_type_);
        for (int64_t i = 0; i < batch.present; ++i)
            logits->insert(logits->end(), out.data() + i * stride, out.data() + i * stride + vocab);
    }

  private:
    Model& model_;
    int kv_type_;
    int64_t blocks_, length_[kSequences] = {};
    Guarded<int32_t> table_;
    Guarded<float> cos_, sin_;
    std::vector<std::unique_ptr<Guarded<uint8_t>>> caches_;
    std::vector<std::unique_ptr<Guarded<uint16_t>>> scales_;
    dlb_decoder* decoder_;
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    for (const float x : a)
        if (!std::isfinite(x)) return false;
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Prefill and decode, then the same tokens in other chunks: the same logits, on every ISA.
void decode(Model& model, int kv_type, int64_t longest) {
    std::vector<float> want;
    for (const int isa : instruction_sets()) {
        dlb_isa_select(isa);
        std::vector<float> logits, after, ignored, chunked, last;
        {
            Session whole(model, kv_type);
            whole.step({5, longest, 1}, &logits);
            whole.step({1, 1, 1}, &after);
            whole.step({1, 0, 1}, &last);
        }
        Session chunks(model, kv_type);
        chunks.step({2, longest / 2, 0}, &ignored);
        chunks.step({1, 1, 0}, &ignored);
        chunks.step({2, longest - longest / 2 - 1, 1}, &chunked);
        check(same(logits, chunked), "decoder in chunks", dlb_isa_name(isa), kv_type, longest, model.plain);
        logits.insert(logits.end(), after.begin(), after.end());
        logits.insert(logits.end(), last.begin(), last.end());
        if (want.empty()) want = logits;
        check(same(logits, want), "decoder", dlb_isa_name(isa), kv_type, longest, model.plain);
    }
}

// Programs whose parts do not fit together are refused before a step could find out.
void refusals() {
    Model model(false, false);
    dlb_routed* routed = &model.layers[1].routed;
    const auto refused = [&](const char* what) {
        int status = DLB_OK;
        dlb_decoder* decoder = dlb_decoder_create(&model.program, &status);
        check(decoder == nullptr && status == DLB_BAD_SPEC, what, "any", status, 0, 0);
        if (decoder != nullptr) dlb_decoder_destroy(decoder);
    };
    const dlb_routed good = *routed;
    for (const int32_t activation : {-1, static_cast<int32_t>(DLB_ACTIVATIONS)}) {
        routed->activation = activation;
        refused("activation of experts");
    }
    *routed = good;
    routed->shared_gate.packed = model.pack(kFp16, 1, kHidden + 1, &routed->shared_gate.bytes);
    refused("K of a shared gate");
    *routed = good;
    // The first expert, another one, the shared one.
    for (const size_t e : {0, 2, 4}) {
        const dlb_expert expert = model.experts[e];
        dlb_expert* bad = &model.experts[e];
        bad->down = model.pack(kSym4, kHidden + 16, kInner, &bad->down_bytes);
        refused("N of an expert");
        *bad = expert;
        bad->gate = model.pack(kSym4, 2 * kInner, kHidden - 1, &bad->gate_bytes);
        refused("K of an expert");
        *bad = expert;
        bad->gate = model.pack(kSym4, 2 * kInner + 1, kHidden, &bad->gate_bytes);
        refused("N of an expert's gate");
        *bad = expert;
        bad->down_bytes -= 64;
        refused("bytes of an expert");
        *bad = expert;
    }
}

}  // namespace

void decoders() {
    refusals();
    for (const bool plain : {false, true})
        for (const bool ranks : {false, true}) {
            if (brief && ranks) continue;
            Model model(plain, ranks);
            for (const int kv_type : {DLB_KV_FP16, DLB_KV_INT8, DLB_KV_FP32, DLB_KV_BF16}) {
                if ((brief || ranks) && kv_type != DLB_KV_INT8) continue;
                decode(model, kv_type, 34);
            }
            if (!brief && !ranks) decode(model, plain ? DLB_KV_FP16 : DLB_KV_INT8, 600);  // two slices, three chunks
        }
}

}  // namespace guarded

// Drives the compiled kernels with every buffer against a page that may not be touched, first the page after it and
// then the page before it, and compares what the instruction sets compute, bit by bit:
//   here               products of one weight (every codec, width, offset and compute), attention, elementwise steps,
//   the
//                      sums of ranks
//   guarded_fused.cpp  several products of rows that are normed or activated on the way in and biased, added and cast
//   on
//                      the way out; stacked experts; routing
//   guarded_decoder.cpp  whole decoders: prefills in slices, chunks and single tokens, every type of cache
// over ragged shapes, on every ISA that the processor has. Built with sanitizers by `make sanitize`; needs no Python.
// Exit status 0: nothing was touched that is not ours, and all agree. With --brief a hundredth of it, for a processor
// that is emulated whole.
#include "guarded.h"

#include "../attention.h"
#include "../elementwise.h"
#include "../fused.h"
#include "../shm.h"

namespace guarded {
namespace {

void linear(const Code& code, int64_t n, int64_t k, int64_t group, bool upper) {
    const Random random = random_weight(code, n, k, group, upper);
    const std::unique_ptr<Weight> back = random.room();
    const dlb_linear_spec& spec = random.spec;
    const dlb_linear_parts parts = random.weight->parts(), parts_back = back->parts();
    const char* why = dlb_linear_why_not(&spec);
    check(why == nullptr, why == nullptr ? "spec" : why, "any", code.codec, code.bits, code.offset);
    if (why != nullptr) return;
    Guarded<uint8_t> packed(dlb_linear_packed_bytes(&spec));
    const int64_t bytes = static_cast<int64_t>(packed.size());
    check(dlb_linear_prepack(&spec, &parts, packed.data()) == DLB_OK, "prepack", "any", n, k, group);
    check(dlb_linear_unpack(packed.data(), bytes, &parts_back) == DLB_OK, "unpack", "any", n, k, group);
    // Bits of a row's last byte that belong to no code need not survive, so the parts are compared packed again.
    Guarded<uint8_t> again(bytes);
    dlb_linear_prepack(&spec, &parts_back, again.data());
    check(memcmp(packed.data(), again.data(), packed.size()) == 0, "unpack", "any", n, k, group);

    for (const int64_t m : {1, 2, 3, 5, 7, 17, 32, 66}) {
        if (brief && m > 2) break;
        const int64_t x_stride = k + (m % 2), y_stride = n + (m % 3);
        Guarded<float> x((m - 1) * x_stride + k), y((m - 1) * y_stride + n);
        fill_floats(x);
        std::vector<float> want;
        for (const int isa : instruction_sets()) {
            dlb_isa_select(isa);
            fill_bytes(y, 0);
            const int status = dlb_linear_run(packed.data(), bytes, x.data(), x_stride, m, k, y.data(), y_stride, n);
            check(status == DLB_OK, "linear", dlb_isa_name(isa), n, k, m);
            if (want.empty()) want.assign(y.data(), y.data() + y.size());
            check(memcmp(want.data(), y.data(), y.size() * sizeof(float)) == 0, "linear", dlb_isa_name(isa), n, k, m);
        }
    }
}

void linears() {
    std::vector<Code> codes;
    for (const int compute : {DLB_COMPUTE_INT8, DLB_COMPUTE_FP32}) {
        for (const int bits : {1, 2, 3, 4, 5, 6, 8})
            for (const int offset : {DLB_OFFSET_NONE, DLB_OFFSET_MIN, DLB_OFFSET_ZERO_POINT})
                codes.push_back({DLB_AFFINE, bits, offset, 0, compute});
        for (const int bits : {1, 2, 3, 4}) codes.push_back({DLB_TABLE, bits, DLB_OFFSET_NONE, 0, compute});
    }
    for (int element = 0; element < DLB_ELEMENTS; ++element) codes.push_back({DLB_ELEMENT, 8, 0, element, 0});
    const struct {
        int64_t n, k, group;
        bool upper;
    } shapes[] = {
        {1, 1, 32, false}, {16, 32, -1, false}, {17, 100, 32, false}, {5, 353, 96, true}, {33, 520, -1, true}};
    for (const Code& code : codes)
        for (const auto& s : shapes)
            if (!brief || s.n == 17) linear(code, s.n, s.k, s.group, s.upper);
}

struct Attention {
    int64_t heads, kv_heads, rows, slots, dim, value_dim;
    int mask, kv_type;
    int64_t causal, window;
    float softcap;
};

void attention(const Attention& a) {
    const size_t size = a.kv_type == DLB_KV_FP32 ? 4 : 2;
    Guarded<float> q(a.heads * a.rows * a.dim), out(a.heads * a.rows * a.value_dim), added(a.rows * a.slots);
    Guarded<uint8_t> k(a.kv_heads * a.slots * a.dim * static_cast<int64_t>(size));
    Guarded<uint8_t> v(a.kv_heads * a.slots * a.value_dim * static_cast<int64_t>(size)), seen(a.rows * a.slots);
    Guarded<int32_t> kv_index(a.heads);
    fill_floats(q);
    fill_floats(added);
    for (Guarded<uint8_t>* buffer : {&k, &v}) fill_scales(*buffer, size == 4 ? DLB_SCALE_FP32 : DLB_SCALE_FP16);
    fill_bytes(seen, 1);
    for (int64_t h = 0; h < a.heads; ++h) kv_index[static_cast<size_t>(h)] = static_cast<int32_t>(h % a.kv_heads);

    dlb_attention_args args;
    memset(&args, 0, sizeof args);
    args.q = q.data();
    args.k = k.data();
    args.v = v.data();
    args.out = out.data();
    args.mask = a.mask == DLB_MASK_BOOL  ? static_cast<void*>(seen.data())
                : a.mask == DLB_MASK_ADD ? added.data()
                                         : nullptr;
    args.kv_index = kv_index.data();
    const int64_t q_stride[] = {a.heads * a.rows * a.dim, a.rows * a.dim, a.dim};
    const int64_t k_stride[] = {a.kv_heads * a.slots * a.dim, a.slots * a.dim, a.dim};
    const int64_t v_stride[] = {a.kv_heads * a.slots * a.value_dim, a.slots * a.value_dim, a.value_dim};
    const int64_t out_stride[] = {a.heads * a.rows * a.value_dim, a.rows * a.value_dim, a.value_dim};
    const int64_t mask_stride[] = {0, 0, a.slots};
    memcpy(args.q_stride, q_stride, sizeof q_stride);
    memcpy(args.k_stride, k_stride, sizeof k_stride);
    memcpy(args.v_stride, v_stride, sizeof v_stride);
    memcpy(args.out_stride, out_stride, sizeof out_stride);
    memcpy(args.mask_stride, mask_stride, sizeof mask_stride);
    args.batch = 1;
    args.heads = a.heads;
    args.kv_heads = a.kv_heads;
    args.rows = a.rows;
    args.slots = a.slots;
    args.head_dim = a.dim;
    args.value_dim = a.value_dim;
    args.causal_offset = a.causal;
    args.window = a.window;
    args.scale = 0.25f;
    args.softcap = a.softcap;
    args.kv_type = a.kv_type;
    args.mask_type = a.mask;

    std::vector<float> want;
    for (const int isa : instruction_sets()) {
        dlb_isa_select(isa);
        check(dlb_attention(&args) == DLB_OK, "attention", dlb_isa_name(isa), a.rows, a.slots, a.dim);
        if (want.empty()) want.assign(out.data(), out.data() + out.size());
        const bool same = memcmp(want.data(), out.data(), out.size() * sizeof(float)) == 0;
        check(same, "attention", dlb_isa_name(isa), a.rows, a.slots, a.dim);
    }
}

void attentions() {
    for (const int kv_type : {DLB_KV_FP32, DLB_KV_FP16, DLB_KV_BF16})
        for (const int mask : {DLB_MASK_NONE, DLB_MASK_BOOL, DLB_MASK_ADD})
            for (const int64_t slots : {17, 1, 256, 300}) {
                if (brief && slots != 17) break;
                attention({3, 1, 1, slots, 64, 64, mask, kv_type, DLB_CAUSAL_NONE, 0, 0.0f});
                attention({4, 2, 5, slots + 4, 20, 12, mask, kv_type, slots - 1, 0, 7.0f});
                attention({1, 1, 33, slots + 32, 1, 3, mask, kv_type, slots - 1, 9, 0.0f});
            }
}

template <class Run>
void elementwise(const char* what, int64_t inputs, int64_t n, const Run& run) {
    Guarded<float> a(inputs), b(inputs), out(n);
    fill_floats(a);
    fill_floats(b);
    std::vector<float> want;
    for (const int isa : instruction_sets()) {
        dlb_isa_select(isa);
        run(a.data(), b.data(), out.data());
        if (want.empty()) want.assign(out.data(), out.data() + out.size());
        check(memcmp(want.data(), out.data(), out.size() * sizeof(float)) == 0, what, dlb_isa_name(isa), n, 0, 0);
    }
}

// Rows of every kind, cast to every type, with all that may be added.
void rows(int kind, int activation, int y_type, int64_t m, int64_t k) {
    Guarded<float> x(m * k), up(m * k), weight(k), bias(k), residual(m * k), rows_out(m * k);
    for (Guarded<float>* buffer : {&x, &up, &weight, &bias, &residual}) fill_floats(*buffer);
    Guarded<uint8_t> y(m * k * (y_type == DLB_FLOAT32 ? 4 : 2));
    dlb_rows_in in;
    memset(&in, 0, sizeof in);
    in.x = x.data();
    in.x_stride = in.up_stride = in.rows_stride = k;
    in.m = m;
    in.k = k;
    in.kind = kind;
    in.activation = activation;
    in.eps = 1e-5f;
    in.rows_out = rows_out.data();
    if (kind == DLB_ROWS_RMS_NORM || kind == DLB_ROWS_LAYER_NORM) in.weight = weight.data();
    if (kind == DLB_ROWS_LAYER_NORM) in.bias = bias.data();
    if (kind == DLB_ROWS_GATED) in.up = up.data();
    dlb_rows_out out;
    memset(&out, 0, sizeof out);
    out.y = y.data();
    out.y_stride = out.residual_stride = k;
    out.y_type = y_type;
    out.bias = bias.data();
    out.residual = residual.data();
    std::vector<uint8_t> want;
    for (const int isa : instruction_sets()) {
        dlb_isa_select(isa);
        check(dlb_rows_apply(&in, &out) == DLB_OK, "rows", dlb_isa_name(isa), kind, activation, k);
        if (want.empty()) want.assign(y.data(), y.data() + y.size());
        check(memcmp(want.data(), y.data(), y.size()) == 0, "rows", dlb_isa_name(isa), kind, activation, k);
    }
}

void elementwises() {
    for (const int64_t n : {1, 7, 8, 15, 16, 17, 100, 4099, 40000})
        elementwise("exp", n, n, [&](float* a, float*, float* out) { dlb_exp_poly(a, out, n); });
    for (const int y_type : {DLB_FLOAT32, DLB_FLOAT16, DLB_BFLOAT16})
        for (const int64_t k : {1, 15, 16, 33, 257})
            for (int kind = 0; kind < DLB_ROWS_KINDS; ++kind)
                for (int activation = 0; activation < DLB_ACTIVATIONS; ++activation) {
                    const bool activated = kind == DLB_ROWS_ACTIVATION || kind == DLB_ROWS_GATED;
                    if (activated || activation == 0) rows(kind, activation, y_type, k == 33 ? 5 : 1, k);
                }
}

void sums() {
    const int8_t program[] = {0, 1, -1, 2, -1};
    for (const int dtype : {DLB_SHM_FP32, DLB_SHM_BF16, DLB_SHM_FP16})
        for (const int64_t n : {1, 7, 16, 33, 1000}) {
            const int64_t bytes = n * (dtype == DLB_SHM_FP32 ? 4 : 2);
            Guarded<uint8_t> a(bytes), b(bytes), c(bytes), out(bytes), plain(bytes);
            for (Guarded<uint8_t>* buffer : {&a, &b, &c})
                fill_scales(*buffer, dtype == DLB_SHM_FP32 ? DLB_SCALE_FP32 : DLB_SCALE_FP16);
            const void* sources[] = {a.data(), b.data(), c.data()};
            dlb_shm_tree_sum(program, 5, sources, out.data(), static_cast<size_t>(n), dtype, 0);
            dlb_shm_tree_sum(program, 5, sources, plain.data(), static_cast<size_t>(n), dtype, 1);
            check(memcmp(out.data(), plain.data(), out.size()) == 0, "tree_sum", "any", n, dtype, 0);
        }
}

}  // namespace
}  // namespace guarded

using namespace guarded;

int main(int argc, char** argv) {
    brief = argc > 1 && strcmp(argv[1], "--brief") == 0;
    dlb_threads_start(2, nullptr, 0);
    for (const bool end : {true, false}) {
        at_end = end;
        if (brief && !end) break;
        linears();
        attentions();
        elementwises();
        sums();
        fused_products();
        experts();
        routes();
        decoders();
    }
    printf("guarded: %ld checks, %d failures, on", calls, failures);
    for (const int isa : instruction_sets()) printf(" %s", dlb_isa_name(isa));
    printf("\n");
    dlb_threads_start(1, nullptr, 0);
    return failures == 0 ? 0 : 1;
}

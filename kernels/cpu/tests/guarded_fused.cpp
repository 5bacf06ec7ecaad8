// Fused products, experts and routing (guarded.cpp says what is driven and why).
#include "../fused.h"
#include "guarded.h"

namespace guarded {
namespace {

int64_t size_of(int type) { return type == DLB_FLOAT32 ? 4 : 2; }

// The weights of a call: of every way to meet the rows, each with its own N and group size.
struct Product {
    Code code;
    int64_t n, group;
};
constexpr Product kProducts[] = {{kSym4, 33, 32}, {kAsym5, 7, 96}, {kZero3, 16, -1}, {kTable4, 21, 64},
                                 {kSym8, 1, -1},  {kFp16, 18, -1}, {kE4M3, 5, 32},   {kSym4Fp32, 20, 32}};
constexpr int kCount = sizeof kProducts / sizeof kProducts[0];

// Rows in guarded buffers, gate and up as two halves of one buffer.
struct RowsIn {
    Guarded<float> x, weight, bias, made;
    dlb_rows_in in;

    RowsIn(int kind, int activation, int64_t m, int64_t k, bool keep)
        : x((m - 1) * (2 * k + 1) + (kind == DLB_ROWS_GATED ? 2 : 1) * k), weight(k), bias(k), made(keep ? m * k : 0) {
        for (Guarded<float>* buffer : {&x, &weight, &bias}) fill_floats(*buffer);
        in = zeroed<dlb_rows_in>();
        in.x = x.data();
        in.x_stride = in.up_stride = 2 * k + 1;
        in.m = m;
        in.k = k;
        in.kind = kind;
        in.activation = activation;
        in.eps = 1e-5f;
        if (kind == DLB_ROWS_RMS_NORM || kind == DLB_ROWS_LAYER_NORM) in.weight = weight.data();
        if (kind == DLB_ROWS_LAYER_NORM) in.bias = bias.data();
        if (kind == DLB_ROWS_GATED) in.up = x.data() + k;
        if (keep) in.rows_out = made.data();
        in.rows_stride = k;
    }
};

// The call's results are those of its steps, each a call of its own: rows, product, then bias, residual and cast.
void check_steps(const RowsIn& rows, const dlb_linear_out& product, int isa, int64_t n) {
    const int64_t m = rows.in.m, k = rows.in.k, size = size_of(product.out.y_type);
    Guarded<float> made(m * k), y(m * n);
    Guarded<uint8_t> want(m * n * size);
    dlb_rows_in in = rows.in;
    in.rows_out = nullptr;
    dlb_rows_out plain = zeroed<dlb_rows_out>();
    plain.y = made.data();
    plain.y_stride = k;
    dlb_rows_apply(&in, &plain);
    dlb_linear_run(product.packed, product.bytes, made.data(), k, m, k, y.data(), n, n);
    in = zeroed<dlb_rows_in>();
    in.x = y.data();
    in.x_stride = n;
    in.m = m;
    in.k = n;
    dlb_rows_out out = product.out;
    out.y = want.data();
    out.y_stride = n;
    dlb_rows_apply(&in, &out);
    bool same = true;
    for (int64_t i = 0; i < m; ++i) {
        const uint8_t* got = static_cast<const uint8_t*>(product.out.y) + i * product.out.y_stride * size;
        same &= memcmp(got, want.data() + i * n * size, static_cast<size_t>(n * size)) == 0;
    }
    check(same, "fused, against its steps", dlb_isa_name(isa), m, k, n);
    if (rows.in.rows_out != nullptr)
        check(memcmp(rows.in.rows_out, made.data(), static_cast<size_t>(m * k) * 4) == 0, "rows", dlb_isa_name(isa), m,
              k, n);
}

void fused(int kind, int activation, int64_t m, int64_t k, int count) {
    RowsIn rows(kind, activation, m, k, kind != DLB_ROWS_AS_IS && m != 3);
    std::vector<Packed> weights;
    std::vector<std::unique_ptr<Guarded<uint8_t>>> results;
    std::vector<std::unique_ptr<Guarded<float>>> added;
    std::vector<dlb_linear_out> products;
    for (int i = 0; i < count; ++i) {
        const Product& p = kProducts[(i + m) % kCount];
        const int type = static_cast<int>((i + k) % 3);
        const int64_t stride = p.n + i % 2, extent = (m - 1) * stride + p.n;
        weights.push_back(packed_weight(p.code, p.n, k, p.group));
        results.push_back(std::make_unique<Guarded<uint8_t>>(extent * size_of(type)));
        dlb_linear_out product = zeroed<dlb_linear_out>();
        product.packed = weights.back()->data();
        product.bytes = bytes_of(weights.back());
        product.out.y = results.back()->data();
        product.out.y_stride = product.out.residual_stride = stride;
        product.out.y_type = type;
        for (const bool residual : {false, true}) {
            if ((residual ? i / 2 : i) % 2 == 0) continue;
            added.push_back(std::make_unique<Guarded<float>>(residual ? extent : p.n));
            fill_floats(*added.back());
            (residual ? product.out.residual : product.out.bias) = added.back()->data();
        }
        products.push_back(product);
    }
    std::vector<std::vector<uint8_t>> want(products.size());
    for (const int isa : instruction_sets()) {
        dlb_isa_select(isa);
        for (const auto& result : results) fill_bytes(*result, 0);
        check(dlb_linear_fused(&rows.in, products.data(), count) == DLB_OK, "fused", dlb_isa_name(isa), kind, m, k);
        for (size_t i = 0; i < products.size(); ++i) {
            const int64_t n = kProducts[(i + static_cast<size_t>(m)) % kCount].n;
            check_steps(rows, products[i], isa, n);
            if (want[i].empty()) want[i].assign(results[i]->data(), results[i]->data() + results[i]->size());
            check(memcmp(want[i].data(), results[i]->data(), want[i].size()) == 0, "fused", dlb_isa_name(isa), n, m, k);
        }
    }
}

// Sizes of summation blocks without a common multiple that 64 bits hold.
void block_sizes() {
    RowsIn rows(DLB_ROWS_GATED, DLB_ACT_RELU, 2, 5000, false);
    std::vector<Packed> weights;
    std::vector<dlb_linear_out> products;
    Guarded<float> y(2 * kDlbMaxProducts);
    for (const int prime : {2, 3, 5, 7, 11, 971, 977, 983, 991, 997, 1009, 1013, 1019, 1021, 967, 953}) {
        weights.push_back(packed_weight(kSym4, 1, 5000, 32 * prime));
        dlb_linear_out product = zeroed<dlb_linear_out>();
        product.packed = weights.back()->data();
        product.bytes = bytes_of(weights.back());
        product.out.y = y.data() + products.size();
        product.out.y_stride = kDlbMaxProducts;
        products.push_back(product);
    }
    check(dlb_linear_fused(&rows.in, products.data(), kDlbMaxProducts) == DLB_OK, "blocks", "any", 5000, 0, 0);
    for (const dlb_linear_out& product : products) check_steps(rows, product, dlb_isa_active(), 1);
}

// Experts of three layouts: gate above up in one weight, two weights, no gate; the last one shared, of another I.
struct Layout {
    const char* name;
    bool gated, stacked;
    Code code;
};

struct Stack {
    std::vector<Packed> weights;
    std::vector<dlb_expert> experts;

    const void* add(const Code& code, int64_t n, int64_t k, int64_t* bytes) {
        weights.push_back(packed_weight(code, n, k, 32));
        *bytes = bytes_of(weights.back());
        return weights.back()->data();
    }
    Stack(const Layout& layout, int64_t k, int64_t n, int count) {
        for (int e = 0; e < count; ++e) {
            const int64_t inner = e == count - 1 ? 64 : 100;
            dlb_expert expert = zeroed<dlb_expert>();
            expert.gate = add(layout.code, layout.stacked ? 2 * inner : inner, k, &expert.gate_bytes);
            if (layout.gated && !layout.stacked) expert.up = add(layout.code, inner, k, &expert.up_bytes);
            expert.down = add(layout.code, n, inner, &expert.down_bytes);
            experts.push_back(expert);
        }
    }
};

// Rows of `slots` different experts each, in no order, the shared one in all of them and here and there an unused slot.
void choose(Guarded<int32_t>& ids, int64_t slots, int count) {
    const int64_t m = static_cast<int64_t>(ids.size()) / slots;
    for (int64_t row = 0; row < m; ++row)
        for (int64_t s = 0; s < slots; ++s) {
            const int64_t id = s == 0 ? count - 1 : (row * 7 + s) % (count - 1);
            ids[static_cast<size_t>(row * slots + s)] = (row + s) % 5 == 4 ? -1 : static_cast<int32_t>(id);
        }
}

void stacked(const Layout& layout, int64_t m, int64_t k, int type) {
    constexpr int64_t slots = 3, n = 37;
    constexpr int count = 6;
    Stack stack(layout, k, n, count);
    Guarded<float> x((m - 1) * (k + 3) + k), weights(m * slots), bias(n), residual(m * n);
    for (Guarded<float>* buffer : {&x, &weights, &bias, &residual}) fill_floats(*buffer);
    Guarded<int32_t> ids(m * slots);
    choose(ids, slots, count);
    Guarded<uint8_t> y(m * n * size_of(type)), one(n * size_of(type));
    dlb_moe_in in = zeroed<dlb_moe_in>();
    in.x = x.data();
    in.x_stride = k + 3;
    in.m = m;
    in.k = k;
    in.experts = stack.experts.data();
    in.expert_count = count;
    in.ids = ids.data();
    in.weights = weights.data();
    in.slots = slots;
    in.activation = layout.gated ? DLB_ACT_SILU : DLB_ACT_GELU_ERF;
    dlb_rows_out out = zeroed<dlb_rows_out>();
    out.y = y.data();
    out.y_stride = out.residual_stride = n;
    out.y_type = type;
    if (type != DLB_BFLOAT16) out.bias = bias.data();
    if (type != DLB_FLOAT16) out.residual = residual.data();
    compare(layout.name, y, m, k, type, [&] { return dlb_moe(&in, &out); });
    // A row does not know of the others; y holds what the last ISA, still selected, left in it.
    const std::vector<uint8_t> all(y.data(), y.data() + y.size());
    in.m = 1;
    out.y = one.data();
    for (const int64_t row : {int64_t{0}, m - 1}) {
        in.x = x.data() + row * in.x_stride;
        in.ids = ids.data() + row * slots;
        in.weights = weights.data() + row * slots;
        if (out.residual != nullptr) out.residual = residual.data() + row * n;
        check(dlb_moe(&in, &out) == DLB_OK && memcmp(one.data(), all.data() + row * one.size(), one.size()) == 0,
              "a row of experts", layout.name, m, k, row);
    }
}

// An expert of another N, which only the last of many rows asks for: nothing is written.
void bad_expert() {
    constexpr int64_t m = 520, k = 32, n = 37;  // two slices
    const Layout layout = {"a bad expert", true, true, kSym4};
    for (const bool wide : {false, true}) {
        Stack stack(layout, k, n, 3);
        dlb_expert* last = &stack.experts[1];
        last->down = stack.add(kSym4, wide ? n + 16 : n, wide ? 100 : 90, &last->down_bytes);
        Guarded<float> x(m * k), weights(m), y(m * n);
        Guarded<int32_t> ids(m);
        fill_floats(x);
        fill_floats(weights);
        for (size_t i = 0; i < y.size(); ++i) y[i] = 7.0f;
        for (size_t i = 0; i < ids.size(); ++i) ids[i] = i + 1 == ids.size();
        dlb_moe_in in = zeroed<dlb_moe_in>();
        in.x = x.data();
        in.x_stride = in.k = k;
        in.m = m;
        in.experts = stack.experts.data();
        in.expert_count = 3;
        in.ids = ids.data();
        in.weights = weights.data();
        in.slots = 1;
        in.activation = DLB_ACT_SILU;
        dlb_rows_out out = zeroed<dlb_rows_out>();
        out.y = y.data();
        out.y_stride = n;
        const int status = dlb_moe(&in, &out);
        bool untouched = true;
        for (size_t i = 0; i < y.size(); ++i) untouched &= y[i] == 7.0f;
        check(status == DLB_BAD_SHAPE && untouched, "a bad expert", "any", status, wide, 0);
    }
}

void route(int64_t m, int64_t count, int64_t top_k, bool normalize) {
    const int64_t stride = count + 2, slots = top_k + 1;
    Guarded<float> logits((m - 1) * stride + count);
    fill_floats(logits);
    if (count > 2) logits[0] = logits[2];  // a tie
    // ids and weights one after the other, so that one comparison takes both
    const int64_t extent = (m - 1) * slots + top_k;
    Guarded<int32_t> ids(extent);
    Guarded<uint8_t> both(extent * 4);
    compare("route", both, m, count, top_k, [&] {
        float* weights = reinterpret_cast<float*>(both.data());
        return dlb_route(logits.data(), stride, m, count, top_k, normalize, ids.data(), slots, weights, slots);
    });
    for (int64_t row = 0; row < m; ++row)
        for (int64_t i = 0; i < top_k; ++i) {
            const int32_t* chosen = ids.data() + row * slots;
            bool good = chosen[i] >= 0 && chosen[i] < count;
            for (int64_t j = 0; j < i; ++j) good &= chosen[j] != chosen[i];
            check(good, "a chosen expert", "any", m, count, row);
        }
}

void sigmoid_add(int64_t rows, int64_t k) {
    const int64_t stride = k + 1;
    Guarded<float> x((rows - 1) * stride + k), s((rows - 1) * stride + k), gate((rows - 1) * 2 + 1);
    for (Guarded<float>* buffer : {&x, &s, &gate}) fill_floats(*buffer);
    Guarded<uint8_t> out(static_cast<int64_t>(x.size()) * 4);
    compare("sigmoid_add", out, rows, k, 0, [&] {
        float* y = reinterpret_cast<float*>(out.data());
        return dlb_sigmoid_add(x.data(), s.data(), gate.data(), 2, y, stride, rows, k);
    });
}

}  // namespace

void fused_products() {
    const struct {
        int kind, activation;
    } ways[] = {{DLB_ROWS_AS_IS, DLB_ACT_NONE},
                {DLB_ROWS_RMS_NORM, DLB_ACT_NONE},
                {DLB_ROWS_LAYER_NORM, DLB_ACT_NONE},
                {DLB_ROWS_ACTIVATION, DLB_ACT_GELU_ERF},
                {DLB_ROWS_GATED, DLB_ACT_SILU}};
    for (const auto& way : ways)
        for (const int64_t k : {1, 33, 200, 604})
            for (const int64_t m : {1, 3, 26}) {
                if (brief && (k != 33 || m > 1)) continue;
                fused(way.kind, way.activation, m, k, brief ? 2 : k == 200 ? kCount : 3);
            }
    if (!brief) fused(DLB_ROWS_GATED, DLB_ACT_GELU_TANH, 2, 4500, 2);  // rows in pieces
    if (!brief) block_sizes();
}

void experts() {
    const Layout layouts[] = {{"experts, stacked", true, true, kSym4},
                              {"experts, gated", true, false, kAsym5},
                              {"experts, plain", false, false, kTable4},
                              {"experts, fp16", true, true, kFp16}};
    for (const Layout& layout : layouts)
        for (const int64_t m : {1, 4, 37})
            for (const int64_t k : {33, 96}) {
                if (brief && (m != 4 || k != 33)) continue;
                stacked(layout, m, k, static_cast<int>((m + k / 32) % 3));
            }
    if (!brief) bad_expert();
}

void routes() {
    for (const int64_t count : {1, 5, 16, 60, 131})
        for (const int64_t top_k : {1, 2, 8})
            if (top_k <= count) route(count == 5 ? 40 : 3, count, top_k, top_k != 2);
    for (const int64_t k : {1, 15, 16, 33, 257}) sigmoid_add(k == 33 ? 5 : 1, k);
}

}  // namespace guarded

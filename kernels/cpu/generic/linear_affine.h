// The integer Linear for any vector ISA. For inclusion within an anonymous namespace of an ISA file, which provides a
// struct V:
//   I, F                        vectors of bytes and of floats, kLanes floats wide; kHalves = 16 / kLanes
//   kTokens                     rows of x that share one decoding of the weights, at most
//   kSignedBytes                whether codes of 8 bits are handed to Dot as c - 128
//   load and_ or_ set1_8 srl16<s> sll16<s> quad zero_f      quad: four bytes of x in every lane
//   Dot<bits, tokens>           exact int32 sums: clear(), step<q>(w, x) for q = 0 .. 7 of a chunk, sum()
//   widen_codes scale16 scale32 set1_f set1_32 sub_scaled to_f add mul store     see the ISA files

template <int Value>
struct Const {
    static constexpr int value = Value;
};

template <int I, int End, class Body>
inline __attribute__((always_inline)) void unroll(const Body& body) {
    if constexpr (I < End) {
        body(Const<I>{});
        unroll<I + 1, End>(body);
    }
}

// Quad q of a chunk's b lines, moved to the bits [shift, shift + b) of every byte.
template <class V, int B, int Q, int Shift>
inline __attribute__((always_inline)) typename V::I plane_quad(const uint8_t* lines) {
    constexpr int kPerByte = 8 / B, kFrom = B * (Q % kPerByte);
    typename V::I bits = V::load(lines + Q / kPerByte * kLineBytes);
    if constexpr (kFrom > Shift) bits = V::template srl16<kFrom - Shift>(bits);
    if constexpr (kFrom < Shift) bits = V::template sll16<Shift - kFrom>(bits);
    if constexpr (B == 8) return bits;
    return V::and_(bits, V::set1_8(((1 << B) - 1) << Shift));
}

template <class V, int B0, int B1, int Q>
inline __attribute__((always_inline)) typename V::I code_quad(const uint8_t* low, const uint8_t* high) {
    typename V::I code = plane_quad<V, B0, Q, 0>(low);
    if constexpr (B1 > 0) code = V::or_(code, plane_quad<V, B1, Q, B0>(high));
    return code;
}

template <class V, int B0, int B1, int Tokens>
struct AffineTile {
    using I = typename V::I;
    using F = typename V::F;
    using Dot = typename V::template Dot<B0 + B1, Tokens>;
    static constexpr int kHalves = V::kHalves;
    // Few tokens: both halves of a line at once, so that memory is read in order. Many: registers are dearer.
    static constexpr int kTogether = Tokens <= 2 ? kHalves : 1;
    static constexpr int kBias = (B0 == 8 && V::kSignedBytes) ? 128 : 0;

    const LinearView& w;
    const uint8_t* panel;
    const int8_t* q[Tokens];
    const float* x_scale[Tokens];
    const int32_t* x_sum[Tokens];
    F value[kSegments][kHalves][Tokens];

    __attribute__((always_inline)) AffineTile(const LinearView& view, const uint8_t* panel_, const ActView& x, int64_t m)
        : w(view), panel(panel_) {
        for (int t = 0; t < Tokens; ++t) {
            q[t] = x.q + (m + t) * x.q_stride;
            x_scale[t] = x.scale + (m + t) * x.blocks;
            x_sum[t] = x.sum + (m + t) * x.blocks;
        }
    }

    // Exact dot products of the chunks [first, first + count) for the halves [Half, Half + kTogether).
    inline __attribute__((always_inline)) void dots(int half, int64_t first, int64_t count, Dot (&dot)[kTogether][Tokens]) {
        const uint8_t* low = panel + w.plane_offset[0] + first * B0 * kLineBytes + half * V::kLanes * 4;
        const uint8_t* high = panel + w.plane_offset[1] + first * B1 * kLineBytes + half * V::kLanes * 4;
        for (int64_t at = first * kChunk; count > 0; --count, at += kChunk) {
            if constexpr (Tokens <= 2) {
                for (int l = 0; l < B0; ++l) __builtin_prefetch(low + l * kLineBytes + V::kPrefetch);
                for (int l = 0; l < B1; ++l) __builtin_prefetch(high + l * kLineBytes + V::kPrefetch);
            }
            unroll<0, kChunk / 4>([&](auto index) __attribute__((always_inline)) {
                constexpr int kQuad = decltype(index)::value;
                I codes[kTogether];
                unroll<0, kTogether>([&](auto h) __attribute__((always_inline)) {
                    constexpr int kAt = decltype(h)::value * V::kLanes * 4;
                    codes[h.value] = code_quad<V, B0, B1, kQuad>(low + kAt, high + kAt);
                    if constexpr (kBias != 0) codes[h.value] = V::flip_sign(codes[h.value]);
                });
                unroll<0, Tokens>([&](auto t) __attribute__((always_inline)) {
                    const I x = V::quad(q[t.value] + at + 4 * kQuad);
                    unroll<0, kTogether>([&](auto h) __attribute__((always_inline)) {
                        dot[h.value][t.value].template step<kQuad>(codes[h.value], x);
                    });
                });
            });
            low += B0 * kLineBytes;
            high += B1 * kLineBytes;
        }
    }

    static inline __attribute__((always_inline)) F load_scale(const LinearView& w, const uint8_t* table, int64_t index) {
        return w.scale_type == DLB_SCALE_FP16 ? V::scale16(table + 2 * index) : V::scale32(table + 4 * index);
    }

    // What is subtracted from every code, so that the sum of q has to be taken out that many times.
    inline __attribute__((always_inline)) I centers(int64_t index) const {
        if (w.offset == DLB_OFFSET_ZERO_POINT) return V::sub_32(V::widen_codes(panel + w.offset_offset + index), kBias);
        return V::set1_32((w.offset == DLB_OFFSET_NONE ? w.center : 0) - kBias);
    }

    inline __attribute__((always_inline)) void add_block(int half, int64_t block, const Dot (&dot)[Tokens], F (&acc)[Tokens]) {
        const int64_t index = block * w.scale_step * kPanelRows + half * V::kLanes;
        const F w_scale = load_scale(w, panel, index);
        const I center = centers(index);
        unroll<0, Tokens>([&](auto t) __attribute__((always_inline)) {
            const I exact = V::sub_scaled(dot[t.value].sum(), center, x_sum[t.value][block]);
            const F scale = V::mul(w_scale, V::set1_f(x_scale[t.value][block]));
            acc[t.value] = V::add(acc[t.value], V::mul(V::to_f(exact), scale));
        });
        if (w.offset != DLB_OFFSET_MIN) return;
        const F w_min = load_scale(w, panel + w.offset_offset, index);
        unroll<0, Tokens>([&](auto t) __attribute__((always_inline)) {
            const F scale = V::mul(w_min, V::set1_f(x_scale[t.value][block]));
            const F sum = V::to_f(V::set1_32(x_sum[t.value][block]));
            acc[t.value] = V::add(acc[t.value], V::mul(sum, scale));
        });
    }

    void run_segment(int s, int64_t blocks) {
        F acc[kHalves][Tokens];
        for (int h = 0; h < kHalves; ++h)
            for (int t = 0; t < Tokens; ++t) acc[h][t] = V::zero_f();
        for (int64_t b = w.cuts[s]; b < w.cuts[s + 1]; ++b) {
            const int64_t first = b * w.block / kChunk;
            const int64_t chunks = b + 1 == blocks ? w.last_chunks : w.block / kChunk;
            for (int half = 0; half < kHalves; half += kTogether) {
                Dot dot[kTogether][Tokens];
                for (int h = 0; h < kTogether; ++h)
                    for (int t = 0; t < Tokens; ++t) dot[h][t].clear();
                dots(half, first, chunks, dot);
                for (int h = 0; h < kTogether; ++h) add_block(half + h, b, dot[h], acc[half + h]);
            }
        }
        for (int h = 0; h < kHalves; ++h)
            for (int t = 0; t < Tokens; ++t) value[s][h][t] = acc[h][t];
    }

    void run(int64_t blocks, int64_t rows, float* y, int64_t y_stride) {
        bool present[kSegments];
        for (int s = 0; s < kSegments; ++s) {
            present[s] = w.cuts[s] < w.cuts[s + 1];
            if (present[s]) run_segment(s, blocks);
        }
        F* flat = value[0][0];
        constexpr int kSize = kHalves * Tokens;
        segment_tree(
            present,
            [&](int a, int b) {
                for (int i = 0; i < kSize; ++i) flat[a * kSize + i] = V::add(flat[a * kSize + i], flat[b * kSize + i]);
            },
            [&](int a, int b) {
                for (int i = 0; i < kSize; ++i) flat[a * kSize + i] = flat[b * kSize + i];
            });
        for (int t = 0; t < Tokens; ++t) {
            float row[kPanelRows];
            float* out = rows == kPanelRows ? y + t * y_stride : row;
            for (int h = 0; h < kHalves; ++h) V::store(out + h * V::kLanes, value[0][h][t]);
            if (out == row) memcpy(y + t * y_stride, row, static_cast<size_t>(rows) * sizeof(float));
        }
    }
};

// The tokens [m, m + count), count <= Tokens, with the smallest tile that holds them.
template <class V, int B0, int B1, int Tokens>
inline void affine_tokens(const LinearView& w, const uint8_t* panel, const ActView& x, int64_t m, int64_t count,
                          int64_t rows, float* y, int64_t y_stride) {
    if constexpr (Tokens > 1) {
        if (count < Tokens) return affine_tokens<V, B0, B1, Tokens - 1>(w, panel, x, m, count, rows, y, y_stride);
    }
    AffineTile<V, B0, B1, Tokens> tile(w, panel, x, m);
    tile.run(x.blocks, rows, y, y_stride);
}

template <class V, int B0, int B1>
void linear_affine(const LinearView& w, const ActView& x, int64_t panel_begin, int64_t panel_end, int64_t m_begin,
                   int64_t m_end, float* y, int64_t y_stride) {
    for (int64_t p = panel_begin; p < panel_end; ++p) {
        const uint8_t* panel = w.panels + p * w.panel_bytes;
        const int64_t first = p * kPanelRows, rows = w.n - first < kPanelRows ? w.n - first : kPanelRows;
        for (int64_t m = m_begin; m < m_end; m += V::kTokens) {
            const int64_t count = m_end - m < V::kTokens ? m_end - m : V::kTokens;
            affine_tokens<V, B0, B1, V::kTokens>(w, panel, x, m, count, rows, y + m * y_stride + first, y_stride);
        }
    }
}

template <class V>
void fill_affine(KernelTable& table) {
    table.linear_affine[1] = linear_affine<V, 1, 0>;
    table.linear_affine[2] = linear_affine<V, 2, 0>;
    table.linear_affine[3] = linear_affine<V, 2, 1>;
    table.linear_affine[4] = linear_affine<V, 4, 0>;
    table.linear_affine[5] = linear_affine<V, 4, 1>;
    table.linear_affine[6] = linear_affine<V, 4, 2>;
    table.linear_affine[8] = linear_affine<V, 8, 0>;
}

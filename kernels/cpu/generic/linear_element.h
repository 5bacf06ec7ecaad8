// The Linear of floating-point elements and fp32 activations for any vector ISA with FMA. For inclusion within an
// anonymous namespace of an ISA file, after linear_affine.h; V also provides kElementTokens, fma,
// element(Const<kind>, p) and alternates(kind), with what belongs to it (avx2_base.h).

template <class V, int Kind, int Tokens>
struct ElementTile {
    using F = typename V::F;
    static constexpr int kHalves = V::kHalves, kSums = 4;
    static constexpr int kBytes = Kind == DLB_FP32 ? 4 : Kind >= DLB_FP16 ? 2 : 1;
    static constexpr int kStep = kPanelRows * kBytes;  // bytes of one k
    // 2^8: what reading e4m3 as fp16 leaves out.
    static constexpr float kFactor = Kind == DLB_E4M3 ? 256.0f : 1.0f;

    const LinearView& w;
    const uint8_t* panel;
    const float* x[Tokens];
    const bool stream;  // the first pass over these weights, which come from memory
    F value[kSegments][kHalves][Tokens];

    DLB_INLINE ElementTile(const LinearView& view, const uint8_t* panel_, const float* x_, int64_t x_stride, bool first)
        : w(view), panel(panel_), stream(first) {
        for (int t = 0; t < Tokens; ++t) x[t] = x_ + t * x_stride;
    }

    // One token: both halves of a line at once, since four chains of FMA leave the adder idle. More: registers are
    // dearer.
    static constexpr int kTogether = Tokens == 1 ? kHalves : 1;
    using Sums = F[kTogether][kSums][Tokens];

    template <int H, int S, int T>
    static DLB_INLINE void clear(Sums& sums) {
        if constexpr (H < kTogether) {
            sums[H][S][T] = V::zero_f();
            constexpr int kT = T + 1 < Tokens ? T + 1 : 0, kS = kT > 0 ? S : S + 1 < kSums ? S + 1 : 0;
            clear<(kT + kS > 0 ? H : H + 1), kS, kT>(sums);
        }
    }

    template <int S, int T>
    DLB_INLINE void step_tokens(F weight, int64_t k, F (&sums)[kSums][Tokens]) const {
        if constexpr (T < Tokens) {
            sums[S][T] = V::fma(weight, V::set1_f(x[T][k + S]), sums[S][T]);
            step_tokens<S, T + 1>(weight, k, sums);
        }
    }

    // Count elements from k on, at most four, of kTogether halves: element k + s goes to sum s.
    template <int S, int H, int Count>
    DLB_INLINE void step(const uint8_t* elements, int64_t k, Sums& sums) const {
        if constexpr (S < Count) {
            constexpr int kAt = S * kStep + H * V::kLanes * kBytes;
            step_tokens<S, 0>(V::element(Const<Kind>{}, elements + kAt), k, sums[H]);
            step<(H + 1 < kTogether ? S : S + 1), (H + 1 < kTogether ? H + 1 : 0), Count>(elements, k, sums);
        }
    }

    // The same for one token, with the even rows in the sums of the first half and the odd ones in the other's.
    static constexpr bool kAlternates = Tokens == 1 && kHalves == 2 && V::alternates(Kind);

    template <int S, int Count>
    DLB_INLINE void step_alternating(const uint8_t* elements, int64_t k, Sums& sums) const {
        if constexpr (S < Count) {
            constexpr bool kTwo = S + 1 < Count;
            typename V::I bytes;
            if constexpr (kTwo)
                bytes = V::load(elements + S * kStep);
            else
                bytes = V::load_row(elements + S * kStep);
            const auto even = V::template alternate<0>(bytes), odd = V::template alternate<1>(bytes);
            const F here = V::set1_f(x[0][k + S]);
            sums[0][S][0] = V::fma(V::first(even), here, sums[0][S][0]);
            sums[1][S][0] = V::fma(V::first(odd), here, sums[1][S][0]);
            if constexpr (kTwo) {
                const F next = V::set1_f(x[0][k + S + 1]);
                sums[0][S + 1][0] = V::fma(V::second(even), next, sums[0][S + 1][0]);
                sums[1][S + 1][0] = V::fma(V::second(odd), next, sums[1][S + 1][0]);
            }
            step_alternating<S + 2, Count>(elements, k, sums);
        }
    }

    template <int Count>
    DLB_INLINE void steps(const uint8_t* elements, int64_t k, Sums& sums) const {
        if constexpr (kAlternates)
            step_alternating<0, Count>(elements, k, sums);
        else
            step<0, 0, Count>(elements, k, sums);
    }

    // The four sums of each token as one, in the first.
    template <int T>
    DLB_INLINE void join(F (&sums)[kSums][Tokens]) const {
        if constexpr (T < Tokens) {
            sums[0][T] = V::add(V::add(sums[0][T], sums[1][T]), V::add(sums[2][T], sums[3][T]));
            join<T + 1>(sums);
        }
    }

    template <int T>
    DLB_INLINE void add_tokens(const F (&sums)[kSums][Tokens], F scale, F (&acc)[Tokens]) const {
        if constexpr (T < Tokens) {
            F sum = sums[0][T];
            if (w.scale_type != DLB_SCALE_NONE) sum = V::mul(sum, scale);
            acc[T] = V::add(acc[T], sum);
            add_tokens<T + 1>(sums, scale, acc);
        }
    }

    DLB_INLINE F scale_at(int64_t index) const {
        if (w.scale_type == DLB_SCALE_NONE) return V::zero_f();
        const F scale = w.scale_type == DLB_SCALE_FP16 ? V::scale16(panel + 2 * index) : V::scale32(panel + 4 * index);
        return V::mul(scale, V::set1_f(w.multiplier * kFactor));
    }

    template <int Half, int H>
    DLB_INLINE void add_halves(int64_t block, Sums& sums, F (&acc)[kHalves][Tokens]) const {
        if constexpr (H < kTogether) {
            if constexpr (H == 0) join<0>(sums[0]);
            if constexpr (H == 0 && kTogether == 2) join<0>(sums[1]);
            if constexpr (H == 0 && kAlternates) V::in_order(sums[0][0][0], sums[1][0][0]);
            const int64_t index = block * w.scale_step * kPanelRows + (Half + H) * V::kLanes;
            add_tokens<0>(sums[H], scale_at(index), acc[Half + H]);
            add_halves<Half, H + 1>(block, sums, acc);
        }
    }

    // acc += the elements [k, end) of one block.
    template <int Half>
    DLB_INLINE void add_block(int64_t block, int64_t k, int64_t end, F (&acc)[kHalves][Tokens]) const {
        if constexpr (Half < kHalves) {
            const uint8_t* elements = panel + w.plane_offset[0] + k * kStep + Half * V::kLanes * kBytes;
            Sums sums;
            clear<0, 0, 0>(sums);
            int64_t at = k;
            for (; at + kSums <= end; at += kSums, elements += kSums * kStep) {
                if (stream && Half == 0)
                    for (int i = 0; i < kSums * kStep; i += kLineBytes) __builtin_prefetch(elements + i + V::kPrefetch);
                steps<kSums>(elements, at, sums);
            }
            if (end - at == 1) steps<1>(elements, at, sums);
            if (end - at == 2) steps<2>(elements, at, sums);
            if (end - at == 3) steps<3>(elements, at, sums);
            add_halves<Half, 0>(block, sums, acc);
            add_block<Half + kTogether>(block, k, end, acc);
        }
    }

    void run_segment(int s) {
        F acc[kHalves][Tokens];
        for (int h = 0; h < kHalves; ++h)
            for (int t = 0; t < Tokens; ++t) acc[h][t] = V::zero_f();
        for (int64_t b = w.cuts[s]; b < w.cuts[s + 1]; ++b) {
            const int64_t k = b * w.block, end = k + w.block < w.k ? k + w.block : w.k;
            add_block<0>(b, k, end, acc);
        }
        for (int h = 0; h < kHalves; ++h)
            for (int t = 0; t < Tokens; ++t) value[s][h][t] = acc[h][t];
    }
};

template <class V, int Kind>
struct Elements {
    template <int Tokens>
    using Tile = ElementTile<V, Kind, Tokens>;
};

template <class V, class Weights, int Tokens>
inline void float_tokens(const LinearView& w, const uint8_t* panel, const float* x, int64_t x_stride, int64_t count,
                         bool first, int64_t rows, const LinearOut& out) {
    if constexpr (Tokens > 1) {
        if (count < Tokens) return float_tokens<V, Weights, Tokens - 1>(w, panel, x, x_stride, count, first, rows, out);
    }
    typename Weights::template Tile<Tokens> tile(w, panel, x, x_stride, first);
    for (int s = 0; s < kSegments; ++s)
        if (w.cuts[s] < w.cuts[s + 1]) tile.run_segment(s);
    finish_tile<V, Tokens>(w, tile.value, rows, out);
}

template <class V, class Weights>
void linear_float(const LinearView& w, const float* x, int64_t x_stride, int64_t panel_begin, int64_t panel_end,
                  int64_t m_begin, int64_t m_end, const LinearOut& out) {
    constexpr int kTokens = V::kElementTokens;
    for (int64_t p = panel_begin; p < panel_end; ++p) {
        const int64_t first = p * kPanelRows, rows = w.n - first < kPanelRows ? w.n - first : kPanelRows;
        for (int64_t m = m_begin; m < m_end; m += kTokens) {
            const int64_t count = m_end - m < kTokens ? m_end - m : kTokens;
            const LinearOut at = {out.y + m * out.stride + first, out.stride, out.segment_stride};
            float_tokens<V, Weights, kTokens>(w, w.panels + p * w.panel_bytes, x + m * x_stride, x_stride, count,
                                              m == m_begin, rows, at);
        }
    }
}

template <class V>
void fill_element(KernelTable& table) {
    table.linear_element[DLB_E5M2] = linear_float<V, Elements<V, DLB_E5M2>>;
    table.linear_element[DLB_E4M3] = linear_float<V, Elements<V, DLB_E4M3>>;
    table.linear_element[DLB_FP16] = linear_float<V, Elements<V, DLB_FP16>>;
    table.linear_element[DLB_BF16] = linear_float<V, Elements<V, DLB_BF16>>;
    table.linear_element[DLB_FP32] = linear_float<V, Elements<V, DLB_FP32>>;
}

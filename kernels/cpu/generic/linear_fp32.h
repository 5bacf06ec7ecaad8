// The Linear of codes and fp32 activations for any vector ISA with FMA: codes become floats in registers, four sums by
// k mod 4 as for elements. For inclusion within an anonymous namespace of an ISA file, after linear_element.h; V also
// provides byte_f<j>(codes), byte j of every lane as a float; Values, load_values and pick<bits, j>(values, codes), the
// table's entry at byte j, bits of other codes above it notwithstanding.

template <class V, int B0, int B1, bool Table, int Tokens>
struct CodeTile {
    using I = typename V::I;
    using F = typename V::F;
    static constexpr int kHalves = V::kHalves, kSums = 4;

    const LinearView& w;
    const uint8_t* panel;
    const typename V::Values values;
    const float* x[Tokens];
    float tail[Tokens][kChunk];  // what x has beyond the last full chunk, then zeros
    const bool stream;           // the first pass over these weights, which come from memory
    F value[kSegments][kHalves][Tokens];

    DLB_INLINE CodeTile(const LinearView& view, const uint8_t* panel_, const float* x_, int64_t x_stride, bool first)
        : w(view), panel(panel_), values(V::load_values(view.values)), stream(first) {
        const int64_t rest = w.k % kChunk;
        for (int t = 0; t < Tokens; ++t) {
            x[t] = x_ + t * x_stride;
            for (int64_t i = 0; rest > 0 && i < kChunk; ++i) tail[t][i] = i < rest ? x[t][w.k - rest + i] : 0.0f;
        }
    }

    using Sums = F[kSums][Tokens];

    // A code c stands for c slope + shift, before `scale` multiplies the sum of a block.
    struct Group {
        F slope, shift, scale;
    };

    DLB_INLINE F load_scale(const uint8_t* scales, int64_t index) const {
        return w.scale_type == DLB_SCALE_FP16 ? V::scale16(scales + 2 * index) : V::scale32(scales + 4 * index);
    }

    DLB_INLINE Group group_at(int64_t index) const {
        const F scale = load_scale(panel, index);
        const uint8_t* offsets = panel + w.offset_offset;
        if (w.offset == DLB_OFFSET_MIN) return {scale, load_scale(offsets, index), V::set1_f(1.0f)};
        const I zero = w.offset == DLB_OFFSET_NONE ? V::set1_32(w.center) : V::widen_codes(offsets + index);
        return {V::set1_f(1.0f), V::mul(V::to_f(zero), V::set1_f(-1.0f)), scale};
    }

    template <int S, int T>
    static DLB_INLINE void clear(Sums& sums) {
        if constexpr (S < kSums) {
            sums[S][T] = V::zero_f();
            clear<T + 1 < Tokens ? S : S + 1, T + 1 < Tokens ? T + 1 : 0>(sums);
        }
    }

    template <int S, int T>
    DLB_INLINE void step_tokens(F weight, const float* const (&rows)[Tokens], int64_t k, Sums& sums) const {
        if constexpr (T < Tokens) {
            sums[S][T] = V::fma(weight, V::set1_f(rows[T][k + S]), sums[S][T]);
            step_tokens<S, T + 1>(weight, rows, k, sums);
        }
    }

    template <int S>
    DLB_INLINE void step(I codes, const Group& group, const float* const (&rows)[Tokens], int64_t k, Sums& sums) const {
        if constexpr (S < kSums) {
            F weight;
            if constexpr (Table)
                weight = V::template pick<B0 + B1, S>(values, codes);
            else
                weight = V::fma(V::template byte_f<S>(codes), group.slope, group.shift);
            step_tokens<S, 0>(weight, rows, k, sums);
            step<S + 1>(codes, group, rows, k, sums);
        }
    }

    template <int Q>
    DLB_INLINE void step_quads(const uint8_t* low, const uint8_t* high, const Group& group,
                               const float* const (&rows)[Tokens], int64_t k, Sums& sums) const {
        if constexpr (Q < kChunk / 4) {
            step<0>(code_quad<V, B0, B1, Q, Table>(low, high), group, rows, k + 4 * Q, sums);
            step_quads<Q + 1>(low, high, group, rows, k, sums);
        }
    }

    template <int T>
    DLB_INLINE void add_tokens(const Sums& sums, F scale, F (&acc)[Tokens]) const {
        if constexpr (T < Tokens) {
            const F sum = V::add(V::add(sums[0][T], sums[1][T]), V::add(sums[2][T], sums[3][T]));
            acc[T] = V::add(acc[T], V::mul(sum, scale));
            add_tokens<T + 1>(sums, scale, acc);
        }
    }

    // acc += the chunks [first, end) of one block, for one half after the other.
    template <int Half>
    DLB_INLINE void add_block(int64_t block, int64_t first, int64_t end, F (&acc)[kHalves][Tokens]) const {
        if constexpr (Half < kHalves) {
            const uint8_t* low = panel + w.plane_offset[0] + first * B0 * kLineBytes + Half * V::kLanes * 4;
            const uint8_t* high = panel + w.plane_offset[1] + first * B1 * kLineBytes + Half * V::kLanes * 4;
            const Group group = group_at(block * w.scale_step * kPanelRows + Half * V::kLanes);
            Sums sums;
            clear<0, 0>(sums);
            for (int64_t c = first; c < end; ++c, low += B0 * kLineBytes, high += B1 * kLineBytes) {
                if (stream && Half == 0) {
                    for (int l = 0; l < B0; ++l) __builtin_prefetch(low + l * kLineBytes + V::kPrefetch);
                    for (int l = 0; l < B1; ++l) __builtin_prefetch(high + l * kLineBytes + V::kPrefetch);
                }
                const bool short_chunk = (c + 1) * kChunk > w.k;
                const float* rows[Tokens];
                for (int t = 0; t < Tokens; ++t) rows[t] = short_chunk ? tail[t] : x[t] + c * kChunk;
                step_quads<0>(low, high, group, rows, 0, sums);
            }
            add_tokens<0>(sums, group.scale, acc[Half]);
            add_block<Half + 1>(block, first, end, acc);
        }
    }

    void run_segment(int s) {
        const int64_t blocks = (w.k + w.block - 1) / w.block;
        F acc[kHalves][Tokens];
        for (int h = 0; h < kHalves; ++h)
            for (int t = 0; t < Tokens; ++t) acc[h][t] = V::zero_f();
        for (int64_t b = w.cuts[s]; b < w.cuts[s + 1]; ++b) {
            const int64_t first = b * w.block / kChunk;
            add_block<0>(b, first, first + (b + 1 == blocks ? w.last_chunks : w.block / kChunk), acc);
        }
        for (int h = 0; h < kHalves; ++h)
            for (int t = 0; t < Tokens; ++t) value[s][h][t] = acc[h][t];
    }
};

template <class V, int B0, int B1, bool Table>
struct Codes {
    template <int Tokens>
    using Tile = CodeTile<V, B0, B1, Table, Tokens>;
};

template <class V>
void fill_fp32(KernelTable& table) {
    table.linear_affine_fp32[1] = linear_float<V, Codes<V, 1, 0, false>>;
    table.linear_affine_fp32[2] = linear_float<V, Codes<V, 2, 0, false>>;
    table.linear_affine_fp32[3] = linear_float<V, Codes<V, 2, 1, false>>;
    table.linear_affine_fp32[4] = linear_float<V, Codes<V, 4, 0, false>>;
    table.linear_affine_fp32[5] = linear_float<V, Codes<V, 4, 1, false>>;
    table.linear_affine_fp32[6] = linear_float<V, Codes<V, 4, 2, false>>;
    table.linear_affine_fp32[8] = linear_float<V, Codes<V, 8, 0, false>>;
    table.linear_table_fp32[1] = linear_float<V, Codes<V, 1, 0, true>>;
    table.linear_table_fp32[2] = linear_float<V, Codes<V, 2, 0, true>>;
    table.linear_table_fp32[3] = linear_float<V, Codes<V, 2, 1, true>>;
    table.linear_table_fp32[4] = linear_float<V, Codes<V, 4, 0, true>>;
}

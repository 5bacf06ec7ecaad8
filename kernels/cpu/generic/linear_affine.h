// The Linear of integer codes for any vector ISA. For inclusion within an anonymous namespace of an ISA file, which
// provides a struct V:
//   I, F                        vectors of bytes and of floats, kLanes floats wide; kHalves = 16 / kLanes
//   kTokens                     rows of x that share one decoding of the weights, at most
//   kSignedBytes                whether codes of 8 bits are handed to Dot as c - 128
//   load_table lookup           a table of 16 bytes, and its entries at the codes
//   kPrefetch                   bytes ahead of their use that weights are asked for
//   load and_ or_ set1_8 srl16<s> sll16<s> quad zero_f      quad: four bytes of x in every lane
//   Dot<bits, tokens>           exact int32 sums: begin(start), step<q>(w, x) for q = 0 .. 7 of a chunk, sum();
//                               kInPlace: steps of odd q take w sixteen times too large, and sum() makes up for it
//   widen_codes scale16 scale32 set1_f set1_32 sub_scaled to_f add mul store     see the ISA files

// Unrolling is by templates that hand references on: lambdas would leave the sums in memory (GCC 12).
// A sanitized build says plain `inline`: checks around each load, unrolled this far, compile for many minutes.
#ifndef DLB_INLINE
#define DLB_INLINE inline __attribute__((always_inline))
#endif

// Quad q of a chunk's b lines, moved to the bits [shift, shift + b) of every byte.
template <class V, int B, int Q, int Shift>
DLB_INLINE typename V::I plane_quad(const uint8_t* lines) {
    constexpr int kPerByte = 8 / B, kFrom = B * (Q % kPerByte);
    typename V::I bits = V::load(lines + Q / kPerByte * kLineBytes);
    if constexpr (kFrom > Shift) bits = V::template srl16<kFrom - Shift>(bits);
    if constexpr (kFrom < Shift) bits = V::template sll16<Shift - kFrom>(bits);
    if constexpr (B == 8) return bits;
    return V::and_(bits, V::set1_8(((1 << B) - 1) << Shift));
}

// The codes of three bits of the quads Q and Q + 2, Q = 0, 1, 4 or 5, in the low and high four bits of every byte,
// whose fourth bits are 0.
template <class V, int Q>
DLB_INLINE typename V::I three_bit_pair(const uint8_t* low, const uint8_t* high) {
    constexpr int kFrom = high_place(2, Q);
    typename V::I two = V::load(low + Q / 4 * kLineBytes), one = V::load(high);
    if constexpr (Q % 2 == 1) two = V::template srl16<2>(two);
    if constexpr (kFrom < 2) one = V::template sll16<2 - kFrom>(one);
    if constexpr (kFrom > 2) one = V::template srl16<kFrom - 2>(one);
    return V::or_(V::and_(two, V::set1_8(0x33)), V::and_(one, V::set1_8(0x44)));
}

// Quad Q of a chunk's codes, one in a byte. For a lookup, codes of three bits may have those of another quad above
// them, at bits that no lookup reads.
template <class V, int B0, int B1, int Q, bool ForLookup>
DLB_INLINE typename V::I code_quad(const uint8_t* low, const uint8_t* high) {
    if constexpr (B0 == 2 && B1 == 1) {
        typename V::I code = three_bit_pair<V, Q & ~2>(low, high);
        if constexpr ((Q & 2) != 0) code = V::template srl16<4>(code);
        if constexpr (!ForLookup) code = V::and_(code, V::set1_8(7));
        return code;
    } else {
        typename V::I code = plane_quad<V, B0, Q, 0>(low);
        if constexpr (B1 > 0) code = V::or_(code, plane_quad<V, B1, Q, B0>(high));
        return code;
    }
}

// What a tile multiplies by: the codes, or the entries of a table at the codes, of five or of eight bits.
enum TileKind { kCodes, kTable5, kTable8 };
constexpr int kEntryBits = 9;  // what a Dot knows the entries of eight bits by: never -128, as codes may be

template <class V, int B0, int B1, TileKind Kind, int Tokens>
struct AffineTile {
    using I = typename V::I;
    using F = typename V::F;
    static constexpr bool kTable = Kind != kCodes;
    static constexpr bool kSigned = (Kind == kTable8 || B0 == 8) && V::kSignedBytes;
    using Dot = typename V::template Dot<Kind == kTable8 ? kEntryBits : Kind == kTable5 ? 5 : B0 + B1, Tokens>;
    static constexpr int kHalves = V::kHalves;
    // Whether Dot takes codes of four bits from the upper half of a byte where they are, sixteen times too large.
    static constexpr bool kInPlace = Kind == kCodes && B0 == 4 && B1 == 0 && Dot::kInPlace;
    static_assert(kInPlace || !Dot::kInPlace, "Dot would shift back what it did not get shifted");

    const LinearView& w;
    const uint8_t* panel;
    const I table;
    const int8_t* q[Tokens];
    const float* x_scale[Tokens];
    const int32_t* x_sum[Tokens];
    const int32_t* x_start[Tokens];
    const bool stream;  // the first pass over these weights, which come from memory
    const int64_t all_chunks, all_blocks, blocks_ahead;
    F value[kSegments][kHalves][Tokens];

    DLB_INLINE AffineTile(const LinearView& view, const uint8_t* panel_, const ActView& x, int64_t m, bool first)
        : w(view),
          panel(panel_),
          table(table_of(view)),
          stream(first),
          all_chunks((view.k + kChunk - 1) / kChunk),
          all_blocks(x.blocks),
          blocks_ahead(kAhead * kChunk / view.block + 1) {
        for (int t = 0; t < Tokens; ++t) {
            q[t] = x.q + (m + t) * x.q_stride;
            x_scale[t] = x.scale + (m + t) * x.blocks;
            x_sum[t] = x.sum + (m + t) * x.blocks;
            x_start[t] = x.start + (m + t) * x.blocks;
        }
    }

    static DLB_INLINE I table_of(const LinearView& view) {
        const I entries = V::load_table(view.table);
        if constexpr (kSigned) return V::flip_sign(entries);
        return entries;
    }

    using Dots = Dot[kHalves][Tokens];
    using Codes = I[kHalves];

    template <int Q, int H>
    DLB_INLINE void load_codes(const uint8_t* low, const uint8_t* high, Codes& codes) const {
        if constexpr (H < kHalves) {
            constexpr int kAt = H * V::kLanes * 4;
            if constexpr (kInPlace)
                codes[H] = V::and_(V::load(low + kAt + Q / 2 * kLineBytes), V::set1_8(Q % 2 == 0 ? 0x0f : 0xf0));
            else
                codes[H] = code_quad<V, B0, B1, Q, kTable>(low + kAt, high + kAt);
            if constexpr (kTable)
                codes[H] = V::lookup(table, codes[H]);
            else if constexpr (kSigned)
                codes[H] = V::flip_sign(codes[H]);
            load_codes<Q, H + 1>(low, high, codes);
        }
    }

    template <int Q, int H, int T>
    static DLB_INLINE void step_halves(const Codes& codes, I x, Dots& dots) {
        if constexpr (H < kHalves) {
            dots[H][T].template step<Q>(codes[H], x);
            step_halves<Q, H + 1, T>(codes, x, dots);
        }
    }

    template <int Q, int T>
    DLB_INLINE void step_tokens(const Codes& codes, int64_t at, Dots& dots) const {
        if constexpr (T < Tokens) {
            step_halves<Q, 0, T>(codes, V::quad(q[T] + at + 4 * Q), dots);
            step_tokens<Q, T + 1>(codes, at, dots);
        }
    }

    template <int Q>
    DLB_INLINE void step_quads(const uint8_t* low, const uint8_t* high, int64_t at, Dots& dots) const {
        if constexpr (Q < kChunk / 4) {
            Codes codes;
            load_codes<Q, 0>(low, high, codes);
            step_tokens<Q, 0>(codes, at, dots);
            step_quads<Q + 1>(low, high, at, dots);
        }
    }

    template <int H, int T>
    DLB_INLINE void begin(int64_t block, Dots& dots) const {
        if constexpr (H < kHalves) {
            dots[H][T].begin(V::set1_32(x_start[T][block]));
            begin<T + 1 < Tokens ? H : H + 1, T + 1 < Tokens ? T + 1 : 0>(block, dots);
        }
    }

    DLB_INLINE F load_scale(const uint8_t* scales, int64_t index) const {
        F scale = w.scale_type == DLB_SCALE_FP16 ? V::scale16(scales + 2 * index) : V::scale32(scales + 4 * index);
        if constexpr (kTable) scale = V::mul(scale, V::set1_f(w.multiplier));
        return scale;
    }

    template <int H, int T>
    DLB_INLINE void add_tokens(int64_t block, const Dots& dots, F w_scale, F (&acc)[Tokens]) const {
        if constexpr (T < Tokens) {
            const F scale = V::mul(w_scale, V::set1_f(x_scale[T][block]));
            acc[T] = V::add(acc[T], V::mul(V::to_f(dots[H][T].sum()), scale));
            add_tokens<H, T + 1>(block, dots, w_scale, acc);
        }
    }

    // The same where every group has a zero point: the sum of q is taken out that many times.
    template <int H>
    void add_zero_points(int64_t block, int64_t index, const Dots& dots, F w_scale, F (&acc)[Tokens]) const {
        const I zero_point = V::widen_codes(panel + w.offset_offset + index);
        for (int t = 0; t < Tokens; ++t) {
            const I exact = V::sub_scaled(dots[H][t].sum(), zero_point, x_sum[t][block]);
            const F scale = V::mul(w_scale, V::set1_f(x_scale[t][block]));
            acc[t] = V::add(acc[t], V::mul(V::to_f(exact), scale));
        }
    }

    void add_mins(int64_t block, int64_t index, F (&acc)[Tokens]) const {
        const F w_min = load_scale(panel + w.offset_offset, index);
        for (int t = 0; t < Tokens; ++t) {
            const F scale = V::mul(w_min, V::set1_f(x_scale[t][block]));
            acc[t] = V::add(acc[t], V::mul(V::to_f(V::set1_32(x_sum[t][block])), scale));
        }
    }

    template <int H>
    DLB_INLINE void add_halves(int64_t block, const Dots& dots, F (&acc)[kHalves][Tokens]) const {
        if constexpr (H < kHalves) {
            const int64_t index = block * w.scale_step * kPanelRows + H * V::kLanes;
            if (w.offset == DLB_OFFSET_ZERO_POINT)
                add_zero_points<H>(block, index, dots, load_scale(panel, index), acc[H]);
            else
                add_tokens<H, 0>(block, dots, load_scale(panel, index), acc[H]);
            if (w.offset == DLB_OFFSET_MIN) add_mins(block, index, acc[H]);
            add_halves<H + 1>(block, dots, acc);
        }
    }

    // Whether memory is asked for in one line (ahead_of): more tokens have more to do and no registers to spare.
    static constexpr bool kInLine = B1 == 0 && Tokens <= 2;

    // Ask for what comes `kAhead` chunks later, in this panel or the next; each plane is a stream of its own.
    static constexpr int64_t kAhead = V::kPrefetch / ((B0 + B1) * kLineBytes);

    DLB_INLINE void ask_planes(int64_t chunk, const uint8_t* low, const uint8_t* high) const {
        const bool last = chunk + kAhead >= all_chunks;
        const uint8_t* low_ahead = low + kAhead * B0 * kLineBytes;
        const uint8_t* high_ahead = high + kAhead * B1 * kLineBytes;
        if (last) low_ahead += w.panel_bytes - all_chunks * B0 * kLineBytes;
        if (last) high_ahead += w.panel_bytes - all_chunks * B1 * kLineBytes;
        for (int l = 0; l < B0; ++l) __builtin_prefetch(low_ahead + l * kLineBytes);
        for (int l = 0; l < B1; ++l) __builtin_prefetch(high_ahead + l * kLineBytes);
    }

    // The same for the scales and offsets of a block, a line or less each.
    DLB_INLINE void ask_groups(int64_t block) const {
        const int64_t ahead = block + blocks_ahead, bytes = w.scale_type == DLB_SCALE_FP16 ? 32 : 64;
        const uint8_t* base =
            ahead < all_blocks ? panel + ahead * bytes : panel + w.panel_bytes + (ahead - all_blocks) * bytes;
        __builtin_prefetch(base);
        if (w.offset == DLB_OFFSET_MIN) __builtin_prefetch(base + w.offset_offset);
    }

    // One plane and what belongs to its groups are asked for in one line from panel to panel, with each block as much
    // as a block has: memory brings one behind the other, and nothing is to be decided on the way.
    struct Line {
        const uint8_t* at;
        int64_t group_bytes;  // of scales and offsets for a block

        DLB_INLINE void ask(int lines) {
            for (int l = 0; l < lines; ++l) __builtin_prefetch(at + l * kLineBytes);
            at += lines * kLineBytes;
        }
        DLB_INLINE void ask_groups(int64_t block) {
            for (int64_t due = block * group_bytes % kLineBytes + group_bytes; due >= kLineBytes; due -= kLineBytes)
                ask(1);
        }
    };
    struct NoLine {};
    using Ahead = std::conditional_t<kInLine, Line, NoLine>;

    DLB_INLINE Ahead ahead_of(int64_t block) const {
        if constexpr (kInLine) {
            const int64_t groups = w.scale_step == 0 ? 0 : w.plane_offset[0] / all_blocks;
            const int64_t codes = block * w.block / kChunk * (B0 * kLineBytes);
            const int64_t shared = block * groups / kLineBytes * kLineBytes;
            return {panel + w.plane_offset[0] + V::kPrefetch + codes + shared, groups};
        } else {
            return {};
        }
    }

    // acc += one block of `chunks` chunks from `first` on.
    DLB_INLINE void add_block(int64_t block, int64_t first, int64_t chunks, Ahead& ahead,
                              F (&acc)[kHalves][Tokens]) const {
        const uint8_t* low = panel + w.plane_offset[0] + first * B0 * kLineBytes;
        const uint8_t* high = panel + w.plane_offset[1] + first * B1 * kLineBytes;
        if (!kInLine && stream && w.scale_step != 0) ask_groups(block);
        Dots dots;
        begin<0, 0>(block, dots);
        for (int64_t c = 0; c < chunks; ++c) {
            if constexpr (kInLine) {
                if (stream) ahead.ask(B0);
            } else {
                if (stream) ask_planes(first + c, low, high);
            }
            step_quads<0>(low, high, (first + c) * kChunk, dots);
            low += B0 * kLineBytes;
            high += B1 * kLineBytes;
        }
        if constexpr (kInLine) {
            if (stream) ahead.ask_groups(block);
        }
        add_halves<0>(block, dots, acc);
    }

    DLB_INLINE void run_segment(int s, int64_t blocks) {
        F acc[kHalves][Tokens];
        for (int h = 0; h < kHalves; ++h)
            for (int t = 0; t < Tokens; ++t) acc[h][t] = V::zero_f();
        Ahead ahead = ahead_of(w.cuts[s]);
        for (int64_t b = w.cuts[s]; b < w.cuts[s + 1]; ++b) {
            const int64_t first = b * w.block / kChunk;
            const int64_t chunks = b + 1 == blocks ? w.last_chunks : w.block / kChunk;
            add_block(b, first, chunks, ahead, acc);
        }
        for (int h = 0; h < kHalves; ++h)
            for (int t = 0; t < Tokens; ++t) value[s][h][t] = acc[h][t];
    }
};

// Store `rows` results of each token.
template <class V, int Tokens>
inline void store_tile(typename V::F (&value)[V::kHalves][Tokens], int64_t rows, float* y, int64_t stride) {
    for (int t = 0; t < Tokens; ++t) {
        float row[kPanelRows];
        float* out = rows == kPanelRows ? y + t * stride : row;
        for (int h = 0; h < V::kHalves; ++h) V::store(out + h * V::kLanes, value[h][t]);
        if (out == row) memcpy(y + t * stride, row, static_cast<size_t>(rows) * sizeof(float));
    }
}

// Add the segments of a tile in the tree and store the sum, or store each of them. `out` is moved to the tile's place.
template <class V, int Tokens>
inline void finish_tile(const LinearView& w, typename V::F (&value)[kSegments][V::kHalves][Tokens], int64_t rows,
                        const LinearOut& out) {
    using F = typename V::F;
    bool present[kSegments];
    for (int s = 0; s < kSegments; ++s) present[s] = w.cuts[s] < w.cuts[s + 1];
    if (out.segment_stride != 0) {
        for (int s = 0; s < kSegments; ++s)
            if (present[s]) store_tile<V, Tokens>(value[s], rows, out.y + s * out.segment_stride, out.stride);
        return;
    }
    F* flat = value[0][0];
    constexpr int kSize = V::kHalves * Tokens;
    segment_tree(
        present,
        [&](int a, int b) {
            for (int i = 0; i < kSize; ++i) flat[a * kSize + i] = V::add(flat[a * kSize + i], flat[b * kSize + i]);
        },
        [&](int a, int b) {
            for (int i = 0; i < kSize; ++i) flat[a * kSize + i] = flat[b * kSize + i];
        });
    store_tile<V, Tokens>(value[0], rows, out.y, out.stride);
}

// The tokens [m, m + count), count <= Tokens, with the smallest tile that holds them.
template <class V, int B0, int B1, TileKind Kind, int Tokens>
inline void affine_tokens(const LinearView& w, const uint8_t* panel, const ActView& x, int64_t m, int64_t count,
                          bool first, int64_t rows, const LinearOut& out) {
    if constexpr (Tokens > 1) {
        if (count < Tokens) return affine_tokens<V, B0, B1, Kind, Tokens - 1>(w, panel, x, m, count, first, rows, out);
    }
    AffineTile<V, B0, B1, Kind, Tokens> tile(w, panel, x, m, first);
    for (int s = 0; s < kSegments; ++s)
        if (w.cuts[s] < w.cuts[s + 1]) tile.run_segment(s, x.blocks);
    finish_tile<V, Tokens>(w, tile.value, rows, out);
}

template <class V, int B0, int B1, TileKind Kind = kCodes>
void linear_affine(const LinearView& w, const ActView& x, int64_t panel_begin, int64_t panel_end, int64_t m_begin,
                   int64_t m_end, const LinearOut& out) {
    for (int64_t p = panel_begin; p < panel_end; ++p) {
        const uint8_t* panel = w.panels + p * w.panel_bytes;
        const int64_t first = p * kPanelRows, rows = w.n - first < kPanelRows ? w.n - first : kPanelRows;
        for (int64_t m = m_begin; m < m_end; m += V::kTokens) {
            const int64_t count = m_end - m < V::kTokens ? m_end - m : V::kTokens;
            const LinearOut at = {out.y + m * out.stride + first, out.stride, out.segment_stride};
            affine_tokens<V, B0, B1, Kind, V::kTokens>(w, panel, x, m, count, m == m_begin, rows, at);
        }
    }
}

template <class V, int B0, int B1>
void linear_table(const LinearView& w, const ActView& x, int64_t panel_begin, int64_t panel_end, int64_t m_begin,
                  int64_t m_end, const LinearOut& out) {
    if constexpr (V::kSignedBytes) {
        if (!w.full_bytes) return linear_affine<V, B0, B1, kTable5>(w, x, panel_begin, panel_end, m_begin, m_end, out);
    }
    linear_affine<V, B0, B1, kTable8>(w, x, panel_begin, panel_end, m_begin, m_end, out);
}

template <class V>
void fill_affine(KernelTable& table) {
    table.signed_bytes = V::kSignedBytes;
    table.linear_affine[1] = linear_affine<V, 1, 0>;
    table.linear_affine[2] = linear_affine<V, 2, 0>;
    table.linear_affine[3] = linear_affine<V, 2, 1>;
    table.linear_affine[4] = linear_affine<V, 4, 0>;
    table.linear_affine[5] = linear_affine<V, 4, 1>;
    table.linear_affine[6] = linear_affine<V, 4, 2>;
    table.linear_affine[8] = linear_affine<V, 8, 0>;
    table.linear_table[1] = linear_table<V, 1, 0>;
    table.linear_table[2] = linear_table<V, 2, 0>;
    table.linear_table[3] = linear_table<V, 2, 1>;
    table.linear_table[4] = linear_table<V, 4, 0>;
}

// AMX with int8 tiles: sixteen tokens by sixteen rows of N at a time. A line of a panel is a row of a tile as it lies
// there, so decoded codes are the right factor and activations the left one. Fewer tokens, and the tokens that sixteen
// does not divide, go to the ISA below: the bits are the same.
#include <string.h>

#include "../api.h"
#include "../intrinsics.h"
#include "../layout.h"

namespace dlb {
namespace {

#include "../generic/tree.h"

constexpr int kTileTokens = 16;
constexpr int kTiles = 4;                    // tiles of sums: so many tokens share one decoding of the weights
constexpr int kStepBytes = 16 * kLineBytes;  // codes of 64 elements of K

// Tiles 0-3: sums [16 tokens][16 rows of N] int32. 4, 5: activations and codes of 64 elements of K; 6, 7: of 32, for
// blocks of an odd number of chunks: a dot product never crosses a block's end.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 32, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 8};
};
static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads 64 bytes");

// The compiler does not know what tile instructions read and write.
inline void fence() { __asm__ volatile("" ::: "memory"); }

// Tiles are configured for the length of a task: other code of this thread may want its own, and a thread that holds
// none has less to save when it is switched.
struct ConfiguredTiles {
    ConfiguredTiles() {
        const TileConfig config;
        fence();
        _tile_loadconfig(&config);
    }
    ~ConfiguredTiles() { _tile_release(); }
    ConfiguredTiles(const ConfiguredTiles&) = delete;
    ConfiguredTiles& operator=(const ConfiguredTiles&) = delete;
};

// Quad Q of a chunk's B lines, moved to the bits [Shift, Shift + B) of every byte.
template <int B, int Q, int Shift>
inline __m512i plane_quad(const uint8_t* lines) {
    constexpr int kPerByte = 8 / B, kFrom = B * (Q % kPerByte);
    __m512i bits = _mm512_loadu_si512(lines + Q / kPerByte * kLineBytes);
    if constexpr (kFrom > Shift) bits = _mm512_srli_epi16(bits, kFrom - Shift);
    if constexpr (kFrom < Shift) bits = _mm512_slli_epi16(bits, Shift - kFrom);
    if constexpr (B == 8) return bits;
    return _mm512_and_si512(bits, _mm512_set1_epi8(static_cast<char>(((1 << B) - 1) << Shift)));
}

// A chunk's codes (of a table: its entries) as eight rows of a tile.
template <int B0, int B1, bool Table, int Q = 0>
inline void decode_chunk(const uint8_t* low, const uint8_t* high, __m512i table, uint8_t* out) {
    if constexpr (Q < kChunk / 4) {
        __m512i code = plane_quad<B0, Q, 0>(low);
        if constexpr (B1 > 0) {
            const __m512i upper = plane_quad<B1, B1 == 1 ? high_place(B0, Q) : Q, B0>(high);
            code = _mm512_or_si512(code, upper);
        }
        if constexpr (Table) code = _mm512_shuffle_epi8(table, code);
        _mm512_storeu_si512(out + Q * kLineBytes, code);
        decode_chunk<B0, B1, Table, Q + 1>(low, high, table, out);
    }
}

// The codes of the chunks [first, first + count), count at most 2.
using DecodeFn = void (*)(const LinearView& w, const uint8_t* panel, int64_t first, int count, uint8_t* out);

template <int B0, int B1, bool Table>
void decode(const LinearView& w, const uint8_t* panel, int64_t first, int count, uint8_t* out) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table)));
    for (int64_t c = first; c < first + count; ++c, out += kStepBytes / 2)
        decode_chunk<B0, B1, Table>(panel + w.plane_offset[0] + c * B0 * kLineBytes,
                                    panel + w.plane_offset[1] + c * B1 * kLineBytes, table, out);
}

// A step along K: one or two chunks of one block.
struct Step {
    int64_t block, chunk;
    int count;
    bool ends_block;
};

struct Walk {
    const LinearView& w;
    const int64_t blocks;

    Step at(int64_t block, int64_t done) const {  // done: chunks of the block that earlier steps took
        const int64_t chunks = block + 1 == blocks ? w.last_chunks : w.block / kChunk;
        const int count = chunks - done < 2 ? 1 : 2;
        return {block, block * (w.block / kChunk) + done, count, done + count == chunks};
    }
    Step after(const Step& s) const {
        return s.ends_block ? at(s.block + 1, 0) : at(s.block, s.chunk - s.block * (w.block / kChunk) + s.count);
    }
};

// The sums of 16 tokens, from the activations of 64 or 32 elements and the codes in tile 5 or 7.
#define DLB_TILE_STEP(tile)                                          \
    if (Tiles > tile) {                                              \
        if (s.count == 2) {                                          \
            _tile_loadd(4, q + tile * kTileTokens * stride, stride); \
            _tile_dpbsud(tile, 4, 5);                                \
        } else {                                                     \
            _tile_loadd(6, q + tile * kTileTokens * stride, stride); \
            _tile_dpbsud(tile, 6, 7);                                \
        }                                                            \
    }

template <int Tiles>
inline void step_tiles(const Step& s, const uint8_t* codes, const int8_t* q, int64_t stride) {
    fence();
    if (s.count == 2)
        _tile_loadd(5, codes, kLineBytes);
    else
        _tile_loadd(7, codes, kLineBytes);
    DLB_TILE_STEP(0)
    DLB_TILE_STEP(1)
    DLB_TILE_STEP(2)
    DLB_TILE_STEP(3)
}
#undef DLB_TILE_STEP

template <int Tiles>
inline void clear_tiles() {
    _tile_zero(0);
    if (Tiles > 1) _tile_zero(1);
    if (Tiles > 2) _tile_zero(2);
    if (Tiles > 3) _tile_zero(3);
}

using Dots = int32_t[kTileTokens][kPanelRows];

template <int Tiles>
inline void store_tiles(Dots* dots) {
    _tile_stored(0, dots[0], kLineBytes);
    if (Tiles > 1) _tile_stored(1, dots[1], kLineBytes);
    if (Tiles > 2) _tile_stored(2, dots[2], kLineBytes);
    if (Tiles > 3) _tile_stored(3, dots[3], kLineBytes);
    fence();
}

inline __m512 load_scale(const LinearView& w, const uint8_t* scales, int64_t index) {
    if (w.scale_type == DLB_SCALE_FP16)
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 2 * index)));
    return _mm512_loadu_ps(scales + 4 * index);
}

// acc[t] += a block's contribution for `tokens` tokens from m on, in the order that linear.cpp states.
template <bool Table>
void add_block(const LinearView& w, const uint8_t* panel, const ActView& x, int64_t m, int tokens, int64_t block,
               const int32_t* dots, float* acc) {
    const int64_t index = block * w.scale_step * kPanelRows;
    __m512 w_scale = load_scale(w, panel, index), w_min = _mm512_setzero_ps();
    if (Table) w_scale = _mm512_mul_ps(w_scale, _mm512_set1_ps(w.multiplier));
    const uint8_t* offsets = panel + w.offset_offset;
    __m512i zero_point = _mm512_setzero_si512();
    if (w.offset == DLB_OFFSET_ZERO_POINT)
        zero_point = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(offsets + index)));
    if (w.offset == DLB_OFFSET_MIN) w_min = load_scale(w, offsets, index);
    for (int t = 0; t < tokens; ++t) {
        const int64_t at = (m + t) * x.blocks + block;
        const __m512i sum = _mm512_set1_epi32(x.sum[at]);
        __m512i dot = _mm512_add_epi32(_mm512_loadu_si512(dots + t * kPanelRows), _mm512_set1_epi32(x.start[at]));
        if (w.offset == DLB_OFFSET_ZERO_POINT) dot = _mm512_sub_epi32(dot, _mm512_mullo_epi32(zero_point, sum));
        const __m512 x_scale = _mm512_set1_ps(x.scale[at]);
        __m512 total = _mm512_loadu_ps(acc + t * kPanelRows);
        total = _mm512_add_ps(total, _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(w_scale, x_scale)));
        if (w.offset == DLB_OFFSET_MIN)
            total = _mm512_add_ps(total, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(w_min, x_scale)));
        _mm512_storeu_ps(acc + t * kPanelRows, total);
    }
}

// One segment of Tiles x 16 tokens from m on. The codes of the next step are written while those of this one are
// multiplied: a tile cannot be loaded from stores that are still under way.
template <int Tiles, bool Table>
void run_segment(const LinearView& w, const uint8_t* panel, const ActView& x, int64_t m, int64_t begin, int64_t end,
                 DecodeFn decode_step, float* acc) {
    alignas(64) uint8_t codes[2][kStepBytes];
    alignas(64) Dots dots[Tiles];
    constexpr int kTokens = Tiles * kTileTokens;
    memset(acc, 0, kTokens * kPanelRows * sizeof(float));
    const Walk walk{w, x.blocks};
    Step step = walk.at(begin, 0);
    decode_step(w, panel, step.chunk, step.count, codes[0]);
    clear_tiles<Tiles>();
    for (int now = 0; step.block < end; now ^= 1) {
        const Step next = walk.after(step);
        if (next.block < end) decode_step(w, panel, next.chunk, next.count, codes[now ^ 1]);
        step_tiles<Tiles>(step, codes[now], x.q + m * x.q_stride + step.chunk * kChunk, x.q_stride);
        if (step.ends_block) {
            store_tiles<Tiles>(dots);
            clear_tiles<Tiles>();
            add_block<Table>(w, panel, x, m, kTokens, step.block, dots[0][0], acc);
        }
        step = next;
    }
}

inline void store_rows(const float* value, int tokens, int64_t rows, float* y, int64_t stride) {
    for (int t = 0; t < tokens; ++t)
        memcpy(y + t * stride, value + t * kPanelRows, static_cast<size_t>(rows) * sizeof(float));
}

// A panel's `rows` rows for Tiles x 16 tokens from m on: the segments, and their tree where one sum is wanted.
template <int Tiles, bool Table>
void run_panel(const LinearView& w, int64_t p, const ActView& x, int64_t m, DecodeFn decode_step,
               const LinearOut& out) {
    constexpr int kTokens = Tiles * kTileTokens, kSize = kTokens * kPanelRows;
    const uint8_t* panel = w.panels + p * w.panel_bytes;
    const int64_t first = p * kPanelRows, rows = w.n - first < kPanelRows ? w.n - first : kPanelRows;
    float* y = out.y + m * out.stride + first;
    alignas(64) float value[kSegments][kSize];
    bool present[kSegments];
    for (int s = 0; s < kSegments; ++s) {
        present[s] = w.cuts[s] < w.cuts[s + 1];
        if (!present[s]) continue;
        run_segment<Tiles, Table>(w, panel, x, m, w.cuts[s], w.cuts[s + 1], decode_step, value[s]);
        if (out.segment_stride != 0) store_rows(value[s], kTokens, rows, y + s * out.segment_stride, out.stride);
    }
    if (out.segment_stride != 0) return;
    segment_tree(
        present,
        [&](int a, int b) {
            for (int i = 0; i < kSize; ++i) value[a][i] = value[a][i] + value[b][i];
        },
        [&](int a, int b) { memcpy(value[a], value[b], sizeof value[b]); });
    store_rows(value[0], kTokens, rows, y, out.stride);
}

// What this ISA inherits: the kernels of few tokens.
LinearFn affine_below[kMaxBits + 1], table_below[kMaxBits + 1];

template <int B0, int B1, bool Table>
void linear(const LinearView& w, const ActView& x, int64_t panel_begin, int64_t panel_end, int64_t m_begin,
            int64_t m_end, const LinearOut& out) {
    const int64_t m_tiled = m_end - (m_end - m_begin) % kTileTokens;
    if (m_tiled < m_end)
        (Table ? table_below : affine_below)[B0 + B1](w, x, panel_begin, panel_end, m_tiled, m_end, out);
    if (m_tiled == m_begin) return;
    const ConfiguredTiles configured;
    const DecodeFn decode_step = decode<B0, B1, Table>;
    for (int64_t p = panel_begin; p < panel_end; ++p) {
        int64_t m = m_begin;
        for (; m_tiled - m >= kTiles * kTileTokens; m += kTiles * kTileTokens)
            run_panel<kTiles, Table>(w, p, x, m, decode_step, out);
        for (; m_tiled - m >= 2 * kTileTokens; m += 2 * kTileTokens) run_panel<2, Table>(w, p, x, m, decode_step, out);
        for (; m < m_tiled; m += kTileTokens) run_panel<1, Table>(w, p, x, m, decode_step, out);
    }
}

}  // namespace

void fill_amx(KernelTable& table) {
    memcpy(affine_below, table.linear_affine, sizeof affine_below);
    memcpy(table_below, table.linear_table, sizeof table_below);
    table.linear_affine[1] = linear<1, 0, false>;
    table.linear_affine[2] = linear<2, 0, false>;
    table.linear_affine[3] = linear<2, 1, false>;
    table.linear_affine[4] = linear<4, 0, false>;
    table.linear_affine[5] = linear<4, 1, false>;
    table.linear_affine[6] = linear<4, 2, false>;
    table.linear_affine[8] = linear<8, 0, false>;
    table.linear_table[1] = linear<1, 0, true>;
    table.linear_table[2] = linear<2, 0, true>;
    table.linear_table[3] = linear<2, 1, true>;
    table.linear_table[4] = linear<4, 0, true>;
}

}  // namespace dlb

// Every slot in plain C++ for any x86-64: the fallback, and the version to read first.
#include <string.h>

#include "../api.h"
#include "../layout.h"

namespace dlb {
namespace {

#include "../generic/fma.h"
#include "../generic/half.h"
#include "../generic/tree.h"

constexpr int kTokens = 4;  // rows of x that share one decoding of the weights

// Round to nearest even, for |x| < 2^22: the addition leaves no bits below the unit.
inline int32_t round_even(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23
    return static_cast<int32_t>((x + magic) - magic);
}

void quantize_block(const float* x, int64_t length, int8_t* q, float* scale, int32_t* sum) {
    // Magnitudes compare as integers, and NaN and Inf come out on top.
    uint32_t top = 0;
    for (int64_t i = 0; i < length; ++i) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float peak;
    memcpy(&peak, &top, 4);
    *sum = 0;
    if (top >= 0x7f800000 || peak < 1e-30f) {
        memset(q, 0, static_cast<size_t>(length));
        *scale = top >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
        return;
    }
    const float inverse = 127.0f / peak;
    int32_t total = 0;
    for (int64_t i = 0; i < length; ++i) {
        const int32_t value = round_even(x[i] * inverse);
        q[i] = static_cast<int8_t>(value);
        total += value;
    }
    *scale = peak / 127.0f;
    *sum = total;
}

void quantize(const float* x, int64_t k, int64_t block, int8_t* q, float* scale, int32_t* sum) {
    for (int64_t at = 0, b = 0; at < k; at += block, ++b)
        quantize_block(x + at, k - at < block ? k - at : block, q + at, scale + b, sum + b);
    memset(q + k, 0, static_cast<size_t>(round_up(k, kChunk) - k));
}

// The codes of one chunk, [16][32]; of a table, center + the integers that they stand for.
template <bool Table>
void decode_chunk(const LinearView& w, const uint8_t* panel, int64_t chunk, uint8_t codes[kPanelRows][kChunk]) {
    memset(codes, 0, kPanelRows * kChunk);
    for (int p = 0, shift = 0; p < 2; ++p) {
        const int b = kPlanes[w.bits].bits[p];
        if (b == 0) continue;
        const uint8_t* lines = panel + w.plane_offset[p] + chunk * b * kLineBytes;
        const int per_byte = 8 / b, mask = (1 << b) - 1;
        for (int quad = 0; quad < kChunk / 4; ++quad) {
            const uint8_t* line = lines + quad / per_byte * kLineBytes;
            const int right = p == 1 && b == 1 ? high_place(kPlanes[w.bits].bits[0], quad) : b * (quad % per_byte);
            for (int r = 0; r < kPanelRows; ++r)
                for (int j = 0; j < 4; ++j)
                    codes[r][quad * 4 + j] |= static_cast<uint8_t>(((line[r * 4 + j] >> right) & mask) << shift);
        }
        shift += b;
    }
    if (!Table) return;
    for (int r = 0; r < kPanelRows; ++r)
        for (int i = 0; i < kChunk; ++i) codes[r][i] = w.table[codes[r][i]];
}

float load_float(const uint8_t* p) {
    float value;
    memcpy(&value, p, 4);
    return value;
}

float load_scale(const LinearView& w, const uint8_t* table, int64_t index) {
    if (w.scale_type == DLB_SCALE_FP16) {
        uint16_t half;
        memcpy(&half, table + 2 * index, 2);
        return half_to_float(half);
    }
    return load_float(table + 4 * index);
}

// acc += the block's contribution, for one token and the panel's rows.
template <bool Table>
void add_block(const LinearView& w, const uint8_t* panel, int64_t block, const int32_t* dot, float x_scale, int32_t sum,
               int32_t start, float* acc) {
    const int64_t group = block * w.scale_step * kPanelRows;
    const uint8_t* offsets = panel + w.offset_offset;
    for (int r = 0; r < kPanelRows; ++r) {
        int32_t exact = dot[r] + start;
        if (w.offset == DLB_OFFSET_ZERO_POINT) exact -= offsets[group + r] * sum;
        float w_scale = load_scale(w, panel, group + r);
        if (Table) w_scale = w_scale * w.multiplier;
        acc[r] = acc[r] + static_cast<float>(exact) * (w_scale * x_scale);
        if (w.offset == DLB_OFFSET_MIN)
            acc[r] = acc[r] + static_cast<float>(sum) * (load_scale(w, offsets, group + r) * x_scale);
    }
}

using Values = float[kSegments][kTokens][kPanelRows];  // a tile's segments

template <bool Table>
void run_segments(const LinearView& w, const uint8_t* panel, const ActView& x, int64_t m_begin, int tokens,
                  Values& value) {
    uint8_t codes[kPanelRows][kChunk];
    for (int s = 0; s < kSegments; ++s) {
        memset(value[s], 0, sizeof value[s]);
        for (int64_t b = w.cuts[s]; b < w.cuts[s + 1]; ++b) {
            const int64_t first = b * w.block / kChunk;
            const int64_t chunks = b + 1 == x.blocks ? w.last_chunks : w.block / kChunk;
            int32_t dot[kTokens][kPanelRows] = {};
            for (int64_t c = first; c < first + chunks; ++c) {
                decode_chunk<Table>(w, panel, c, codes);
                for (int t = 0; t < tokens; ++t) {
                    const int8_t* q = x.q + (m_begin + t) * x.q_stride + c * kChunk;
                    for (int r = 0; r < kPanelRows; ++r)
                        for (int i = 0; i < kChunk; ++i) dot[t][r] += codes[r][i] * q[i];
                }
            }
            for (int t = 0; t < tokens; ++t) {
                const int64_t at = (m_begin + t) * x.blocks + b;
                add_block<Table>(w, panel, b, dot[t], x.scale[at], x.sum[at], x.start[at], value[s][t]);
            }
        }
    }
}

// Store the panel's rows of each token from `m` on; y is where the whole product starts.
void store_tile(const LinearView& w, int64_t panel, int64_t m, int tokens, float (&value)[kTokens][kPanelRows],
                float* y, int64_t stride) {
    const int64_t first = panel * kPanelRows, rows = w.n - first < kPanelRows ? w.n - first : kPanelRows;
    for (int t = 0; t < tokens; ++t)
        memcpy(y + (m + t) * stride + first, value[t], static_cast<size_t>(rows) * sizeof(float));
}

// Add the segments of a tile in the tree and store the sum, or store each of them.
void finish_tile(const LinearView& w, int64_t panel, int64_t m, int tokens, Values& value, const LinearOut& out) {
    bool present[kSegments];
    for (int s = 0; s < kSegments; ++s) present[s] = w.cuts[s] < w.cuts[s + 1];
    if (out.segment_stride != 0) {
        for (int s = 0; s < kSegments; ++s)
            if (present[s]) store_tile(w, panel, m, tokens, value[s], out.y + s * out.segment_stride, out.stride);
        return;
    }
    float* flat = value[0][0];
    constexpr int kSize = kTokens * kPanelRows;
    segment_tree(
        present,
        [&](int a, int b) {
            for (int i = 0; i < kSize; ++i) flat[a * kSize + i] += flat[b * kSize + i];
        },
        [&](int a, int b) { memcpy(flat + a * kSize, flat + b * kSize, kSize * sizeof(float)); });
    store_tile(w, panel, m, tokens, value[0], out.y, out.stride);
}

template <bool Table>
void linear(const LinearView& w, const ActView& x, int64_t panel_begin, int64_t panel_end, int64_t m_begin,
            int64_t m_end, const LinearOut& out) {
    Values value;
    for (int64_t p = panel_begin; p < panel_end; ++p)
        for (int64_t m = m_begin; m < m_end; m += kTokens) {
            const int tokens = static_cast<int>(m_end - m < kTokens ? m_end - m : kTokens);
            run_segments<Table>(w, w.panels + p * w.panel_bytes, x, m, tokens, value);
            finish_tile(w, p, m, tokens, value, out);
        }
}

float load_element(int kind, const uint8_t* plane, int64_t index) {
    if (kind == DLB_FP32) return load_float(plane + 4 * index);
    if (kind == DLB_E5M2) return half_to_float(static_cast<uint16_t>(plane[index] << 8));
    if (kind == DLB_E4M3) {
        // Exponent and mantissa at the places of fp16, whose exponent counts from 15 and not 7.
        const int byte = plane[index];
        return 256.0f * half_to_float(static_cast<uint16_t>((byte & 0x80) << 8 | (byte & 0x7f) << 7));
    }
    uint16_t half;
    memcpy(&half, plane + 2 * index, 2);
    if (kind == DLB_FP16) return half_to_float(half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// acc[r] += the elements [k, end) of one block times x.
void add_element_block(const LinearView& w, const uint8_t* panel, int64_t block, int64_t k, int64_t end, const float* x,
                       float* acc) {
    float sum[4][kPanelRows] = {};
    for (int64_t i = k; i < end; ++i)
        for (int r = 0; r < kPanelRows; ++r)
            sum[(i - k) % 4][r] = fma_once(load_element(w.element, panel + w.plane_offset[0], i * kPanelRows + r), x[i],
                                           sum[(i - k) % 4][r]);
    for (int r = 0; r < kPanelRows; ++r) {
        float total = (sum[0][r] + sum[1][r]) + (sum[2][r] + sum[3][r]);
        if (w.scale_type != DLB_SCALE_NONE)
            total = total * (load_scale(w, panel, block * w.scale_step * kPanelRows + r) * w.multiplier);
        acc[r] = acc[r] + total;
    }
}

// acc[r] += the codes of the block's elements [k, end), as the floats that they stand for, times x.
template <bool Table>
void add_fp32_block(const LinearView& w, const uint8_t* panel, int64_t block, int64_t k, int64_t end, const float* x,
                    float* acc) {
    const int64_t group = block * w.scale_step * kPanelRows;
    const uint8_t* offsets = panel + w.offset_offset;
    uint8_t codes[kPanelRows][kChunk];
    float sum[4][kPanelRows] = {};
    for (int64_t i = k; i < end; ++i) {
        if (i % kChunk == 0) decode_chunk<false>(w, panel, i / kChunk, codes);
        for (int r = 0; r < kPanelRows; ++r) {
            const uint8_t code = codes[r][i % kChunk];
            float weight = code;
            if (Table)
                weight = w.values[code];
            else if (w.offset == DLB_OFFSET_MIN)
                weight = fma_once(weight, load_scale(w, panel, group + r), load_scale(w, offsets, group + r));
            else
                weight = weight - static_cast<float>(w.offset == DLB_OFFSET_NONE ? w.center : offsets[group + r]);
            sum[i % 4][r] = fma_once(weight, x[i], sum[i % 4][r]);
        }
    }
    for (int r = 0; r < kPanelRows; ++r) {
        const float total = (sum[0][r] + sum[1][r]) + (sum[2][r] + sum[3][r]);
        acc[r] = acc[r] + total * (w.offset == DLB_OFFSET_MIN ? 1.0f : load_scale(w, panel, group + r));
    }
}

using AddFloats = void (*)(const LinearView& w, const uint8_t* panel, int64_t block, int64_t k, int64_t end,
                           const float* x, float* acc);

template <AddFloats add>
void linear_float(const LinearView& w, const float* x, int64_t x_stride, int64_t panel_begin, int64_t panel_end,
                  int64_t m_begin, int64_t m_end, const LinearOut& out) {
    Values value;
    for (int64_t p = panel_begin; p < panel_end; ++p)
        for (int64_t m = m_begin; m < m_end; ++m) {
            memset(value, 0, sizeof value);
            for (int s = 0; s < kSegments; ++s)
                for (int64_t b = w.cuts[s]; b < w.cuts[s + 1]; ++b) {
                    const int64_t k = b * w.block, end = k + w.block < w.k ? k + w.block : w.k;
                    add(w, w.panels + p * w.panel_bytes, b, k, end, x + m * x_stride, value[s][0]);
                }
            finish_tile(w, p, m, 1, value, out);
        }
}

uint64_t read_all(const uint8_t* data, int64_t bytes) {
    uint64_t total = 0, word;
    for (int64_t i = 0; i + 8 <= bytes; i += 8) {
        memcpy(&word, data + i, 8);
        total += word;
    }
    return total;
}

}  // namespace

void fill_scalar(KernelTable& table) {
    table.quantize = quantize;
    table.signed_bytes = false;
    for (int bits = 1; bits <= kMaxBits; ++bits) {
        table.linear_affine[bits] = linear<false>;
        table.linear_table[bits] = linear<true>;
        table.linear_affine_fp32[bits] = linear_float<add_fp32_block<false>>;
        table.linear_table_fp32[bits] = linear_float<add_fp32_block<true>>;
    }
    for (int kind = 0; kind < kElements; ++kind) table.linear_element[kind] = linear_float<add_element_block>;
    table.read_all = read_all;
    table.floats = float_scalar;
    table.kv = kv_scalar;
}

}  // namespace dlb

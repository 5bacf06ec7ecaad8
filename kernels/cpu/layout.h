// The prepacked layouts, shared by every ISA.
//
//   header | panel 0 | panel 1 | ...          a panel: 16 rows of N (the last one padded with zeros), all of K
//   panel  = scales | mins or zero points | plane 0 | plane 1          each part starts on 64 bytes
//   scales = [blocks][16]                     or [1][16] where one scale serves a row
//   plane of b bits = lines of 64 bytes; byte (r, j) of line l holds the codes k = (l * 8/b + t) * 4 + j of row r,
//                     t = 0 .. 8/b - 1, at bits [b t, b t + b); of a plane of 1 bit beside one of 2, at high_place(t)
//
// Elements (fp8, fp16, bf16, fp32) have one plane instead: [k][16 rows], each element as it is stored.
//
// So 32 codes of K (a chunk) take b lines of every plane, a shift and a mask turn a line into 16 rows x 4 codes, four
// bytes of activations broadcast meet them in maddubs, dpbusd or a tile, and no ISA ever sums across lanes.
#pragma once

#include <string.h>

#include <type_traits>  // for generic/*.h, which are included inside a namespace

#include "api.h"
#include "kernel_table.h"

namespace dlb {

constexpr int kChunk = 32;
static_assert(kElements == DLB_ELEMENTS, "the table of kernels lacks an element");
constexpr int64_t kHeaderBytes = 256;
constexpr int64_t kMaxBlock = 32768;
static_assert(255 * 127 * kMaxBlock < INT32_MAX, "a block's dot product fits int32");
// Half a block's codes of four bits, sixteen times too large.
static_assert(16 * 15 * 127 * (kMaxBlock / 2) < INT32_MAX, "and so does what Dot::kInPlace sums");

struct PackedHeader {
    char magic[8];
    uint32_t version;
    uint32_t layout;  // which family of layouts: 1 = this one
    int64_t total_bytes;
    dlb_linear_spec spec;
};
static_assert(sizeof(PackedHeader) <= kHeaderBytes, "the header has outgrown its room");

constexpr char kMagic[8] = {'d', 'l', 'b', 'p', 'a', 'c', 'k', 0};
constexpr uint32_t kLayoutVersion = 4;
constexpr uint32_t kLayoutPanels = 1;

// Planes of a code, low bits first; {0, 0} for widths that no format has.
struct Planes {
    int bits[2];
};
constexpr Planes kPlanes[kMaxBits + 1] = {{{0, 0}}, {{1, 0}}, {{2, 0}}, {{2, 1}}, {{4, 0}},
                                          {{4, 1}}, {{4, 2}}, {{0, 0}}, {{8, 0}}};

// Which bit of a byte of plane 1 holds quad t of a chunk, if that plane has one bit. Beside a plane of 2 bits, t and t
// + 2 are four bits apart in both planes, so that a shift and a mask move the bits of two quads.
static constexpr int high_place(int low_bits, int t) {
    return low_bits != 2 ? t : (t & 1) | (t & 4) >> 1 | (t & 2) << 1;
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

static inline int64_t block_of(const dlb_linear_spec& s) { return s.group_size == -1 ? 64 : s.group_size; }
static inline int64_t groups_of(const dlb_linear_spec& s) {
    if (s.scale == DLB_SCALE_NONE) return 0;
    return s.group_size == -1 ? 1 : ceil_div(s.k, s.group_size);
}
static inline int64_t element_bytes(const dlb_linear_spec& s) {
    return s.element == DLB_FP32 ? 4 : s.element >= DLB_FP16 ? 2 : 1;
}
static inline int64_t scale_bytes(const dlb_linear_spec& s) { return s.scale == DLB_SCALE_FP32 ? 4 : 2; }
static inline int64_t offset_bytes(const dlb_linear_spec& s) {
    return s.offset == DLB_OFFSET_NONE ? 0 : s.offset == DLB_OFFSET_MIN ? scale_bytes(s) : 1;
}

// Geometry of a spec that dlb_linear_why_not has no objection to; panels start after the header at `packed`.
static inline LinearView view_of(const dlb_linear_spec& s, const void* packed) {
    LinearView v;
    memset(&v, 0, sizeof v);
    v.panels = packed == nullptr ? nullptr : static_cast<const uint8_t*>(packed) + kHeaderBytes;
    v.n = s.n;
    v.k = s.k;
    v.block = block_of(s);
    const int64_t blocks = ceil_div(s.k, v.block);
    v.last_chunks = s.k == 0 ? 0 : ceil_div(s.k - (blocks - 1) * v.block, kChunk);
    v.bits = s.bits;
    v.center = s.center;
    v.offset = s.offset;
    v.scale_type = s.scale;
    v.element = s.element;
    v.multiplier = s.multiplier;
    v.full_bytes = s.codec == DLB_AFFINE && s.bits == 8;
    if (s.codec == DLB_TABLE) {
        // Small integers as codes of five bits, whose products leave more room in int16.
        for (int i = 0; i < 16; ++i) v.full_bytes |= s.table[i] < -16 || s.table[i] > 15;
        v.center = v.full_bytes ? 128 : 16;
        for (int i = 0; i < 16; ++i) v.table[i] = static_cast<uint8_t>(v.center + s.table[i]);
        memcpy(v.values, s.values, sizeof v.values);
    }
    v.scale_step = s.group_size == -1 ? 0 : 1;
    for (int i = 0; i <= kSegments; ++i) v.cuts[i] = ceil_div(s.cuts[i], v.block);
    int64_t at = round_up(groups_of(s) * kPanelRows * scale_bytes(s), kLineBytes);
    v.offset_offset = at;
    at += round_up(groups_of(s) * kPanelRows * offset_bytes(s), kLineBytes);
    if (s.codec == DLB_ELEMENT) {
        v.plane_offset[0] = at;
        v.panel_bytes = at + round_up(s.k * kPanelRows * element_bytes(s), kLineBytes);
        return v;
    }
    for (int p = 0; p < 2; ++p) {
        v.plane_offset[p] = at;
        at += ceil_div(s.k, kChunk) * kPlanes[s.bits].bits[p] * kLineBytes;
    }
    v.panel_bytes = at;
    return v;
}

// What the sum of q is multiplied by to begin a block's dot product: minus what the codes are to be lowered by, plus
// what the ISA has lowered them by.
static inline int32_t start_factor(const LinearView& w, bool signed_bytes) {
    return (w.full_bytes && signed_bytes ? 128 : 0) - (w.offset == DLB_OFFSET_NONE ? w.center : 0);
}

static inline int64_t panels_of(const dlb_linear_spec& s) { return ceil_div(s.n, kPanelRows); }

}  // namespace dlb

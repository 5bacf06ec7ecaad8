// Canonical parts to panels and back (layout.h). Both directions are exact and work panel by panel on the pool.
#include <stddef.h>

#include "layout.h"
#include "threadpool.h"

namespace dlb {
namespace {

const char* codec_why_not(const dlb_linear_spec& s) {
    if (s.codec == DLB_ELEMENT) {
        if (s.element < 0 || s.element >= DLB_ELEMENTS) return "the kind of element is unknown";
        if (s.offset != DLB_OFFSET_NONE) return "elements have no offset";
        if (s.scale == DLB_SCALE_NONE && s.element < DLB_FP16) return "elements of 8 bits need scales";
        return s.scale == DLB_SCALE_NONE && s.group_size != -1 ? "there are groups but no scales" : nullptr;
    }
    if (s.codec != DLB_AFFINE && s.codec != DLB_TABLE) return "the codec is unknown";
    if (s.bits < 1 || s.bits > kMaxBits || kPlanes[s.bits].bits[0] == 0)
        return "codes are not 1, 2, 3, 4, 5, 6 or 8 bits";
    if (s.scale == DLB_SCALE_NONE) return "codes need scales";
    if (s.codec == DLB_TABLE && s.bits > 4) return "a table has more than 16 entries";
    if (s.codec == DLB_TABLE && s.offset != DLB_OFFSET_NONE) return "a table has no offset";
    for (int i = 0; s.codec == DLB_TABLE && i < 16; ++i)
        if (s.table[i] < -127) return "a table holds an integer below -127";
    if (s.compute != DLB_COMPUTE_INT8 && s.compute != DLB_COMPUTE_FP32) return "the kind of arithmetic is unknown";
    if (s.center < 0 || s.center > 255) return "the center code does not fit 8 bits";
    return nullptr;
}

const char* why_not(const dlb_linear_spec& s) {
    if (const char* why = codec_why_not(s)) return why;
    if (s.offset < DLB_OFFSET_NONE || s.offset > DLB_OFFSET_ZERO_POINT) return "the kind of offset is unknown";
    if (s.scale < DLB_SCALE_FP16 || s.scale > DLB_SCALE_NONE) return "scales are neither fp16 nor fp32";
    if (s.n < 0 || s.k < 0) return "a dimension is negative";
    if (s.n > INT32_MAX || s.k > INT32_MAX) return "a dimension is above 2^31 - 1";
    if (s.group_size != -1 && (s.group_size < kChunk || s.group_size % kChunk != 0))
        return "the group size is no multiple of 32";
    if (s.group_size > kMaxBlock) return "the group size is above 32768, where int32 dot products may overflow";
    if (s.cuts[0] != 0 || s.cuts[kSegments] != s.k) return "the segments do not run from 0 to K";
    for (int i = 1; i <= kSegments; ++i) {
        if (s.cuts[i] < s.cuts[i - 1]) return "the segment ends decrease";
        if (s.cuts[i] != s.k && s.cuts[i] % block_of(s) != 0) return "a segment ends within a summation block";
    }
    return nullptr;
}

// 32 codes of b bits from 4 b bytes of a canonical row, and back. `bytes` may be short at the end of a row.
template <int B>
void unpack_chunk(const uint8_t* row, int64_t bytes, uint8_t* codes) {
    uint8_t raw[4 * B] = {};
    memcpy(raw, row, static_cast<size_t>(bytes < 4 * B ? bytes : 4 * B));
    for (int i = 0; i < 4 * B; ++i)
        for (int t = 0; t < 8 / B; ++t) codes[i * (8 / B) + t] = (raw[i] >> (B * t)) & ((1 << B) - 1);
}

template <int B>
void pack_chunk(const uint8_t* codes, uint8_t* row, int64_t bytes) {
    uint8_t raw[4 * B] = {};
    for (int i = 0; i < 4 * B; ++i)
        for (int t = 0; t < 8 / B; ++t) raw[i] |= static_cast<uint8_t>(codes[i * (8 / B) + t] << (B * t));
    memcpy(row, raw, static_cast<size_t>(bytes < 4 * B ? bytes : 4 * B));
}

// Codes of one row and chunk to their places in the chunk's b lines, and back. low_bits: of the plane below, or 0.
template <int B>
void to_lines(const uint8_t* codes, uint8_t* lines, int row, int low_bits) {
    for (int l = 0; l < B; ++l) {
        uint8_t out[4] = {};
        for (int t = 0; t < 8 / B; ++t) {
            const int place = B == 1 ? high_place(low_bits, t) : B * t;
            for (int j = 0; j < 4; ++j) out[j] |= static_cast<uint8_t>(codes[(l * (8 / B) + t) * 4 + j] << place);
        }
        memcpy(lines + l * kLineBytes + row * 4, out, 4);
    }
}

template <int B>
void from_lines(const uint8_t* lines, uint8_t* codes, int row, int low_bits) {
    for (int l = 0; l < B; ++l)
        for (int t = 0; t < 8 / B; ++t) {
            const int place = B == 1 ? high_place(low_bits, t) : B * t;
            for (int j = 0; j < 4; ++j)
                codes[(l * (8 / B) + t) * 4 + j] = (lines[l * kLineBytes + row * 4 + j] >> place) & ((1 << B) - 1);
        }
}

template <int B>
void plane_to_panel(const uint8_t* plane, int64_t k, int rows, int low_bits, uint8_t* panel) {
    const int64_t width = ceil_div(k * B, 8), chunks = ceil_div(k, kChunk);
    uint8_t codes[kChunk];
    for (int64_t c = 0; c < chunks; ++c)
        for (int r = 0; r < rows; ++r) {
            const int64_t at = c * 4 * B;
            unpack_chunk<B>(plane + r * width + at, width - at, codes);
            to_lines<B>(codes, panel + c * B * kLineBytes, r, low_bits);
        }
}

template <int B>
void plane_from_panel(const uint8_t* panel, int64_t k, int rows, int low_bits, uint8_t* plane) {
    const int64_t width = ceil_div(k * B, 8), chunks = ceil_div(k, kChunk);
    uint8_t codes[kChunk];
    for (int64_t c = 0; c < chunks; ++c)
        for (int r = 0; r < rows; ++r) {
            const int64_t at = c * 4 * B;
            from_lines<B>(panel + c * B * kLineBytes, codes, r, low_bits);
            pack_chunk<B>(codes, plane + r * width + at, width - at);
        }
}

void plane_forth(int bits, const uint8_t* plane, int64_t k, int rows, int low_bits, uint8_t* panel) {
    if (bits == 1) plane_to_panel<1>(plane, k, rows, low_bits, panel);
    if (bits == 2) plane_to_panel<2>(plane, k, rows, low_bits, panel);
    if (bits == 4) plane_to_panel<4>(plane, k, rows, low_bits, panel);
    if (bits == 8) plane_to_panel<8>(plane, k, rows, low_bits, panel);
}

void plane_back(int bits, const uint8_t* panel, int64_t k, int rows, int low_bits, uint8_t* plane) {
    if (bits == 1) plane_from_panel<1>(panel, k, rows, low_bits, plane);
    if (bits == 2) plane_from_panel<2>(panel, k, rows, low_bits, plane);
    if (bits == 4) plane_from_panel<4>(panel, k, rows, low_bits, plane);
    if (bits == 8) plane_from_panel<8>(panel, k, rows, low_bits, plane);
}

// [rows][columns] of elements to [columns][16], or back.
template <bool Back, int Size>
void transpose_of(uint8_t* canonical, uint8_t* panel, int64_t columns, int rows) {
    for (int64_t c = 0; c < columns; ++c)
        for (int r = 0; r < rows; ++r) {
            uint8_t* a = canonical + (r * columns + c) * Size;
            uint8_t* b = panel + (c * kPanelRows + r) * Size;
            memcpy(Back ? a : b, Back ? b : a, Size);
        }
}

template <bool Back>
void transpose(uint8_t* canonical, uint8_t* panel, int64_t columns, int rows, int64_t size) {
    if (size == 1) transpose_of<Back, 1>(canonical, panel, columns, rows);
    if (size == 2) transpose_of<Back, 2>(canonical, panel, columns, rows);
    if (size == 4) transpose_of<Back, 4>(canonical, panel, columns, rows);
}

// Move one panel in the direction that Back says.
template <bool Back>
void move_panel(const dlb_linear_spec& s, const LinearView& v, const dlb_linear_parts& parts, uint8_t* panel,
                int64_t index) {
    const int64_t first = index * kPanelRows, groups = groups_of(s);
    const int rows = static_cast<int>(s.n - first < kPanelRows ? s.n - first : kPanelRows);
    const auto at = [&](void* part, int64_t row_bytes) { return static_cast<uint8_t*>(part) + first * row_bytes; };
    if (groups > 0) transpose<Back>(at(parts.scale, groups * scale_bytes(s)), panel, groups, rows, scale_bytes(s));
    if (s.codec == DLB_ELEMENT) {
        const int64_t size = element_bytes(s);
        transpose<Back>(at(parts.planes[0], s.k * size), panel + v.plane_offset[0], s.k, rows, size);
        return;
    }
    if (s.offset != DLB_OFFSET_NONE)
        transpose<Back>(at(parts.offset, groups * offset_bytes(s)), panel + v.offset_offset, groups, rows,
                        offset_bytes(s));
    for (int p = 0; p < 2; ++p) {
        const int bits = kPlanes[s.bits].bits[p], low_bits = p == 0 ? 0 : kPlanes[s.bits].bits[0];
        if (bits == 0) continue;
        uint8_t* plane = at(parts.planes[p], ceil_div(s.k * bits, 8));
        uint8_t* lines = panel + v.plane_offset[p];
        if (Back)
            plane_back(bits, lines, s.k, rows, low_bits, plane);
        else
            plane_forth(bits, plane, s.k, rows, low_bits, lines);
    }
}

// Parts without elements have no address.
bool parts_given(const dlb_linear_spec& s, const dlb_linear_parts& parts) {
    const bool codes = s.n > 0 && s.k > 0, groups = s.n > 0 && groups_of(s) > 0;
    return (!codes || parts.planes[0] != nullptr) &&
           (!codes || s.codec == DLB_ELEMENT || kPlanes[s.bits].bits[1] == 0 || parts.planes[1] != nullptr) &&
           (!groups || parts.scale != nullptr) && (!groups || s.offset == DLB_OFFSET_NONE || parts.offset != nullptr);
}

}  // namespace
}  // namespace dlb

DLB_API const char* dlb_linear_why_not(const dlb_linear_spec* spec) { return dlb::why_not(*spec); }

DLB_API int64_t dlb_linear_packed_bytes(const dlb_linear_spec* spec) {
    if (dlb::why_not(*spec) != nullptr) return DLB_BAD_SPEC;
    return dlb::kHeaderBytes + dlb::panels_of(*spec) * dlb::view_of(*spec, nullptr).panel_bytes;
}

DLB_API int dlb_linear_prepack(const dlb_linear_spec* spec, const dlb_linear_parts* parts, void* packed) {
    const int64_t bytes = dlb_linear_packed_bytes(spec);
    if (bytes < 0 || !dlb::parts_given(*spec, *parts)) return DLB_BAD_SPEC;
    memset(packed, 0, dlb::kHeaderBytes);
    dlb::PackedHeader header;
    memset(&header, 0, sizeof header);
    memcpy(header.magic, dlb::kMagic, sizeof header.magic);
    header.version = dlb::kLayoutVersion;
    header.layout = dlb::kLayoutPanels;
    header.total_bytes = bytes;
    header.spec = *spec;
    memcpy(packed, &header, sizeof header);
    const dlb::LinearView view = dlb::view_of(*spec, packed);
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            uint8_t* panel = const_cast<uint8_t*>(view.panels) + p * view.panel_bytes;
            memset(panel, 0, static_cast<size_t>(view.panel_bytes));
            dlb::move_panel<false>(*spec, view, *parts, panel, p);
        }
    };
    dlb::parallel(dlb::panels_of(*spec), 4, body);
    return DLB_OK;
}

DLB_API int dlb_linear_spec_of(const void* packed, int64_t bytes, dlb_linear_spec* spec) {
    if (bytes < dlb::kHeaderBytes) return DLB_BAD_BUFFER;
    dlb::PackedHeader header;
    memcpy(&header, packed, sizeof header);
    if (memcmp(header.magic, dlb::kMagic, sizeof header.magic) != 0 || header.version != dlb::kLayoutVersion ||
        header.layout != dlb::kLayoutPanels || header.total_bytes != bytes ||
        dlb_linear_packed_bytes(&header.spec) != bytes)
        return DLB_BAD_BUFFER;
    *spec = header.spec;
    return DLB_OK;
}

DLB_API int dlb_linear_unpack(const void* packed, int64_t bytes, const dlb_linear_parts* parts) {
    dlb_linear_spec spec;
    const int status = dlb_linear_spec_of(packed, bytes, &spec);
    if (status != DLB_OK) return status;
    if (!dlb::parts_given(spec, *parts)) return DLB_BAD_SPEC;
    const dlb::LinearView view = dlb::view_of(spec, packed);
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p)
            dlb::move_panel<true>(spec, view, *parts, const_cast<uint8_t*>(view.panels) + p * view.panel_bytes, p);
    };
    dlb::parallel(dlb::panels_of(spec), 4, body);
    return DLB_OK;
}

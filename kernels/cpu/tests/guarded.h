// What the files of the guarded driver share: buffers between forbidden pages, random contents, packed weights, checks.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <vector>

#include "../api.h"

namespace guarded {

inline int failures = 0;
inline long calls = 0;
inline bool brief = false;
inline bool at_end = true;  // whether buffers end at a forbidden page, or begin after one

// `count` numbers between two forbidden pages, touching one of them.
template <class T>
class Guarded {
  public:
    explicit Guarded(int64_t count) : size_(static_cast<size_t>(count)) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = size_ * sizeof(T);
        const size_t room = (bytes + page - 1) / page * page;
        total_ = room + 2 * page;
        base_ = static_cast<char*>(mmap(nullptr, total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED || (room > 0 && mprotect(base_ + page, room, PROT_READ | PROT_WRITE) != 0)) abort();
        data_ = reinterpret_cast<T*>(base_ + page + (at_end ? room - bytes : 0));
    }
    ~Guarded() { munmap(base_, total_); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    T* data() { return data_; }
    size_t size() const { return size_; }
    T& operator[](size_t i) { return data_[i]; }

  private:
    size_t size_, total_;
    char* base_;
    T* data_;
};

inline uint64_t random_state = 0x9e3779b97f4a7c15;

inline uint32_t random_bits() {
    random_state = random_state * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<uint32_t>(random_state >> 33);
}

inline float random_float() { return static_cast<float>(static_cast<int>(random_bits() & 0xffff) - 32768) / 16384.0f; }

template <class T>
void fill_bytes(Guarded<T>& buffer, uint32_t mask) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(buffer.data());
    for (size_t i = 0; i < buffer.size() * sizeof(T); ++i) bytes[i] = static_cast<uint8_t>(random_bits() & mask);
}

inline void fill_floats(Guarded<float>& buffer) {
    for (size_t i = 0; i < buffer.size(); ++i) buffer[i] = random_float();
}

template <class T>
T zeroed() {
    T made;
    memset(&made, 0, sizeof made);
    return made;
}

inline void check(bool good, const char* what, const char* isa, int64_t a, int64_t b, int64_t c) {
    ++calls;
    if (good) return;
    ++failures;
    fprintf(stderr, "%s on %s: wrong at (%ld, %ld, %ld)\n", what, isa, static_cast<long>(a), static_cast<long>(b),
            static_cast<long>(c));
}

inline std::vector<int> instruction_sets() {
    std::vector<int> found;
    for (int i = 0; i < dlb_isa_count(); ++i)
        if (dlb_isa_supported(i)) found.push_back(i);
    return found;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Segments as floor(i U / 8) of the U blocks, or, `upper`, the four upper ones alone.
inline void cut(dlb_linear_spec& spec, bool upper) {
    const int64_t block = spec.group_size == -1 ? 64 : spec.group_size, units = ceil_div(spec.k, block);
    for (int i = 0; i <= 8; ++i) {
        const int64_t unit = upper ? (i < 4 ? 0 : (i - 4) * units / 4) : i * units / 8;
        spec.cuts[i] = unit * block < spec.k ? unit * block : spec.k;
    }
}

struct Code {
    int codec, bits, offset, element, compute;
};

constexpr int kPlaneBits[9][2] = {{0, 0}, {1, 0}, {2, 0}, {2, 1}, {4, 0}, {4, 1}, {4, 2}, {0, 0}, {8, 0}};

inline dlb_linear_spec spec_of(const Code& code, int64_t n, int64_t k, int64_t group, int scale, bool upper) {
    dlb_linear_spec spec;
    memset(&spec, 0, sizeof spec);
    spec.n = n;
    spec.k = k;
    spec.group_size = group;
    spec.codec = code.codec;
    spec.bits = code.bits;
    spec.offset = code.offset;
    spec.element = code.element;
    spec.compute = code.compute;
    spec.center = code.codec == DLB_AFFINE && code.offset == DLB_OFFSET_NONE ? 1 << (code.bits - 1) : 0;
    spec.scale = scale;
    spec.multiplier = 1.0f / 127;
    for (int i = 0; i < 16; ++i) {
        spec.table[i] = static_cast<int8_t>(16 * i - 113);
        spec.values[i] = static_cast<float>(spec.table[i]) / 127;
    }
    cut(spec, upper);
    return spec;
}

struct Weight {
    Guarded<uint8_t> low, high, scale, offset;

    Weight(int64_t low_bytes, int64_t high_bytes, int64_t scale_bytes, int64_t offset_bytes)
        : low(low_bytes), high(high_bytes), scale(scale_bytes), offset(offset_bytes) {}

    dlb_linear_parts parts() {
        dlb_linear_parts p;
        memset(&p, 0, sizeof p);
        p.planes[0] = low.data();
        p.planes[1] = high.size() > 0 ? high.data() : nullptr;
        p.scale = scale.size() > 0 ? scale.data() : nullptr;
        p.offset = offset.size() > 0 ? offset.data() : nullptr;
        return p;
    }
};

inline void fill_scales(Guarded<uint8_t>& buffer, int scale) {
    // fp16 0x2c00 .. 0x2fff and fp32 0x3c800000 .. : positive and neither huge nor subnormal.
    const size_t step = scale == DLB_SCALE_FP16 ? 2 : 4;
    for (size_t i = 0; i + step <= buffer.size(); i += step) {
        const uint32_t bits =
            scale == DLB_SCALE_FP16 ? 0x2c00 + (random_bits() & 0x3ff) : 0x3c800000 + random_bits() % 9999;
        memcpy(buffer.data() + i, &bits, step);
    }
}

// A random weight [n, k] and what a spec says of it.
struct Random {
    dlb_linear_spec spec;
    int64_t low, high, scale, offset;  // bytes of the parts
    std::unique_ptr<Weight> weight;

    std::unique_ptr<Weight> room() const { return std::make_unique<Weight>(low, high, scale, offset); }
};

inline Random random_weight(const Code& code, int64_t n, int64_t k, int64_t group, bool upper) {
    const bool element = code.codec == DLB_ELEMENT, plain = element && code.element >= DLB_FP16;
    const int scale = plain ? DLB_SCALE_NONE : code.bits % 2 == 1 ? DLB_SCALE_FP32 : DLB_SCALE_FP16;
    const int64_t groups = plain ? 0 : group == -1 ? 1 : ceil_div(k, group), size = scale == DLB_SCALE_FP32 ? 4 : 2;
    const int64_t width = code.element == DLB_FP32 ? 4 : plain ? 2 : 1;
    const int64_t offset = code.offset == DLB_OFFSET_NONE ? 0 : code.offset == DLB_OFFSET_MIN ? size : 1;
    Random made;
    made.spec = spec_of(code, n, k, plain ? -1 : group, scale, upper);
    made.low = element ? n * k * width : n * ceil_div(k * kPlaneBits[code.bits][0], 8);
    made.high = element ? 0 : n * ceil_div(k * kPlaneBits[code.bits][1], 8);
    made.scale = n * groups * size;
    made.offset = n * groups * offset;
    made.weight = made.room();
    fill_bytes(made.weight->low, plain ? 0x3b : element ? 0x37 : 0xff);  // finite elements
    fill_bytes(made.weight->high, 0xff);
    fill_scales(made.weight->scale, scale);
    if (code.offset == DLB_OFFSET_MIN)
        fill_scales(made.weight->offset, scale);
    else
        fill_bytes(made.weight->offset, (1u << code.bits) - 1);
    return made;
}

// The same, prepacked.
using Packed = std::unique_ptr<Guarded<uint8_t>>;

inline Packed packed_weight(const Code& code, int64_t n, int64_t k, int64_t group) {
    Random random = random_weight(code, n, k, group, false);
    const dlb_linear_parts parts = random.weight->parts();
    Packed packed = std::make_unique<Guarded<uint8_t>>(dlb_linear_packed_bytes(&random.spec));
    check(dlb_linear_prepack(&random.spec, &parts, packed->data()) == DLB_OK, "prepack", "any", n, k, group);
    return packed;
}

inline int64_t bytes_of(const Packed& packed) { return static_cast<int64_t>(packed->size()); }

// Weights of every path.
constexpr Code kSym4 = {DLB_AFFINE, 4, DLB_OFFSET_NONE, 0, DLB_COMPUTE_INT8};
constexpr Code kAsym5 = {DLB_AFFINE, 5, DLB_OFFSET_MIN, 0, DLB_COMPUTE_INT8};
constexpr Code kZero3 = {DLB_AFFINE, 3, DLB_OFFSET_ZERO_POINT, 0, DLB_COMPUTE_INT8};
constexpr Code kSym8 = {DLB_AFFINE, 8, DLB_OFFSET_NONE, 0, DLB_COMPUTE_INT8};
constexpr Code kTable4 = {DLB_TABLE, 4, DLB_OFFSET_NONE, 0, DLB_COMPUTE_INT8};
constexpr Code kFp16 = {DLB_ELEMENT, 8, 0, DLB_FP16, 0};
constexpr Code kE4M3 = {DLB_ELEMENT, 8, 0, DLB_E4M3, 0};
constexpr Code kSym4Fp32 = {DLB_AFFINE, 4, DLB_OFFSET_NONE, 0, DLB_COMPUTE_FP32};

// Call `run` on every instruction set and compare what it leaves in `out` with what the first one left.
inline void compare(const char* what, Guarded<uint8_t>& out, int64_t a, int64_t b, int64_t c,
                    const std::function<int()>& run) {
    std::vector<uint8_t> want;
    for (const int isa : instruction_sets()) {
        dlb_isa_select(isa);
        fill_bytes(out, 0);
        check(run() == DLB_OK, what, dlb_isa_name(isa), a, b, c);
        if (want.empty()) want.assign(out.data(), out.data() + out.size());
        check(memcmp(want.data(), out.data(), out.size()) == 0, what, dlb_isa_name(isa), a, b, c);
    }
}

void fused_products();  // guarded_fused.cpp
void experts();
void routes();
void decoders();  // guarded_decoder.cpp

}  // namespace guarded

// See tree_sum.h. The vector code and the plain code give the same bits.
#include "tree_sum.h"

#include <immintrin.h>
#include <string.h>

#include "shm.h"

namespace {

constexpr size_t kLine = 64;
constexpr size_t kBlock = 512;  // floats added at a time: sources and temporaries fit the L1 cache
constexpr int kMaxDepth = 8;    // 16 ranks need a stack of 5

struct Arithmetic {
    void (*add)(const float* a, const float* b, float* out, size_t n);
    void (*widen[3])(const void* in, float* out, size_t n);
    void (*narrow[3])(const float* in, void* out, size_t n);
};

#include "generic/half.h"

void add_plain(const float* a, const float* b, float* out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}

void widen_bf16_plain(const void* in, float* out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = bfloat_to_float(static_cast<const uint16_t*>(in)[i]);
}

void narrow_bf16_plain(const float* in, void* out, size_t n) {
    for (size_t i = 0; i < n; i++) static_cast<uint16_t*>(out)[i] = float_to_bfloat(in[i]);
}

void widen_fp16_plain(const void* in, float* out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = half_to_float(static_cast<const uint16_t*>(in)[i]);
}

void narrow_fp16_plain(const float* in, void* out, size_t n) {
    for (size_t i = 0; i < n; i++) static_cast<uint16_t*>(out)[i] = float_to_half(in[i]);
}

const Arithmetic kPlain = {
    add_plain,
    {nullptr, widen_bf16_plain, widen_fp16_plain},
    {nullptr, narrow_bf16_plain, narrow_fp16_plain},
};

#define DLB_AVX2 __attribute__((target("avx2,f16c")))

DLB_AVX2 void add_avx2(const float* a, const float* b, float* out, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m256 low = _mm256_add_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i));
        __m256 high = _mm256_add_ps(_mm256_loadu_ps(a + i + 8), _mm256_loadu_ps(b + i + 8));
        _mm256_storeu_ps(out + i, low);
        _mm256_storeu_ps(out + i + 8, high);
    }
    for (; i < n; i++) out[i] = a[i] + b[i];
}

DLB_AVX2 void widen_bf16_avx2(const void* in, float* out, size_t n) {
    const uint16_t* source = static_cast<const uint16_t*>(in);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
        __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
        _mm256_storeu_ps(out + i, _mm256_castsi256_ps(wide));
    }
    widen_bf16_plain(source + i, out + i, n - i);
}

DLB_AVX2 void narrow_bf16_avx2(const float* in, void* out, size_t n) {
    uint16_t* target = static_cast<uint16_t*>(out);
    const __m256i one = _mm256_set1_epi32(1), bias = _mm256_set1_epi32(0x7fff);
    const __m256i quiet = _mm256_set1_epi32(0x400000);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 x = _mm256_loadu_ps(in + i);
        __m256i u = _mm256_castps_si256(x);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), one);
        __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(bias, odd));
        __m256i unordered = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_or_si256(u, quiet), unordered), 16);
        __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), packed);
    }
    narrow_bf16_plain(in + i, target + i, n - i);
}

DLB_AVX2 void widen_fp16_avx2(const void* in, float* out, size_t n) {
    const uint16_t* source = static_cast<const uint16_t*>(in);
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
    widen_fp16_plain(source + i, out + i, n - i);
}

DLB_AVX2 void narrow_fp16_avx2(const float* in, void* out, size_t n) {
    uint16_t* target = static_cast<uint16_t*>(out);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), half);
    }
    narrow_fp16_plain(in + i, target + i, n - i);
}

const Arithmetic kAvx2 = {
    add_avx2,
    {nullptr, widen_bf16_avx2, widen_fp16_avx2},
    {nullptr, narrow_bf16_avx2, narrow_fp16_avx2},
};

const Arithmetic* arithmetic() {
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    return avx2 ? &kAvx2 : &kPlain;
}

// dst may be one of the sources: a block is read to its end before it is written.
void sum(const Arithmetic& math, const int8_t* program, int length, const void* const* sources, void* dst, size_t count,
         int dtype) {
    alignas(kLine) float temporary[kMaxDepth][kBlock];
    const float* stack[kMaxDepth];
    const size_t element = dlb::tree_width(dtype);
    const bool wide = dtype == DLB_SHM_FP32;
    for (size_t start = 0; start < count; start += kBlock) {
        const size_t n = count - start < kBlock ? count - start : kBlock;
        char* target = static_cast<char*>(dst) + start * element;
        int depth = 0;
        for (int i = 0; i < length; i++) {
            if (program[i] < 0) {
                depth--;
                float* out = wide && i == length - 1 ? reinterpret_cast<float*>(target) : temporary[depth - 1];
                math.add(stack[depth - 1], stack[depth], out, n);
                stack[depth - 1] = out;
                continue;
            }
            const char* source = static_cast<const char*>(sources[int(program[i])]) + start * element;
            if (wide) {
                stack[depth] = reinterpret_cast<const float*>(source);
            } else {
                math.widen[dtype](source, temporary[depth], n);
                stack[depth] = temporary[depth];
            }
            depth++;
        }
        if (!wide) math.narrow[dtype](stack[0], target, n);
    }
}

}  // namespace

namespace dlb {

size_t tree_width(int dtype) { return dtype == DLB_SHM_FP32 ? 4 : 2; }

void tree_sum(const int8_t* program, int length, const void* const* sources, void* dst, size_t count, int dtype) {
    sum(*arithmetic(), program, length, sources, dst, count, dtype);
}

}  // namespace dlb

void dlb_shm_tree_sum(const int8_t* program, int program_length, const void* const* sources, void* dst, size_t count,
                      int dtype, int scalar) {
    sum(scalar ? kPlain : *arithmetic(), program, program_length, sources, dst, count, dtype);
}

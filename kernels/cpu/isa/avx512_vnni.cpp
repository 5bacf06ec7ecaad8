// AVX-512 with VNNI: one line of a panel is one register, sixteen rows of N.
#include <string.h>

#include "../api.h"
#include "../intrinsics.h"
#include "../layout.h"

namespace dlb {
namespace {

#include "../generic/tree.h"

struct Avx512 {
    using I = __m512i;
    using F = __m512;
    static constexpr int kLanes = 16, kHalves = 1, kPrefetch = 8192;
    static constexpr int kTokens = DLB_TOKENS(8), kElementTokens = DLB_TOKENS(6);
    static constexpr bool kSignedBytes = false;

    template <int Bits, int Tokens>
    struct Dot {
        // Two chains where few tokens leave the adder's latency bare.
        static constexpr int kChains = Tokens <= 4 ? 2 : 1;
        static constexpr bool kInPlace = Bits == 4 && kChains == 2;  // exact: kMaxBlock in layout.h
        I part[kChains];

        inline void begin(I start) {
            part[0] = start;
            for (int i = 1; i < kChains; ++i) part[i] = _mm512_setzero_si512();
        }
        template <int Q>
        inline __attribute__((always_inline)) void step(I w, I x) {
            part[Q % kChains] = _mm512_dpbusd_epi32(part[Q % kChains], w, x);
        }
        inline I sum() const {
            if (kChains == 1) return part[0];
            const I odd = part[kChains - 1];
            return _mm512_add_epi32(part[0], kInPlace ? _mm512_srai_epi32(odd, 4) : odd);
        }
    };

    static inline I load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static inline I and_(I a, I b) { return _mm512_and_si512(a, b); }
    static inline I or_(I a, I b) { return _mm512_or_si512(a, b); }
    static inline I set1_8(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
    template <int S>
    static inline I srl16(I a) {
        return _mm512_srli_epi16(a, S);
    }
    template <int S>
    static inline I sll16(I a) {
        return _mm512_slli_epi16(a, S);
    }
    static inline I load_table(const uint8_t* p) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static inline I lookup(I entries, I codes) { return _mm512_shuffle_epi8(entries, codes); }
    static inline I quad(const int8_t* p) {
        int32_t four;
        __builtin_memcpy(&four, p, 4);
        return _mm512_set1_epi32(four);
    }
    static inline F zero_f() { return _mm512_setzero_ps(); }
    static inline F set1_f(float v) { return _mm512_set1_ps(v); }
    static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
    static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
    static inline F to_f(I a) { return _mm512_cvtepi32_ps(a); }
    static inline I set1_32(int v) { return _mm512_set1_epi32(v); }
    // a - center * factor, all int32
    static inline I sub_scaled(I a, I center, int32_t factor) {
        return _mm512_sub_epi32(a, _mm512_mullo_epi32(center, _mm512_set1_epi32(factor)));
    }
    static inline I widen_codes(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static inline F scale16(const uint8_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static inline F scale32(const uint8_t* p) { return _mm512_loadu_ps(p); }
    static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static inline F element(Const<DLB_E5M2>, const uint8_t* p) {
        const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm512_cvtph_ps(_mm256_slli_epi16(wide, 8));
    }
    // Sign, four bits of exponent and three of mantissa at the places of fp16, whose exponent counts from 15 and not 7.
    static inline F element(Const<DLB_E4M3>, const uint8_t* p) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        const __m256i keep = _mm256_set1_epi16(static_cast<short>(0xbfff));
        return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), keep));
    }
    static constexpr bool alternates(int) { return false; }
    static inline F element(Const<DLB_FP16>, const uint8_t* p) { return scale16(p); }
    static inline F element(Const<DLB_BF16>, const uint8_t* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static inline F element(Const<DLB_FP32>, const uint8_t* p) { return scale32(p); }

    // Byte J of every 32-bit lane as a float.
    template <int J>
    static inline F byte_f(I codes) {
        if constexpr (J > 0) codes = _mm512_srli_epi32(codes, 8 * J);
        if constexpr (J < 3) codes = _mm512_and_si512(codes, _mm512_set1_epi32(255));
        return _mm512_cvtepi32_ps(codes);
    }
    using Values = F;
    static inline Values load_values(const float* p) { return _mm512_loadu_ps(p); }
    // The permutation looks at four bits of each lane.
    template <int Bits, int J>
    static inline F pick(Values values, I codes) {
        return _mm512_permutexvar_ps(J > 0 ? _mm512_srli_epi32(codes, 8 * J) : codes, values);
    }
};

#include "../generic/linear_affine.h"
#include "../generic/linear_element.h"
#include "../generic/linear_fp32.h"

}  // namespace

void fill_attention(KernelTable& table);  // avx512_vnni.attention.cpp

void fill_avx512_vnni(KernelTable& table) {
    fill_attention(table);
    fill_affine<Avx512>(table);
    fill_element<Avx512>(table);
    fill_fp32<Avx512>(table);
}

}  // namespace dlb

// AVX2 with F16C: unsigned codes straight into maddubs, widened from int16 as seldom as their width allows.
#include <immintrin.h>
#include <string.h>

#include "../api.h"
#include "../layout.h"

namespace dlb {
namespace {

#include "../generic/avx2_base.h"
#include "../generic/tree.h"

struct Avx2 : Base256 {
    static constexpr int kTokens = DLB_TOKENS(4), kElementTokens = DLB_TOKENS(3);
    static constexpr bool kSignedBytes = true;

    // A pair of products is at most 2 * 127 * (2^bits - 1), so this many pairs fit an int16: 8 of 4 bits (30480),
    // 4 of 5 bits (31496), 2 of 6 bits (32004). Codes of 8 bits come signed: maddubs wants |c| and x with c's sign,
    // one pair is at most 2 * 128 * 127 = 32512. Entries of a table (9) lie within +-127.
    template <int Bits, int Tokens>
    struct Dot {
        // Keep the compiler from adding in a tree, whose leaves would not fit the registers.
        static inline void in_order(I& sum) { __asm__("" : "+x"(sum)); }

        static constexpr bool kInPlace = false;  // the pairs would not fit an int16
        static constexpr int kPairs = Bits <= 4 ? 8 : Bits == 5 ? 4 : Bits == 6 ? 2 : 1;
        I narrow, wide;

        inline void begin(I start) { wide = start; }
        template <int Q>
        inline __attribute__((always_inline)) void step(I w, I x) {
            I pairs;
            if constexpr (Bits == 9 && Tokens == 1)  // the absolute value of x serves both halves of a line
                pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
            else if constexpr (Bits >= 8)
                pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
            else
                pairs = _mm256_maddubs_epi16(w, x);
            narrow = Q % kPairs == 0 ? pairs : _mm256_add_epi16(narrow, pairs);
            in_order(narrow);
            if constexpr (Q % kPairs == kPairs - 1) {
                wide = _mm256_add_epi32(wide, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
                in_order(wide);
            }
        }
        inline I sum() const { return wide; }
    };
};

#include "../generic/linear_affine.h"
#include "../generic/linear_element.h"
#include "../generic/linear_fp32.h"

}  // namespace

void fill_avx2(KernelTable& table) {
    table.quantize = quantize_row;
    table.read_all = read_lines;
    table.floats = float_avx2;
    table.kv = kv_avx2;
    fill_affine<Avx2>(table);
    fill_element<Avx2>(table);
    fill_fp32<Avx2>(table);
}

}  // namespace dlb

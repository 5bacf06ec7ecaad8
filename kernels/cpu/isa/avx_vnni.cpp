// AVX-VNNI: 256-bit dpbusd adds four products of unsigned codes and signed activations straight into int32.
#include <string.h>

#include "../api.h"
#include "../intrinsics.h"
#include "../layout.h"

namespace dlb {
namespace {

#include "../generic/avx2_base.h"
#include "../generic/tree.h"

struct AvxVnni : Base256 {
    static constexpr int kTokens = DLB_TOKENS(6);
    static constexpr bool kSignedBytes = false;

    template <int Bits, int Tokens>
    struct Dot {
        // Two chains where few tokens leave the adder's latency bare.
        static constexpr int kChains = Tokens <= 2 ? 2 : 1;
        static constexpr bool kInPlace = Bits == 4 && kChains == 2;  // exact: kMaxBlock in layout.h
        I part[kChains];

        inline void begin(I start) {
            part[0] = start;
            for (int i = 1; i < kChains; ++i) part[i] = _mm256_setzero_si256();
        }
        template <int Q>
        inline __attribute__((always_inline)) void step(I w, I x) {
            part[Q % kChains] = _mm256_dpbusd_avx_epi32(part[Q % kChains], w, x);
        }
        inline I sum() const {
            if (kChains == 1) return part[0];
            const I odd = part[kChains - 1];
            return _mm256_add_epi32(part[0], kInPlace ? _mm256_srai_epi32(odd, 4) : odd);
        }
    };
};

#include "../generic/linear_affine.h"

}  // namespace

void fill_avx_vnni(KernelTable& table) { fill_affine<AvxVnni>(table); }

}  // namespace dlb

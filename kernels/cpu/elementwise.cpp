// The elementwise steps, row after row over the pool's threads.
#include "elementwise.h"

#include <string.h>

#include <algorithm>

#include "float_kernels.h"
#include "kernel_table.h"
#include "threadpool.h"

namespace dlb {

// Every ISA above scalar has AVX2 and F16C.
const FloatKernels& float_kernels() { return strcmp(active_table().name, "scalar") == 0 ? float_scalar : float_avx2; }

namespace {
// Less than this many numbers per task is not worth waking a thread for.
constexpr int64_t kGrain = 16384;
}  // namespace

}  // namespace dlb

void dlb_exp_poly(const float* x, float* out, int64_t n) { dlb::float_kernels().exp(x, out, n); }

void dlb_silu_mul(const float* gate, const float* up, float* out, int64_t n) {
    const dlb::FloatKernels& kernels = dlb::float_kernels();
    auto body = [&](int64_t begin, int64_t end) {
        kernels.silu_mul(gate + begin, up + begin, out + begin, end - begin);
    };
    dlb::parallel(n, dlb::kGrain, body);
}

void dlb_rms_norm(const float* x, const float* weight, float eps, float* out, int64_t rows, int64_t k) {
    const dlb::FloatKernels& kernels = dlb::float_kernels();
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) kernels.rms_norm(x + r * k, weight, eps, out + r * k, k);
    };
    dlb::parallel(rows, std::max<int64_t>(1, dlb::kGrain / std::max<int64_t>(1, k)), body);
}

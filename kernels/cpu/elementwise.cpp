// Steps without a product: routing, a shared expert's gate, the exponential.
#include "elementwise.h"

#include <string.h>

#include <algorithm>
#include <limits>

#include "float_kernels.h"
#include "fused.h"
#include "kernel_table.h"
#include "threadpool.h"

namespace dlb {

namespace {

// Less than this many numbers per task is not worth waking a thread for.
constexpr int64_t kGrain = 16384;
constexpr int64_t kLanes = 16;

// The index of the largest logit that is not taken, the lowest of equals; NaN loses to none and beats none.
int64_t next_expert(const float* logits, int64_t experts, const bool* taken) {
    int64_t best = -1;
    for (int64_t i = 0; i < experts; ++i)
        if (!taken[i] && (best < 0 || logits[i] > logits[best])) best = i;
    return best;
}

void route_row(const FloatKernels& kernels, const float* logits, int64_t experts, int64_t top_k, bool normalize,
               int32_t* ids, float* weights) {
    float e[kDlbMaxExperts];
    bool taken[kDlbMaxExperts] = {};
    const int64_t padded = (experts + kLanes - 1) / kLanes * kLanes;
    memcpy(e, logits, static_cast<size_t>(experts) * 4);
    std::fill(e + experts, e + padded, -std::numeric_limits<float>::infinity());
    float max, sum, chosen = 0.0f;
    kernels.softmax(e, static_cast<int>(padded), &max, &sum);
    for (int64_t s = 0; s < top_k; ++s) {
        const int64_t i = next_expert(logits, experts, taken);
        taken[i] = true;
        ids[s] = static_cast<int32_t>(i);
        weights[s] = e[i] / sum;
        chosen = chosen + weights[s];
    }
    for (int64_t s = 0; s < top_k && normalize; ++s) weights[s] = weights[s] / chosen;
}

}  // namespace
}  // namespace dlb

void dlb_exp_poly(const float* x, float* out, int64_t n) { dlb::float_kernels().exp(x, out, n); }

DLB_API int dlb_route(const float* logits, int64_t logits_stride, int64_t m, int64_t experts, int64_t top_k,
                      int32_t normalize, int32_t* ids, int64_t ids_stride, float* weights, int64_t weights_stride) {
    if (top_k < 1 || top_k > experts || experts > kDlbMaxExperts) return DLB_BAD_SPEC;
    const dlb::FloatKernels& kernels = dlb::float_kernels();
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            dlb::route_row(kernels, logits + r * logits_stride, experts, top_k, normalize != 0, ids + r * ids_stride,
                           weights + r * weights_stride);
    };
    dlb::parallel(m, std::max<int64_t>(1, dlb::kGrain / (experts * top_k)), body);
    return DLB_OK;
}

DLB_API int dlb_sigmoid_add(const float* x, const float* s, const float* gate, int64_t gate_stride, float* out,
                            int64_t stride, int64_t rows, int64_t k) {
    const dlb::FloatKernels& kernels = dlb::float_kernels();
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            float weight;
            kernels.activate(DLB_ACT_SIGMOID, gate + r * gate_stride, nullptr, &weight, 1);
            kernels.scaled_sum(x + r * stride, s + r * stride, weight, out + r * stride, k);
        }
    };
    dlb::parallel(rows, std::max<int64_t>(1, dlb::kGrain / std::max<int64_t>(1, k)), body);
    return DLB_OK;
}

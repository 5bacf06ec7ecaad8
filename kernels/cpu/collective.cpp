// Time a group's all-reduce as a decoder calls it.
#include "collective.h"

#include <time.h>

namespace {

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

}  // namespace

int dlb_collective_time(const dlb_collective* group, float* data, int64_t count, int runs, double* seconds) {
    for (int i = 0; i < runs; i++) {
        const double start = now();
        const int status = group->all_reduce(group->context, data, count);
        if (status) return status;
        seconds[i] = now() - start;
    }
    return 0;
}

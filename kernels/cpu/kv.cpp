// The cache's number types: which ISA's code turns them.
#include <string.h>

#include "kernel_table.h"
#include "kv_kernels.h"

namespace dlb {

// Every ISA above scalar has AVX2 and F16C.
const KvKernels& kv_kernels() { return strcmp(active_table().name, "scalar") == 0 ? kv_scalar : kv_avx2; }

}  // namespace dlb

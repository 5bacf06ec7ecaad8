// The intrinsics that ISA files call: the compiler's, or in a build with DLB_EMULATE software that computes the same.
#pragma once

#ifdef DLB_EMULATE
#include "emulation/intrinsics.h"
#else
#include <immintrin.h>
#endif

// The numbers of exp_poly, the one exponential of attention, softmax and the activations.
//
// exp(x) = 2^n exp(r), n = rne(x log2 e), r = x - n ln 2 (Cody and Waite's two-part ln 2: the high part has 9
// significant bits, so n * LN2_HI is exact), exp(r) = 1 + r + r^2 P(r) with P of degree 4. P is the minimax polynomial
// of the relative error on |r| <= ln(2)/2 (Remez), 3.1e-9 before rounding; dist_lowbit/ops/elementwise.py holds the
// same numbers and states the bound of the whole. Below EXP_LOWEST the result is 0; above it no result is subnormal.
//
// Only numbers here: every ISA file writes its own code, so that no inline function is shared between instruction sets.
#pragma once

#define DLB_EXP_LOWEST (-87.0f)
#define DLB_EXP_LOG2E 0x1.715476p+0f
#define DLB_EXP_LN2_HI 0x1.63p-1f
#define DLB_EXP_LN2_LO (-0x1.bd0106p-13f)
#define DLB_EXP_C2 0x1.fffffcp-2f
#define DLB_EXP_C3 0x1.555492p-3f
#define DLB_EXP_C4 0x1.5558f2p-5f
#define DLB_EXP_C5 0x1.1239e2p-7f
#define DLB_EXP_C6 0x1.6a2434p-10f
// Adding 1.5 * 2^23 rounds to the nearest even integer and leaves it in the low bits of the sum.
#define DLB_EXP_MAGIC 12582912.0f
#define DLB_EXP_MAGIC_BITS 0x4B400000u

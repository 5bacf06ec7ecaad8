// The numbers of gelu's normal distribution and of its two approximations by a sigmoid.
//
// Phi(-a) = exp(-a^2 / 2) P(q) / (1 + a) for a = min(|x|, 14), q = (a - 4) / (a + 4): the factor beside the exponential
// falls slowly from 1/2, and q maps the half-line to (-1, 1), where P of degree 9 (Chebyshev interpolation on
// 0 <= a <= 13.25, then rounded to fp32) is within 1.0 u of it, u = 2^-24. Beyond a = 13.2 the exponential is 0.
// dist_lowbit/ops/arithmetic.py holds the same numbers and the bound of the whole.
#pragma once

#define DLB_GELU_LARGEST 14.0f
#define DLB_GELU_CENTER 4.0f
#define DLB_GELU_P0 0x1.e361ecp-2f
#define DLB_GELU_P1 (-0x1.8c18eep-4f)
#define DLB_GELU_P2 0x1.cab52p-7f
#define DLB_GELU_P3 0x1.d492e6p-6f
#define DLB_GELU_P4 (-0x1.07a578p-5f)
#define DLB_GELU_P5 0x1.26251ep-6f
#define DLB_GELU_P6 (-0x1.4c223p-8f)
#define DLB_GELU_P7 (-0x1.9a1e9p-12f)
#define DLB_GELU_P8 0x1.915312p-11f
#define DLB_GELU_P9 0x1.c4890ap-14f
// 2 sqrt(2 / pi), and that times 0.044715: tanh(y) = 2 sigmoid(2 y) - 1.
#define DLB_GELU_TANH_C1 0x1.988454p+0f
#define DLB_GELU_TANH_C2 0x1.2444f2p-4f
#define DLB_QUICK_GELU_C 1.702f

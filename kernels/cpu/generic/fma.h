// fma(a, b, c), rounded once, on processors without the instruction. For inclusion within an anonymous namespace.

// The product of two floats is exact in double. Its sum with c is rounded to odd: exact, or the neighbour whose last
// bit is set. Since 53 bits are two more than twice a float's 24 (for subnormal results: than fewer), rounding that to
// float is rounding the exact sum (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved
// algorithms using rounding to odd", 2008). Nothing here can overflow or underflow in double; infinities and NaN pass
// through.
inline float fma_once(float a, float b, float c) {
    const double product = static_cast<double>(a) * static_cast<double>(b), addend = c;
    const double sum = product + addend;
    // sum + error is exact (Knuth, The Art of Computer Programming 2, 4.2.2, theorem B); NaN where sum is not finite.
    const double taken = sum - product;
    const double error = (product - (sum - taken)) + (addend - taken);
    int64_t bits;
    memcpy(&bits, &sum, 8);
    const int64_t up = sum > 0 ? 1 : -1;  // to the neighbour further from zero, or nearer
    const int64_t step = (error > 0) * up - (error < 0) * up;
    bits += bits & 1 ? 0 : step;
    double odd;
    memcpy(&odd, &bits, 8);
    return static_cast<float>(odd);
}

// fp16 and bf16 in plain integers: widening is exact, narrowing to nearest even. A NaN keeps its sign and upper bits
// and becomes quiet, as vcvtps2ph, vcvtph2ps and vcvtneps2bf16 have it; a bf16 widens as it is. For inclusion within an
// anonymous namespace.

inline uint32_t bits_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fffu;
    if (rest > 0x7c00) return float_of(sign | 0x7fc00000u | rest << 13);
    if (rest == 0x7c00) return float_of(sign | 0x7f800000u);
    // Subnormal: units of 2^-24, exact in fp32.
    if (rest < 0x0400) return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));
    return float_of(sign | ((rest << 13) + (112u << 23)));
}

inline uint16_t float_to_half(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    uint32_t half;
    if (rest > 0x7f800000u)
        half = 0x7e00u | (rest >> 13 & 0x3ffu);
    else if (rest >= 0x477ff000u)  // 65520 and more round to infinity
        half = 0x7c00u;
    else if (rest < 0x38800000u)  // below 2^-14: adding 1/2 leaves multiples of 2^-24, rounded to even, in the low bits
        half = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
    else
        half = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
    return static_cast<uint16_t>(sign | half);
}

inline float bfloat_to_float(uint16_t b) { return float_of(static_cast<uint32_t>(b) << 16); }

inline uint16_t float_to_bfloat(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

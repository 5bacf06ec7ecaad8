// fp16 to fp32 in plain integers, exact. For inclusion within an anonymous namespace of an ISA file.

inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fff;
    uint32_t bits;
    if (magnitude >= 0x7c00) {
        bits = 0x7f800000u | (magnitude & 0x3ff) << 13;
    } else if (magnitude >= 0x0400) {
        bits = (magnitude + ((127u - 15u) << 10)) << 13;
    } else {
        // Subnormal: magnitude * 2^-24, exact in fp32.
        const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
        __builtin_memcpy(&bits, &value, 4);
    }
    bits |= sign;
    float out;
    __builtin_memcpy(&out, &bits, 4);
    return out;
}

// What the 256-bit ISAs share: loads, shifts, scales, quantizing. For inclusion within an anonymous namespace.

struct Base256 {
    using I = __m256i;
    using F = __m256;
    static constexpr int kLanes = 8, kHalves = 2, kPrefetch = 8192;

    static inline I load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static inline I and_(I a, I b) { return _mm256_and_si256(a, b); }
    static inline I or_(I a, I b) { return _mm256_or_si256(a, b); }
    static inline I set1_8(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
    template <int S>
    static inline I srl16(I a) {
        return _mm256_srli_epi16(a, S);
    }
    template <int S>
    static inline I sll16(I a) {
        return _mm256_slli_epi16(a, S);
    }
    static inline I flip_sign(I a) { return _mm256_xor_si256(a, _mm256_set1_epi8(-128)); }
    static inline I load_table(const uint8_t* p) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static inline I lookup(I entries, I codes) { return _mm256_shuffle_epi8(entries, codes); }
    static inline I quad(const int8_t* p) {
        int32_t four;
        __builtin_memcpy(&four, p, 4);
        return _mm256_set1_epi32(four);
    }
    static inline F zero_f() { return _mm256_setzero_ps(); }
    static inline F set1_f(float v) { return _mm256_set1_ps(v); }
    static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
    static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
    static inline F to_f(I a) { return _mm256_cvtepi32_ps(a); }
    static inline I set1_32(int v) { return _mm256_set1_epi32(v); }
    // a - center * factor, all int32
    static inline I sub_scaled(I a, I center, int32_t factor) {
        return _mm256_sub_epi32(a, _mm256_mullo_epi32(center, _mm256_set1_epi32(factor)));
    }
    static inline I widen_codes(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    static inline F scale16(const uint8_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static inline F element(Const<DLB_E5M2>, const uint8_t* p) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes));
    }
    // Sign, four bits of exponent and three of mantissa at the places of fp16, whose exponent counts from 15 and not 7.
    static inline F element(Const<DLB_E4M3>, const uint8_t* p) {
        const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<short>(0xbfff))));
    }
    // For one token, e4m3 comes with its rows by parity, which takes half as many operations: a product with 128 puts a
    // byte, sign extended, where fp16 wants it, all even (or odd) ones of a register at once. alternate: rows 0, 2, ..
    // (1, 3, ..) of two k, of which first and second make floats; in_order: back to rows 0 to 7 and 8 to 15.
    static constexpr bool alternates(int kind) { return kind == DLB_E4M3; }
    template <int Odd>
    static inline I alternate(I bytes) {
        const I factor = _mm256_set1_epi16(static_cast<short>(Odd ? 0x8000 : 0x0080));
        return _mm256_and_si256(_mm256_maddubs_epi16(factor, bytes), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    }
    static inline I load_row(const uint8_t* p) {
        return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static inline F first(I halves) { return _mm256_cvtph_ps(_mm256_castsi256_si128(halves)); }
    static inline F second(I halves) { return _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)); }
    static inline void in_order(F& even, F& odd) {
        const F low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
        even = _mm256_permute2f128_ps(low, high, 0x20);
        odd = _mm256_permute2f128_ps(low, high, 0x31);
    }
    static inline F element(Const<DLB_FP16>, const uint8_t* p) { return scale16(p); }
    static inline F element(Const<DLB_BF16>, const uint8_t* p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static inline F element(Const<DLB_FP32>, const uint8_t* p) { return scale32(p); }

    // Byte J of every 32-bit lane as a float.
    template <int J>
    static inline F byte_f(I codes) {
        if constexpr (J > 0) codes = _mm256_srli_epi32(codes, 8 * J);
        if constexpr (J < 3) codes = _mm256_and_si256(codes, _mm256_set1_epi32(255));
        return _mm256_cvtepi32_ps(codes);
    }
    struct Values {
        F low, high;
    };
    static inline Values load_values(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    // The permutation looks at three bits of each lane, the blend at its sign.
    template <int Bits, int J>
    static inline F pick(const Values& values, I codes) {
        const I at = J > 0 ? _mm256_srli_epi32(codes, 8 * J) : codes;
        const F low = _mm256_permutevar8x32_ps(values.low, at);
        if constexpr (Bits <= 3) return low;
        const F high = _mm256_permutevar8x32_ps(values.high, at);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - 8 * J)));
    }
    static inline F scale32(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
};

// The first `count` of eight floats, the others zero.
inline __m256 load_first(const float* x, int64_t count) {
    if (count >= 8) return _mm256_loadu_ps(x);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(x, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane));
}

// `length` floats of one block to int8; q gets zeros up to the next multiple of 32.
inline void quantize_block(const float* x, int64_t length, int8_t* q, float* scale, int32_t* sum) {
    // Magnitudes compare as integers, and NaN and Inf come out on top.
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i top = _mm256_setzero_si256();
    for (int64_t i = 0; i < length; i += 8)
        top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(load_first(x + i, length - i)), magnitude));
    __m128i top4 = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    top4 = _mm_max_epi32(top4, _mm_shuffle_epi32(top4, 0x4e));
    top4 = _mm_max_epi32(top4, _mm_shuffle_epi32(top4, 0xb1));
    const int32_t bits = _mm_cvtsi128_si32(top4);
    const float peak = _mm_cvtss_f32(_mm_castsi128_ps(top4));
    const bool bad = bits >= 0x7f800000, empty = bad || peak < 1e-30f;
    const __m256 inverse = _mm256_set1_ps(empty ? 0.0f : 127.0f / peak);
    *scale = bad ? __builtin_nanf("") : empty ? 0.0f : peak / 127.0f;
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < length; i += 32) {
        __m256i part[4];
        for (int j = 0; j < 4; ++j) {
            const int64_t left = length - i - 8 * j;
            const __m256 value = empty || left <= 0 ? _mm256_setzero_ps() : load_first(x + i + 8 * j, left);
            part[j] = _mm256_cvtps_epi32(_mm256_mul_ps(value, inverse));
            total = _mm256_add_epi32(total, part[j]);
        }
        const __m256i low = _mm256_packs_epi32(part[0], part[1]), high = _mm256_packs_epi32(part[2], part[3]);
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), bytes);
    }
    __m128i sum4 = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    sum4 = _mm_add_epi32(sum4, _mm_shuffle_epi32(sum4, 0x4e));
    sum4 = _mm_add_epi32(sum4, _mm_shuffle_epi32(sum4, 0xb1));
    *sum = _mm_cvtsi128_si32(sum4);
}

inline void quantize_row(const float* x, int64_t k, int64_t block, int8_t* q, float* scale, int32_t* sum) {
    for (int64_t at = 0, b = 0; at < k; at += block, ++b)
        quantize_block(x + at, k - at < block ? k - at : block, q + at, scale + b, sum + b);
}

inline uint64_t read_lines(const uint8_t* data, int64_t bytes) {
    __m256i sum[4] = {};
    for (int64_t i = 0; i + 128 <= bytes; i += 128)
        for (int j = 0; j < 4; ++j) sum[j] = _mm256_add_epi64(sum[j], Base256::load(data + i + 32 * j));
    const __m256i all = _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3]));
    uint64_t part[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(part), all);
    return part[0] + part[1] + part[2] + part[3];
}

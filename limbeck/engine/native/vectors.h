// The machine's vectors, one form for AVX2 and AVX-512. Every sum has a fixed order; nothing is contracted by itself.
#pragma once
#include <cstdint>
#include <immintrin.h>

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8;
#else
#error "needs AVX2 and FMA"
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float Half __attribute__((vector_size(2 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef Floats FloatsAt __attribute__((aligned(4), may_alias));
typedef Ints IntsAt __attribute__((aligned(1), may_alias));

inline Floats load(const float* at) { return *reinterpret_cast<const FloatsAt*>(at); }
template <class Vector> inline Vector load_as(const float* at) {
    typedef Vector At __attribute__((aligned(4), may_alias));
    return *reinterpret_cast<const At*>(at);
}
inline void store(float* at, Floats values) { *reinterpret_cast<FloatsAt*>(at) = values; }
inline Ints load_bytes(const void* at) { return *reinterpret_cast<const IntsAt*>(at); }
inline Floats splat(float value) { return value - Floats{}; }
inline Ints splat(int32_t value) { return value - Ints{}; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats magnitude(Floats a) { return (Floats)((Ints)a & splat(0x7fffffff)); }

#if defined(__AVX512F__) && defined(__AVX512BW__)
inline Floats fused(Floats a, Floats b, Floats sum) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
}
inline Half fused(Half a, Half b, Half sum) { return (Half)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum); }
inline float total(Floats a) { return _mm512_reduce_add_ps((__m512)a); }
inline float largest(Floats a) { return _mm512_reduce_max_ps((__m512)a); }
// sum + four products of unsigned and signed bytes a lane; signed ones within -63..63, so that pairs fit into 16 bits
inline Ints dots(Ints sum, Ints bytes, Ints codes) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)codes);
#else
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)bytes, (__m512i)codes);
    return sum + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#endif
}
#else
inline Floats fused(Floats a, Floats b, Floats sum) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
}
inline Half fused(Half a, Half b, Half sum) { return (Half)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)sum); }
template <class Join> inline float joined(Floats a, Join join) {
    __m128 half = join(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
    half = join(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(join(half, _mm_movehdup_ps(half)));
}
inline float total(Floats a) { return joined(a, [](__m128 x, __m128 y) { return _mm_add_ps(x, y); }); }
inline float largest(Floats a) { return joined(a, [](__m128 x, __m128 y) { return _mm_max_ps(x, y); }); }
inline Ints dots(Ints sum, Ints bytes, Ints codes) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)bytes, (__m256i)codes);
    return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#endif

constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then hold

// e^x to 2 units in the last place, for x clamped to [-87, 88]; the polynomial is that of Cephes' expf.
inline Floats exponential(Floats x) {
    x = smaller(larger(x, splat(-87.0f)), splat(88.0f));
    const Floats shifted = fused(x, splat(1.44269504f), splat(ROUNDER));
    const Floats whole = shifted - splat(ROUNDER);
    const Floats rest = fused(whole, splat(2.12194440e-4f), fused(whole, splat(-0.693359375f), x));
    Floats sum = splat(1.9875691500e-4f);
    for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        sum = fused(sum, rest, splat(coefficient));
    sum = fused(sum * rest, rest, rest + splat(1.0f));
    const Ints power = ((Ints)shifted - (Ints)splat(ROUNDER) + splat(127)) << 23;
    return sum * (Floats)power;
}

// The vectors of one instruction set: types, and loads and stores that convert the element types.
// Part of ctu_kernels.cc, whose rules hold here.
#pragma once

#include "ctu_cpu.h"
#include "ctu_math.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ctonnx {
inline namespace CTONNX_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr size_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr size_t kVectorBytes = 32;
#else
constexpr size_t kVectorBytes = 16;  // SSE2, NEON and most others
#endif

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
using Ints = IntegerOf<Floats>;

// The number of lanes of a vector.
template <class V>
constexpr size_t kLanes = sizeof(V) / sizeof(LaneOf<V>);

template <class T>
struct VectorFor {
  using type = Floats;
};
template <>
struct VectorFor<double> {
  using type = Doubles;
};

template <class V>
V load_units(const LaneOf<V>* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

Floats load(const float* p) { return load_units<Floats>(p); }
Doubles load(const double* p) { return load_units<Doubles>(p); }
void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
void store(double* p, Doubles v) { std::memcpy(p, &v, sizeof v); }

// larger: a > b ? a : b; smaller: a < b ? a : b. Each is one instruction, which compilers do not find
// by themselves.
#if defined(__AVX512F__)
// Here and below, a mask selects every lane: without one GCC warns falsely about its own headers.
Floats larger(Floats a, Floats b) {
  return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
}
Floats smaller(Floats a, Floats b) {
  return (Floats)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
}
#elif defined(__AVX2__)
Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
Floats smaller(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__)
Floats larger(Floats a, Floats b) { return (Floats)_mm_max_ps((__m128)a, (__m128)b); }
Floats smaller(Floats a, Floats b) { return (Floats)_mm_min_ps((__m128)a, (__m128)b); }
#else
Floats larger(Floats a, Floats b) { return a > b ? a : b; }
Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
#endif

// The bits of 16-bit elements, and the same bits widened to the lanes of Floats.
typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

Words load_words(const void* p) {
  Shorts shorts;
  std::memcpy(&shorts, p, sizeof shorts);
  return __builtin_convertvector(shorts, Words);
}

void store_words(void* p, Words words) {
  const Shorts shorts = __builtin_convertvector(words, Shorts);
  std::memcpy(p, &shorts, sizeof shorts);
}

Floats load(const BFloat16* p) { return bits_as<Floats>(load_words(p) << 16); }

// Rounds to nearest, ties to even. NaN stays NaN.
void store(BFloat16* p, Floats v) {
  const Words bits = bits_as<Words>(v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_words(p, v == v ? rounded : (bits >> 16) | 0x40);
}

#if defined(__AVX512F__)
Floats load(const Half* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, halves);
}
void store(Half* p, Floats v) {
  const __m256i halves = _mm512_maskz_cvtps_ph(
      0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}
#elif defined(__AVX2__)
Floats load(const Half* p) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
void store(Half* p, Floats v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
Floats load(const Half* p) {
  const Words bits = load_words(p);
  const Words sign = (bits & 0x8000) << 16;
  const Words rest = (bits & 0x7fff) << 13;
  // As a float32 exponent, the exponent of a half is too small by 112: the multiplication adds 112
  // and normalises denormals. Infinity and NaN get the largest exponent instead.
  const Words finite = bits_as<Words>(bits_as<Floats>(rest) * 0x1p112f);
  return bits_as<Floats>(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : finite));
}

// Rounds to nearest, ties to even. NaN stays NaN.
void store(Half* p, Floats v) {
  const Words bits = bits_as<Words>(v);
  const Words sign = (bits >> 16) & 0x8000;
  const Words magnitude = bits & 0x7fffffff;
  // Below 2^-14 the result is denormal: adding 0.5 rounds it into the low bits of the sum.
  const Words denormal = bits_as<Words>(bits_as<Floats>(magnitude) + 0.5f) - 0x3f000000;
  const Words normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Words finite = magnitude < 0x38800000 ? denormal : normal;
  const Words special = Words{} + 0x7c00 + ((magnitude > 0x7f800000) & 0x0200);
  store_words(p, sign | (magnitude >= 0x477ff000 ? special : finite));
}
#endif

}  // namespace
}  // namespace CTONNX_LEVEL
}  // namespace ctonnx

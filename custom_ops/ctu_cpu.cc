#include "ctu_cpu.h"

#include <algorithm>

namespace ctonnx {
namespace {

// Sixteen lanes; the compiler splits them into what the target has.
typedef float Vector __attribute__((vector_size(64)));
constexpr size_t kLanes = sizeof(Vector) / sizeof(float);

float to_float(Half half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000) << 16;
  const uint32_t rest = half.bits & 0x7fff;
  // Shifting the exponent field up leaves it short by 112; a multiplication adds that and
  // normalises denormals. Infinity and NaN need the full exponent instead.
  const float scaled = bits_as<float>(rest << 13) * bits_as<float>(uint32_t{239} << 23);
  const uint32_t magnitude =
      rest >= 0x7c00 ? (rest << 13) | 0x7f800000 : bits_as<uint32_t>(scaled);
  return bits_as<float>(sign | magnitude);
}

float to_float(BFloat16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }

// Both conversions round to nearest, ties to even, and keep NaN a NaN.
void from_float(float value, Half* half) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  // Below 2^-14 the result is denormal: adding 0.5 puts its bits in the low end of the sum.
  const uint32_t denormal =
      bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<uint32_t>(0.5f);
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000 ? denormal : normal;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  half->bits = static_cast<uint16_t>(sign | (magnitude >= 0x477ff000 ? special : finite));
}

void from_float(float value, BFloat16* result) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  result->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40 : rounded);
}

template <bool kSloped>
void run(const float* x, float* y, size_t n, const Unit<float>& unit) {
  for (size_t i = 0; i < n; i += kLanes) {
    Vector v = {};
    const size_t bytes = std::min(kLanes, n - i) * sizeof(float);
    std::memcpy(&v, x + i, bytes);
    v = ctu<kSloped>(v, unit);
    std::memcpy(y + i, &v, bytes);
  }
}

template <bool kSloped>
void run(const double* x, double* y, size_t n, const Unit<double>& unit) {
  for (size_t i = 0; i < n; ++i) y[i] = ctu<kSloped>(x[i], unit);
}

// Half types go through a small float buffer that stays in the cache.
template <bool kSloped, class T>
void run(const T* x, T* y, size_t n, const Unit<float>& unit) {
  constexpr size_t kBlock = 512;
  float buffer[kBlock];
  for (size_t i = 0; i < n; i += kBlock) {
    const size_t count = std::min(kBlock, n - i);
    for (size_t j = 0; j < count; ++j) buffer[j] = to_float(x[i + j]);
    run<kSloped>(buffer, buffer, count, unit);
    for (size_t j = 0; j < count; ++j) from_float(buffer[j], &y[i + j]);
  }
}

}  // namespace

double to_double(float value) { return value; }
double to_double(double value) { return value; }
double to_double(Half value) { return to_float(value); }
double to_double(BFloat16 value) { return to_float(value); }

template <class T>
void ctu_run(const T* x, T* y, size_t n, const Unit<typename Arithmetic<T>::type>& unit) {
  if (unit.slope == 0) {
    run<false>(x, y, n, unit);
  } else {
    run<true>(x, y, n, unit);
  }
}

template void ctu_run(const float*, float*, size_t, const Unit<float>&);
template void ctu_run(const double*, double*, size_t, const Unit<double>&);
template void ctu_run(const Half*, Half*, size_t, const Unit<float>&);
template void ctu_run(const BFloat16*, BFloat16*, size_t, const Unit<float>&);

}  // namespace ctonnx

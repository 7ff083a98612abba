// Shared by kernels_test.cc and cuda_test.cc: the rows of the numeric contract, the exact formula,
// test data, and a comparison that prints failures.
#pragma once

#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "ctu_plan.h"

using namespace ctonnx;

namespace {

// The numeric contract of ctu_math.h, row by row. `step` is for the types that round once more:
// half the relative distance of neighbouring numbers.
template <class T>
struct Row;
template <>
struct Row<float> {
  static constexpr const char* name = "float32";
  static constexpr double tolerance = 2.5e-7, step = 0;
};
template <>
struct Row<double> {
  static constexpr const char* name = "double";
  static constexpr double tolerance = 4e-15, step = 0;
};
template <>
struct Row<Half> {
  static constexpr const char* name = "float16";
  static constexpr double tolerance = 2.5e-7, step = 0x1p-11;
};
template <>
struct Row<BFloat16> {
  static constexpr const char* name = "bfloat16";
  static constexpr double tolerance = 2.5e-7, step = 0x1p-8;
};

const float kBetas[] = {0.f,   1e-6f, 1e-4f, 0.01f, 0.1f,  0.149f,    0.15f, 0.151f,
                        0.3f,  0.5f,  0.7f,  0.85f, 0.99f, 0.999999f, 1.f};
const float kCoeffs[] = {0.f, 0.1f, 0.5f, 0.9f, 1.f};
const double kSlopes[] = {0, 0.01, 0.25, 0.8, 0.95, 1, 1.5, 2, 5, -0.5};

int failures = 0;

void fail(const char* what, const char* type, double x, double y, double exact, Parameters p) {
  if (++failures <= 20) {
    std::printf("%s: %s CTU(%.9g) is %.17g, not %.17g, for beta %.9g, c %.9g, slope %g\n", what,
                type, x, y, exact, p.beta, p.coeff, p.slope);
  }
}

void require(bool ok, const char* what, const char* type, size_t n) {
  if (!ok && ++failures <= 20) std::printf("%s: %s, length %zu\n", what, type, n);
}

// The formula of ctu_math.h in extended precision.
double exact_ctu(double x, Parameters p) {
  if (std::isnan(x)) return x;
  const double negative = p.slope == 0 ? 0 : p.slope * x;
  if (std::isinf(x)) return x > 0 ? x : negative;
  const long double s = 1.0L - p.beta + 1e-6L, gap = fabsl(1.0L - p.slope);
  const long double u = gap * fabsl(x) / s, sign = p.slope < 1 ? 1 : p.slope > 1 ? -1 : 0;
  const long double r = (1.0L - p.coeff) * log1pl(expl(-u)) - p.coeff * u / (1 + expl(p.beta * u));
  const long double original = x < 0 ? p.slope * static_cast<long double>(x) : x;
  return static_cast<double>(original + sign * s * r);
}

// The same for an op with kinks elsewhere, and in `scale` what its error is relative to.
double exact_bounded(double x, Parameters p, const Bounds<double>& b, double* scale) {
  const double z = b.alpha * x + b.offset;
  const double clipped = z < b.lo ? b.lo : z > b.hi ? b.hi : z;
  const auto kink = [&](double bound) {
    const double distance = std::fabs(z - bound);
    return std::isfinite(distance) ? exact_ctu(-distance, {p.beta, p.coeff, 0}) : 0;
  };
  const double at_lo = kink(b.lo), at_hi = kink(b.hi), y = clipped + (at_lo - at_hi);
  *scale = std::max({1.0, std::fabs(y), std::fabs(at_lo), std::fabs(at_hi), std::fabs(b.offset)});
  return y;
}

template <class T>
T from_double(double value) {
  return static_cast<T>(value);
}
// Truncation is good enough for test data.
template <>
BFloat16 from_double(double value) {
  return {static_cast<uint16_t>(bits_as<uint32_t>(static_cast<float>(value)) >> 16)};
}
template <>
Half from_double(double value) {
  const uint32_t bits = bits_as<uint32_t>(static_cast<float>(value));
  const int exponent = static_cast<int>((bits >> 23) & 0xff) - 112;
  const uint32_t sign = (bits >> 16) & 0x8000;
  if (exponent <= 0) return {static_cast<uint16_t>(sign)};
  return {static_cast<uint16_t>(sign | exponent << 10 | ((bits >> 13) & 0x3ff))};
}

// Whether the output y for x keeps the contract.
template <class T>
bool keeps_contract(double x, double y, double exact, double slope) {
  double scale = std::max(1.0, std::fabs(exact));
  if (slope < 0) scale = std::max(scale, std::fabs(x));
  const double smallest = sizeof(T) == 2 ? 0x1p-25 : 0;  // half of float16's smallest number
  const double rounding = std::max(Row<T>::step * std::fabs(exact) * 1.001, smallest);
  return std::fabs(y - exact) <= Row<T>::tolerance * scale + (Row<T>::step > 0 ? rounding : 0);
}

template <class T>
void check(const char* what, const T* x, const T* y, size_t n, Parameters p) {
  for (size_t i = 0; i < n; ++i) {
    const double in = to_double(x[i]), out = to_double(y[i]), exact = exact_ctu(in, p);
    const bool ok = std::isfinite(exact) ? keeps_contract<T>(in, out, exact, p.slope)
                                         : std::isnan(exact) ? std::isnan(out) : out == exact;
    if (!ok) fail(what, Row<T>::name, in, out, exact, p);
  }
}

// As `check` for an op with kinks elsewhere, whose row is twice that of its type.
template <class T>
void check_bounded(const char* what, const T* x, const T* y, size_t n, Parameters p,
                   const Bounds<double>& bounds) {
  for (size_t i = 0; i < n; ++i) {
    const double in = to_double(x[i]), out = to_double(y[i]);
    double scale = 1;
    const double exact = exact_bounded(in, p, bounds, &scale);
    const double rounding = Row<T>::step > 0 ? Row<T>::step * std::fabs(exact) * 1.001 + 0x1p-25 : 0;
    const bool ok = std::isfinite(exact)
                        ? std::fabs(out - exact) <= 2 * Row<T>::tolerance * scale + rounding
                        : std::isnan(exact) ? std::isnan(out) : out == exact;
    if (!ok) {
      fail(what, Row<T>::name, in, out, exact, p);
      std::printf("  between %g and %g\n", bounds.lo, bounds.hi);
    }
  }
}

// The bounds of the ops, whose numbers every element type has.
const Bounds<double> kBounds[] = {
    {1, 0, 0, 6},      {1, 0, -1, 1},       {1, 0, -0.5, 0.25},      {1, 0, 3, 100},
    {1, 0, 1, INFINITY}, {1, 0, -INFINITY, 0}, {0.25, 0.5, 0, 1}, {-0.125, 0.5, -INFINITY, 2},
    {1, 0, -64, 64},   {1, 0, 0, 0.0625},
};

// Numbers of both signs and every magnitude up to 1e4. Most are of magnitude s, where the curve
// bends.
template <class T>
std::vector<T> samples(size_t n, double s, uint32_t seed = 1) {
  std::vector<T> x;
  auto uniform = [&] { return (seed = seed * 1664525u + 1013904223u) / 4294967296.0; };
  for (size_t i = 0; i < n; ++i) {
    const double sign = uniform() < 0.5 ? -1 : 1, magnitude = uniform();
    x.push_back(from_double<T>(sign * (i % 3 == 0 ? std::pow(10, 12 * magnitude - 8)
                                                  : std::min(1e4, s * std::pow(300, magnitude)))));
  }
  return x;
}

// Numbers of both signs and every magnitude up to 1e4, most of them near a bound.
template <class T>
std::vector<T> samples_near(const Bounds<double>& bounds, size_t n, double s) {
  std::vector<T> x = samples<T>(n, s);
  for (size_t i = 0; i < n; i += 3) {
    const double bound = std::isinf(bounds.hi) || (i % 2 == 0 && !std::isinf(bounds.lo))
                             ? bounds.lo : bounds.hi;
    const double z = bound + to_double(x[(i + 1) % n]);
    x[i] = from_double<T>(std::fmin(1e4, std::fmax(-1e4, (z - bounds.offset) / bounds.alpha)));
  }
  return x;
}

// The comparison must be able to fail.
void test_comparison() {
  const Parameters right = {0.85f, 0.3f, 0}, wrong = {0.85f, 0.7f, 0};
  const double x = -0.3, exact = exact_ctu(x, right);
  require(!keeps_contract<float>(x, exact_ctu(x, wrong), exact, 0), "accepts c for 1 - c", "", 1);
  require(!keeps_contract<float>(x, exact + 3e-7, exact, 0), "accepts 3e-7", "", 1);
  require(!keeps_contract<float>(x, std::nan(""), exact, 0), "accepts NaN", "", 1);
  require(!keeps_contract<Half>(x, exact * (1 + 0x1p-10), exact, 0), "accepts an ulp", "", 1);
  require(keeps_contract<float>(x, exact + 2e-7, exact, 0), "rejects 2e-7", "", 1);
  double scale = 0;
  const double middle = exact_bounded(3, right, kBounds[0], &scale);
  require(std::fabs(middle - 3) < 1e-6 && scale == middle, "a Clip in its middle", "", 1);
  require(std::fabs(exact_bounded(x, right, kBounds[4], &scale) - 1 -
                    (exact_ctu(x - 1, right))) < 1e-12, "a Max is no CTU moved", "", 1);
}

// Zeros, denormals, infinities and NaN. For 16-bit types, every number that the contract covers.
template <class T>
std::vector<T> special_values() {
  const double infinity = std::numeric_limits<double>::infinity();
  std::vector<T> x = {T{}, from_double<T>(1e-40), from_double<T>(-1e-40)};
  if constexpr (sizeof(T) == 2) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const T value{static_cast<uint16_t>(bits)};
      if (!(std::fabs(to_double(value)) > 1e4) || !std::isfinite(to_double(value))) {
        x.push_back(value);
      }
    }
  } else {
    for (double value : {infinity, -infinity, std::nan(""), -0.0}) x.push_back(T(value));
  }
  return x;
}

}  // namespace

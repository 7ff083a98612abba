// The CT unit, for CPU and GPU.
//
//   Y = P(X) + sgn(1 - a) * s * r(|1 - a| * |X| / s)        s = 1 - beta + 1e-6
//   P(x) = x for x >= 0, a * x for x < 0                    a = slope, 0 where absent
//   r(u) = (1 - c) * log1p(exp(-u)) - c * u * sigmoid(-beta * u)
//
// This is the paper's c * sigmoid(beta * x / s) * x + (1 - c) * s * softplus(x / s)
// (arXiv 2502.07783, with the epsilon of its authors' code), written as the piecewise-linear
// original plus a correction that is even and decays, so that nothing overflows or cancels.
//
// Numeric contract, for every beta, c in [0, 1] and |X| <= 1e4, against the exact formula of the
// float32 beta and c as they are:
//
//   type                  arithmetic   max |error| / max(1, |Y|)
//   float32               float32      2.5e-7
//   double                double       4e-15
//   float16, bfloat16     float32      2.5e-7, then one rounding to the type
//
// For a slope below 0 the two terms cancel where Y crosses zero, and the error is relative to
// max(1, |X|) instead.
//
//   X = NaN gives NaN, +inf gives +inf, -inf gives what the original gives (0 where a = 0).
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CTONNX_HOST_DEVICE __host__ __device__
#else
#define CTONNX_HOST_DEVICE
#endif

// Code compiled for one instruction set must not be merged with the same code compiled for another,
// as the linker does with inline functions of one name: each such build sets a name of its own.
#ifndef CTONNX_LEVEL
#define CTONNX_LEVEL baseline
#endif

namespace ctonnx {
inline namespace CTONNX_LEVEL {

// The formula below is written once for F = float, double and vectors of them. These name the
// floating-point type of one lane, and the integer of the same layout as F.
template <class F>
struct Lane {
  using type = decltype(F{}[0] + F{}[0]);
  using integer = decltype(F{} < F{});
};
template <>
struct Lane<float> {
  using type = float;
  using integer = int32_t;
};
template <>
struct Lane<double> {
  using type = double;
  using integer = int64_t;
};
template <class F>
using LaneOf = typename Lane<F>::type;
template <class F>
using IntegerOf = typename Lane<F>::integer;

template <class To, class From>
CTONNX_HOST_DEVICE inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The polynomial in t with these coefficients, the highest power's first.
template <class F, class S, class... Rest>
CTONNX_HOST_DEVICE inline F horner(F t, S highest, Rest... rest) {
  F p = F{} + highest;
  ((p = p * t + rest), ...);
  return p;
}

// What the elementary functions need for each precision. The coefficients interpolate at Chebyshev
// nodes: exp on [-ln 2 / 2, ln 2 / 2], log1p on [0, 1].
template <class S>
struct Elementary;

template <>
struct Elementary<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kOne = 0x3f800000;  // the bits of 1.0
  static constexpr int32_t kAbs = 0x7fffffff;  // all bits but the sign
  static constexpr int32_t kShort = static_cast<int32_t>(0xfffff000);  // drops half the mantissa
  static constexpr float kMax = FLT_MAX;
  static constexpr float kMagic = 12582912.f;  // 1.5 * 2^23
  static constexpr float kExpLimit = 87.f;     // exp(-87) is the last normal power in e
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f;  // short: its product with an exponent is exact
  static constexpr float kLn2Low = -2.12194440e-4f;

  // 1.2e-7 relative.
  template <class F>
  CTONNX_HOST_DEVICE static F exp_reduced(F t) {
    return horner(t, 1.383684613e-3f, 8.374815798e-3f, 4.166822557e-2f, 1.666642017e-1f,
                  4.999999208e-1f, 1.000000036f, 1.000000001f);
  }

  // 5e-9 absolute.
  template <class F>
  CTONNX_HOST_DEVICE static F log1p_unit(F z) {
    return z * horner(z, 3.942134538e-3f, -2.390944840e-2f, 6.818918278e-2f, -1.270185487e-1f,
                      1.857657492e-1f, -2.467515488e-1f, 3.329017928e-1f, -4.999714766e-1f,
                      9.999993486e-1f);
  }
};

template <>
struct Elementary<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000;
  static constexpr int64_t kAbs = 0x7fffffffffffffff;
  static constexpr int64_t kShort = static_cast<int64_t>(0xfffffffff8000000);
  static constexpr double kMax = DBL_MAX;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kExpLimit = 708;
  static constexpr double kLog2e = 1.4426950408889634;
  static constexpr double kLn2High = 0.6931471805592082;
  static constexpr double kLn2Low = 7.371002565167799e-13;

  // 3e-16 relative.
  template <class F>
  CTONNX_HOST_DEVICE static F exp_reduced(F t) {
    return horner(t, 2.5110037605963777e-08, 2.763263963904103e-07, 2.755724091857897e-06,
                  2.4801485482328494e-05, 0.00019841269890047113, 0.0013888888952314775,
                  0.008333333333319601, 0.0416666666664881, 0.1666666666666668, 0.5000000000000019,
                  1.0, 1.0);
  }

  // 3e-16 absolute: log1p(z) = 2 atanh(w) with w = z / (2 + z), a polynomial in w^2 times w.
  template <class F>
  CTONNX_HOST_DEVICE static F log1p_unit(F z) {
    const F w = z / (2 + z);
    return w * horner(w * w, 0.17044163562781398, 0.0832450651186082, 0.12110168728069218,
                      0.13300374032674625, 0.1538661404230401, 0.18181740832504806,
                      0.22222224080747674, 0.28571428545454114, 0.4000000000018575,
                      0.6666666666666615, 2.0);
  }
};

// exp(-(v + low)) for v >= 0 and |low| << 1; 0 where v is NaN or so large that exp underflows.
template <class F>
CTONNX_HOST_DEVICE inline F exp_neg(F v, F low) {
  using E = Elementary<LaneOf<F>>;
  using I = IntegerOf<F>;
  const F limit = F{} + E::kExpLimit;
  const F clamped = v < limit ? v : limit;
  const F magic = F{} + E::kMagic;  // adding it rounds to an integer, in the low bits of the sum
  const F shifted = clamped * -E::kLog2e + magic;
  const F n = shifted - magic;
  const F t = ((-clamped - n * E::kLn2High) - n * E::kLn2Low) - low;
  const I power = (bits_as<I>(shifted) << E::kMantissaBits) + E::kOne;
  return v < limit ? E::exp_reduced(t) * bits_as<F>(power) : F{};
}

// log1p(z) for z in [0, 1].
template <class F>
CTONNX_HOST_DEVICE inline F log1p_unit(F z) {
  return Elementary<LaneOf<F>>::log1p_unit(z);
}

template <class F>
CTONNX_HOST_DEVICE inline F absolute(F x) {
  using I = IntegerOf<F>;
  return bits_as<F>(bits_as<I>(x) & Elementary<LaneOf<F>>::kAbs);
}

// The leading half of the mantissa: the product of two such numbers is exact, with or without a
// fused multiply-add, so every instruction set can multiply to twice the precision.
template <class F>
CTONNX_HOST_DEVICE inline F leading_half(F x) {
  using I = IntegerOf<F>;
  return bits_as<F>(bits_as<I>(x) & Elementary<LaneOf<F>>::kShort);
}

// What one (beta, c, slope) needs, computed once. P is a scalar, or a vector that holds another unit
// in each lane.
template <class P>
struct Unit {
  P slope;
  P inv_s, k_hi, k_lo;      // |1 - a| / s, and |1 - a| * beta / s in two parts
  P log_scale, gate_scale;  // sgn(1 - a) times (1 - c) * s and c * |1 - a|

  Unit() = default;

  // For scalar P.
  CTONNX_HOST_DEVICE Unit(float beta, float coeff, double a) {
    const double s = 1.0 - static_cast<double>(beta) + 1e-6;
    const double gap = std::fabs(1 - a);
    const double sign = a < 1 ? 1 : a > 1 ? -1 : 0;
    const double k = gap * beta / s;
    slope = static_cast<P>(a);
    inv_s = static_cast<P>(gap / s);
    k_hi = leading_half(static_cast<P>(k));
    k_lo = static_cast<P>(k - k_hi);
    log_scale = static_cast<P>(sign * (1 - static_cast<double>(coeff)) * s);
    gate_scale = static_cast<P>(sign * coeff * gap);
  }

  // sgn(1 - a) * s * r(|1 - a| * |x| / s)
  template <class F>
  CTONNX_HOST_DEVICE F correction(F x) const {
    const F ax = absolute(x);
    const F log_term = log1p_unit(exp_neg(ax * inv_s, F{}));
    // exp(-k * |x|) amplifies an error of its argument by the argument, hence the two parts.
    const F high = leading_half(ax);
    const F g = exp_neg(high * k_hi, (ax - high) * k_hi + ax * k_lo);
    // The limit is 0 at infinity, where inf * 0 would give NaN.
    const F finite = ax <= Elementary<LaneOf<F>>::kMax ? ax : F{};
    return log_scale * log_term - (gate_scale * finite) * (g / (1 + g));
  }
};

// The piecewise-linear original. kSloped = false is for slopes that are all 0. NaN < 0 is false, so
// NaN passes through.
template <bool kSloped, class F, class P>
CTONNX_HOST_DEVICE inline F original(F x, P slope) {
  // Not x * slope for slope 0: 0 * -inf would give NaN where the original gives 0.
  const F negative = kSloped ? (slope == P{} ? F{} : x * slope) : F{};
  return x < F{} ? negative : x;
}

// The CT unit.
template <bool kSloped, class F, class P>
CTONNX_HOST_DEVICE inline F ctu(F x, const Unit<P>& unit) {
  return original<kSloped>(x, unit.slope) + unit.correction(x);
}

}  // namespace CTONNX_LEVEL
}  // namespace ctonnx

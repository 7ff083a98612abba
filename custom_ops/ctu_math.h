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

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __CUDACC__
#define CTONNX_HOST_DEVICE __host__ __device__
#else
#define CTONNX_HOST_DEVICE
#endif

namespace ctonnx {

// The integer of the same layout as F, which is float or a vector of floats: the float32 formula
// below is written once for both.
template <class F>
struct IntegerOf {
  using type = decltype(F{} < F{});
};
template <>
struct IntegerOf<float> {
  using type = int32_t;
};

template <class To, class From>
CTONNX_HOST_DEVICE inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// exp(-(v + low)) for v >= 0 and |low| << 1, to 1.2e-7 relative; 0 from v = 87 on.
template <class F>
CTONNX_HOST_DEVICE inline F exp_neg(F v, F low) {
  using I = typename IntegerOf<F>::type;
  const F kLimit = F{} + 87.f;
  const F clamped = v < kLimit ? v : kLimit;
  const F magic = F{} + 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const F shifted = clamped * -1.44269504f + magic;
  const F n = shifted - magic;
  // ln 2 in two parts, the first short enough for n * part to be exact.
  const F t = ((-clamped - n * 0.693359375f) + n * 2.12194440e-4f) - low;
  F p = F{} + 1.383684613e-3f;
  p = p * t + 8.374815798e-3f;
  p = p * t + 4.166822557e-2f;
  p = p * t + 1.666642017e-1f;
  p = p * t + 4.999999208e-1f;
  p = p * t + 1.000000036f;
  p = p * t + 1.000000001f;
  const I scale = (bits_as<I>(shifted) << 23) + 0x3f800000;
  return v < kLimit ? p * bits_as<F>(scale) : F{};
}

// log1p(z) for z in [0, 1], to 5e-9 absolute.
template <class F>
CTONNX_HOST_DEVICE inline F log1p_unit(F z) {
  F p = F{} + 3.942134538e-3f;
  p = p * z - 2.390944840e-2f;
  p = p * z + 6.818918278e-2f;
  p = p * z - 1.270185487e-1f;
  p = p * z + 1.857657492e-1f;
  p = p * z - 2.467515488e-1f;
  p = p * z + 3.329017928e-1f;
  p = p * z - 4.999714766e-1f;
  p = p * z + 9.999993486e-1f;
  return p * z;
}

// What one (beta, c, slope) needs, computed once; `correction` is the even term above, with its sign.
template <class T>
struct Unit;

template <>
struct Unit<double> {
  double slope;
  double inv_s, k;               // |1 - a| / s, |1 - a| * beta / s
  double log_scale, gate_scale;  // sgn(1 - a) times (1 - c) * s and c * |1 - a|

  Unit() = default;

  CTONNX_HOST_DEVICE Unit(float beta, float coeff, double a) {
    const double s = 1.0 - static_cast<double>(beta) + 1e-6;
    const double gap = std::fabs(1 - a);
    const double sign = a < 1 ? 1 : a > 1 ? -1 : 0;
    slope = a;
    inv_s = gap / s;
    k = gap * beta / s;
    log_scale = sign * (1 - static_cast<double>(coeff)) * s;
    gate_scale = sign * coeff * gap;
  }

  CTONNX_HOST_DEVICE double correction(double x) const {
    const double ax = std::fabs(x);
    // The gate's limit is 0 at infinity, where inf * 0 would give NaN.
    const double finite = ax <= std::numeric_limits<double>::max() ? ax : 0;
    const double g = std::exp(-k * finite);
    return log_scale * std::log1p(std::exp(-ax * inv_s)) - gate_scale * finite * (g / (1 + g));
  }
};

template <>
struct Unit<float> {
  float slope;
  float inv_s, k_hi, k_lo;       // |1 - a| / s, and |1 - a| * beta / s in two floats
  float log_scale, gate_scale;   // sgn(1 - a) times (1 - c) * s and c * |1 - a|

  Unit() = default;

  CTONNX_HOST_DEVICE Unit(float beta, float coeff, double a) {
    const Unit<double> exact(beta, coeff, a);
    slope = static_cast<float>(a);
    inv_s = static_cast<float>(exact.inv_s);
    k_hi = short_float(static_cast<float>(exact.k));
    k_lo = static_cast<float>(exact.k - k_hi);
    log_scale = static_cast<float>(exact.log_scale);
    gate_scale = static_cast<float>(exact.gate_scale);
  }

  // The 12 leading bits: the product of two such floats is exact, with or without a fused
  // multiply-add, so every instruction set gives k * |x| to twice float32's precision.
  template <class F>
  CTONNX_HOST_DEVICE static F short_float(F v) {
    using I = typename IntegerOf<F>::type;
    return bits_as<F>(bits_as<I>(v) & static_cast<int32_t>(0xfffff000));
  }

  template <class F>
  CTONNX_HOST_DEVICE F correction(F x) const {
    using I = typename IntegerOf<F>::type;
    const F ax = bits_as<F>(bits_as<I>(x) & 0x7fffffff);
    const F log_term = log1p_unit(exp_neg(ax * inv_s, F{}));
    const F high = short_float(ax);
    const F g = exp_neg(high * k_hi, (ax - high) * k_hi + ax * k_lo);
    // As above; a NaN from inf * 0 or inf - inf in g is past exp_neg's limit.
    const F finite = ax <= std::numeric_limits<float>::max() ? ax : F{};
    return log_scale * log_term - (gate_scale * finite) * (g / (1.f + g));
  }
};

// The CT unit; `kSloped` is whether unit.slope is not 0. NaN < 0 is false, so NaN passes through.
template <bool kSloped, class F, class T>
CTONNX_HOST_DEVICE inline F ctu(F x, const Unit<T>& unit) {
  // Not x * slope for slope 0: 0 * -inf would give NaN where the original gives 0.
  const F negative = kSloped ? x * unit.slope : F{};
  return (x < F{} ? negative : x) + unit.correction(x);
}

}  // namespace ctonnx

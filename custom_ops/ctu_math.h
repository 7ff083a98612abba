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
//
// The ops with kinks elsewhere smooth a line that is bounded from below, above or both:
//
//   Y = min(max(Z, lo), hi) + k(Z - lo) - k(Z - hi)         Z = alpha * X + offset
//   k(d) = s * r(|d| / s)
//
// Where a bound is absent it is infinite, and so is the distance to it, at which k is 0. Each kink
// adds its error and that of Z - lo or Z - hi, so the errors may be twice those of the table, relative
// to max(1, |Y|, |k(Z - lo)|, |k(Z - hi)|, |offset|): for a beta near 0 the two k are large
// and cancel. NaN gives NaN, and infinities give the bounds.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CTONNX_HOST_DEVICE __host__ __device__
#define CTONNX_DEVICE __device__ __forceinline__
#else
#define CTONNX_HOST_DEVICE
#define CTONNX_DEVICE inline  // GPU code, compiled for the tests on the host
#endif
// For what is called in several places of a kernel: a call for each vector would be slow.
#define CTONNX_INLINE CTONNX_HOST_DEVICE inline __attribute__((always_inline))

// The linker merges inline functions of the same name. Code for different instruction sets must
// stay apart, so each build for one sets a CTONNX_LEVEL of its own.
#ifndef CTONNX_LEVEL
#define CTONNX_LEVEL baseline
#endif

namespace ctonnx {

// The line and the bounds of an op with kinks elsewhere.
template <class P>
struct Bounds {
  P alpha, offset, lo, hi;
};
// What stands for those that an op does not have.
constexpr Bounds<float> kUnbounded = {1, 0, -INFINITY, INFINITY};

inline namespace CTONNX_LEVEL {

// The code below is written once for F = float, double and vectors of them. LaneOf<F> is the
// floating-point type of one lane, IntegerOf<F> the integer type with the layout of F.
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

// The polynomial in t with these coefficients, the highest power first.
template <class F, class S, class... Rest>
CTONNX_HOST_DEVICE inline F horner(F t, S highest, Rest... rest) {
  F p = F{} + highest;
  ((p = p * t + rest), ...);
  return p;
}

// Constants and polynomials of the elementary functions, for each precision. The polynomials
// interpolate at Chebyshev nodes: exp on [-ln 2 / 2, ln 2 / 2], log1p on [0, 1].
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
  static constexpr float kExpLimit = 87.f;     // beyond, exp(-v) is denormal
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f;  // few bits: exact times an exponent
  static constexpr float kLn2Low = -2.12194440e-4f;

  // Relative error 1.2e-7, by rounding; that of the polynomial, 1 + t + t^2 * R(t), is 1e-8.
  template <class F>
  CTONNX_HOST_DEVICE static F exp_reduced(F t) {
    return horner(t, 1.392617612e-3f, 8.363173075e-3f, 4.166655466e-2f, 1.666657703e-1f, 0.5f, 1.f,
                  1.f);
  }

  // Absolute error 5e-9.
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

  // Relative error 3e-16.
  template <class F>
  CTONNX_HOST_DEVICE static F exp_reduced(F t) {
    return horner(t, 2.5110037605963777e-08, 2.763263963904103e-07, 2.755724091857897e-06,
                  2.4801485482328494e-05, 0.00019841269890047113, 0.0013888888952314775,
                  0.008333333333319601, 0.0416666666664881, 0.1666666666666668, 0.5000000000000019,
                  1.0, 1.0);
  }

  // Absolute error 3e-16: log1p(z) = 2 atanh(w) with w = z / (2 + z), w times a polynomial in w^2.
  template <class F>
  CTONNX_HOST_DEVICE static F log1p_unit(F z) {
    const F w = z / (2 + z);
    return w * horner(w * w, 0.17044163562781398, 0.0832450651186082, 0.12110168728069218,
                      0.13300374032674625, 0.1538661404230401, 0.18181740832504806,
                      0.22222224080747674, 0.28571428545454114, 0.4000000000018575,
                      0.6666666666666615, 2.0);
  }
};

// A left shift that may drop bits, which is undefined for a signed scalar.
template <class I>
CTONNX_HOST_DEVICE inline I shifted_left(I value, int bits) {
  return value << bits;
}
template <>
CTONNX_HOST_DEVICE inline int32_t shifted_left(int32_t value, int bits) {
  return static_cast<int32_t>(static_cast<uint32_t>(value) << bits);
}
template <>
CTONNX_HOST_DEVICE inline int64_t shifted_left(int64_t value, int bits) {
  return static_cast<int64_t>(static_cast<uint64_t>(value) << bits);
}

// exp(v + low) for |v| <= kExpLimit and |low| << 1.
template <class F>
CTONNX_INLINE F exponential(F v, F low) {
  using E = Elementary<LaneOf<F>>;
  using I = IntegerOf<F>;
  const F magic = F{} + E::kMagic;  // the sum rounds to an integer, in its low bits
  const F shifted = v * E::kLog2e + magic;
  const F n = shifted - magic;
  const F t = (v - n * E::kLn2High) + (low - n * E::kLn2Low);
  const I power = shifted_left(bits_as<I>(shifted), E::kMantissaBits) + E::kOne;
  return E::exp_reduced(t) * bits_as<F>(power);
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

// x with the leading half of its mantissa. The product of two such numbers is exact, with or
// without a fused multiply-add, so every instruction set can multiply with twice the precision.
template <class F>
CTONNX_HOST_DEVICE inline F leading_half(F x) {
  using I = IntegerOf<F>;
  return bits_as<F>(bits_as<I>(x) & Elementary<LaneOf<F>>::kShort);
}

// The constants of one (beta, c, slope), computed once. P is a scalar, or a vector with a different
// unit in each lane.
template <class P>
struct Unit {
  P slope;
  P inv_s, k_hi, k_lo;  // |1 - a| / s, and |1 - a| * beta / s in two parts
  P log_scale;          // sgn(1 - a) * (1 - c) * s
  P gate_hi, gate_lo;   // sgn(1 - a) * c * |1 - a| in two parts

  Unit() = default;

  // Scalar P only.
  CTONNX_HOST_DEVICE Unit(float beta, float coeff, double a) {
    const double s = 1.0 - static_cast<double>(beta) + 1e-6;
    const double gap = std::fabs(1 - a);
    const double sign = a < 1 ? 1 : a > 1 ? -1 : 0;
    const double k = gap * beta / s;
    slope = static_cast<P>(a);
    inv_s = static_cast<P>(gap / s);
    split(k, &k_hi, &k_lo);
    log_scale = static_cast<P>(sign * (1 - static_cast<double>(coeff)) * s);
    split(sign * coeff * gap, &gate_hi, &gate_lo);
  }

  // sgn(1 - a) * s * (1 - c) * log1p(exp(-u)) with u = |1 - a| * ax / s, for ax = |x|. For NaN it
  // is 0, and so is gate_term: above_zero passes NaN on.
  template <class F>
  CTONNX_INLINE F log_term(F ax) const {
    const F limit = F{} + Elementary<LaneOf<F>>::kExpLimit;
    const F u = ax * inv_s;
    const F z = exponential(-(u < limit ? u : limit), F{});
    return u < limit ? log_scale * log1p_unit(z) : F{};
  }

  // sgn(1 - a) * c * |1 - a| * ax / (1 + exp(k * ax)). Both factors of ax are in two parts, because
  // exp amplifies an error of its argument by the argument, and the numerator would round twice.
  template <class F>
  CTONNX_INLINE F gate_term(F ax) const {
    const F limit = F{} + Elementary<LaneOf<F>>::kExpLimit;
    const F high = leading_half(ax), low = ax - high;
    const F v = high * k_hi;
    const F e = exponential(v < limit ? v : limit, low * k_hi + ax * k_lo);
    const F numerator = high * gate_hi + (low * gate_hi + ax * gate_lo);
    return v < limit ? numerator / (1 + e) : F{};
  }

 private:
  CTONNX_HOST_DEVICE static void split(double value, P* high, P* low) {
    *high = leading_half(static_cast<P>(value));
    *low = static_cast<P>(value - *high);
  }
};

// The two halves of the piecewise-linear original. NaN < 0 is false, so above_zero passes NaN on.
template <class F>
CTONNX_HOST_DEVICE inline F above_zero(F x) {
  return x < F{} ? F{} : x;
}

template <class F, class P>
CTONNX_HOST_DEVICE inline F below_zero(F x, P slope) {
  // 0 * -inf would be NaN, where the original is 0.
  return x < F{} ? (slope == P{} ? F{} : x * slope) : F{};
}

// The CT unit. With kSloped = false, every slope must be 0.
template <bool kSloped, class F, class P>
CTONNX_INLINE F ctu(F x, const Unit<P>& unit) {
  const F ax = absolute(x);
  // The order matters for rounding: small terms first, x last.
  F small = unit.log_term(ax);
  if (kSloped) small += below_zero(x, unit.slope);
  return above_zero(x) + (small - unit.gate_term(ax));
}

template <class F, class P>
CTONNX_HOST_DEVICE inline F clip(F z, const Bounds<P>& bounds) {  // NaN passes
  const F lo = F{} + bounds.lo, hi = F{} + bounds.hi;
  return z < lo ? lo : z > hi ? hi : z;
}

// An op with kinks elsewhere, for a Unit or a FastUnit of slope 0. The distance of an infinity to an
// infinite bound is NaN, for which both terms are 0.
template <class F, class P, class U>
CTONNX_INLINE F bounded_ctu(F x, const Bounds<P>& bounds, const U& unit) {
  const F z = x * bounds.alpha + bounds.offset;
  const F above_lo = absolute(z - bounds.lo), below_hi = absolute(z - bounds.hi);
  const F at_lo = unit.log_term(above_lo) - unit.gate_term(above_lo);
  const F at_hi = unit.log_term(below_hi) - unit.gate_term(below_hi);
  return clip(z, bounds) + (at_lo - at_hi);
}

// ---- With the approximate functions of a GPU ---------------------------------------------------

// Below this beta the errors of the approximate functions can add up to more than the contract
// allows. The largest error is 2.1e-7 from this beta on, and 2.9e-7 from 0.5 on, by random search
// and hill climbing over beta, c, slope, X and the signs of the errors, with and without
// contraction.
constexpr float kFastFromBeta = 0.75f;

// The CT unit in float32, with functions `M` as accurate as PTX's .approx.ftz instructions: exp2 to
// a factor of 1 +- 2^-22, reciprocal to a factor of 1 +- 2^-23, log2 of [1, 2] to 2^-22 absolute.
// tests/cuda_test.cc checks the contract with functions that have exactly these errors.
template <class M>
struct FastUnit {
  float slope;
  float u_scale, v_scale;  // |1 - a| / s and |1 - a| * beta / s, times log2(e)
  float log_scale;         // sgn(1 - a) * (1 - c) * s * ln(2)
  float gate;              // sgn(1 - a) * c * |1 - a|

  FastUnit() = default;

  // For beta in [kFastFromBeta, 1], where 1 - beta is exact.
  CTONNX_DEVICE FastUnit(float beta, float coeff, float a) {
    const float s = (1 - beta) + 1e-6f;
    const float gap = fabsf(1 - a);
    const float sign = a < 1 ? 1.f : a > 1 ? -1.f : 0.f;
    slope = a;
    u_scale = gap / s * Elementary<float>::kLog2e;
    v_scale = beta * u_scale;
    log_scale = sign * (1 - coeff) * s * 0.693147181f;
    gate = sign * coeff * gap;
  }

  // The terms of Unit. Beyond the limit both are 0. They are 0 for NaN too: above_zero and clip pass
  // NaN on.
  CTONNX_DEVICE float log_term(float ax) const {
    const float u = ax * u_scale, term = log_scale * M::log2(1 + M::exp2(-u));
    return u < kLimit ? term : 0;
  }
  CTONNX_DEVICE float gate_term(float ax) const {
    const float v = ax * v_scale, term = ax * gate * M::reciprocal(1 + M::exp2(v));
    return v < kLimit ? term : 0;
  }

  CTONNX_DEVICE float operator()(float x) const {
    const float ax = absolute(x);
    float small = log_term(ax);
    // fmaf: for slopes near 1 the rounding of the product would be most of the error. Slope 0 is a
    // case of its own as in below_zero.
    if (x < 0 && slope != 0) small = fmaf(x, slope, small);
    return above_zero(x) + (small - gate_term(ax));
  }

 private:
  static constexpr float kLimit = 126;
};

}  // namespace CTONNX_LEVEL
}  // namespace ctonnx

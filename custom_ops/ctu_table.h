// The table that replaces the formula in float32 arithmetic, for one instruction set. Part of
// ctu_kernels.cc, whose rules hold here.
//
// With beta and c fixed, the correction s * r(u) of ctu_math.h is a function of u = |x| / s alone.
// The table approximates it over v = 1 + kScale * u. It splits each octave of v into equal segments
// with a polynomial on each: segments are short near 0 and long far out, and the leading bits of v
// are the number of the segment. From v = 256 on the correction is below 1e-8 and taken as 0.
//
// The larger beta is, the faster the correction decays: from kFineFromBeta on, where people steer,
// shorter segments reach far enough, and their polynomials need a lower degree.
#pragma once

#include "ctu_vector.h"

namespace ctonnx {
inline namespace CTONNX_LEVEL {
namespace {

#if defined(__AVX512F__)
// Few segments of high degree: the coefficients of a power fill two registers (one with AVX2), and
// a permutation of registers looks them up.
constexpr int kSplitBits = 2;  // 4 segments to an octave
constexpr int kCoarseDegree = 5, kFineDegree = 4;
#elif defined(__AVX2__)
constexpr int kSplitBits = 0;
constexpr int kCoarseDegree = 10, kFineDegree = 7;
#else
// Many segments of low degree: the coefficients of a segment are a row in memory.
constexpr int kSplitBits = 5;
constexpr int kCoarseDegree = 3, kFineDegree = 2;
constexpr int kRow = 4;  // floats
#endif

constexpr float kMiddle = 1 + 0.5f / (1 << kSplitBits);  // of a segment, in the mantissa

// How the table splits v: kScale as above, and polynomials of degree kDegree in mantissa - kOrigin.
// Polynomials of degree 2 are as accurate with kOrigin = 0, which saves a subtraction.
struct Coarse {
  static constexpr int kDegree = kCoarseDegree, kPowers = kDegree + 1, kScale = 1;
  static constexpr float kOrigin = kMiddle;
};
struct Fine {
  static constexpr int kDegree = kFineDegree, kPowers = kDegree + 1, kScale = 8;
  static constexpr float kOrigin = kDegree > 2 ? kMiddle : 0;
};
constexpr float kFineFromBeta = 0.699f;

// Whether the table of a unit is Fine.
bool is_fine(const Unit<float>& unit) {
  return unit.k_hi + unit.k_lo >= kFineFromBeta * unit.inv_s;
}

constexpr int kOctaves = 8;
constexpr int kSegments = kOctaves << kSplitBits;
constexpr int kFractionBits = 23 - kSplitBits;  // of the mantissa: the place within the segment
constexpr float kLimit = 1 << kOctaves;

// The part of the fit that does not depend on beta: the interpolation nodes of each segment, and
// the linear map from the values at the nodes to the coefficients.
template <class Split>
struct Nodes {
  static constexpr int kPowers = Split::kPowers;
  alignas(64) double u[kPowers][kSegments];
  alignas(64) double log_term[kPowers][kSegments];  // log1p(exp(-u))
  double coefficient[kPowers][kPowers];             // [power][node] of the map

  Nodes() {
    const double pi = 3.14159265358979323846;
    const double half_width = 0.5 / (1 << kSplitBits);
    for (int node = 0; node < kPowers; ++node) {
      const double angle = pi * (node + 0.5) / kPowers;
      for (int segment = 0; segment < kSegments; ++segment) {
        const int octave = segment >> kSplitBits;
        const double middle = 1 + (2 * (segment - (octave << kSplitBits)) + 1) * half_width;
        const double v = (middle + half_width * cos(angle)) * (1 << octave);
        u[node][segment] = (v - 1) / Split::kScale;
        log_term[node][segment] = log1p(exp(-u[node][segment]));
      }
      // The interpolant is sum_k T_k(t) * (2 - [k = 0]) / n * sum_nodes cos(k * angle) * value.
      // `chebyshev` has the coefficients of the polynomial T_k = 2 t T_(k-1) - T_(k-2).
      double chebyshev[kPowers] = {1}, before[kPowers] = {};
      double* const column = &coefficient[0][node];
      for (int power = 0; power < kPowers; ++power) column[power * kPowers] = 0;
      for (int k = 0; k < kPowers; ++k) {
        const double weight = (k == 0 ? 1.0 : 2.0) / kPowers * cos(k * angle);
        for (int power = 0; power < kPowers; ++power) {
          column[power * kPowers] += weight * chebyshev[power] / pow(half_width, power);
        }
        double next[kPowers];
        for (int power = 0; power < kPowers; ++power) {
          const double shifted = power == 0 ? 0 : chebyshev[power - 1];
          next[power] = (k == 0 ? 1 : 2) * shifted - before[power];
        }
        std::memcpy(before, chebyshev, sizeof before);
        std::memcpy(chebyshev, next, sizeof chebyshev);
      }
      // The powers are now of mantissa - kMiddle: shift them to mantissa - kOrigin.
      for (int i = 0; i < kPowers - 1; ++i) {
        for (int power = kPowers - 2; power >= i; --power) {
          column[power * kPowers] += column[(power + 1) * kPowers] * (Split::kOrigin - kMiddle);
        }
      }
    }
  }
};

#if defined(__AVX2__)
constexpr size_t kTableFrom = 32;
constexpr size_t kTableFloats = kSegments * Coarse::kPowers;

// The place in a table of the coefficient of `power` on `segment`. The permutation takes the low
// bits of exponent and leading mantissa, which include the exponent's bias of 127.
size_t table_index(int segment, int power) {
  return static_cast<size_t>(power * kSegments + (segment + (127 << kSplitBits)) % kSegments);
}
#else
constexpr size_t kTableFrom = 256;  // a table is 4 kB, too much for short runs of many channels
// The row after that of the last segment is 0: it serves everything beyond the last segment.
constexpr size_t kTableFloats = (kSegments + 1) * kRow;

size_t table_index(int segment, int power) {
  return static_cast<size_t>(segment * kRow + power);
}
#endif

template <class Split>
void fill_table(const Parameters& parameters, float* table) {
  constexpr int kPowers = Split::kPowers;
  static const Nodes<Split> nodes;
  const double beta = parameters.beta, coeff = parameters.coeff, slope = parameters.slope;
  const double sign = slope < 1 ? 1 : slope > 1 ? -1 : 0;
  const double s = sign * (1.0 - beta + 1e-6);
  const double log_scale = (1 - coeff) * s, gate_scale = coeff * s;
  std::memset(table, 0, kTableFloats * sizeof(float));
  constexpr int step = kLanes<Doubles>;
  for (int segment = 0; segment < kSegments; segment += step) {
    Doubles values[kPowers];
    for (int node = 0; node < kPowers; ++node) {
      const Doubles u = load(&nodes.u[node][segment]);
      const Doubles e = exponential(u * beta, Doubles{});
      values[node] = load(&nodes.log_term[node][segment]) * log_scale - u * gate_scale / (1 + e);
    }
    for (int power = 0; power < kPowers; ++power) {
      Doubles sum = {};
      for (int node = 0; node < kPowers; ++node) {
        sum += values[node] * nodes.coefficient[power][node];
      }
      for (int lane = 0; lane < step; ++lane) {
        table[table_index(segment + lane, power)] = static_cast<float>(sum[lane]);
      }
    }
  }
}

// Fills table[0 .. kTableFloats) for one (beta, c, slope), beta >= kTableFromBeta.
void make_table(const Parameters& parameters, float* table) {
  const Unit<float> unit(parameters.beta, parameters.coeff, parameters.slope);
  is_fine(unit) ? fill_table<Fine>(parameters, table) : fill_table<Coarse>(parameters, table);
}

// A table that is ready for look-ups: at(v) is the correction at v = 1 + kScale * u, for v >= 1 or
// NaN.
#if defined(__AVX2__)

template <class Split>
class Table {
 public:
  explicit Table(const float* table) {
    for (int power = 0; power < Split::kPowers; ++power) {
      for (int part = 0; part < kParts; ++part) {
        powers_[power][part] = load(table + power * kSegments + part * kSegments / kParts);
      }
    }
  }

  Floats at(Floats v) const {
    const Ints bits = bits_as<Ints>(v);
    const Ints segment = bits >> kFractionBits;
    const Ints fraction = bits & ((1 << kFractionBits) - 1);
    const Floats t = bits_as<Floats>(fraction | 0x3f800000) - Split::kOrigin;
    // Even and odd powers are summed apart: two short chains of operations instead of a long one.
    const Floats square = t * t;
    Floats sums[2];
    for (int power = Split::kDegree; power >= 0; --power) {
      const Floats c = look_up(powers_[power], segment);
      Floats& sum = sums[power % 2];
      sum = power + 2 > Split::kDegree ? c : sum * square + c;
    }
    const Floats p = sums[1] * t + sums[0];
    return v < kLimit ? p : Floats{};
  }

 private:
  static constexpr int kParts = kSegments * sizeof(float) / kVectorBytes;

#if defined(__AVX512F__)
  static Floats look_up(const Floats (&parts)[2], Ints segment) {
    return (Floats)_mm512_permutex2var_ps((__m512)parts[0], (__m512i)segment, (__m512)parts[1]);
  }
#else
  static Floats look_up(const Floats (&parts)[1], Ints segment) {
    return (Floats)_mm256_permutevar8x32_ps((__m256)parts[0], (__m256i)segment);
  }
#endif

  Floats powers_[Split::kPowers][kParts];
};

#else

// (a0, b0, a1, b1) and (a2, b2, a3, b3).
#if defined(__clang__)
Floats zip_low(Floats a, Floats b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
Floats zip_high(Floats a, Floats b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#else
Floats zip_low(Floats a, Floats b) { return __builtin_shuffle(a, b, (Ints){0, 4, 1, 5}); }
Floats zip_high(Floats a, Floats b) { return __builtin_shuffle(a, b, (Ints){2, 6, 3, 7}); }
#endif

template <class Split>
class Table {
 public:
  // The segment numbers in at() include the exponent's bias of 127: the address subtracts it.
  explicit Table(const float* table)
      : rows_(reinterpret_cast<uintptr_t>(table) - (127 << kSplitBits) * kRowBytes) {}

  Floats at(Floats v) const {
    const Floats limit = Floats{} + kLimit;
    const Floats clamped = smaller(v, limit);  // NaN becomes the limit
    const Words bits = bits_as<Words>(clamped);
    const Words offset = (bits >> (kFractionBits - kRowBits)) & ~(kRowBytes - 1);
    const Words fraction = bits & ((1 << kFractionBits) - 1);
    const Floats t = bits_as<Floats>(fraction | 0x3f800000) - Split::kOrigin;
    // Four rows of four coefficients are a 4 x 4 matrix; its transpose has a vector for each power.
    const Pairs pairs = bits_as<Pairs>(offset);
    const Floats row0 = row(first(pairs[0])), row1 = row(second(pairs[0]));
    const Floats row2 = row(first(pairs[1])), row3 = row(second(pairs[1]));
    const Floats even_low = zip_low(row0, row2), even_high = zip_high(row0, row2);
    const Floats odd_low = zip_low(row1, row3), odd_high = zip_high(row1, row3);
    const Floats c0 = zip_low(even_low, odd_low), c1 = zip_high(even_low, odd_low);
    const Floats c2 = zip_low(even_high, odd_high), c3 = zip_high(even_high, odd_high);
    const Floats upper = Split::kDegree == 3 ? c3 * t + c2 : c2;
    return (upper * t + c1) * t + c0;
  }

 private:
  static constexpr uint32_t kRowBits = 4, kRowBytes = 1 << kRowBits;

  // Two offsets leave a vector in one instruction.
  typedef uint64_t Pairs __attribute__((vector_size(kVectorBytes)));
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  static uint32_t first(uint64_t pair) { return static_cast<uint32_t>(pair); }
  static uint32_t second(uint64_t pair) { return static_cast<uint32_t>(pair >> 32); }
#else
  static uint32_t first(uint64_t pair) { return static_cast<uint32_t>(pair >> 32); }
  static uint32_t second(uint64_t pair) { return static_cast<uint32_t>(pair); }
#endif

  Floats row(uint32_t offset) const { return load(reinterpret_cast<const float*>(rows_ + offset)); }

  uintptr_t rows_;
};

#endif

}  // namespace
}  // namespace CTONNX_LEVEL
}  // namespace ctonnx

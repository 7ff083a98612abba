// The CPU kernels, for one instruction set. CMake compiles this file once for each, with the flags
// of that set and its name as CTONNX_LEVEL. What is compiled here may run only on machines that have
// the set, so nothing may be shared with other files: functions of the anonymous namespace or of
// namespace CTONNX_LEVEL only, and no templates of the standard library.
#include "ctu_cpu.h"
#include "ctu_math.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ctonnx {
inline namespace CTONNX_LEVEL {
namespace {

// ---- Vectors -----------------------------------------------------------------------------------

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

// Numbers in a vector.
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

// a > b ? a : b, which the compiler does not make the one instruction that it is; and a < b ? a : b,
// which wide vectors have no need of.
#if defined(__AVX512F__)
Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__)
Floats larger(Floats a, Floats b) { return (Floats)_mm_max_ps((__m128)a, (__m128)b); }
Floats smaller(Floats a, Floats b) { return (Floats)_mm_min_ps((__m128)a, (__m128)b); }
#else
Floats larger(Floats a, Floats b) { return a > b ? a : b; }
Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
#endif

// The 16-bit types, as integers of half the vector's size.
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

// Rounds to nearest, ties to even; NaN stays NaN.
void store(BFloat16* p, Floats v) {
  const Words bits = bits_as<Words>(v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_words(p, v == v ? rounded : (bits >> 16) | 0x40);
}

#if defined(__AVX512F__)
// Masks that take every lane: GCC's headers draw false warnings for the forms without one.
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
  // The exponent field, read as float32's, is short by 112: a multiplication adds that and
  // normalises denormals. Infinity and NaN need the full exponent instead.
  const Words finite = bits_as<Words>(bits_as<Floats>(rest) * 0x1p112f);
  return bits_as<Floats>(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : finite));
}

// Rounds to nearest, ties to even; NaN stays NaN.
void store(Half* p, Floats v) {
  const Words bits = bits_as<Words>(v);
  const Words sign = (bits >> 16) & 0x8000;
  const Words magnitude = bits & 0x7fffffff;
  // Below 2^-14 the result is denormal: adding 0.5 rounds, and leaves it in the low bits of the sum.
  const Words denormal = bits_as<Words>(bits_as<Floats>(magnitude) + 0.5f) - 0x3f000000;
  const Words normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Words finite = magnitude < 0x38800000 ? denormal : normal;
  const Words special = Words{} + 0x7c00 + ((magnitude > 0x7f800000) & 0x0200);
  store_words(p, sign | (magnitude >= 0x477ff000 ? special : finite));
}
#endif

// y[i..] = body(x[i..], i) over n elements, a vector at a time.
template <class T, class Body>
void for_each_vector(const T* x, T* y, size_t n, Body body) {
  constexpr size_t step = kLanes<typename VectorFor<T>::type>;
  if (n >= step) {
    // The first and the last vector may overlap their neighbours, so that the stores between are
    // aligned and no element is left over. Each is read before the one before it is written, which
    // is soon enough where no three overlap.
    const size_t aligned = step - reinterpret_cast<uintptr_t>(y) / sizeof(T) % step;
    size_t i = 0, next = n < 2 * step ? n - step : aligned;
    auto v = load(x);
    while (i < n - step) {
      next = next < n - step ? next : n - step;
      const auto following = load(x + next);
      store(y + i, body(v, i));
      v = following;
      i = next;
      next += step;
    }
    store(y + i, body(v, i));
  } else if (n > 0) {
    T padded[step] = {};
    std::memcpy(padded, x, n * sizeof(T));
    store(padded, body(load(padded), 0));
    std::memcpy(y, padded, n * sizeof(T));
  }
}

// ---- The table ---------------------------------------------------------------------------------
//
// With beta and c fixed, the correction s * r(u) is a function of u = |x| / s alone. It is tabulated
// over v = 1 + kScale * u: an octave of v is split into equal segments with a polynomial on each, so
// that the grid is fine near 0 and coarse far out, and the segment's number is the leading bits of
// v. From v = 256 on the correction is below 1e-8 and taken as 0.
//
// The larger beta is, the faster the correction decays: from kFineFromBeta on, where people steer,
// the segments can be finer, and their polynomials of lower degree.

#if defined(__AVX512F__)
// Few segments of high degree: the coefficients of each power fill two registers, or one of AVX2's,
// and a permutation of those looks them up.
constexpr int kSplitBits = 2;  // 4 segments to an octave
constexpr int kWideDegree = 5, kFineDegree = 4;
#elif defined(__AVX2__)
constexpr int kSplitBits = 0;
constexpr int kWideDegree = 10, kFineDegree = 7;
#else
// Many segments of low degree: the coefficients of a segment are a row in memory.
constexpr int kSplitBits = 5;
constexpr int kWideDegree = 3, kFineDegree = 2;
constexpr int kRow = 4;  // floats
#endif

constexpr float kMiddle = 1 + 0.5f / (1 << kSplitBits);  // of a segment, in the mantissa

// Polynomials are in the mantissa less kOrigin: fine ones of degree 2 lose nothing by one of 0, which
// saves a subtraction.
struct Wide {
  static constexpr int kDegree = kWideDegree, kPowers = kDegree + 1, kScale = 1;
  static constexpr float kOrigin = kMiddle;
};
struct Fine {
  static constexpr int kDegree = kFineDegree, kPowers = kDegree + 1, kScale = 8;
  static constexpr float kOrigin = kDegree > 2 ? kMiddle : 0;
};
constexpr float kFineFromBeta = 0.699f;

// Which grid the table of a unit has.
bool is_fine(const Unit<float>& unit) {
  return unit.k_hi + unit.k_lo >= kFineFromBeta * unit.inv_s;
}

constexpr int kOctaves = 8;
constexpr int kSegments = kOctaves << kSplitBits;
constexpr int kFractionBits = 23 - kSplitBits;  // of a float32 mantissa, the place in the segment
constexpr float kLimit = 1 << kOctaves;

// What fitting needs and no beta changes: the nodes of each segment and the map from values there to
// coefficients.
template <class Grid>
struct Nodes {
  static constexpr int kPowers = Grid::kPowers;
  alignas(64) double u[kPowers][kSegments];
  alignas(64) double log_term[kPowers][kSegments];  // log1p(exp(-u))
  double coefficient[kPowers][kPowers];             // of a power, from the value at a node

  Nodes() {
    const double pi = 3.14159265358979323846;
    const double half_width = 0.5 / (1 << kSplitBits);
    for (int node = 0; node < kPowers; ++node) {
      const double angle = pi * (node + 0.5) / kPowers;
      for (int segment = 0; segment < kSegments; ++segment) {
        const int octave = segment >> kSplitBits;
        const double middle = 1 + (2 * (segment - (octave << kSplitBits)) + 1) * half_width;
        const double v = (middle + half_width * cos(angle)) * (1 << octave);
        u[node][segment] = (v - 1) / Grid::kScale;
        log_term[node][segment] = log1p(exp(-u[node][segment]));
      }
      // Interpolation is sum_k T_k(t) * (2 - [k = 0]) / n * sum_nodes cos(k * angle) * value, where
      // the Chebyshev polynomial T_k = 2 t T_(k-1) - T_(k-2), here by its coefficients.
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
      // From powers of the distance to the middle to those of the distance to kOrigin.
      for (int i = 0; i < kPowers - 1; ++i) {
        for (int power = kPowers - 2; power >= i; --power) {
          column[power * kPowers] += column[(power + 1) * kPowers] * (Grid::kOrigin - kMiddle);
        }
      }
    }
  }
};

#if defined(__AVX2__)
constexpr size_t kTableFloats = kSegments * Wide::kPowers;

// Where a table keeps the coefficient of `power` on `segment`. The permutation takes the low bits of
// exponent and leading mantissa, in which the exponent's bias of 127 still is.
size_t table_index(int segment, int power) {
  return static_cast<size_t>(power * kSegments + (segment + (127 << kSplitBits)) % kSegments);
}
#else
// The row behind the last segment's is 0, for what lies beyond the grid.
constexpr size_t kTableFloats = (kSegments + 1) * kRow;

size_t table_index(int segment, int power) {
  return static_cast<size_t>(segment * kRow + power);
}
#endif

template <class Grid>
void fill_table(const Parameters& parameters, float* table) {
  constexpr int kPowers = Grid::kPowers;
  static const Nodes<Grid> nodes;
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

void make_table(const Parameters& parameters, float* table) {
  const Unit<float> unit(parameters.beta, parameters.coeff, parameters.slope);
  is_fine(unit) ? fill_table<Fine>(parameters, table) : fill_table<Wide>(parameters, table);
}

// A table ready for use: at(v) is the correction for v = 1 + kScale * u, v >= 1 or NaN.
#if defined(__AVX2__)

template <class Grid>
class Table {
 public:
  explicit Table(const float* table) {
    for (int power = 0; power < Grid::kPowers; ++power) {
      for (int part = 0; part < kParts; ++part) {
        powers_[power][part] = load(table + power * kSegments + part * kSegments / kParts);
      }
    }
  }

  Floats at(Floats v) const {
    const Ints bits = bits_as<Ints>(v);
    const Ints segment = bits >> kFractionBits;
    const Floats t = bits_as<Floats>((bits & ((1 << kFractionBits) - 1)) | 0x3f800000) - Grid::kOrigin;
    // Even and odd powers apart: two short chains of operations rather than a long one.
    const Floats square = t * t;
    Floats sums[2];
    for (int power = Grid::kDegree; power >= 0; --power) {
      const Floats c = look_up(powers_[power], segment);
      Floats& sum = sums[power % 2];
      sum = power + 2 > Grid::kDegree ? c : sum * square + c;
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

  Floats powers_[Grid::kPowers][kParts];
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

template <class Grid>
class Table {
 public:
  // The numbers of segments have the exponent's bias of 127 in them.
  explicit Table(const float* table)
      : rows_(reinterpret_cast<uintptr_t>(table) - (127 << kSplitBits) * kRowBytes) {}

  Floats at(Floats v) const {
    const Floats limit = Floats{} + kLimit;
    const Floats clamped = smaller(v, limit);  // the limit where v is NaN
    const Words bits = bits_as<Words>(clamped);
    const Words offset = (bits >> (kFractionBits - kRowBits)) & ~(kRowBytes - 1);
    const Words fraction = bits & ((1 << kFractionBits) - 1);
    const Floats t = bits_as<Floats>(fraction | 0x3f800000) - Grid::kOrigin;
    // Four rows of four coefficients are a 4 x 4 matrix: transposed, each power is a vector.
    const Pairs pairs = bits_as<Pairs>(offset);
    const Floats row0 = row(first(pairs[0])), row1 = row(second(pairs[0]));
    const Floats row2 = row(first(pairs[1])), row3 = row(second(pairs[1]));
    const Floats even_low = zip_low(row0, row2), even_high = zip_high(row0, row2);
    const Floats odd_low = zip_low(row1, row3), odd_high = zip_high(row1, row3);
    const Floats c0 = zip_low(even_low, odd_low), c1 = zip_high(even_low, odd_low);
    const Floats c2 = zip_low(even_high, odd_high), c3 = zip_high(even_high, odd_high);
    const Floats upper = Grid::kDegree == 3 ? c3 * t + c2 : c2;
    return (upper * t + c1) * t + c0;
  }

 private:
  static constexpr uint32_t kRowBits = 4, kRowBytes = 1 << kRowBits;

  // Two numbers leave a vector in one step.
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

// ---- The kernels -------------------------------------------------------------------------------

// The fields of a Unit are read in its order: see Units.
template <class P, class Read>
Unit<P> read_unit(Read read) {
  static_assert(sizeof(Unit<P>) == kUnitFields * sizeof(P), "Units holds every field");
  Unit<P> unit;
  unit.slope = read(0);
  unit.inv_s = read(1);
  unit.k_hi = read(2);
  unit.k_lo = read(3);
  unit.log_scale = read(4);
  unit.gate_hi = read(5);
  unit.gate_lo = read(6);
  return unit;
}

template <bool kSloped, class T, class A>
void run_one(const T* x, T* y, size_t n, const Unit<A>& unit) {
  using V = typename VectorFor<T>::type;
  for_each_vector(x, y, n, [&](V v, size_t) { return ctu<kSloped>(v, unit); });
}

template <bool kSloped, class Grid, class T>
void run_table(const T* x, T* y, size_t n, const Unit<float>& unit, const float* coefficients) {
  const Table<Grid> table(coefficients);
  const float scale = unit.inv_s * Grid::kScale;
  for_each_vector(x, y, n, [&](Floats v, size_t) {
    Floats small = table.at(absolute(v) * scale + 1);
    if (kSloped) small += below_zero(v, unit.slope);
    return larger(Floats{}, v) + small;  // NaN where v is
  });
}

template <class T, class A>
void run(const T* x, T* y, size_t n, Units<A> units, size_t index, const float* table) {
  const Unit<A> unit =
      read_unit<A>([&](size_t field) { return units.data[field * units.stride + index]; });
  const bool sloped = unit.slope != 0;
  if constexpr (sizeof(A) == sizeof(float)) {
    if (table != nullptr) {
      if (is_fine(unit)) {
        return sloped ? run_table<true, Fine>(x, y, n, unit, table)
                      : run_table<false, Fine>(x, y, n, unit, table);
      }
      return sloped ? run_table<true, Wide>(x, y, n, unit, table)
                    : run_table<false, Wide>(x, y, n, unit, table);
    }
  }
  sloped ? run_one<true>(x, y, n, unit) : run_one<false>(x, y, n, unit);
}

template <class T, class A>
void run_each(const T* x, T* y, size_t n, Units<A> units, size_t first) {
  using V = typename VectorFor<T>::type;
  for_each_vector(x, y, n, [&](V v, size_t i) {
    return ctu<true>(v, read_unit<V>([&](size_t field) {
      return load_units<V>(units.data + field * units.stride + first + i);
    }));
  });
}

}  // namespace

#define CTONNX_TEXT_(name) #name
#define CTONNX_TEXT(name) CTONNX_TEXT_(name)

extern const Level level;
const Level level = {
    CTONNX_TEXT(CTONNX_LEVEL),
    kTableFloats,
#if defined(__AVX2__)
    32,
#else
    256,  // a table is 4 kB, which a thousand channels would rather not have
#endif
    make_table,
    {run<float, float>, run_each<float, float>},
    {run<Half, float>, run_each<Half, float>},
    {run<BFloat16, float>, run_each<BFloat16, float>},
    {run<double, double>, run_each<double, double>},
};

}  // namespace CTONNX_LEVEL
}  // namespace ctonnx

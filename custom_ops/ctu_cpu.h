// CTU kernels for the CPU. Plain pointers only: no vector type leaks from here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ctonnx {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type a kernel for elements of type T computes in.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

struct Parameters {
  float beta, coeff;
  double slope;
};

// The fields of Unit (ctu_math.h) in its order, for many units: field f of unit i is
// data[f * stride + i], so that neighbouring units load as vectors.
template <class A>
struct Units {
  const A* data;
  size_t stride;
};
constexpr size_t kUnitFields = 7;

// A vector of units may be loaded that starts at the last one: leave so many behind it.
constexpr size_t kUnitPadding = 15;

// A table replaces the formula where it is accurate enough: from this beta on.
constexpr float kTableFromBeta = 0.15f;

// Kernels for one element type: y[i] = CTU(x[i]) for i < n. x and y are equal or do not overlap; no
// alignment is needed.
template <class T>
struct Kernels {
  using A = typename Arithmetic<T>::type;

  // All elements by one unit, through its table where that is not null (never for double).
  void (*run)(const T* x, T* y, size_t n, Units<A> units, size_t unit, const float* table);

  // Element i by unit first + i.
  void (*run_each)(const T* x, T* y, size_t n, Units<A> units, size_t first);
};

// The kernels compiled for one instruction set.
struct Level {
  const char* name;

  size_t table_floats;  // size of a table
  size_t table_from;    // the number of elements from which reading a ready table pays
  void (*make_table)(const Parameters&, float* table);

  Kernels<float> float32;
  Kernels<Half> float16;
  Kernels<BFloat16> bfloat16;
  Kernels<double> float64;

  const Kernels<float>& kernels(float) const { return float32; }
  const Kernels<Half>& kernels(Half) const { return float16; }
  const Kernels<BFloat16>& kernels(BFloat16) const { return bfloat16; }
  const Kernels<double>& kernels(double) const { return float64; }
};

// The best level of this machine, or the one that the environment variable CTONNX_CPU names
// (avx512, avx2 or portable). Throws std::runtime_error where that is unknown or not supported.
const Level& cpu_level();

double to_double(Half value);
double to_double(BFloat16 value);
inline double to_double(double value) { return value; }

}  // namespace ctonnx

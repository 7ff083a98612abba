// The CPU kernels. The interface has plain pointers only, as vector types differ between levels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ctu_math.h"

namespace ctonnx {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type in which a kernel for elements of type T computes.
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

// Many Units (ctu_math.h) as an array for each field, in the order of Unit: field f of unit i is
// data[f * stride + i]. So neighbouring units load as vectors.
template <class A>
struct Units {
  const A* data;
  size_t stride;
};
constexpr size_t kUnitFields = 7;

// Elements to allocate after the last unit of a field: a vector load may start at the last unit.
constexpr size_t kUnitPadding = 15;

// The beta from which a table is accurate enough to replace the formula.
constexpr float kTableFromBeta = 0.15f;

// Kernels for one element type: y[i] = CTU(x[i]) for i < n, or with kinks elsewhere unless `bounds`
// is null. x and y are equal or do not overlap. They need no alignment.
template <class T>
struct Kernels {
  using A = typename Arithmetic<T>::type;

  // All elements with unit number `unit`, and with its table unless that is null. Double has none.
  void (*run)(const T* x, T* y, size_t n, Units<A> units, size_t unit, const float* table,
              const Bounds<A>* bounds);

  // Element i with unit number first + i.
  void (*run_each)(const T* x, T* y, size_t n, Units<A> units, size_t first, const Bounds<A>* bounds);

  // The same for every one of `rows` rows of `width` elements, a multiple of kWidth.
  void (*run_rows)(const T* x, T* y, size_t rows, size_t width, Units<A> units, size_t first,
                   const Bounds<A>* bounds);
};
constexpr size_t kWidth = 16;  // elements of the longest vector

// The kernels compiled for one instruction set.
struct Level {
  const char* name;

  size_t table_floats;  // size of a table
  size_t table_from;    // elements of a point from which a table is faster than the formula
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
// (avx512, avx2 or portable). Throws std::runtime_error if that is unknown or not supported.
const Level& cpu_level();

double to_double(Half value);
double to_double(BFloat16 value);
inline double to_double(double value) { return value; }

}  // namespace ctonnx

// CTU kernels for the CPU. Plain pointers only: no vector type leaks from here.
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

// The type a kernel for elements of type T computes in.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

double to_double(float value);
double to_double(double value);
double to_double(Half value);
double to_double(BFloat16 value);

// y[i] = CTU(x[i]) for i < n. x and y are equal or do not overlap; no alignment is needed.
template <class T>
void ctu_run(const T* x, T* y, size_t n, const Unit<typename Arithmetic<T>::type>& unit);

}  // namespace ctonnx

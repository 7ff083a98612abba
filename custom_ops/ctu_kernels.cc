// The CPU kernels for one instruction set. CMake compiles this file once for each, with its
// compiler flags and its name as CTONNX_LEVEL.
//
// A machine without the instruction set must not run this code. So the linker may merge nothing of
// it with other files: here and in ctu_vector.h and ctu_table.h every function is in an anonymous
// namespace or in namespace CTONNX_LEVEL, and no template of the standard library is used.
#include "ctu_table.h"

namespace ctonnx {
inline namespace CTONNX_LEVEL {
namespace {

// y[i..] = body(x[i..], i) for n elements, one vector at a time. The one loop of all kernels.
template <class T, class Body>
void for_each_vector(const T* x, T* y, size_t n, Body body) {
  constexpr size_t step = kLanes<typename VectorFor<T>::type>;
  if (n >= step) {
    // The first and the last vector may overlap their neighbours: the stores between are aligned,
    // and no element is left over. Each vector is read before the previous one is written. That is
    // early enough in place too, because no three vectors overlap.
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

// A Unit from its fields; read(f) is field f in the order of Units.
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

// Calls kernel(Choice<true>()) or kernel(Choice<false>()).
template <bool kValue>
struct Choice {
  static constexpr bool value = kValue;
};
template <class Kernel>
void choose(bool value, Kernel kernel) {
  value ? kernel(Choice<true>()) : kernel(Choice<false>());
}

template <class T, class A>
void run_formula(const T* x, T* y, size_t n, const Unit<A>& unit, const Bounds<A>* bounds) {
  using V = typename VectorFor<T>::type;
  if (bounds != nullptr) {
    const Bounds<A> own = *bounds;
    return for_each_vector(x, y, n, [&](V v, size_t) { return bounded_ctu(v, own, unit); });
  }
  choose(unit.slope != 0, [&](auto sloped) {
    for_each_vector(x, y, n, [&](V v, size_t) { return ctu<sloped.value>(v, unit); });
  });
}

template <class Split, class T>
void run_table(const T* x, T* y, size_t n, const Unit<float>& unit, const float* coefficients) {
  const Table<Split> table(coefficients);
  const float scale = unit.inv_s * Split::kScale;
  choose(unit.slope != 0, [&](auto sloped) {
    for_each_vector(x, y, n, [&](Floats v, size_t) {
      Floats small = table.at(absolute(v) * scale + 1);
      if (sloped.value) small += below_zero(v, unit.slope);
      return larger(Floats{}, v) + small;  // NaN stays NaN
    });
  });
}

// Whether the bounds are so far apart that at each x the smaller of the two corrections is below
// 2e-7. Halfway between them, both are about half * exp(-k * half) for c = 1.
bool far_apart(const Unit<float>& unit, const Bounds<float>& bounds) {
  const float half = bounds.hi / 2 - bounds.lo / 2;
  return unit.k_hi * half >= 16 + half / 4;
}

template <class Split, class T>
void run_bounded_table(const T* x, T* y, size_t n, const Unit<float>& unit,
                       const float* coefficients, const Bounds<float>& bounds) {
  const Table<Split> table(coefficients);
  const float scale = unit.inv_s * Split::kScale;
  const Floats lo = Floats{} + bounds.lo, hi = Floats{} + bounds.hi;
  const float alpha = bounds.alpha, offset = bounds.offset;
  const bool apart = far_apart(unit, bounds);
  // The nearer bound alone, if they are far apart. An infinite one is never nearer: the middle is
  // infinite too.
  const float middle = bounds.lo / 2 + bounds.hi / 2;
  choose(alpha == 1 && offset == 0, [&](auto unscaled) {
    const auto each = [&](auto body) {
      for_each_vector(x, y, n, [&](Floats v, size_t) {
        const Floats z = unscaled.value ? v : v * alpha + offset;
        return body(z, smaller(hi, larger(lo, z)));  // NaN stays NaN
      });
    };
    if (apart) {
      each([&](Floats z, Floats clipped) {
        const Floats small = table.at(absolute(z - (z < middle ? lo : hi)) * scale + 1);
        return z < middle ? clipped + small : clipped - small;
      });
    } else {
      each([&](Floats z, Floats clipped) {
        const Floats at_lo = table.at(absolute(z - lo) * scale + 1);
        return clipped + (at_lo - table.at(absolute(z - hi) * scale + 1));
      });
    }
  });
}

template <class T, class A>
void run(const T* x, T* y, size_t n, Units<A> units, size_t index, const float* table,
         const Bounds<A>* bounds) {
  const Unit<A> unit =
      read_unit<A>([&](size_t field) { return units.data[field * units.stride + index]; });
  if constexpr (sizeof(A) == sizeof(float)) {
    if (table != nullptr && bounds != nullptr) {
      return is_fine(unit) ? run_bounded_table<Fine>(x, y, n, unit, table, *bounds)
                           : run_bounded_table<Coarse>(x, y, n, unit, table, *bounds);
    }
    if (table != nullptr) {
      return is_fine(unit) ? run_table<Fine>(x, y, n, unit, table)
                           : run_table<Coarse>(x, y, n, unit, table);
    }
  }
  run_formula(x, y, n, unit, bounds);
}

// The units of a vector of elements, from number `first` on.
template <class V, class A>
Unit<V> units_at(const Units<A>& units, size_t first) {
  return read_unit<V>(
      [&](size_t field) { return load_units<V>(units.data + field * units.stride + first); });
}

template <class T, class A>
void run_each(const T* x, T* y, size_t n, Units<A> units, size_t first, const Bounds<A>* bounds) {
  using V = typename VectorFor<T>::type;
  if (bounds != nullptr) {
    const Bounds<A> own = *bounds;
    return for_each_vector(x, y, n, [&](V v, size_t i) {
      return bounded_ctu(v, own, units_at<V>(units, first + i));
    });
  }
  for_each_vector(x, y, n, [&](V v, size_t i) {
    return ctu<true>(v, units_at<V>(units, first + i));
  });
}

// Down the rows, the units of a vector stay in registers.
template <class T, class A>
void run_rows(const T* x, T* y, size_t rows, size_t width, Units<A> units, size_t first,
              const Bounds<A>* bounds) {
  using V = typename VectorFor<T>::type;
  static_assert(kWidth % kLanes<V> == 0, "a row is whole vectors");
  const auto down = [&](size_t column, auto body) {
    for (size_t i = column; i < rows * width; i += width) store(y + i, body(load(x + i)));
  };
  for (size_t column = 0; column < width; column += kLanes<V>) {
    const Unit<V> unit = units_at<V>(units, first + column);
    if (bounds != nullptr) {
      const Bounds<A> own = *bounds;
      down(column, [&](V v) { return bounded_ctu(v, own, unit); });
    } else {
      down(column, [&](V v) { return ctu<true>(v, unit); });
    }
  }
}

}  // namespace

#define CTONNX_TEXT_(name) #name
#define CTONNX_TEXT(name) CTONNX_TEXT_(name)

extern const Level level;
const Level level = {
    CTONNX_TEXT(CTONNX_LEVEL),
    kTableFloats,
    kTableFrom,
    make_table,
    {run<float, float>, run_each<float, float>, run_rows<float, float>},
    {run<Half, float>, run_each<Half, float>, run_rows<Half, float>},
    {run<BFloat16, float>, run_each<BFloat16, float>, run_rows<BFloat16, float>},
    {run<double, double>, run_each<double, double>, run_rows<double, double>},
};

}  // namespace CTONNX_LEVEL
}  // namespace ctonnx

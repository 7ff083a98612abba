// Tests of the CPU kernels without ONNX Runtime, for sanitizers. They test the level that
// CTONNX_CPU names. Prints failures; exits with 1 if there are any.
#include <limits>
#include <thread>

#include "contract.h"

namespace {

// A grid of one triple: for long runs, which use a table where beta allows it, or with inner == 1
// for a unit per element.
template <class T>
struct One {
  Parameters parameters;
  T slope;
  Grid<T> grid;

  One(Parameters p, size_t inner) : parameters(p), slope(from_double<T>(p.slope)) {
    parameters.slope = to_double(slope);
    grid.inner = inner;
    if (inner == 1) grid.dims = {1};
    grid.beta.data = &parameters.beta;
    grid.coeff.data = &parameters.coeff;
    grid.slope.data = &slope;
    grid.beta.count = grid.coeff.count = grid.slope.count = 1;
  }
  One(const One&) = delete;
};

template <class T>
void test_contract() {
  for (float beta : kBetas) {
    const std::vector<T> x = samples<T>(200, 1 - beta + 1e-6);
    std::vector<T> y(x.size());
    for (float coeff : kCoeffs) {
      for (double slope : kSlopes) {
        for (size_t inner : {size_t{1}, size_t{33}, size_t{100000}}) {
          const One<T> one({beta, coeff, slope}, inner);
          Plan<T>(one.grid, cpu_level()).run(x.data(), y.data(), 0, x.size(), 100000);
          check("contract", x.data(), y.data(), x.size(), one.parameters);
        }
      }
    }
  }
}

template <class T>
Bounds<typename Arithmetic<T>::type> as_computed(const Bounds<double>& bounds) {
  using A = typename Arithmetic<T>::type;
  return {static_cast<A>(bounds.alpha), static_cast<A>(bounds.offset), static_cast<A>(bounds.lo),
          static_cast<A>(bounds.hi)};
}

// The ops with kinks elsewhere: by the formula, with a unit for each element, and with a table, once
// for the nearer kink and once for both.
template <class T>
void test_bounds() {
  for (const Bounds<double>& bounds : kBounds) {
    const Bounds<typename Arithmetic<T>::type> own = as_computed<T>(bounds);
    const std::vector<T> special = special_values<T>();
    for (float beta : kBetas) {
      for (float coeff : kCoeffs) {
        std::vector<T> x = samples_near<T>(bounds, 300, 1 - beta + 1e-6);
        if (coeff == 0.5f && (beta == 0.1f || beta == 0.85f)) {
          x.insert(x.end(), special.begin(), special.end());
        }
        for (size_t inner : {size_t{1}, size_t{100000}}) {
          const One<T> one({beta, coeff, 0}, inner);
          std::vector<T> y(x.size());
          Plan<T>(one.grid, cpu_level()).run(x.data(), y.data(), 0, x.size(), 1 << 20, &own);
          check_bounded("bounds", x.data(), y.data(), x.size(), one.parameters, bounds);
        }
      }
    }
  }
}

// The largest error of random bounds and parameters, which fixed ones may miss: starts at random
// points, then improves the worst of them by small steps.
void test_worst_bounds() {
  uint32_t seed = 1;
  const auto uniform = [&](float from, float to) {
    return from + (to - from) * static_cast<float>((seed = seed * 1664525u + 1013904223u) * 0x1p-32);
  };
  struct Point {
    float beta, coeff, lo, width, x;
  };
  const auto error = [](const Point& p, float* y, Bounds<double>* bounds) {
    const Bounds<float> own = {1, 0, p.lo, p.lo + p.width};
    *bounds = {1, 0, own.lo, own.hi};
    const One<float> one({p.beta, p.coeff, 0}, 100000);
    const std::vector<float> x(33, p.x);
    std::vector<float> out(33);
    Plan<float>(one.grid, cpu_level()).run(x.data(), out.data(), 0, 33, 100000, &own);
    *y = out[32];
    double scale;
    const double exact = exact_bounded(p.x, one.parameters, *bounds, &scale);
    return std::fabs(*y - exact) / scale;
  };
  for (int start = 0; start < 40; ++start) {
    Point worst{};
    double largest = 0;
    float step = 0.1f, y;
    Bounds<double> bounds;
    for (int i = 0; i < 300; ++i) {
      Point p = worst;
      if (i < 100) {
        p = {uniform(start % 4 == 0 ? 0.f : 0.7f, 1), uniform(0, 1), uniform(-2, 1),
             uniform(0.1f, 8), uniform(-3, 9)};
      } else {
        p.beta = std::clamp(p.beta + uniform(-step, step) / 3, 0.f, 1.f);
        p.coeff = std::clamp(p.coeff + uniform(-step, step), 0.f, 1.f);
        p.lo += uniform(-step, step);
        p.width *= 1 + uniform(-step, step);
        p.x += uniform(-step, step);
      }
      const double found = error(p, &y, &bounds);
      if (i >= 100) step *= found > largest ? 1.5f : 0.97f;
      if (!(found <= largest)) largest = found, worst = p;  // NaN stays
    }
    if (!(largest <= 2 * Row<float>::tolerance)) {
      error(worst, &y, &bounds);
      const Parameters p = {worst.beta, worst.coeff, 0};
      double scale;
      fail("worst bounds", "float32", worst.x, y, exact_bounded(worst.x, p, bounds, &scale), p);
    }
  }
}

template <class T>
void test_special_values() {
  std::vector<T> x = special_values<T>();
  if (sizeof(T) == 4) {
    // Bit patterns over the whole range, denormals included.
    for (uint64_t bits = 0; bits < 0x100000000; bits += 65521) {
      const float value = bits_as<float>(static_cast<uint32_t>(bits));
      if (!(std::fabs(value) > 1e4) || !std::isfinite(value)) x.push_back(from_double<T>(value));
    }
  }
  std::vector<T> y(x.size());
  for (Parameters p : {Parameters{0, 0.5f, 1}, {0.1f, 0.5f, 0.25}, {0.5f, 0.5f, 0},
                       {1, 0.5f, -0.5}}) {
    for (size_t inner : {size_t{1}, size_t{100000}}) {
      const One<T> one(p, inner);
      Plan<T>(one.grid, cpu_level()).run(x.data(), y.data(), 0, x.size(), 1 << 20);
      check("special values", x.data(), y.data(), x.size(), one.parameters);
    }
  }
}

// For every length and alignment, in place or not, the kernels write exactly their elements, and
// the same numbers as in a long run. The buffers end with the data, so that a sanitizer sees reads
// beyond.
template <class T>
void test_lengths() {
  constexpr size_t longest = 67;
  const std::vector<T> x = samples<T>(longest, 1);
  auto same = [](const T* a, const T* b, size_t n) {
    return n == 0 || std::memcmp(a, b, n * sizeof *a) == 0;
  };
  for (float beta : {0.1f, 0.85f}) {
    for (size_t inner : {size_t{1}, size_t{100000}}) {
      const One<T> one({beta, 0.5f, 0.25}, inner);
      const Plan<T> plan(one.grid, cpu_level());
      std::vector<T> whole(longest);
      plan.run(x.data(), whole.data(), 0, longest, 100000);
      for (size_t n = 0; n <= longest; ++n) {
        for (size_t offset = 0; offset < 4; ++offset) {
          std::vector<T> in(offset), out(offset + n + 3);
          in.insert(in.end(), x.begin(), x.begin() + static_cast<ptrdiff_t>(n));
          in.shrink_to_fit();
          plan.run(in.data() + offset, out.data() + offset, 0, n, 100000);
          require(same(out.data() + offset, whole.data(), n), "values", Row<T>::name, n);
          bool outside = true;
          for (size_t i = 0; i < out.size(); ++i) {
            outside &= (i >= offset && i < offset + n) || to_double(out[i]) == 0;
          }
          require(outside, "writes outside", Row<T>::name, n);
          plan.run(in.data() + offset, in.data() + offset, 0, n, 100000);
          require(same(in.data() + offset, whole.data(), n), "in place", Row<T>::name, n);
        }
      }
    }
  }
}

// Grids with points of many sizes, in tasks that may begin and end within a point.
template <class T>
void test_grids() {
  for (size_t points : {2, 3, 16, 67, 300}) {
    for (size_t inner : {1, 2, 7, 31, 32, 49, 600}) {
      std::vector<float> beta, coeff;
      for (size_t i = 0; i < points; ++i) {
        beta.push_back(static_cast<float>(i % 11) / 10);
        coeff.push_back(static_cast<float>(i % 7) / 6);
      }
      const T slope = from_double<T>(0.25);
      Grid<T> grid;
      grid.dims = {points};
      grid.inner = inner;
      grid.beta = {beta.data(), points, {1}};
      grid.coeff = {coeff.data(), points, {1}};
      grid.slope = {&slope, 1, {}};
      const Plan<T> plan(grid, cpu_level());
      const size_t n = 2 * points * inner;
      const std::vector<T> x = samples<T>(n, 0.5);
      std::vector<T> y(n);
      for (size_t begin = 0; begin < n; begin += 777) {
        plan.run(x.data(), y.data(), begin, std::min(n, begin + 777), inner);
      }
      for (size_t i = 0; i < n; i += inner < 600 ? 1 : 37) {
        const size_t point = i / inner % points;
        check("grid", &x[i], &y[i], 1, {beta[point], coeff[point], 0.25});
      }
    }
  }
}

// Parameters that vary along the first and the last of three dimensions, in tasks that may begin and
// end anywhere.
template <class T>
void test_rows() {
  for (size_t outer : {1, 3}) {
    for (size_t rows : {1, 5, 49}) {
      for (size_t width : {1, 3, 8, 16, 20, 48}) {
        std::vector<float> beta;
        for (size_t i = 0; i < outer * width; ++i) beta.push_back(static_cast<float>(i % 11) / 10);
        const float coeff = 0.25f;
        Grid<T> grid;
        grid.dims = {outer, rows, width};
        grid.beta = {beta.data(), beta.size(), {width, 0, 1}};
        grid.coeff = {&coeff, 1, {}};
        grid.set_rows();
        require(grid.rows == rows && grid.points() == outer * width, "rows", Row<T>::name, rows);
        const Plan<T> plan(grid, cpu_level());
        const size_t n = 2 * outer * rows * width;
        const std::vector<T> x = samples<T>(n, 0.5);
        for (size_t task : {n, size_t{777}, size_t{50}}) {
          std::vector<T> y = x, z(n);
          const auto own = as_computed<T>(kBounds[1]);
          for (size_t begin = 0; begin < n; begin += task) {
            plan.run(y.data(), y.data(), begin, std::min(n, begin + task), 1);
            plan.run(x.data(), z.data(), begin, std::min(n, begin + task), 1, &own);
          }
          for (size_t i = 0; i < n; ++i) {
            const size_t unit = i / (rows * width) % outer * width + i % width;
            check("rows", &x[i], &y[i], 1, {beta[unit], coeff, 0});
            check_bounded("rows", &x[i], &z[i], 1, {beta[unit], coeff, 0}, kBounds[1]);
          }
        }
      }
    }
  }
}

// Many threads share a cache, with parameters that change from run to run.
void test_threads() {
  PlanCache<float> cache;
  const std::vector<float> x = samples<float>(2000, 0.5);
  std::vector<std::thread> threads;
  std::vector<std::vector<float>> outputs(4 * 50);
  auto parameters = [](size_t i) {
    return Parameters{static_cast<float>(i % 5) / 4, 0.5f, i % 2 == 0 ? 0.0 : 0.25};
  };
  for (size_t thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (size_t i = thread; i < outputs.size(); i += 4) {
        const One<float> one(parameters(i), 2000);
        outputs[i].resize(x.size());
        cache.get(one.grid, cpu_level())->run(x.data(), outputs[i].data(), 0, x.size(), 2000);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < outputs.size(); ++i) {
    check("threads", x.data(), outputs[i].data(), x.size(), parameters(i));
  }
}

template <class T>
void test_type() {
  test_contract<T>();
  test_bounds<T>();
  test_special_values<T>();
  test_lengths<T>();
  test_grids<T>();
  test_rows<T>();
}

}  // namespace

// With an argument, runs only test_threads.
int main(int argc, char**) {
  test_threads();
  if (argc > 1) return failures > 0;
  test_comparison();
  test_type<float>();
  test_type<Half>();
  test_type<BFloat16>();
  test_type<double>();
  test_worst_bounds();
  std::printf("%s: %d failures\n", cpu_level().name, failures);
  return failures > 0;
}

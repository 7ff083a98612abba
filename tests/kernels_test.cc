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
  test_special_values<T>();
  test_lengths<T>();
  test_grids<T>();
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
  std::printf("%s: %d failures\n", cpu_level().name, failures);
  return failures > 0;
}

// Tests of the CPU kernels without ONNX Runtime, so that sanitizers can watch them. The level under
// test is what CTONNX_CPU names. Prints what fails; exits with 1 if anything does.
#include <cmath>
#include <cstdio>
#include <limits>
#include <thread>

#include "ctu_plan.h"

using namespace ctonnx;

namespace {

// The numeric contract of ctu_math.h, row by row. `step` is half the distance of neighbouring
// numbers relative to them, for the types that round once more.
template <class T>
struct Row;
template <>
struct Row<float> {
  static constexpr const char* name = "float32";
  static constexpr double tolerance = 2.5e-7, step = 0;
};
template <>
struct Row<double> {
  static constexpr const char* name = "double";
  static constexpr double tolerance = 4e-15, step = 0;
};
template <>
struct Row<Half> {
  static constexpr const char* name = "float16";
  static constexpr double tolerance = 2.5e-7, step = 0x1p-11;
};
template <>
struct Row<BFloat16> {
  static constexpr const char* name = "bfloat16";
  static constexpr double tolerance = 2.5e-7, step = 0x1p-8;
};

const float kBetas[] = {0.f,   1e-6f, 1e-4f, 0.01f, 0.1f,  0.149f,    0.15f, 0.151f,
                        0.3f,  0.5f,  0.7f,  0.85f, 0.99f, 0.999999f, 1.f};
const float kCoeffs[] = {0.f, 0.1f, 0.5f, 0.9f, 1.f};
const double kSlopes[] = {0, 0.01, 0.25, 1, 1.5, -0.5};

int failures = 0;

void fail(const char* what, const char* type, double x, double y, double exact, Parameters p) {
  if (++failures <= 20) {
    std::printf("%s: %s CTU(%.9g) is %.17g, not %.17g, for beta %.9g, c %.9g, slope %g\n", what,
                type, x, y, exact, p.beta, p.coeff, p.slope);
  }
}

void require(bool ok, const char* what, const char* type, size_t n) {
  if (!ok && ++failures <= 20) std::printf("%s: %s, length %zu\n", what, type, n);
}

// The paper's formula where that is stable, in extended precision.
double exact_ctu(double x, Parameters p) {
  if (std::isnan(x)) return x;
  const double negative = p.slope == 0 ? 0 : p.slope * x;
  if (std::isinf(x)) return x > 0 ? x : negative;
  const long double s = 1.0L - p.beta + 1e-6L, gap = fabsl(1.0L - p.slope);
  const long double u = gap * fabsl(x) / s, sign = p.slope < 1 ? 1 : p.slope > 1 ? -1 : 0;
  const long double r = (1.0L - p.coeff) * log1pl(expl(-u)) - p.coeff * u / (1 + expl(p.beta * u));
  const long double original = x < 0 ? p.slope * static_cast<long double>(x) : x;
  return static_cast<double>(original + sign * s * r);
}

template <class T>
T from_double(double value) {
  return static_cast<T>(value);
}
// Truncation is enough to make test data.
template <>
BFloat16 from_double(double value) {
  return {static_cast<uint16_t>(bits_as<uint32_t>(static_cast<float>(value)) >> 16)};
}
template <>
Half from_double(double value) {
  const uint32_t bits = bits_as<uint32_t>(static_cast<float>(value));
  const int exponent = static_cast<int>((bits >> 23) & 0xff) - 112;
  const uint32_t sign = (bits >> 16) & 0x8000;
  if (exponent <= 0) return {static_cast<uint16_t>(sign)};
  return {static_cast<uint16_t>(sign | exponent << 10 | ((bits >> 13) & 0x3ff))};
}

// Whether y, an output for x, keeps the contract.
template <class T>
bool keeps_contract(double x, double y, double exact, double slope) {
  double scale = std::max(1.0, std::fabs(exact));
  if (slope < 0) scale = std::max(scale, std::fabs(x));
  const double smallest = sizeof(T) == 2 ? 0x1p-25 : 0;  // half of float16's smallest number
  const double rounding = std::max(Row<T>::step * std::fabs(exact) * 1.001, smallest);
  return std::fabs(y - exact) <= Row<T>::tolerance * scale + (Row<T>::step > 0 ? rounding : 0);
}

template <class T>
void check(const char* what, const T* x, const T* y, size_t n, Parameters p) {
  for (size_t i = 0; i < n; ++i) {
    const double in = to_double(x[i]), out = to_double(y[i]), exact = exact_ctu(in, p);
    const bool ok = std::isfinite(exact) ? keeps_contract<T>(in, out, exact, p.slope)
                                         : std::isnan(exact) ? std::isnan(out) : out == exact;
    if (!ok) fail(what, Row<T>::name, in, out, exact, p);
  }
}

// Numbers of both signs and every magnitude up to 1e4, most of them where s makes the curve bend.
template <class T>
std::vector<T> samples(size_t n, double s, uint32_t seed = 1) {
  std::vector<T> x;
  auto uniform = [&] { return (seed = seed * 1664525u + 1013904223u) / 4294967296.0; };
  for (size_t i = 0; i < n; ++i) {
    const double sign = uniform() < 0.5 ? -1 : 1, magnitude = uniform();
    x.push_back(from_double<T>(sign * (i % 3 == 0 ? std::pow(10, 12 * magnitude - 8)
                                                  : std::min(1e4, s * std::pow(300, magnitude)))));
  }
  return x;
}

// A grid of one triple for long runs (the table, where beta allows it) or for one element each.
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
    const std::vector<T> x = samples<T>(600, 1 - beta + 1e-6);
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
  const double infinity = std::numeric_limits<double>::infinity();
  const T zero{};
  std::vector<T> x = {zero, from_double<T>(1e-40), from_double<T>(-1e-40)};
  if constexpr (sizeof(T) == 2) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const T value{static_cast<uint16_t>(bits)};
      if (!(std::fabs(to_double(value)) > 1e4) || !std::isfinite(to_double(value))) {
        x.push_back(value);
      }
    }
  } else {
    for (double value : {infinity, -infinity, std::nan(""), -0.0}) x.push_back(T(value));
    if (sizeof(T) == 4) {
      // Bit patterns over the whole range, denormals included.
      for (uint64_t bits = 0; bits < 0x100000000; bits += 65521) {
        const float value = bits_as<float>(static_cast<uint32_t>(bits));
        if (!(std::fabs(value) > 1e4) || !std::isfinite(value)) x.push_back(T(value));
      }
    }
  }
  std::vector<T> y(x.size());
  for (float beta : {0.f, 0.1f, 0.5f, 1.f}) {
    for (double slope : {0.0, 0.25, 1.0, -0.5}) {
      for (size_t inner : {size_t{1}, size_t{100000}}) {
        const One<T> one({beta, 0.5f, slope}, inner);
        Plan<T>(one.grid, cpu_level()).run(x.data(), y.data(), 0, x.size(), 1 << 20);
        check("special values", x.data(), y.data(), x.size(), one.parameters);
      }
    }
  }
}

// Every length and alignment writes exactly its elements, the same numbers as a long run, in place
// too. The buffers end where the data does, for a sanitizer to notice reads beyond.
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

// Grids whose points are of every size, in tasks that cut them anywhere.
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

// One cache, many threads, parameters that change from run to run.
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

// The comparison can fail.
void test_comparison() {
  const Parameters right = {0.85f, 0.3f, 0}, wrong = {0.85f, 0.7f, 0};
  const double x = -0.3, exact = exact_ctu(x, right);
  require(!keeps_contract<float>(x, exact_ctu(x, wrong), exact, 0), "accepts c for 1 - c", "", 1);
  require(!keeps_contract<float>(x, exact + 3e-7, exact, 0), "accepts 3e-7", "", 1);
  require(!keeps_contract<float>(x, std::nan(""), exact, 0), "accepts NaN", "", 1);
  require(!keeps_contract<Half>(x, exact * (1 + 0x1p-10), exact, 0), "accepts an ulp", "", 1);
  require(keeps_contract<float>(x, exact + 2e-7, exact, 0), "rejects 2e-7", "", 1);
}

template <class T>
void test_type() {
  test_contract<T>();
  test_special_values<T>();
  test_lengths<T>();
  test_grids<T>();
}

}  // namespace

int main() {
  test_comparison();
  test_type<float>();
  test_type<Half>();
  test_type<BFloat16>();
  test_type<double>();
  test_threads();
  std::printf("%s: %d failures\n", cpu_level().name, failures);
  return failures > 0;
}

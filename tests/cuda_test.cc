// Tests of the threads of the CUDA kernels, which run one after another on the host: the numeric
// contract, with functions as inaccurate as those of a GPU may be, and the elements that a thread
// reads and writes, with which unit. Prints failures; exits with 1 if there are any.
#include <sys/mman.h>

#include <limits>
#include <random>

#include "contract.h"
#include "ctu_launch.h"

namespace ctonnx {

// Functions with the largest errors of PTX's .approx.ftz instructions; the variables are the signs
// of the errors. The two exponentials of FastUnit have arguments of different sign.
struct Approximate {
  static int falling, rising, log, reciprocals;

  static float exp2(float x) {
    const double error = 0x1p-22 * (std::signbit(x) ? falling : rising);
    const float y = static_cast<float>(std::exp2(static_cast<double>(x)) * (1 + error));
    return y < 0x1p-126f ? 0 : y;
  }
  static float log2(float x) {
    return static_cast<float>(std::log2(static_cast<double>(x)) + 0x1p-22 * log);
  }
  static float reciprocal(float x) {
    const float y = static_cast<float>(1 / static_cast<double>(x) * (1 + 0x1p-23 * reciprocals));
    return y < 0x1p-126f ? 0 : y;
  }
};
int Approximate::falling = 0, Approximate::rising = 0, Approximate::log = 0,
    Approximate::reciprocals = 0;

size_t widened = 0;  // calls of widen: one for each element of X and for the slope of each new unit
template <class T>
float widen(T value) {
  ++widened;
  return static_cast<float>(to_double(value));
}

void narrow(float from, BFloat16* to) { to->bits = nearest_bfloat16(from); }

// Rounds to nearest, ties to even.
void narrow(float from, Half* to) {
  const uint16_t sign = std::signbit(from) ? 0x8000 : 0;
  const double value = std::fabs(static_cast<double>(from));
  if (std::isnan(from)) {
    *to = {0x7e00};
  } else if (value >= 65520) {
    *to = {static_cast<uint16_t>(sign | 0x7c00)};
  } else {
    int exponent;
    std::frexp(value, &exponent);
    const double step = std::ldexp(1, std::max(exponent - 11, -24));
    const double rounded = std::nearbyint(value / step) * step;
    const bool normal = rounded >= 0x1p-14;
    std::frexp(rounded, &exponent);
    const double bits = normal ? std::ldexp(rounded, 11 - exponent) - 1024 + 1024 * (exponent + 14)
                               : rounded * 0x1p24;
    *to = {static_cast<uint16_t>(sign | static_cast<uint16_t>(bits))};
  }
}

template <class T, int kLanes>
void narrow(const float (&from)[kLanes], T (&to)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) narrow(from[i], &to[i]);
}

}  // namespace ctonnx

namespace {

template <bool kBounded, class T>
void run_one_thread(const Work<T>& work, uint64_t block, uint64_t blocks, unsigned thread) {
  if (work.points == 1) {
    run_thread<kPacketLanes<T>, false, kBounded, Approximate>(work, block, blocks, thread);
  } else if (work.lanes > 1) {
    run_thread<kPacketLanes<T>, true, kBounded, Approximate>(work, block, blocks, thread);
  } else {
    run_thread<1, true, kBounded, Approximate>(work, block, blocks, thread);
  }
}

template <class T>
void run_block(const Work<T>& work, uint64_t block, uint64_t blocks) {
  // Threads are independent, so every second block runs them backwards.
  for (unsigned i = 0; i < kThreads; ++i) {
    const unsigned thread = block % 2 == 0 ? i : kThreads - 1 - i;
    work.bounded ? run_one_thread<true>(work, block, blocks, thread)
                 : run_one_thread<false>(work, block, blocks, thread);
  }
}

template <class T>
void run_all(const Work<T>& work, uint64_t blocks) {
  for (uint64_t block = 0; block < blocks; ++block) run_block(work, block, blocks);
}

template <class T>
void run(const T* x, T* y, size_t n, const Grid<T>& grid, const Bounds<const T*>* bounds = nullptr) {
  Work<T> work;
  require(make_work(x, y, n, grid, &work), "refused", Row<T>::name, n);
  work.bounded = bounds != nullptr;
  if (bounds != nullptr) work.bounds = *bounds;
  run_all(work, blocks_of(work));
}

// A grid of one triple.
template <class T>
struct One {
  Parameters parameters;
  T slope;
  Grid<T> grid;

  explicit One(Parameters p) : parameters(p), slope(from_double<T>(p.slope)) {
    parameters.slope = to_double(slope);
    grid.beta = {&parameters.beta, 1, {}};
    grid.coeff = {&parameters.coeff, 1, {}};
    grid.slope = {&slope, 1, {}};
  }
  One(const One&) = delete;
};

void set_signs(int signs) {
  Approximate::falling = signs & 1 ? 1 : -1;
  Approximate::rising = signs & 2 ? 1 : -1;
  Approximate::log = signs & 4 ? 1 : -1;
  Approximate::reciprocals = signs & 8 ? 1 : -1;
}

template <class T>
void test_contract() {
  for (int signs = 0; signs < (sizeof(T) == sizeof(float) ? 16 : 1); ++signs) {
    set_signs(signs);
    for (float beta : kBetas) {
      if (signs > 0 && beta < kFastFromBeta) continue;  // does not call the functions
      const std::vector<T> x = samples<T>(300, 1 - beta + 1e-6);
      std::vector<T> y(x.size());
      for (float coeff : kCoeffs) {
        for (double slope : kSlopes) {
          const One<T> one({beta, coeff, slope});
          run(x.data(), y.data(), x.size(), one.grid);
          check("contract", x.data(), y.data(), x.size(), one.parameters);
        }
      }
    }
  }
}

// The ops with kinks elsewhere, for one unit and for one in each place, which has a packet of its own.
template <class T>
void test_bounds() {
  for (const Bounds<double>& exact : kBounds) {
    const T alpha = from_double<T>(exact.alpha), offset = from_double<T>(exact.offset),
            lo = from_double<T>(exact.lo), hi = from_double<T>(exact.hi);
    const Bounds<const T*> bounds = {exact.alpha == 1 ? nullptr : &alpha,
                                     exact.offset == 0 ? nullptr : &offset,
                                     std::isinf(exact.lo) ? nullptr : &lo,
                                     std::isinf(exact.hi) ? nullptr : &hi};
    for (int signs : {0, 5, 10, 15}) {
      set_signs(signs);
      for (float beta : kBetas) {
        for (float coeff : kCoeffs) {
          std::vector<T> x = samples_near<T>(exact, 200, 1 - beta + 1e-6);
          if (signs == 0 && beta == 0.85f && coeff == 0.5f) {
            const std::vector<T> special = special_values<T>();
            x.insert(x.end(), special.begin(), special.end());
          }
          std::vector<T> y(x.size());
          One<T> one({beta, coeff, 0});
          one.grid.slope = {};
          run(x.data(), y.data(), x.size(), one.grid, &bounds);
          check_bounded("bounds", x.data(), y.data(), x.size(), one.parameters, exact);
          const std::vector<float> betas(x.size(), beta);
          one.grid.dims = {x.size()};
          one.grid.beta = {betas.data(), betas.size(), {1}};
          run(x.data(), y.data(), x.size(), one.grid, &bounds);
          check_bounded("bounds of places", x.data(), y.data(), x.size(), one.parameters, exact);
        }
      }
    }
  }
  const T lo{};
  const Bounds<const T*> bounds = {nullptr, nullptr, &lo, nullptr};
  const One<T> one({1.1f, 0.5f, 0});
  const T x = from_double<T>(0.5);
  T y;
  run(&x, &y, 1, one.grid, &bounds);
  require(std::isnan(to_double(y)), "not NaN", Row<T>::name, 1);
}

// Searches for the point at which the errors of the approximate functions add up most, which fixed
// points miss: starts at random points with a beta just above the limit, then improves the worst of
// them by small steps.
void test_worst_case() {
  struct Point {
    float beta, coeff, slope, x;
    int signs;

    double error() const {
      set_signs(signs);
      const double exact = exact_ctu(x, {beta, coeff, slope});
      const float y = FastUnit<Approximate>(beta, coeff, slope)(x);
      const double scale = std::max(std::fabs(exact), slope < 0 ? std::fabs(double{x}) : 0);
      return std::fabs(y - exact) / std::max(1.0, scale);
    }
  };
  std::mt19937 random(1);
  const auto uniform = [&](float from, float to) {
    return from + (to - from) * static_cast<float>(random() * 0x1p-32);
  };
  for (int start = 0; start < 160; ++start) {
    const float lowest[] = {0, 0.8f, 1, 2, -2}, highest[] = {1, 1, 1.3f, 10, 0};
    Point worst{};
    double largest = 0;
    float step = 0.1f;
    for (int i = 0; i < 700; ++i) {
      Point p = worst;
      if (i < 200) {
        p = {uniform(kFastFromBeta, kFastFromBeta + 0.1f), uniform(0, 1),
             uniform(lowest[start % 5], highest[start % 5]), uniform(-2, 1),
             static_cast<int>(random() % 16)};
      } else {
        p.beta = std::clamp(p.beta + uniform(-step, step) / 3, kFastFromBeta, 1.f);
        p.coeff = std::clamp(p.coeff + uniform(-step, step), 0.f, 1.f);
        p.slope += uniform(-step, step);
        p.x *= 1 + uniform(-step, step);
        if (i % 10 == 0) p.signs = static_cast<int>(random() % 16);
      }
      const double error = p.error();
      if (i >= 200) step = error > largest ? std::min(1.5f * step, 0.3f) : 0.985f * step;
      if (step < 1e-7f) step = 0.01f;
      if (error > largest) largest = error, worst = p;
    }
    if (largest > Row<float>::tolerance) {
      const float y = FastUnit<Approximate>(worst.beta, worst.coeff, worst.slope)(worst.x);
      const Parameters p = {worst.beta, worst.coeff, worst.slope};
      fail("worst case", "float32", worst.x, y, exact_ctu(worst.x, p), p);
    }
  }
}

template <class T>
void test_special_values() {
  const std::vector<T> x = special_values<T>();
  std::vector<T> y(x.size());
  for (Parameters p : {Parameters{0, 0.5f, 1}, {0.3f, 0.5f, 0}, {0.5f, 0.5f, -0.5},
                       {0.85f, 0.5f, 0}, {0.85f, 0.5f, 0.25}, {1, 0.5f, -0.5}}) {
    const One<T> one(p);
    run(x.data(), y.data(), x.size(), one.grid);
    check("special values", x.data(), y.data(), x.size(), one.parameters);
  }
  const float nan = std::nanf("");
  for (Parameters p : {Parameters{-0.1f, 0.5f, 0}, {1.1f, 0.5f, 0}, {nan, 0.5f, 0},
                       {0.85f, -0.1f, 0}, {0.85f, 1.1f, 0}, {0.3f, nan, 0}}) {
    const One<T> one(p);
    run(x.data(), y.data(), x.size(), one.grid);
    for (T value : y) require(std::isnan(to_double(value)), "not NaN", Row<T>::name, y.size());
  }
}

// For every length and every pair of alignments, in place or not, the threads write exactly their
// elements. The buffers end with the data, so that a sanitizer sees reads beyond and unaligned
// accesses.
template <class T>
void test_lengths() {
  constexpr size_t longest = 67;
  const One<T> one({0.85f, 0.5f, 0.25});
  const std::vector<T> x = samples<T>(longest, 1);
  for (size_t n = 1; n <= longest; ++n) {
    for (size_t from = 0; from < kPacketLanes<T>; ++from) {
      std::vector<T> in(from);
      in.insert(in.end(), x.begin(), x.begin() + static_cast<ptrdiff_t>(n));
      in.shrink_to_fit();
      for (size_t to = 0; to < kPacketLanes<T>; ++to) {
        const T poison = from_double<T>(-77);
        std::vector<T> out(to + n + 20, poison);
        run(in.data() + from, out.data() + to, n, one.grid);
        check("lengths", x.data(), out.data() + to, n, one.parameters);
        bool outside = true;
        for (size_t i = 0; i < out.size(); ++i) {
          outside &= (i >= to && i < to + n) || to_double(out[i]) == -77;
        }
        require(outside, "writes outside", Row<T>::name, n);
      }
      run(in.data() + from, in.data() + from, n, one.grid);
      check("in place", x.data(), in.data() + from, n, one.parameters);
    }
  }
}

// Tiles of many shapes, also with fewer blocks than tiles.
template <class T>
void test_tiles() {
  const One<T> one({0.85f, 0.5f, 0.25});
  for (size_t packets : {255, 256, 257, 1000, 5000}) {
    const size_t n = packets * kPacketLanes<T> - 1;
    const std::vector<T> x = samples<T>(n, 1);
    for (uint64_t per_thread : {1, 2, 3, 8}) {
      for (uint64_t blocks : {1, 2, 1000}) {
        std::vector<T> y = x;
        Work<T> work;
        make_work(y.data(), y.data(), n, one.grid, &work);
        work.per_thread = per_thread;
        run_all(work, std::min(blocks, blocks_of(work)));
        check("tiles", x.data(), y.data(), n, one.parameters);
      }
    }
  }
}

// Points of many sizes, with many alignments, in tiles of many sizes.
template <class T>
void test_grids() {
  for (size_t points : {2, 3, 16, 67, 300}) {
    for (size_t inner : {1, 2, 3, 7, 8, 9, 31, 49, 600}) {
      std::vector<float> beta, coeff;
      std::vector<T> slope;
      for (size_t i = 0; i < points; ++i) {
        beta.push_back(static_cast<float>(i % 11) / 10);
        coeff.push_back(static_cast<float>(i % 7) / 6);
        slope.push_back(from_double<T>(static_cast<double>(i % 3) / 4));
      }
      Grid<T> grid;
      grid.dims = {points};
      grid.inner = inner;
      grid.beta = {beta.data(), points, {1}};
      grid.coeff = {coeff.data(), points, {1}};
      grid.slope = {slope.data(), points, {1}};
      const size_t n = 2 * points * inner;
      const std::vector<T> x = samples<T>(n, 0.5);
      const size_t to = (points + inner) % kPacketLanes<T>;
      std::vector<T> y(to + n);
      std::copy(x.begin(), x.end(), y.begin() + static_cast<ptrdiff_t>(to));
      Work<T> work;
      make_work(y.data() + to, y.data() + to, n, grid, &work);
      work.per_thread = 1 + points % 4;
      run_all(work, std::min<uint64_t>(blocks_of(work), 3));
      for (size_t i = 0; i < n; i += inner < 600 ? 1 : 37) {
        const size_t point = i / inner % points;
        check("grid", &x[i], &y[to + i], 1, {beta[point], coeff[point], to_double(slope[point])});
      }
    }
  }
}

// A thread computes a unit only when the point changes, not for each packet.
void test_units() {
  constexpr size_t points = 3, packets = 8, inner = packets * kThreads * kPacketLanes<Half>;
  for (size_t repeat : {1, 4}) {  // the number of points that the packets of a thread belong to
    const std::vector<float> beta(points * repeat, 0.9f);
    const std::vector<Half> slope(points * repeat, from_double<Half>(0.25));
    Grid<Half> grid;
    grid.dims = {points * repeat};
    grid.inner = inner / repeat;
    grid.beta = {beta.data(), beta.size(), {1}};
    grid.coeff = {beta.data(), beta.size(), {1}};
    grid.slope = {slope.data(), slope.size(), {1}};
    const std::vector<Half> x = samples<Half>(points * inner, 1);
    std::vector<Half> y(x.size());
    Work<Half> work;
    make_work(x.data(), y.data(), x.size(), grid, &work);
    work.per_thread = packets;
    widened = 0;
    run_all(work, blocks_of(work));
    require(widened - x.size() == points * repeat * kThreads, "units", "float16", inner);
  }
}

// Parameters that vary along different dimensions, some of which merge.
void test_broadcast() {
  const std::vector<size_t> dims = {2, 3, 1, 4, 5};
  const std::vector<std::vector<size_t>> steps[] = {
      // As from read_parameter, for the whole shape, [3,1,1,1], [2,1,1,4,1], [5] and [3,1,4,1].
      {{60, 20, 0, 5, 1}, {0, 1, 0, 0, 0}},
      {{4, 0, 0, 1, 0}, {0, 0, 0, 0, 1}},
      {{0, 4, 0, 1, 0}, {}},
      {{60, 20, 0, 5, 1}, {60, 20, 0, 5, 1}},
  };
  std::vector<float> values;
  for (size_t i = 0; i < 120; ++i) values.push_back(static_cast<float>((i * 37) % 101) / 100);
  for (const auto& pair : steps) {
    for (size_t inner : {1, 6}) {
      Grid<float> grid;
      grid.dims = dims;
      grid.inner = inner;
      grid.beta = {values.data(), 120, pair[0]};
      grid.coeff = {values.data(), pair[1].empty() ? size_t{1} : size_t{120}, pair[1]};
      const size_t n = 3 * 120 * inner;
      const std::vector<float> x = samples<float>(n, 0.5);
      std::vector<float> y(n);
      run(x.data(), y.data(), n, grid);
      for (size_t i = 0; i < n; ++i) {
        size_t rest = i / inner % 120, beta = 0, coeff = 0;
        for (size_t axis = dims.size(); axis-- > 0; rest /= dims[axis]) {
          beta += rest % dims[axis] * pair[0][axis];
          coeff += pair[1].empty() ? 0 : rest % dims[axis] * pair[1][axis];
        }
        check("broadcast", &x[i], &y[i], 1, {values[beta], values[coeff], 0});
      }
    }
  }
  Grid<float> many;
  many.inner = 1;
  for (size_t axis = 0; axis <= kMaxAxes; ++axis) {
    many.dims.push_back(2);
    many.beta.steps.push_back(axis % 2 == 0 ? size_t{1} << axis : 0);
  }
  Work<float> work;
  require(!make_work<float>(nullptr, nullptr, 512, many, &work), "too many axes", "", kMaxAxes);
}

// More elements than 32 bits can count. Only the pages that are touched take memory.
void test_large() {
  const uint64_t inner = (1ull << 31) + 13, n = 3 * inner;
  const size_t bytes = (n + 8) * sizeof(Half);
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return require(false, "cannot map memory", "float16", n);
  Half* const y = static_cast<Half*>(memory) + 3;
  const float beta[] = {0.3f, 0.6f, 0.9f}, coeff = 0.5f;
  Grid<Half> grid;
  grid.dims = {3};
  grid.inner = inner;
  grid.beta = {beta, 3, {1}};
  grid.coeff = {&coeff, 1, {}};
  Work<Half> work;
  make_work(y, y, n - 3, grid, &work);
  const uint64_t blocks = blocks_of(work);
  const Half minus = from_double<Half>(-0.5);
  for (uint64_t middle : {inner, 2 * inner, n - 3}) {
    for (uint64_t i = middle - 20; i < std::min(middle + 20, n); ++i) y[i] = minus;
    const uint64_t packet = (middle - 20 + work.shift) / 8;
    const uint64_t block = packet / work.tile();
    run_block(work, block, blocks);
    if (block + 1 < blocks) run_block(work, block + 1, blocks);
    for (uint64_t i = middle - 20; i < std::min(middle + 20, n - 3); ++i) {
      check("large", &minus, &y[i], 1, {beta[i / inner], coeff, 0});
    }
  }
  for (uint64_t i = n - 3; i < n; ++i) require(y[i].bits == minus.bits, "beyond", "float16", n);
  munmap(memory, bytes);
}

template <class T>
void test_type() {
  test_contract<T>();
  test_bounds<T>();
  test_special_values<T>();
  test_lengths<T>();
  test_tiles<T>();
  test_grids<T>();
}

}  // namespace

int main() {
  test_comparison();
  test_type<float>();
  test_type<Half>();
  test_type<BFloat16>();
  test_type<double>();
  test_worst_case();
  test_units();
  test_broadcast();
  test_large();
  std::printf("%d failures\n", failures);
  return failures > 0;
}

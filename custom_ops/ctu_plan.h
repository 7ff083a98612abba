// The constants that the CPU kernels need for a grid of (beta, coeff, slope): computed once, and
// reused while the values stay the same.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "ctu_cpu.h"
#include "ctu_math.h"

namespace ctonnx {

// beta, coeff or slope: `count` values, and the step along each dimension of Grid::dims, which is 0
// along a dimension that it is broadcast over. A single value needs no steps.
template <class T>
struct Parameter {
  const T* data = nullptr;
  size_t count = 0;
  std::vector<size_t> steps;

  T at(const std::vector<size_t>& place) const {
    size_t offset = 0;
    for (size_t axis = 0; axis < steps.size(); ++axis) offset += place[axis] * steps[axis];
    return data[offset];
  }

  bool operator==(const Parameter& other) const {
    // Compares bytes, because NaN is not equal to itself.
    return count == other.count && steps == other.steps &&
           (count == 0 || std::memcmp(data, other.data, count * sizeof(T)) == 0);
  }
};

// The layout of (beta, coeff, slope) over X: a grid of points with one triple each. A point is
// `inner` neighbouring elements, and the grid repeats to the end of X. With `rows` above 0, the last
// `width` points, a row, repeat that many times before the next ones follow.
template <class T>
struct Grid {
  std::vector<size_t> dims;  // empty for a single triple
  size_t inner = 1;
  size_t rows = 0, width = 0;
  Parameter<float> beta, coeff;
  Parameter<T> slope;  // null data for slope 0

  size_t points() const {
    size_t product = 1;
    for (size_t dim : dims) product *= dim;
    return product;
  }

  // Takes dimensions that nothing varies along out of the middle of the grid, as rows.
  void set_rows() {
    const auto varies = [&](size_t axis) {
      const auto step = [&](const std::vector<size_t>& steps) {
        return steps.empty() ? 0 : steps[axis];
      };
      return step(beta.steps) + step(coeff.steps) + step(slope.steps) > 0;
    };
    size_t end = dims.size();
    while (end > 0 && varies(end - 1)) --end;
    size_t begin = end;
    while (begin > 0 && !varies(begin - 1)) --begin;
    if (inner > 1 || begin == 0) return;
    rows = width = 1;
    for (size_t axis = begin; axis < dims.size(); ++axis) (axis < end ? rows : width) *= dims[axis];
    const auto drop = [&](std::vector<size_t>* values) {
      if (values->empty()) return;
      values->erase(values->begin() + static_cast<ptrdiff_t>(begin),
                    values->begin() + static_cast<ptrdiff_t>(end));
    };
    for (std::vector<size_t>* steps : {&beta.steps, &coeff.steps, &slope.steps}) drop(steps);
    drop(&dims);
  }

  Parameters at(const std::vector<size_t>& place) const {
    const double a = slope.data != nullptr ? to_double(slope.at(place)) : 0;
    return {beta.at(place), coeff.at(place), a};
  }
};

// The units of a grid, with tables where they are faster. A plan has copies of the grid's values
// and never changes.
template <class T>
class Plan {
  using A = typename Arithmetic<T>::type;

 public:
  Plan(const Grid<T>& grid, const Level& level)
      : level_(level), grid_(grid), form_(form_of(grid, level)) {
    grid_.beta.data = copy_of(grid.beta, &beta_);
    grid_.coeff.data = copy_of(grid.coeff, &coeff_);
    grid_.slope.data = copy_of(grid.slope, &slope_);

    // With a unit for each element, a grid without rows repeats in units_, so that a run of the
    // kernel is several whole vectors long.
    const size_t points = grid.points();
    const size_t elements = points * form_.copies;
    const bool repeats = grid.rows == 0 && elements > 0 && elements < kMinPeriod;
    period_ = repeats ? elements * kWidth : elements > 0 ? elements : points;
    while (repeats && period_ < kMinPeriod) period_ += elements * kWidth;
    stride_ = period_ + kUnitPadding;
    units_.resize(kUnitFields * stride_);
    tables_.resize(form_.tables ? points * lines() : 0);
    table_of_.resize(points);
    std::vector<size_t> place(grid_.dims.size());
    for (size_t point = 0; point < points; ++point) {
      add(point, grid_.at(place));
      for (size_t axis = place.size(); axis-- > 0;) {
        if (++place[axis] < grid_.dims[axis]) break;
        place[axis] = 0;
      }
    }
    for (size_t i = elements; i < period_ && elements > 0; ++i) copy_unit(i - elements, i);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Whether a plan for `grid` would be equal to this one.
  bool fits(const Grid<T>& grid) const {
    const Form form = form_of(grid, level_);
    return form.copies == form_.copies && form.tables == form_.tables && grid.dims == grid_.dims &&
           grid.rows == grid_.rows && grid.width == grid_.width && grid.beta == grid_.beta && grid.coeff == grid_.coeff && grid.slope == grid_.slope;
  }

  // y[i] = CTU(x[i]) for begin <= i < end, or with kinks elsewhere unless `bounds` is null. The grid
  // begins at i = 0, with points of `inner` elements.
  void run(const T* x, T* y, size_t begin, size_t end, size_t inner,
           const Bounds<A>* bounds = nullptr) const {
    const Kernels<T>& kernels = level_.kernels(T());
    const Units<A> units = {units_.data(), stride_};
    if (form_.copies > 0) return run_rows(x, y, begin, end, units, bounds);
    for (size_t i = begin, next; i < end; i = next) {
      const size_t unit = i / inner % period_;
      next = std::min(end, (i / inner + 1) * inner);
      kernels.run(x + i, y + i, next - i, units, unit, table_of_[unit], bounds);
    }
  }

 private:
  static constexpr size_t kShort = 32;       // shorter points would leave vectors half empty
  static constexpr size_t kNarrow = 4 * kWidth;
  static constexpr size_t kMinPeriod = 256;  // see the constructor

  // As `run` for a unit for each element: narrow rows of equal units at once, from column 0 on. Down
  // wide rows the reads would be too far apart for the processor to foresee them.
  void run_rows(const T* x, T* y, size_t begin, size_t end, Units<A> units,
                const Bounds<A>* bounds) const {
    const Kernels<T>& kernels = level_.kernels(T());
    const bool has_rows = grid_.rows > 0;
    const size_t width = has_rows ? grid_.width : period_;
    const size_t area = has_rows ? grid_.rows * width : std::numeric_limits<size_t>::max();
    for (size_t i = begin, next; i < end; i = next) {
      const size_t area_end = has_rows ? std::min(end, (i / area + 1) * area) : end;
      const size_t first = i / area * width % period_, column = i % width;
      if (column == 0 && width % kWidth == 0 && width <= kNarrow && area_end - i >= width) {
        const size_t rows = (area_end - i) / width;
        next = i + rows * width;
        kernels.run_rows(x + i, y + i, rows, width, units, first, bounds);
      } else {
        next = std::min(area_end, i + width - column);
        kernels.run_each(x + i, y + i, next - i, units, first + column, bounds);
      }
    }
  }

  // Tables begin at cache lines, in the order of the points.
  struct alignas(64) Line {
    float floats[16];
  };
  size_t lines() const { return (level_.table_floats + 15) / 16; }

  // The form of the units, which depends on the number of elements of a point.
  struct Form {
    size_t copies;  // of the unit of a point, one for each of its elements; 0: a single unit
    bool tables;
  };

  static Form form_of(const Grid<T>& grid, const Level& level) {
    if (!grid.dims.empty() && grid.inner < kShort) return {grid.inner, false};
    return {0, sizeof(A) == sizeof(float) && grid.inner >= level.table_from};
  }

  template <class V>
  static const V* copy_of(const Parameter<V>& parameter, std::vector<V>* copy) {
    if (parameter.data == nullptr) return nullptr;
    copy->assign(parameter.data, parameter.data + parameter.count);
    return copy->data();
  }

  void add(size_t point, const Parameters& parameters) {
    const Unit<A> unit(parameters.beta, parameters.coeff, parameters.slope);
    static_assert(sizeof unit == kUnitFields * sizeof(A), "Units holds every field");
    A fields[kUnitFields];
    std::memcpy(fields, &unit, sizeof unit);
    const size_t copies = std::max<size_t>(1, form_.copies);
    for (size_t field = 0; field < kUnitFields; ++field) {
      std::fill_n(units_.begin() + static_cast<ptrdiff_t>(field * stride_ + point * copies), copies,
                  fields[field]);
    }
    if (form_.tables && parameters.beta >= kTableFromBeta) {
      float* const table = tables_[point * lines()].floats;
      level_.make_table(parameters, table);
      table_of_[point] = table;
    }
  }

  void copy_unit(size_t from, size_t to) {
    for (size_t field = 0; field < kUnitFields; ++field) {
      units_[field * stride_ + to] = units_[field * stride_ + from];
    }
  }

  const Level& level_;
  Grid<T> grid_;  // with pointers into the copies below
  std::vector<float> beta_, coeff_;
  std::vector<T> slope_;
  const Form form_;
  size_t period_ = 0, stride_ = 0;  // number of units, without and with padding
  std::vector<A> units_;            // see Units
  std::vector<Line> tables_;
  std::vector<const float*> table_of_;  // for each point, null if it has no table
};

// The plan of the latest run. Threads may run one session with different parameters at the same
// time, so each run shares ownership of its plan.
template <class T>
class PlanCache {
 public:
  std::shared_ptr<const Plan<T>> get(const Grid<T>& grid, const Level& level) {
    std::shared_ptr<const Plan<T>> plan = exchange(nullptr);
    if (plan != nullptr && plan->fits(grid)) return plan;
    plan = std::make_shared<const Plan<T>>(grid, level);
    exchange(plan);
    return plan;
  }

 private:
  // Makes `plan` the latest plan unless it is null; returns the latest plan.
  std::shared_ptr<const Plan<T>> exchange(std::shared_ptr<const Plan<T>> plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plan != nullptr) latest_ = std::move(plan);
    return latest_;
  }

  std::mutex mutex_;
  std::shared_ptr<const Plan<T>> latest_;
};

}  // namespace ctonnx

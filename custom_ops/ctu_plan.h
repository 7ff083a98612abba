// What the kernels need of beta, coeff and slope: made once, and kept while those stay the same.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "ctu_cpu.h"
#include "ctu_math.h"

namespace ctonnx {

// beta, coeff or slope: its values, and its step along each dimension of Grid::dims, 0 where it is
// broadcast. A single value needs no steps.
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
    // Compared as bytes, as a NaN is not equal to itself.
    return count == other.count && steps == other.steps &&
           (count == 0 || std::memcmp(data, other.data, count * sizeof(T)) == 0);
  }
};

// How (beta, coeff, slope) lie over X: a grid of points with one such triple each, repeated to the
// end of X, where each point is `inner` neighbouring elements.
template <class T>
struct Grid {
  std::vector<size_t> dims;  // none for one triple
  size_t inner = 1;
  Parameter<float> beta, coeff;
  Parameter<T> slope;  // no data where it is 0

  size_t points() const {
    size_t product = 1;
    for (size_t dim : dims) product *= dim;
    return product;
  }

  Parameters at(const std::vector<size_t>& place) const {
    return {beta.at(place), coeff.at(place), slope.data != nullptr ? to_double(slope.at(place)) : 0};
  }
};

// The units of a grid, and their tables where those pay.
template <class T>
class Plan {
 public:
  Plan(const Grid<T>& grid, const Level& level)
      : level_(level), grid_(grid), form_(form_of(grid, level)) {
    grid_.beta.data = keep(grid.beta, &beta_);
    grid_.coeff.data = keep(grid.coeff, &coeff_);
    grid_.slope.data = keep(grid.slope, &slope_);

    // Spelled out at least so far that the kernel runs over a few vectors at a time.
    const size_t points = grid.points();
    const size_t spelled = points * form_.spell;
    period_ = spelled == 0 ? points : (kSpelled + spelled - 1) / spelled * spelled;
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
    for (size_t i = spelled; i < period_ && spelled > 0; ++i) copy_unit(i - spelled, i);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Whether this is the plan for `grid` too.
  bool fits(const Grid<T>& grid) const {
    const Form form = form_of(grid, level_);
    return form.spell == form_.spell && form.tables == form_.tables && grid.dims == grid_.dims &&
           grid.beta == grid_.beta && grid.coeff == grid_.coeff && grid.slope == grid_.slope;
  }

  // y[i] = CTU(x[i]) for i in [begin, end), where the grid begins at i = 0; `inner` is the grid's.
  void run(const T* x, T* y, size_t begin, size_t end, size_t inner) const {
    const Kernels<T>& kernels = level_.kernels(T());
    const Units<A> units = {units_.data(), stride_};
    for (size_t i = begin, next; i < end; i = next) {
      if (form_.spell > 0) {
        const size_t unit = i % period_;
        next = std::min(end, i + period_ - unit);
        kernels.run_each(x + i, y + i, next - i, units, unit);
      } else {
        const size_t unit = i / inner % period_;
        next = std::min(end, (i / inner + 1) * inner);
        kernels.run(x + i, y + i, next - i, units, unit, table_of_[unit]);
      }
    }
  }

 private:
  using A = typename Arithmetic<T>::type;

  static constexpr size_t kShort = 32;     // points so small would leave vectors half empty
  static constexpr size_t kSpelled = 256;  // see the constructor

  // Tables begin at cache lines, and follow each other in the order they are read in.
  struct alignas(64) Line {
    float floats[16];
  };
  size_t lines() const { return (level_.table_floats + 15) / 16; }

  // How the units are kept, which depends on how many elements they are for.
  struct Form {
    size_t spell;  // one unit for each element of a point, so many; 0: one unit for a point
    bool tables;
  };

  static Form form_of(const Grid<T>& grid, const Level& level) {
    if (!grid.dims.empty() && grid.inner < kShort) return {grid.inner, false};
    return {0, sizeof(A) == sizeof(float) && grid.inner >= level.table_from};
  }

  template <class V>
  static const V* keep(const Parameter<V>& parameter, std::vector<V>* copy) {
    if (parameter.data == nullptr) return nullptr;
    copy->assign(parameter.data, parameter.data + parameter.count);
    return copy->data();
  }

  void add(size_t point, const Parameters& parameters) {
    const Unit<A> unit(parameters.beta, parameters.coeff, parameters.slope);
    static_assert(sizeof unit == kUnitFields * sizeof(A), "Units holds every field");
    A fields[kUnitFields];
    std::memcpy(fields, &unit, sizeof unit);
    const size_t copies = std::max<size_t>(1, form_.spell);
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
  Grid<T> grid_;  // its data are the copies below
  std::vector<float> beta_, coeff_;
  std::vector<T> slope_;
  const Form form_;
  size_t period_ = 0, stride_ = 0;  // units, and their number with padding
  std::vector<A> units_;            // see Units
  std::vector<Line> tables_;
  std::vector<const float*> table_of_;  // a point's, or null
};

// The last plan made. Runs of one session may come from several threads with different parameters:
// a plan never changes, and each run holds on to its own.
template <class T>
class PlanCache {
 public:
  std::shared_ptr<const Plan<T>> get(const Grid<T>& grid, const Level& level) {
    std::shared_ptr<const Plan<T>> plan = swap_in(nullptr);
    if (plan != nullptr && plan->fits(grid)) return plan;
    plan = std::make_shared<const Plan<T>>(grid, level);
    swap_in(plan);
    return plan;
  }

 private:
  // The latest plan; replaced first by `plan` unless that is null.
  std::shared_ptr<const Plan<T>> swap_in(std::shared_ptr<const Plan<T>> plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plan != nullptr) latest_ = std::move(plan);
    return latest_;
  }

  std::mutex mutex_;
  std::shared_ptr<const Plan<T>> latest_;
};

}  // namespace ctonnx

// The arguments of a kernel launch on a GPU, computed on the host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ctu_plan.h"
#include "ctu_thread.h"

namespace ctonnx {

constexpr uint64_t kEnoughBlocks = 1024;     // to keep every multiprocessor busy
constexpr uint64_t kMaxPerThread = 8;        // packets; those of one point share a unit
constexpr uint64_t kMaxBlocks = 0x7fffffff;  // CUDA's limit

// Computes the work of y = CTU(x) for `count` > 0 elements. x and y are aligned to their type, and
// equal or without overlap. All pointers are the GPU's: the host dereferences none. Returns false if
// the grid has more than kMaxAxes dimensions after merging.
template <class T>
bool make_work(const T* x, T* y, uint64_t count, const Grid<T>& grid, Work<T>* work) {
  *work = Work<T>();
  work->x = x;
  work->y = y;
  work->count = count;
  work->beta = grid.beta.data;
  work->coeff = grid.coeff.data;
  work->slope = grid.slope.data;
  work->points = grid.points();
  work->inner = grid.inner;

  const auto step = [](const std::vector<size_t>& steps, size_t axis) {
    return steps.empty() ? 0 : steps[axis];
  };
  for (size_t axis = 0; axis < grid.dims.size(); ++axis) {
    const uint64_t dim = grid.dims[axis], beta = step(grid.beta.steps, axis),
                   coeff = step(grid.coeff.steps, axis), slope = step(grid.slope.steps, axis);
    if (dim == 1) continue;
    const size_t last = work->axes - 1;
    const bool merges = work->axes > 0 && work->beta_steps[last] == beta * dim &&
                        work->coeff_steps[last] == coeff * dim &&
                        work->slope_steps[last] == slope * dim;
    const size_t into = merges ? last : work->axes;
    if (into == kMaxAxes) return false;
    work->axes = into + 1;
    work->dims[into] = merges ? work->dims[into] * dim : dim;
    work->beta_steps[into] = beta;
    work->coeff_steps[into] = coeff;
    work->slope_steps[into] = slope;
  }

  const auto address = [](const T* p) { return reinterpret_cast<uintptr_t>(p); };
  work->lanes = work->points == 1 || grid.inner >= kPacketLanes<T> ? kPacketLanes<T> : 1;
  const uint64_t lanes = static_cast<uint64_t>(work->lanes), bytes = lanes * sizeof(T);
  work->shift = address(y) % bytes / sizeof(T);
  work->aligned = address(x) % bytes == address(y) % bytes;
  work->packets = (work->shift + count + lanes - 1) / lanes;
  work->whole_begin = work->shift > 0;
  work->whole_count =
      std::max((work->shift + count) / lanes, work->whole_begin) - work->whole_begin;
  work->per_thread = std::clamp<uint64_t>(work->packets / (kThreads * kEnoughBlocks), 1,
                                          kMaxPerThread);
  work->origin = work->shift == 0 ? 0 : work->points * work->inner - work->shift;
  work->next_point = kThreads * lanes / work->inner % work->points;
  work->next_rest = kThreads * lanes % work->inner;
  return true;
}

template <class T>
uint64_t blocks_of(const Work<T>& work) {
  return std::min((work.packets + work.tile() - 1) / work.tile(), kMaxBlocks);
}

}  // namespace ctonnx

// The kernels alone, for benchmarks/cuda.py, which builds this with nvcc and loads it.
#include "../custom_ops/ctu_cuda.cu"
#include "../custom_ops/ctu_launch.h"
#include "../custom_ops/ctu_types.cc"

namespace ctonnx {
template <class T>
const char* run(const void* x, void* y, uint64_t count, const float* beta, const float* coeff,
                uint64_t points, uint64_t inner, void* stream) {
  Grid<T> grid;
  if (points > 1) grid.dims = {points};
  grid.inner = inner;
  const std::vector<size_t> steps(grid.dims.size(), 1);
  grid.beta = {beta, points, steps};
  grid.coeff = {coeff, points, steps};
  Work<T> work;
  make_work(static_cast<const T*>(x), static_cast<T*>(y), count, grid, &work);
  return launch(work, blocks_of(work), stream);
}
}  // namespace ctonnx

// `type` is the element type's ONNX code; beta and coeff hold `points` values each.
extern "C" const char* run_ctu(int type, const void* x, void* y, uint64_t count, const float* beta,
                               const float* coeff, uint64_t points, uint64_t inner, void* stream) {
  using namespace ctonnx;
  const auto run_type = type == 1    ? run<float>
                        : type == 10 ? run<Half>
                        : type == 16 ? run<BFloat16>
                                     : run<double>;
  return run_type(x, y, count, beta, coeff, points, inner, stream);
}

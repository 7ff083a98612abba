// The op ctonnx::CTU and its registration with ONNX Runtime.
//
//   inputs   X       float32, float16, bfloat16 or double, any shape
//            beta    float32, broadcastable to X, values in [0, 1]
//            coeff   float32, broadcastable to X, values in [0, 1]
//            slope   optional, type of X, broadcastable to X
//   output   Y       type and shape of X
#include <algorithm>
#include <exception>
#include <limits>
#include <string>
#include <vector>

#include "ctu_cpu.h"
#include "ort_abi.h"

namespace ctonnx {
namespace {

ort::Api api;

// Carries an OrtStatus, ours or ONNX Runtime's, up to the C boundary.
struct StatusError {
  ort::Status* status;
};

void check(ort::Status* status) {
  if (status != nullptr) throw StatusError{status};
}

[[noreturn]] void invalid(const std::string& message) {
  throw StatusError{api.CreateStatus(ort::kInvalidArgument, ("ctonnx::CTU: " + message).c_str())};
}

// Runs `body` and turns whatever it throws into a status.
template <class Body>
ort::Status* guarded(Body body) {
  try {
    body();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const std::exception& error) {
    return api.CreateStatus(ort::kFail, error.what());
  }
}

std::vector<int64_t> shape_of(const ort::Value* value) {
  ort::TensorInfo* info = nullptr;
  check(api.GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  std::vector<int64_t> dims;
  ort::Status* status = api.GetDimensionsCount(info, &rank);
  if (status == nullptr) {
    dims.resize(rank);
    status = api.GetDimensions(info, dims.data(), rank);
  }
  api.ReleaseTensorTypeAndShapeInfo(info);
  check(status);
  return dims;
}

template <class T>
T* data_of(const ort::Value* value) {
  void* data = nullptr;
  check(api.GetTensorMutableData(value, &data));
  return static_cast<T*>(data);
}

size_t product(const int64_t* begin, const int64_t* end) {
  size_t count = 1;
  for (; begin != end; ++begin) count *= static_cast<size_t>(*begin);
  return count;
}

// beta, coeff or slope: its values, and its step along each dimension of X, 0 where it is broadcast.
template <class T>
struct Parameter {
  const T* data = nullptr;
  size_t count = 0;
  std::vector<size_t> steps;

  void bind(const char* name, const ort::Value* value, const std::vector<int64_t>& x_dims) {
    std::vector<int64_t> dims = shape_of(value);
    data = data_of<const T>(value);
    count = product(dims.data(), dims.data() + dims.size());
    while (dims.size() > x_dims.size() && dims.front() == 1) dims.erase(dims.begin());
    steps.assign(x_dims.size(), 0);
    size_t step = 1;
    bool fits = dims.size() <= x_dims.size();
    for (size_t i = 0; fits && i < dims.size(); ++i) {
      const size_t from_end = dims.size() - 1 - i;
      const size_t axis = x_dims.size() - 1 - i;
      if (dims[from_end] == 1) continue;
      fits = dims[from_end] == x_dims[axis];
      steps[axis] = step;
      step *= static_cast<size_t>(dims[from_end]);
    }
    if (!fits) invalid(std::string(name) + " does not broadcast to the shape of X");
  }

  bool varies_along(size_t axis) const { return !steps.empty() && steps[axis] != 0; }
};

void check_unit_interval(const char* name, const Parameter<float>& parameter) {
  for (size_t i = 0; i < parameter.count; ++i) {
    // Written so that NaN fails too.
    if (!(parameter.data[i] >= 0.f && parameter.data[i] <= 1.f)) {
      invalid(std::string(name) + " must lie in [0, 1], got " + std::to_string(parameter.data[i]));
    }
  }
}

template <class T>
struct Run {
  const T* x;
  T* y;
  size_t count;
  size_t inner;  // length of the runs of X that share one (beta, c, slope)
  std::vector<size_t> outer_dims;
  Parameter<float> beta, coeff;
  Parameter<T> slope;

  // Elements per task: enough to outweigh handing it to a thread.
  static constexpr size_t kTask = 16384;

  Unit<typename Arithmetic<T>::type> unit_at(size_t outer) const {
    size_t b = 0, c = 0, a = 0;
    for (size_t axis = outer_dims.size(); axis-- > 0;) {
      const size_t at = outer % outer_dims[axis];
      outer /= outer_dims[axis];
      b += at * beta.steps[axis];
      c += at * coeff.steps[axis];
      if (slope.data != nullptr) a += at * slope.steps[axis];
    }
    return {beta.data[b], coeff.data[c], slope.data != nullptr ? to_double(slope.data[a]) : 0.0};
  }

  void task(size_t index) const {
    size_t at = index * kTask;
    const size_t end = std::min(at + kTask, count);
    while (at < end) {
      const size_t outer = at / inner;
      const size_t length = std::min(end, (outer + 1) * inner) - at;
      ctu_run(x + at, y + at, length, unit_at(outer));
      at += length;
    }
  }
};

template <class T>
void compute(ort::KernelContext* context) {
  size_t inputs = 0;
  check(api.KernelContext_GetInputCount(context, &inputs));
  const ort::Value* values[4] = {};
  for (size_t i = 0; i < std::min<size_t>(inputs, 4); ++i) {
    check(api.KernelContext_GetInput(context, i, &values[i]));
  }

  Run<T> run;
  const std::vector<int64_t> dims = shape_of(values[0]);
  run.x = data_of<const T>(values[0]);
  run.count = product(dims.data(), dims.data() + dims.size());
  run.beta.bind("beta", values[1], dims);
  run.coeff.bind("coeff", values[2], dims);
  if (values[3] != nullptr) run.slope.bind("slope", values[3], dims);
  check_unit_interval("beta", run.beta);
  check_unit_interval("coeff", run.coeff);

  ort::Value* output = nullptr;
  check(api.KernelContext_GetOutput(context, 0, dims.data(), dims.size(), &output));
  run.y = data_of<T>(output);
  if (run.count == 0) return;

  size_t outer_rank = dims.size();
  while (outer_rank > 0 && !run.beta.varies_along(outer_rank - 1) &&
         !run.coeff.varies_along(outer_rank - 1) && !run.slope.varies_along(outer_rank - 1)) {
    --outer_rank;
  }
  run.outer_dims.assign(dims.begin(), dims.begin() + static_cast<ptrdiff_t>(outer_rank));
  run.inner = product(dims.data() + outer_rank, dims.data() + dims.size());

  const size_t tasks = (run.count + Run<T>::kTask - 1) / Run<T>::kTask;
  if (tasks == 1) {
    run.task(0);
  } else {
    const auto task = [](void* user, size_t index) { static_cast<Run<T>*>(user)->task(index); };
    check(api.KernelContext_ParallelFor(context, task, tasks, 0, &run));
  }
}

// Y has the shape of X, as far as that is known.
void infer_shape(ort::ShapeInferContext* context) {
  ort::TensorInfo* info = nullptr;
  check(api.ShapeInferContext_GetInputTypeShape(context, 0, &info));
  size_t rank = 0;
  check(api.GetDimensionsCount(info, &rank));
  // ONNX Runtime reports an unknown rank as 0, and would copy an unknown dimension as the number -1.
  if (rank == 0) return;
  std::vector<int64_t> dims(rank);
  std::vector<const char*> symbols(rank);
  check(api.GetDimensions(info, dims.data(), rank));
  check(api.GetSymbolicDimensions(info, symbols.data(), rank));
  for (size_t i = 0; i < rank; ++i) {
    if (dims[i] < 0 && *symbols[i] == '\0') return;
  }
  check(api.ShapeInferContext_SetOutputTypeShape(context, 0, info));
}

template <class T>
constexpr ort::ElementType element_type();
template <>
constexpr ort::ElementType element_type<float>() {
  return ort::kFloat;
}
template <>
constexpr ort::ElementType element_type<double>() {
  return ort::kDouble;
}
template <>
constexpr ort::ElementType element_type<Half>() {
  return ort::kFloat16;
}
template <>
constexpr ort::ElementType element_type<BFloat16>() {
  return ort::kBFloat16;
}

// The kernel keeps no state, but ONNX Runtime wants a non-null one.
char no_state;

template <class T>
const ort::CustomOp* cpu_op() {
  static const ort::CustomOp op = [] {
    ort::CustomOp ctu{};
    ctu.version = ort::kApiVersion;
    ctu.GetName = [](const ort::CustomOp*) { return "CTU"; };
    ctu.GetExecutionProviderType = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
    ctu.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return 4; };
    ctu.GetInputType = [](const ort::CustomOp*, size_t index) {
      return index == 1 || index == 2 ? ort::kFloat : element_type<T>();
    };
    ctu.GetInputCharacteristic = [](const ort::CustomOp*, size_t index) {
      return index == 3 ? ort::kOptional : ort::kRequired;
    };
    ctu.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
    ctu.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
    ctu.GetOutputType = [](const ort::CustomOp*, size_t) { return element_type<T>(); };
    ctu.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
    ctu.CreateKernelV2 = [](const ort::CustomOp*, const void*, const void*,
                            void** kernel) -> ort::Status* {
      *kernel = &no_state;
      return nullptr;
    };
    ctu.KernelDestroy = [](void*) {};
    ctu.KernelComputeV2 = [](void*, ort::KernelContext* context) {
      return guarded([&] { compute<T>(context); });
    };
    ctu.InferOutputShape = [](const ort::CustomOp*, ort::ShapeInferContext* context) {
      return guarded([&] { infer_shape(context); });
    };
    ctu.GetStartVersion = [](const ort::CustomOp*) { return 1; };
    ctu.GetEndVersion = [](const ort::CustomOp*) { return std::numeric_limits<int>::max(); };
    // Y may overwrite X.
    ctu.GetMayInplace = [](int** inputs, int** outputs) -> size_t {
      static int first = 0;
      *inputs = *outputs = &first;
      return 1;
    };
    ctu.ReleaseMayInplace = [](int*, int*) {};
    return ctu;
  }();
  return &op;
}

// One domain for the life of the process: ONNX Runtime keeps pointers to it in every session.
ort::OpDomain* domain() {
  static ort::OpDomain* const made = [] {
    ort::OpDomain* domain = nullptr;
    check(api.CreateCustomOpDomain("ctonnx", &domain));
    check(api.CustomOpDomain_Add(domain, cpu_op<float>()));
    check(api.CustomOpDomain_Add(domain, cpu_op<Half>()));
    check(api.CustomOpDomain_Add(domain, cpu_op<BFloat16>()));
    check(api.CustomOpDomain_Add(domain, cpu_op<double>()));
    return domain;
  }();
  return made;
}

}  // namespace
}  // namespace ctonnx

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(
    ort::SessionOptions* options, const ort::ApiBase* base) {
  using namespace ctonnx;
  void* const* table = base->GetApi(ort::kApiVersion);
  if (table == nullptr) {
    // Version 1 is in every ONNX Runtime and can make the status that says so.
    const std::string message = std::string("ctonnx needs ONNX Runtime 1.18 or newer, this is ") +
                                base->GetVersionString();
    return ort::Api(base->GetApi(1)).CreateStatus(ort::kFail, message.c_str());
  }
  // Every registration in a process comes from the same ONNX Runtime; set once, as threads may race.
  static const bool ready = (api = ort::Api(table), true);
  static_cast<void>(ready);
  return guarded([&] { check(api.AddCustomOpDomain(options, domain())); });
}

// The op ctonnx::CTU and its registration with ONNX Runtime.
//
//   inputs   X       float32, float16, bfloat16 or double, any shape
//            beta    float32, broadcastable to X, values in [0, 1]
//            coeff   float32, broadcastable to X, values in [0, 1]
//            slope   optional, type of X, broadcastable to X
//   output   Y       type and shape of X
//
// A beta or coeff outside [0, 1], or NaN, is an error on the CPU. On CUDA, where they are not read
// back, it gives NaN.
#include <algorithm>
#include <deque>
#include <exception>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ctu_plan.h"
#include "ort_abi.h"

#if defined(CTONNX_CUDA)
#include "ctu_cuda.h"
#include "ctu_launch.h"
#endif

namespace ctonnx {
namespace {

ort::Api api;

constexpr const char* kCpuProvider = "CPUExecutionProvider";

#if defined(CTONNX_CUDA)
// What NVIDIA's provider is called: the one built into ONNX Runtime, and the plug-in. Ops for
// providers that a session does not have are passed over.
constexpr const char* kCudaProviders[] = {"CUDAExecutionProvider", "CudaPluginExecutionProvider"};
#endif

// Elements of a task for the thread pool: enough to outweigh handing it to a thread.
constexpr size_t kTask = 16384;

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

size_t element_count(const ort::Value* value) {
  ort::TensorInfo* info = nullptr;
  check(api.GetTensorTypeAndShape(value, &info));
  size_t count = 0;
  ort::Status* const status = api.GetTensorShapeElementCount(info, &count);
  api.ReleaseTensorTypeAndShapeInfo(info);
  check(status);
  return count;
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

// The values of beta, coeff or slope, with steps along each dimension of X.
template <class T>
Parameter<T> read_parameter(const char* name, const ort::Value* value,
                            const std::vector<int64_t>& x_dims) {
  Parameter<T> parameter;
  parameter.data = data_of<const T>(value);
  parameter.count = element_count(value);
  // A single value, which most models have, fits any X and needs no more.
  if (parameter.count == 1) return parameter;
  std::vector<int64_t> dims = shape_of(value);
  while (dims.size() > x_dims.size() && dims.front() == 1) dims.erase(dims.begin());
  parameter.steps.assign(x_dims.size(), 0);
  size_t step = 1;
  bool fits = dims.size() <= x_dims.size();
  for (size_t i = 0; fits && i < dims.size(); ++i) {
    const size_t from_end = dims.size() - 1 - i;
    const size_t axis = x_dims.size() - 1 - i;
    if (dims[from_end] == 1) continue;
    fits = dims[from_end] == x_dims[axis];
    parameter.steps[axis] = step;
    step *= static_cast<size_t>(dims[from_end]);
  }
  if (!fits) invalid(std::string(name) + " does not broadcast to the shape of X");
  return parameter;
}

void check_unit_interval(const char* name, const Parameter<float>& parameter) {
  for (size_t i = 0; i < parameter.count; ++i) {
    // Written so that NaN fails too.
    if (!(parameter.data[i] >= 0.f && parameter.data[i] <= 1.f)) {
      invalid(std::string(name) + " must lie in [0, 1], got " + std::to_string(parameter.data[i]));
    }
  }
}

// Narrows `grid`, whose steps are along every dimension of X, to those between the first and the
// last along which a parameter varies.
template <class T>
void set_dims(const std::vector<int64_t>& x_dims, Grid<T>* grid) {
  std::vector<size_t>* const all_steps[] = {&grid->beta.steps, &grid->coeff.steps,
                                            &grid->slope.steps};
  size_t begin = x_dims.size(), end = 0;
  for (const std::vector<size_t>* steps : all_steps) {
    for (size_t axis = 0; axis < steps->size(); ++axis) {
      if ((*steps)[axis] == 0) continue;
      begin = std::min(begin, axis);
      end = std::max(end, axis + 1);
    }
  }
  begin = std::min(begin, end);
  for (std::vector<size_t>* steps : all_steps) {
    if (steps->empty()) continue;
    steps->resize(end);
    steps->erase(steps->begin(), steps->begin() + static_cast<ptrdiff_t>(begin));
  }
  grid->dims.assign(x_dims.begin() + static_cast<ptrdiff_t>(begin),
                    x_dims.begin() + static_cast<ptrdiff_t>(end));
  grid->inner = product(x_dims.data() + end, x_dims.data() + x_dims.size());
}

// A node's inputs, with beta, coeff and slope wherever the provider keeps them.
template <class T>
struct Inputs {
  const T* x;
  std::vector<int64_t> dims;
  Grid<T> grid;  // along every dimension of X

  explicit Inputs(ort::KernelContext* context) {
    size_t inputs = 0;
    check(api.KernelContext_GetInputCount(context, &inputs));
    const ort::Value* values[4] = {};
    for (size_t i = 0; i < std::min<size_t>(inputs, 4); ++i) {
      check(api.KernelContext_GetInput(context, i, &values[i]));
    }
    x = data_of<const T>(values[0]);
    dims = shape_of(values[0]);
    grid.beta = read_parameter<float>("beta", values[1], dims);
    grid.coeff = read_parameter<float>("coeff", values[2], dims);
    if (values[3] != nullptr) grid.slope = read_parameter<T>("slope", values[3], dims);
  }

  size_t count() const { return product(dims.data(), dims.data() + dims.size()); }

  T* output(ort::KernelContext* context) const {
    ort::Value* value = nullptr;
    check(api.KernelContext_GetOutput(context, 0, dims.data(), dims.size(), &value));
    return data_of<T>(value);
  }
};

template <class T>
class CpuKernel {
 public:
  void compute(ort::KernelContext* context) {
    Inputs<T> inputs(context);
    check_unit_interval("beta", inputs.grid.beta);
    check_unit_interval("coeff", inputs.grid.coeff);
    T* const y = inputs.output(context);
    const size_t count = inputs.count();
    if (count == 0) return;
    set_dims(inputs.dims, &inputs.grid);

    struct Job {
      std::shared_ptr<const Plan<T>> plan;
      const T* x;
      T* y;
      size_t count, inner;

      void run(size_t task) const {
        plan->run(x, y, task * kTask, std::min((task + 1) * kTask, count), inner);
      }
    };
    Job job = {cache_.get(inputs.grid, cpu_level()), inputs.x, y, count, inputs.grid.inner};
    const size_t tasks = (count + kTask - 1) / kTask;
    if (tasks == 1) {
      job.run(0);
    } else {
      const auto task = [](void* user, size_t index) { static_cast<Job*>(user)->run(index); };
      check(api.KernelContext_ParallelFor(context, task, tasks, 0, &job));
    }
  }

 private:
  PlanCache<T> cache_;
};

#if defined(CTONNX_CUDA)
// Reads no parameter and keeps nothing: a captured CUDA graph replays with what they then hold.
template <class T>
class CudaKernel {
 public:
  void compute(ort::KernelContext* context) {
    Inputs<T> inputs(context);
    T* const y = inputs.output(context);
    const size_t count = inputs.count();
    if (count == 0) return;
    set_dims(inputs.dims, &inputs.grid);
    Work<T> work;
    if (!make_work(inputs.x, y, count, inputs.grid, &work)) {
      invalid("beta, coeff and slope vary along too many dimensions of X for CUDA");
    }
    void* stream = nullptr;
    check(api.KernelContext_GetGPUComputeStream(context, &stream));
    if (const char* message = launch(work, blocks_of(work), stream)) {
      throw std::runtime_error(std::string("ctonnx::CTU: CUDA: ") + message);
    }
  }
};
#endif

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

struct Op : ort::CustomOp {
  const char* provider;
};

// The op for elements of type T, run by a Kernel on a provider. All inputs are where the provider
// has its memory.
template <class T, class Kernel>
Op make_op(const char* provider) {
  Op ctu{};
  ctu.provider = provider;
  ctu.version = ort::kApiVersion;
  ctu.GetName = [](const ort::CustomOp*) { return "CTU"; };
  ctu.GetExecutionProviderType = [](const ort::CustomOp* op) {
    return static_cast<const Op*>(op)->provider;
  };
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
    return guarded([&] { *kernel = new Kernel; });
  };
  ctu.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  ctu.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
    return guarded([&] { static_cast<Kernel*>(kernel)->compute(context); });
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
}

template <template <class> class Kernel>
void add_ops(ort::OpDomain* domain, const char* provider) {
  // For the life of the process, as the domain: ONNX Runtime keeps pointers to them in sessions.
  static std::deque<Op>& ops = *new std::deque<Op>;
  for (const Op& op : {make_op<float, Kernel<float>>(provider),
                       make_op<Half, Kernel<Half>>(provider),
                       make_op<BFloat16, Kernel<BFloat16>>(provider),
                       make_op<double, Kernel<double>>(provider)}) {
    ops.push_back(op);
    check(api.CustomOpDomain_Add(domain, &ops.back()));
  }
}

ort::OpDomain* domain() {
  static ort::OpDomain* const made = [] {
    ort::OpDomain* domain = nullptr;
    check(api.CreateCustomOpDomain("ctonnx", &domain));
    add_ops<CpuKernel>(domain, kCpuProvider);
#if defined(CTONNX_CUDA)
    for (const char* provider : kCudaProviders) add_ops<CudaKernel>(domain, provider);
#endif
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
  return guarded([&] {
    cpu_level();  // fails here rather than in the first run
    check(api.AddCustomOpDomain(options, domain()));
  });
}

// The instruction set whose kernels run, or null where CTONNX_CPU names none that can.
extern "C" __attribute__((visibility("default"))) const char* ctonnx_cpu_level() {
  try {
    return ctonnx::cpu_level().name;
  } catch (const std::exception&) {
    return nullptr;
  }
}

// The ops of the domain ctonnx and their registration with ONNX Runtime.
//
//   inputs   X       float32, float16, bfloat16 or double, any shape
//            beta    float32, broadcastable to X, values in [0, 1]
//            coeff   float32, broadcastable to X, values in [0, 1]
//            more:
//              CTU             slope, optional, broadcastable to X
//              CTUMax          lo
//              CTUMin          hi
//              CTUClip         lo, hi
//              CTUHardSigmoid  alpha, offset, lo, hi
//   output   Y       type and shape of X
//
// All these are of the type of X; lo, hi, alpha and offset are single values. Like a broadcast sum, Y
// has as many dimensions as such a value, where X has fewer.
//
// On the CPU, a beta or coeff outside [0, 1], or NaN, is an error. On CUDA it gives NaN, because
// the host does not read the values.
//
// Two ONNX Runtimes can share a process, such as one linked into an application and the one of a
// Python wheel. So no global holds an OrtApi: each op and each kernel has that of its ONNX Runtime.
#include <algorithm>
#include <exception>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
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

constexpr const char* kCpuProvider = "CPUExecutionProvider";

#if defined(CTONNX_CUDA)
// NVIDIA's execution provider: the one built into ONNX Runtime, and the plug-in. A session passes
// over the ops of providers that it does not have.
constexpr const char* kCudaProviders[] = {"CUDAExecutionProvider", "CudaPluginExecutionProvider"};
#endif

// Elements of a task for the thread pool: enough to outweigh the cost of a task.
constexpr size_t kTask = 16384;

// Carries an error of ONNX Runtime up to the C boundary.
struct StatusError {
  ort::Status* status;
};

void check(ort::Status* status) {
  if (status != nullptr) throw StatusError{status};
}

// An input behind coeff, in the order of kOperandNames.
enum class Operand { kNone, kSlope, kAlpha, kOffset, kLo, kHi };

struct OpKind {
  const char* name;
  Operand operands[4];

  bool has_bounds() const { return operands[0] != Operand::kSlope; }
  size_t input_count() const {
    size_t count = 3;
    for (Operand operand : operands) count += operand != Operand::kNone;
    return count;
  }
};

constexpr OpKind kOpKinds[] = {
    {"CTU", {Operand::kSlope}},
    {"CTUMax", {Operand::kLo}},
    {"CTUMin", {Operand::kHi}},
    {"CTUClip", {Operand::kLo, Operand::kHi}},
    {"CTUHardSigmoid", {Operand::kAlpha, Operand::kOffset, Operand::kLo, Operand::kHi}},
};

constexpr size_t kMaxInputs = 7;

constexpr const char* kOperandNames[] = {"", "slope", "alpha", "offset", "lo", "hi"};

[[noreturn]] void invalid(const std::string& message, const char* op = "CTU") {
  throw std::invalid_argument(std::string("ctonnx::") + op + ": " + message);
}

// Runs `body` at the C boundary and returns what it throws as a status: an exception that reached
// ONNX Runtime could end the process.
template <class Body>
ort::Status* guarded(ort::Api api, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const std::invalid_argument& error) {
    return api.CreateStatus(ort::kInvalidArgument, error.what());
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ort::kFail, "ctonnx::CTU: out of memory");
  } catch (const std::exception& error) {
    return api.CreateStatus(ort::kFail, error.what());
  } catch (...) {
    return api.CreateStatus(ort::kFail, "ctonnx::CTU: unknown exception");
  }
}

// Owns an object that ONNX Runtime created.
struct Release {
  ort::Api api;
  void operator()(ort::TensorInfo* info) const { api.ReleaseTensorTypeAndShapeInfo(info); }
  void operator()(ort::OpDomain* domain) const { api.ReleaseCustomOpDomain(domain); }
};
template <class Object>
using Owned = std::unique_ptr<Object, Release>;

Owned<ort::TensorInfo> info_of(ort::Api api, const ort::Value* value) {
  ort::TensorInfo* info = nullptr;
  check(api.GetTensorTypeAndShape(value, &info));
  return {info, Release{api}};
}

std::vector<int64_t> dims_of(ort::Api api, const ort::TensorInfo* info) {
  size_t rank = 0;
  check(api.GetDimensionsCount(info, &rank));
  std::vector<int64_t> dims(rank);
  check(api.GetDimensions(info, dims.data(), rank));
  return dims;
}

template <class T>
T* data_of(ort::Api api, const ort::Value* value) {
  void* data = nullptr;
  check(api.GetTensorMutableData(value, &data));
  return static_cast<T*>(data);
}

size_t product(const int64_t* begin, const int64_t* end) {
  size_t count = 1;
  for (; begin != end; ++begin) count *= static_cast<size_t>(*begin);
  return count;
}

// The values of beta, coeff or slope, with steps along each dimension of X. Throws
// std::invalid_argument if they do not broadcast to X.
template <class T>
Parameter<T> read_parameter(ort::Api api, const char* name, const ort::Value* value,
                            const std::vector<int64_t>& x_dims) {
  const Owned<ort::TensorInfo> info = info_of(api, value);
  Parameter<T> parameter;
  parameter.data = data_of<const T>(api, value);
  check(api.GetTensorShapeElementCount(info.get(), &parameter.count));
  // A single value, as in most models, fits every X and needs no steps.
  if (parameter.count == 1) return parameter;
  std::vector<int64_t> dims = dims_of(api, info.get());
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

// Narrows `grid`, which has steps along every dimension of X, to the dimensions from the first to
// the last along which a parameter varies.
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

// The inputs of a node. All values are in the provider's memory.
template <class T>
struct Inputs {
  const T* x;
  std::vector<int64_t> dims;    // of X, and of Y
  std::vector<int64_t> x_dims;  // as they lie in memory
  Grid<T> grid;                 // along each of x_dims
  Bounds<const T*> bounds{};  // null for those that the op does not have

  // `block` is 0, or that of the layout of X: see CpuKernel.
  Inputs(ort::Api api, const OpKind& kind, ort::KernelContext* context, int64_t block = 0) {
    size_t count = 0;
    check(api.KernelContext_GetInputCount(context, &count));
    const ort::Value* values[kMaxInputs] = {};
    for (size_t i = 0; i < std::min(count, kMaxInputs); ++i) {
      check(api.KernelContext_GetInput(context, i, &values[i]));
    }
    x = data_of<const T>(api, values[0]);
    dims = dims_of(api, info_of(api, values[0]).get());
    if (kind.has_bounds()) {
      read_bounds(api, kind, values + 3);
    }
    x_dims = block > 0 ? blocked(dims, block, kind) : dims;
    if (!kind.has_bounds() && values[3] != nullptr) {
      grid.slope = read_parameter<T>(api, "slope", values[3], x_dims);
    }
    grid.beta = read_parameter<float>(api, "beta", values[1], x_dims);
    grid.coeff = read_parameter<float>(api, "coeff", values[2], x_dims);
  }

  size_t count() const { return product(dims.data(), dims.data() + dims.size()); }

  T* output(ort::Api api, ort::KernelContext* context) const {
    ort::Value* value = nullptr;
    check(api.KernelContext_GetOutput(context, 0, dims.data(), dims.size(), &value));
    return data_of<T>(api, value);
  }

 private:
  static std::vector<int64_t> blocked(const std::vector<int64_t>& dims, int64_t block,
                                      const OpKind& kind) {
    if (dims.size() != 4 || dims[1] % block != 0) {
      invalid("X has no whole blocks of channels", kind.name);
    }
    return {dims[0], dims[1] / block, dims[2], dims[3], block};
  }

  void read_bounds(ort::Api api, const OpKind& kind, const ort::Value* const* values) {
    for (size_t i = 0; i + 3 < kind.input_count(); ++i) {
      const Owned<ort::TensorInfo> info = info_of(api, values[i]);
      const std::vector<int64_t> own = dims_of(api, info.get());
      if (product(own.data(), own.data() + own.size()) != 1) {
        invalid(std::string(kOperandNames[static_cast<int>(kind.operands[i])]) +
                    " must be a single value",
                kind.name);
      }
      if (own.size() > dims.size()) dims.insert(dims.begin(), own.size() - dims.size(), 1);
      *member(kind.operands[i]) = data_of<const T>(api, values[i]);
    }
  }

  const T** member(Operand operand) {
    switch (operand) {
      case Operand::kAlpha:
        return &bounds.alpha;
      case Operand::kOffset:
        return &bounds.offset;
      case Operand::kLo:
        return &bounds.lo;
      default:
        return &bounds.hi;
    }
  }
};

template <class T>
class CpuKernel {
 public:
  const ort::Api api;

  CpuKernel(ort::Api api, const OpKind& kind, const ort::KernelInfo* info)
      : api(api), kind_(kind), block_(block_of(api, info)) {}

  void compute(ort::KernelContext* context) {
    Inputs<T> inputs(api, kind_, context, block_);
    check_unit_interval("beta", inputs.grid.beta);
    check_unit_interval("coeff", inputs.grid.coeff);
    T* const y = inputs.output(api, context);
    const size_t count = inputs.count();
    if (count == 0) return;
    set_dims(inputs.x_dims, &inputs.grid);
    inputs.grid.set_rows();

    struct Job {
      std::shared_ptr<const Plan<T>> plan;
      const T* x;
      T* y;
      size_t count, inner;
      const Bounds<A>* bounds;

      void run(size_t task) const noexcept {
        plan->run(x, y, task * kTask, std::min((task + 1) * kTask, count), inner, bounds);
      }
    };
    const Bounds<A> bounds = values_of(inputs.bounds);
    Job job = {cache_.get(inputs.grid, cpu_level()), inputs.x, y, count, inputs.grid.inner,
               kind_.has_bounds() ? &bounds : nullptr};
    const size_t tasks = (count + kTask - 1) / kTask;
    if (tasks == 1) {
      job.run(0);
    } else {
      const auto task = [](void* user, size_t index) noexcept {
        static_cast<Job*>(user)->run(index);
      };
      check(api.KernelContext_ParallelFor(context, task, tasks, 0, &job));
    }
  }

 private:
  using A = typename Arithmetic<T>::type;

  // The attribute `block`, 0 where there is none. With it X [N, C, H, W] lies in memory as
  // [N, C / block, H, W, block], as ONNX Runtime's convolutions have it, and beta, coeff and slope
  // broadcast to that. ctonnx.ort.blocked writes it.
  static int64_t block_of(ort::Api api, const ort::KernelInfo* info) {
    int64_t block = 0;
    if (ort::Status* status = api.KernelInfoGetAttribute_int64(info, "block", &block)) {
      api.ReleaseStatus(status);
      return 0;
    }
    return block;
  }

  static Bounds<A> values_of(const Bounds<const T*>& pointers) {
    const auto value = [](const T* p, float absent) {
      return p != nullptr ? static_cast<A>(to_double(*p)) : absent;
    };
    return {value(pointers.alpha, kUnbounded.alpha), value(pointers.offset, kUnbounded.offset),
            value(pointers.lo, kUnbounded.lo), value(pointers.hi, kUnbounded.hi)};
  }

  const OpKind& kind_;
  const int64_t block_;
  PlanCache<T> cache_;
};

#if defined(CTONNX_CUDA)
// The host neither reads nor keeps a parameter, so a captured CUDA graph replays with the values
// that the parameters have then.
template <class T>
class CudaKernel {
 public:
  const ort::Api api;

  CudaKernel(ort::Api api, const OpKind& kind, const ort::KernelInfo*) : api(api), kind_(kind) {}

  void compute(ort::KernelContext* context) {
    Inputs<T> inputs(api, kind_, context);
    T* const y = inputs.output(api, context);
    const size_t count = inputs.count();
    if (count == 0) return;
    set_dims(inputs.dims, &inputs.grid);
    Work<T> work;
    if (!make_work(inputs.x, y, count, inputs.grid, &work)) {
      invalid("beta, coeff and slope vary along too many dimensions of X for CUDA");
    }
    work.bounded = kind_.has_bounds();
    work.bounds = inputs.bounds;
    void* stream = nullptr;
    check(api.KernelContext_GetGPUComputeStream(context, &stream));
    if (const char* message = launch(work, blocks_of(work), stream)) {
      throw std::runtime_error(std::string("ctonnx::CTU: CUDA: ") + message);
    }
  }

 private:
  const OpKind& kind_;
};
#endif

// Sets the shape of Y to that of X if it is known.
void infer_shape(ort::Api api, const OpKind& kind, ort::ShapeInferContext* context) {
  ort::TensorInfo* info = nullptr;
  check(api.ShapeInferContext_GetInputTypeShape(context, 0, &info));
  const std::vector<int64_t> dims = dims_of(api, info);
  for (size_t i = 3; kind.has_bounds() && i < kind.input_count(); ++i) {
    ort::TensorInfo* operand = nullptr;
    check(api.ShapeInferContext_GetInputTypeShape(context, i, &operand));
    if (dims_of(api, operand).size() > dims.size()) return;
  }
  // ONNX Runtime reports an unknown rank as 0, and would copy an unknown dimension as a plain -1.
  if (dims.empty()) return;
  std::vector<const char*> symbols(dims.size());
  check(api.GetSymbolicDimensions(info, symbols.data(), symbols.size()));
  for (size_t i = 0; i < dims.size(); ++i) {
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
  ort::Api api;
  const char* provider;
  const OpKind& kind;

  Op(ort::Api api, const char* provider, const OpKind& kind)
      : ort::CustomOp{}, api(api), provider(provider), kind(kind) {}
};

const Op& self(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }

// An op for elements of type T. Its inputs are in the memory of `provider`, which runs Kernel<T>.
template <template <class> class Kernel, class T>
Op make_op(ort::Api api, const char* provider, const OpKind& kind) {
  Op op(api, provider, kind);
  op.version = ort::kApiVersion;
  op.GetName = [](const ort::CustomOp* op) noexcept { return self(op).kind.name; };
  op.GetExecutionProviderType = [](const ort::CustomOp* op) noexcept { return self(op).provider; };
  op.GetInputTypeCount = [](const ort::CustomOp* op) noexcept { return self(op).kind.input_count(); };
  op.GetInputType = [](const ort::CustomOp*, size_t index) noexcept {
    return index == 1 || index == 2 ? ort::kFloat : element_type<T>();
  };
  op.GetInputCharacteristic = [](const ort::CustomOp* op, size_t index) noexcept {
    return index == 3 && !self(op).kind.has_bounds() ? ort::kOptional : ort::kRequired;
  };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) noexcept { return 0; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) noexcept -> size_t { return 1; };
  op.GetOutputType = [](const ort::CustomOp*, size_t) noexcept { return element_type<T>(); };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) noexcept { return ort::kRequired; };
  op.CreateKernelV2 = [](const ort::CustomOp* op, const void*, const ort::KernelInfo* info,
                         void** kernel) noexcept {
    const ort::Api api = self(op).api;
    return guarded(api, [&] { *kernel = new Kernel<T>(api, self(op).kind, info); });
  };
  op.KernelDestroy = [](void* kernel) noexcept { delete static_cast<Kernel<T>*>(kernel); };
  op.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) noexcept {
    Kernel<T>* const typed = static_cast<Kernel<T>*>(kernel);
    return guarded(typed->api, [&] { typed->compute(context); });
  };
  op.InferOutputShape = [](const ort::CustomOp* op, ort::ShapeInferContext* context) noexcept {
    const ort::Api api = self(op).api;
    return guarded(api, [&] { infer_shape(api, self(op).kind, context); });
  };
  op.GetStartVersion = [](const ort::CustomOp*) noexcept { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) noexcept { return std::numeric_limits<int>::max(); };
  // Y may overwrite X.
  op.GetMayInplace = [](int** inputs, int** outputs) noexcept -> size_t {
    static int first = 0;
    *inputs = *outputs = &first;
    return 1;
  };
  op.ReleaseMayInplace = [](int*, int*) noexcept {};
  return op;
}

// The op domain of one ONNX Runtime, with every op for every provider and element type.
class Domain {
 public:
  explicit Domain(ort::Api api) : domain_(nullptr, Release{api}) {
    add_ops<CpuKernel>(api, kCpuProvider);
#if defined(CTONNX_CUDA)
    for (const char* provider : kCudaProviders) add_ops<CudaKernel>(api, provider);
#endif
    ort::OpDomain* domain = nullptr;
    check(api.CreateCustomOpDomain("ctonnx", &domain));
    domain_.reset(domain);
    for (const Op& op : ops_) check(api.CustomOpDomain_Add(domain, &op));
  }

  ort::OpDomain* get() const { return domain_.get(); }

 private:
  template <template <class> class Kernel>
  void add_ops(ort::Api api, const char* provider) {
    for (const OpKind& kind : kOpKinds) {
      ops_.push_back(make_op<Kernel, float>(api, provider, kind));
      ops_.push_back(make_op<Kernel, Half>(api, provider, kind));
      ops_.push_back(make_op<Kernel, BFloat16>(api, provider, kind));
      ops_.push_back(make_op<Kernel, double>(api, provider, kind));
    }
  }

  std::vector<Op> ops_;  // ONNX Runtime keeps pointers to them
  Owned<ort::OpDomain> domain_;
};

// The domain of the ONNX Runtime that has this OrtApi table. It is never freed, because sessions
// keep pointers to it.
ort::OpDomain* domain_of(void* const* table) {
  static std::mutex mutex;
  static auto& domains = *new std::map<void* const*, Domain>;
  const std::lock_guard<std::mutex> lock(mutex);
  return domains.try_emplace(table, ort::Api(table)).first->second.get();
}

}  // namespace
}  // namespace ctonnx

// Adds the ops to session options. Returns null, or a status that says what is wrong: an ONNX
// Runtime older than 1.18, or a CTONNX_CPU that this machine does not support.
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(
    ort::SessionOptions* options, const ort::ApiBase* base) noexcept {
  using namespace ctonnx;
  void* const* const table = base->GetApi(ort::kApiVersion);
  // Every ONNX Runtime has version 1, which can create a status.
  const ort::Api api(table != nullptr ? table : base->GetApi(1));
  return guarded(api, [&] {
    if (table == nullptr) {
      throw std::runtime_error(std::string("ctonnx needs ONNX Runtime 1.18 or newer, this is ") +
                               base->GetVersionString());
    }
    cpu_level();  // an unsupported CTONNX_CPU fails here rather than in the first run
    check(api.AddCustomOpDomain(options, domain_of(table)));
  });
}

// The name of the instruction set of the CPU kernels (avx512, avx2 or portable), or null if this
// machine does not support the one that CTONNX_CPU names.
extern "C" __attribute__((visibility("default"))) const char* ctonnx_cpu_level() noexcept {
  try {
    return ctonnx::cpu_level().name;
  } catch (...) {  // an exception may not reach a caller in C
    return nullptr;
  }
}

// Tests of the op at its C boundary, with fakes in place of ONNX Runtime: two ONNX Runtimes in one
// process, and calls and allocations that fail. Prints failures; exits with 1 if there are any.
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "ort_abi.h"

extern "C" ort::Status* RegisterCustomOps(ort::SessionOptions*, const ort::ApiBase*);

namespace {

std::atomic<int> failures{0};

void require(bool ok, const char* what, int detail) {
  if (!ok && ++failures <= 20) std::printf("%s: %d\n", what, detail);
}

// ---- Failures on request -----------------------------------------------------------------------

enum Failure { kNone, kCall, kBadAlloc, kNotAnException };

// In this thread, what fails once `countdown` more calls or allocations have succeeded.
thread_local Failure failure = kNone;
thread_local int countdown = 0;

bool fails_now(Failure kind) { return failure == kind && countdown-- == 0; }

// Allocations of the fakes and the tests themselves succeed.
struct Untouched {
  const Failure before = failure;
  Untouched() { failure = kNone; }
  ~Untouched() { failure = before; }
};

}  // namespace

void* operator new(size_t size) {
  if (fails_now(kBadAlloc)) throw std::bad_alloc();
  if (fails_now(kNotAnException)) throw 7;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

// ---- The fakes ---------------------------------------------------------------------------------

// Every object has the number of the fake that created it.
namespace ort {
struct Status {
  int fake;
  StatusCode code;
  std::string message;
};
struct OpDomain {
  int fake;
  std::vector<const CustomOp*> ops;
};
struct SessionOptions {
  int fake;
  std::vector<OpDomain*> domains;
};
struct TensorInfo {
  int fake;
  std::vector<int64_t> dims;
};
struct Value {
  TensorInfo info;
  std::vector<float> data;
};
struct KernelContext {
  int fake;
  std::vector<Value> inputs;
  Value output;
};
struct ShapeInferContext {
  TensorInfo input, output;
};
}  // namespace ort

namespace {

template <int kFake>
class Fake {
 public:
  static inline std::atomic<int> infos{0}, domains{0};  // that are not released

  static ort::ApiBase* base() {
    static ort::ApiBase base = {[](uint32_t) { return table(); }, [] { return "1.18.0"; }};
    return &base;
  }

  // An ONNX Runtime that does not know the API version.
  static ort::ApiBase* old_base() {
    static ort::ApiBase base = {[](uint32_t version) { return version == 1 ? table() : nullptr; },
                                [] { return "1.17.3"; }};
    return &base;
  }

 private:
  static ort::Status* CreateStatus(int code, const char* message) {
    const Untouched untouched;
    return new ort::Status{kFake, static_cast<ort::StatusCode>(code), message};
  }

  // Whether a call may go on: it is about objects of this fake, and not to fail.
  template <class Object>
  static ort::Status* enter(const Object* object) {
    require(object->fake == kFake, "object of another ONNX Runtime", object->fake);
    return fails_now(kCall) ? CreateStatus(ort::kFail, "refused") : nullptr;
  }

  static ort::Status* CreateCustomOpDomain(const char* name, ort::OpDomain** domain) {
    if (fails_now(kCall)) return CreateStatus(ort::kFail, "refused");
    const Untouched untouched;
    require(name == std::string("ctonnx"), "name of the domain", 0);
    ++domains;
    *domain = new ort::OpDomain{kFake, {}};
    return nullptr;
  }
  static ort::Status* CustomOpDomain_Add(ort::OpDomain* domain, const ort::CustomOp* op) {
    if (ort::Status* status = enter(domain)) return status;
    const Untouched untouched;
    domain->ops.push_back(op);
    return nullptr;
  }
  static ort::Status* AddCustomOpDomain(ort::SessionOptions* options, ort::OpDomain* domain) {
    if (ort::Status* status = enter(options)) return status;
    const Untouched untouched;
    require(domain->fake == kFake, "domain of another ONNX Runtime", domain->fake);
    options->domains.push_back(domain);
    return nullptr;
  }
  static ort::Status* GetTensorMutableData(ort::Value* value, void** data) {
    *data = value->data.data();
    return enter(&value->info);
  }
  static ort::Status* GetDimensionsCount(const ort::TensorInfo* info, size_t* rank) {
    *rank = info->dims.size();
    return enter(info);
  }
  static ort::Status* GetDimensions(const ort::TensorInfo* info, int64_t* dims, size_t rank) {
    for (size_t i = 0; i < rank; ++i) dims[i] = info->dims[i];
    return enter(info);
  }
  static ort::Status* GetSymbolicDimensions(const ort::TensorInfo* info, const char** names,
                                            size_t rank) {
    for (size_t i = 0; i < rank; ++i) names[i] = "";
    return enter(info);
  }
  static ort::Status* GetTensorShapeElementCount(const ort::TensorInfo* info, size_t* count) {
    *count = 1;
    for (int64_t dim : info->dims) *count *= static_cast<size_t>(dim);
    return enter(info);
  }
  static ort::Status* GetTensorTypeAndShape(const ort::Value* value, ort::TensorInfo** info) {
    if (ort::Status* status = enter(&value->info)) return status;
    const Untouched untouched;
    ++infos;
    *info = new ort::TensorInfo(value->info);
    return nullptr;
  }
  static void ReleaseTensorTypeAndShapeInfo(ort::TensorInfo* info) {
    require(info->fake == kFake, "info of another ONNX Runtime", info->fake);
    --infos;
    delete info;
  }
  static void ReleaseCustomOpDomain(ort::OpDomain* domain) {
    require(domain->fake == kFake, "domain of another ONNX Runtime", domain->fake);
    --domains;
    delete domain;
  }
  static ort::Status* KernelInfoGetAttribute_int64(const ort::KernelInfo*, const char*, int64_t*) {
    return CreateStatus(ort::kFail, "no such attribute");
  }
  static void ReleaseStatus(ort::Status* status) {
    require(status->fake == kFake, "status of another ONNX Runtime", status->fake);
    delete status;
  }
  static ort::Status* KernelContext_GetInputCount(const ort::KernelContext* context,
                                                  size_t* count) {
    *count = context->inputs.size();
    return enter(context);
  }
  static ort::Status* KernelContext_GetInput(const ort::KernelContext* context, size_t index,
                                             const ort::Value** value) {
    *value = &context->inputs[index];
    return enter(context);
  }
  static ort::Status* KernelContext_GetOutput(ort::KernelContext* context, size_t,
                                              const int64_t* dims, size_t rank,
                                              ort::Value** value) {
    const Untouched untouched;
    context->output.info = {kFake, {dims, dims + rank}};
    context->output.data.assign(context->inputs[0].data.size(), NAN);
    *value = &context->output;
    return enter(context);
  }
  static ort::Status* ShapeInferContext_GetInputTypeShape(const ort::ShapeInferContext* context,
                                                          size_t, const ort::TensorInfo** info) {
    *info = &context->input;
    return enter(*info);
  }
  static ort::Status* ShapeInferContext_SetOutputTypeShape(ort::ShapeInferContext* context, size_t,
                                                           const ort::TensorInfo* info) {
    const Untouched untouched;
    context->output = *info;
    return enter(info);
  }
  static ort::Status* KernelContext_ParallelFor(const ort::KernelContext* context,
                                                void (*task)(void*, size_t), size_t count, size_t,
                                                void* user) {
    for (size_t i = 0; i < count; ++i) task(user, i);
    return enter(context);
  }

  static void* const* table() {
    static const std::array<void*, 275> slots = [] {
      std::array<void*, 275> slots{};
      const auto put = [&](size_t slot, auto* function) {
        slots[slot] = reinterpret_cast<void*>(function);
      };
      put(0, CreateStatus);
      put(26, CreateCustomOpDomain);
      put(27, CustomOpDomain_Add);
      put(28, AddCustomOpDomain);
      put(51, GetTensorMutableData);
      put(61, GetDimensionsCount);
      put(62, GetDimensions);
      put(63, GetSymbolicDimensions);
      put(64, GetTensorShapeElementCount);
      put(65, GetTensorTypeAndShape);
      put(86, KernelInfoGetAttribute_int64);
      put(88, KernelContext_GetInputCount);
      put(90, KernelContext_GetInput);
      put(91, KernelContext_GetOutput);
      put(93, ReleaseStatus);
      put(99, ReleaseTensorTypeAndShapeInfo);
      put(101, ReleaseCustomOpDomain);
      put(268, ShapeInferContext_GetInputTypeShape);
      put(270, ShapeInferContext_SetOutputTypeShape);
      put(274, KernelContext_ParallelFor);
      return slots;
    }();
    return slots.data();
  }
};

// ---- The tests ---------------------------------------------------------------------------------

// Frees a status; returns its message, or "" for success.
std::string message_of(ort::Status* status, int fake) {
  if (status == nullptr) return "";
  require(status->fake == fake, "status of another ONNX Runtime", status->fake);
  const std::string message = status->message;
  delete status;
  return message;
}

template <int kFake>
const ort::OpDomain* registered() {
  ort::SessionOptions options{kFake, {}};
  const std::string message = message_of(RegisterCustomOps(&options, Fake<kFake>::base()), kFake);
  require(message.empty() && options.domains.size() == 1, message.c_str(), kFake);
  return options.domains.at(0);
}

// The inputs of a run with a beta for each of `channels` and more elements than one task has.
ort::KernelContext inputs(int fake, int64_t channels, float beta) {
  const ort::TensorInfo x = {fake, {2, channels, 9000}}, scalar = {fake, {}};
  return {fake,
          {{x, std::vector<float>(static_cast<size_t>(2 * channels * 9000), -3)},
           {{fake, {channels, 1}}, std::vector<float>(static_cast<size_t>(channels), beta)},
           {scalar, {0.5f}}},
          {}};
}

// At beta 1 the op is ReLU, within 1e-6.
bool is_relu(const ort::KernelContext& context) {
  const std::vector<float>&x = context.inputs[0].data, &y = context.output.data;
  bool equal = context.output.info.dims == context.inputs[0].info.dims && x.size() == y.size();
  for (size_t i = 0; equal && i < x.size(); ++i) {
    equal = std::fabs(y[i] - std::fmax(0.f, x[i])) < 1e-6f;
  }
  return equal;
}

// Everything that ONNX Runtime calls of the op for float32, the first of the domain.
template <int kFake>
void run_op() {
  const ort::CustomOp* const op = registered<kFake>()->ops.at(0);
  void* kernel = nullptr;
  require(op->CreateKernelV2(op, nullptr, nullptr, &kernel) == nullptr, "CreateKernel", kFake);
  ort::KernelContext valid = inputs(kFake, 3, 1), invalid = inputs(kFake, 3, 2);
  require(op->KernelComputeV2(kernel, &valid) == nullptr && is_relu(valid), "Compute", kFake);
  ort::Status* const status = op->KernelComputeV2(kernel, &invalid);
  require(status != nullptr && status->code == ort::kInvalidArgument, "code of a status", kFake);
  require(message_of(status, kFake) == "ctonnx::CTU: beta must lie in [0, 1], got 2.000000",
          "message of a status", kFake);
  ort::ShapeInferContext shapes = {{kFake, {2, 3}}, {}};
  require(op->InferOutputShape(op, &shapes) == nullptr, "InferOutputShape", kFake);
  require(shapes.output.dims == shapes.input.dims, "inferred shape", kFake);
  op->KernelDestroy(kernel);
}

void test_two_runtimes() {
  const ort::OpDomain *const first = registered<1>(), *const second = registered<2>();
  require(registered<1>() == first && registered<2>() == second, "domain of a later call", 0);
  require(first->fake == 1 && second->fake == 2, "fake of a domain", second->fake);
  require(first->ops.size() % 4 == 0 && first->ops.size() == second->ops.size(), "ops", 0);
  run_op<1>();
  run_op<2>();
  run_op<1>();
  require(Fake<1>::domains == 1 && Fake<2>::domains == 1, "domains created", Fake<1>::domains);
}

void test_threads() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back(i % 2 == 0 ? run_op<3> : run_op<4>);
  for (std::thread& thread : threads) thread.join();
  require(Fake<3>::domains == 1 && Fake<4>::domains == 1, "domains created", Fake<3>::domains);
}

void test_old_runtime() {
  ort::SessionOptions options{0, {}};
  require(message_of(RegisterCustomOps(&options, Fake<0>::old_base()), 0) ==
              "ctonnx needs ONNX Runtime 1.18 or newer, this is 1.17.3",
          "message for an old ONNX Runtime", 0);
}

// Runs `call` with a failure of its first step (a call or an allocation), then of its second, and
// so on until it succeeds. Each failure must give a status with a message, and leak nothing.
template <int kFake, class Call>
void fail_everywhere(const char* what, Failure kind, Call call) {
  const std::string expected = kind == kCall       ? "refused"
                               : kind == kBadAlloc ? "ctonnx::CTU: out of memory"
                                                   : "ctonnx::CTU: unknown exception";
  for (int n = 0;; ++n) {
    failure = kind;
    countdown = n;
    ort::Status* const status = call();
    failure = kNone;
    require(Fake<kFake>::infos == 0, "tensor infos that leak", n);
    require(Fake<kFake>::domains <= 1, "domains that leak", n);
    if (status == nullptr) return require(n > 0, what, n);
    const std::string message = message_of(status, kFake);
    if (message != expected) return require(false, (what + (": " + message)).c_str(), n);
  }
}

template <int kFake>
void test_failures(Failure kind) {
  ort::SessionOptions options{kFake, {}};
  fail_everywhere<kFake>("RegisterCustomOps", kind,
                         [&] { return RegisterCustomOps(&options, Fake<kFake>::base()); });
  const ort::CustomOp* const op = options.domains.at(0)->ops.at(0);
  void* kernel = nullptr;
  if (kind != kCall) {
    fail_everywhere<kFake>("CreateKernel", kind,
                           [&] { return op->CreateKernelV2(op, nullptr, nullptr, &kernel); });
  } else {
    op->CreateKernelV2(op, nullptr, nullptr, &kernel);
  }
  ort::KernelContext context = inputs(kFake, 3, 1);
  fail_everywhere<kFake>("Compute", kind, [&] { return op->KernelComputeV2(kernel, &context); });
  require(is_relu(context), "a run after failures", kind);
  op->KernelDestroy(kernel);
  ort::ShapeInferContext shapes = {{kFake, {2, 3}}, {}};
  fail_everywhere<kFake>("InferOutputShape", kind,
                         [&] { return op->InferOutputShape(op, &shapes); });
}

}  // namespace

int main() {
  test_threads();
  test_two_runtimes();
  test_old_runtime();
  test_failures<5>(kCall);
  test_failures<6>(kBadAlloc);
  test_failures<7>(kNotAnException);
  std::printf("%d failures\n", failures.load());
  return failures > 0;
}

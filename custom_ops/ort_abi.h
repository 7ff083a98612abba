// The part of ONNX Runtime's C ABI that this library uses.
//
// ONNX Runtime's wheels ship no C headers, but the ABI is append-only: OrtApi is a table of
// function pointers whose positions never change, and OrtCustomOp is a struct that only grows.
// Declaring the few slots in use keeps the build free of dependencies, and the library works with
// every ONNX Runtime from 1.18 on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

// The oldest API version that has everything below. An older ONNX Runtime returns null for it.
constexpr uint32_t kApiVersion = 18;

struct Status;  // null means success
struct SessionOptions;
struct OpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct Value;
struct TensorInfo;

enum StatusCode : int { kFail = 1, kInvalidArgument = 2 };

enum ElementType : int { kFloat = 1, kFloat16 = 10, kDouble = 11, kBFloat16 = 16 };

enum Characteristic : int { kRequired = 0, kOptional = 1 };

struct ApiBase {
  void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// Field order and types are the ABI; unused fields are null. ONNX Runtime may not see an exception
// from these functions: `noexcept` in their types makes the compiler reject one that could throw.
struct CustomOp {
  uint32_t version;
  void* CreateKernel;
  const char* (*GetName)(const CustomOp*) noexcept;
  const char* (*GetExecutionProviderType)(const CustomOp*) noexcept;
  ElementType (*GetInputType)(const CustomOp*, size_t index) noexcept;
  size_t (*GetInputTypeCount)(const CustomOp*) noexcept;
  ElementType (*GetOutputType)(const CustomOp*, size_t index) noexcept;
  size_t (*GetOutputTypeCount)(const CustomOp*) noexcept;
  void* KernelCompute;
  void (*KernelDestroy)(void* kernel) noexcept;
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t index) noexcept;
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t index) noexcept;
  int (*GetInputMemoryType)(const CustomOp*, size_t index) noexcept;
  void* variadic[4];
  Status* (*CreateKernelV2)(const CustomOp*, const void* api, const KernelInfo* info,
                            void** kernel) noexcept;
  Status* (*KernelComputeV2)(void* kernel, KernelContext*) noexcept;
  Status* (*InferOutputShape)(const CustomOp*, ShapeInferContext*) noexcept;
  int (*GetStartVersion)(const CustomOp*) noexcept;
  int (*GetEndVersion)(const CustomOp*) noexcept;
  size_t (*GetMayInplace)(int** inputs, int** outputs) noexcept;
  void (*ReleaseMayInplace)(int* inputs, int* outputs) noexcept;
  void* alias[2];
};
static_assert(sizeof(CustomOp) == 26 * sizeof(void*), "OrtCustomOp of API 18 is 26 words");

// Typed access to an OrtApi table; the numbers are positions in it. Each ONNX Runtime in a process
// has its own table, and its objects must only reach functions of that table.
class Api {
 public:
  explicit Api(void* const* table) : table_(table) {}

  Status* CreateStatus(StatusCode code, const char* message) const {
    return call<Status*>(0, static_cast<int>(code), message);
  }
  Status* CreateCustomOpDomain(const char* name, OpDomain** domain) const {
    return call<Status*>(26, name, domain);
  }
  Status* CustomOpDomain_Add(OpDomain* domain, const CustomOp* op) const {
    return call<Status*>(27, domain, op);
  }
  Status* AddCustomOpDomain(SessionOptions* options, OpDomain* domain) const {
    return call<Status*>(28, options, domain);
  }
  Status* GetTensorMutableData(const Value* value, void** data) const {
    return call<Status*>(51, value, data);
  }
  Status* GetDimensionsCount(const TensorInfo* info, size_t* rank) const {
    return call<Status*>(61, info, rank);
  }
  Status* GetDimensions(const TensorInfo* info, int64_t* dims, size_t rank) const {
    return call<Status*>(62, info, dims, rank);
  }
  // The names of symbolic dimensions; "" for a dimension without a name.
  Status* GetSymbolicDimensions(const TensorInfo* info, const char** names, size_t rank) const {
    return call<Status*>(63, info, names, rank);
  }
  Status* GetTensorShapeElementCount(const TensorInfo* info, size_t* count) const {
    return call<Status*>(64, info, count);
  }
  Status* GetTensorTypeAndShape(const Value* value, TensorInfo** info) const {
    return call<Status*>(65, value, info);
  }
  // Fails where the node has no such attribute.
  Status* KernelInfoGetAttribute_int64(const KernelInfo* info, const char* name,
                                       int64_t* value) const {
    return call<Status*>(86, info, name, value);
  }
  Status* KernelContext_GetInputCount(const KernelContext* context, size_t* count) const {
    return call<Status*>(88, context, count);
  }
  Status* KernelContext_GetInput(const KernelContext* context, size_t index,
                                 const Value** value) const {
    return call<Status*>(90, context, index, value);
  }
  Status* KernelContext_GetOutput(KernelContext* context, size_t index, const int64_t* dims,
                                  size_t rank, Value** value) const {
    return call<Status*>(91, context, index, dims, rank, value);
  }
  void ReleaseStatus(Status* status) const { call<void>(93, status); }
  void ReleaseTensorTypeAndShapeInfo(TensorInfo* info) const { call<void>(99, info); }
  void ReleaseCustomOpDomain(OpDomain* domain) const { call<void>(101, domain); }
  // The cudaStream_t on which a CUDA provider runs the node.
  Status* KernelContext_GetGPUComputeStream(const KernelContext* context, void** stream) const {
    return call<Status*>(193, context, stream);
  }
  // The context owns `info`.
  Status* ShapeInferContext_GetInputTypeShape(const ShapeInferContext* context, size_t index,
                                              TensorInfo** info) const {
    return call<Status*>(268, context, index, info);
  }
  Status* ShapeInferContext_SetOutputTypeShape(ShapeInferContext* context, size_t index,
                                               const TensorInfo* info) const {
    return call<Status*>(270, context, index, info);
  }
  // Runs task(user, 0 .. count-1) on the session's thread pool; `batches` 0 lets the pool choose.
  Status* KernelContext_ParallelFor(const KernelContext* context,
                                    void (*task)(void*, size_t) noexcept, size_t count,
                                    size_t batches, void* user) const {
    return call<Status*>(274, context, task, count, batches, user);
  }

 private:
  template <class Result, class... Args>
  Result call(size_t slot, Args... args) const {
    return reinterpret_cast<Result (*)(Args...)>(table_[slot])(args...);
  }

  void* const* table_;
};

}  // namespace ort

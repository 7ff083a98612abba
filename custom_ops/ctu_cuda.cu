// The CUDA kernels: the threads of ctu_thread.h with the functions and conversions of a GPU.
#include <cuda_runtime.h>

#include "ctu_cuda.h"

// `ctonnx doctor` looks for this text in the library.
extern "C" __attribute__((used)) const char ctonnx_cuda_kernels[];
const char ctonnx_cuda_kernels[] = "ctonnx CUDA kernels: " CTONNX_CUDA_KERNELS;

namespace ctonnx {

// FastUnit (ctu_math.h) allows for the errors of these instructions.
struct Approximate {
  static __device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ __forceinline__ float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
};

__device__ __forceinline__ float widen(Half half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half.bits));
  return value;
}

__device__ __forceinline__ float widen(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

// Both round to nearest, ties to even. NaN stays NaN.
__device__ __forceinline__ void narrow(float from, Half* to) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(from));
}

__device__ __forceinline__ void narrow(float from, BFloat16* to) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(from));
#else
  to->bits = nearest_bfloat16(from);
#endif
}

template <class T, int kLanes>
__device__ __forceinline__ void narrow(const float (&from)[kLanes], T (&to)[kLanes]) {
#pragma unroll
  for (int i = 0; i < kLanes; ++i) narrow(from[i], &to[i]);
}

namespace {

// Null for success. Three errors mean that the library was built for other GPUs or drivers.
const char* message_of(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return nullptr;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInsufficientDriver:
      return "the library's kernels (" CTONNX_CUDA_KERNELS ") do not run on this GPU and its driver: "
             "install ctonnx again with a toolkit for both, or with CTONNX_CUDA=OFF";
    default:
      return cudaGetErrorString(error);
  }
}

template <class T, int kLanes, bool kGrid, bool kBounded>
__global__ void __launch_bounds__(kThreads, kGrid || kBounded ? 2 : 4)
    ctu_kernel(const __grid_constant__ Work<T> work) {
  run_thread<kLanes, kGrid, kBounded, Approximate>(work, blockIdx.x, gridDim.x, threadIdx.x);
}

template <bool kBounded, class T>
auto kernel_for(const Work<T>& work) {
  return work.points == 1 ? ctu_kernel<T, kPacketLanes<T>, false, kBounded>
         : work.lanes > 1 ? ctu_kernel<T, kPacketLanes<T>, true, kBounded>
                          : ctu_kernel<T, 1, true, kBounded>;
}

template <class T>
const char* launch_kernel(const Work<T>& work, uint64_t blocks, void* stream) {
  const auto kernel = work.bounded ? kernel_for<true>(work) : kernel_for<false>(work);
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(work);
  return message_of(cudaGetLastError());
}

}  // namespace

const char* launch(const Work<float>& work, uint64_t blocks, void* stream) {
  return launch_kernel(work, blocks, stream);
}
const char* launch(const Work<Half>& work, uint64_t blocks, void* stream) {
  return launch_kernel(work, blocks, stream);
}
const char* launch(const Work<BFloat16>& work, uint64_t blocks, void* stream) {
  return launch_kernel(work, blocks, stream);
}
const char* launch(const Work<double>& work, uint64_t blocks, void* stream) {
  return launch_kernel(work, blocks, stream);
}

}  // namespace ctonnx

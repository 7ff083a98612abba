// The CUDA kernels. A library that was built without nvcc has none.
#pragma once

#include <cstdint>

#include "ctu_thread.h"

namespace ctonnx {

// Launches `blocks` blocks on a cudaStream_t without waiting for them. Returns null, or an error
// message.
const char* launch(const Work<float>& work, uint64_t blocks, void* stream);
const char* launch(const Work<Half>& work, uint64_t blocks, void* stream);
const char* launch(const Work<BFloat16>& work, uint64_t blocks, void* stream);
const char* launch(const Work<double>& work, uint64_t blocks, void* stream);

}  // namespace ctonnx

// The CTU kernels for CUDA, present where the library was built with nvcc.
#pragma once

#include <cstdint>

#include "ctu_thread.h"

namespace ctonnx {

// Starts the work on a cudaStream_t, with so many blocks, and waits for nothing. Returns null, or
// what went wrong.
const char* launch(const Work<float>& work, uint64_t blocks, void* stream);
const char* launch(const Work<Half>& work, uint64_t blocks, void* stream);
const char* launch(const Work<BFloat16>& work, uint64_t blocks, void* stream);
const char* launch(const Work<double>& work, uint64_t blocks, void* stream);

}  // namespace ctonnx

# Adds the CUDA kernels to ctonnx_ops if nvcc works. Otherwise the library has only CPU kernels.
if(NOT CTONNX_CUDA)
  return()
endif()
if(CMAKE_CROSSCOMPILING AND NOT CMAKE_CUDA_HOST_COMPILER)
  # Without it nvcc would use the host compiler of this machine.
  message(STATUS "cross-compiling without CMAKE_CUDA_HOST_COMPILER: no CUDA kernels")
  return()
endif()
if(CMAKE_CUDA_COMPILER)
  set(nvcc ${CMAKE_CUDA_COMPILER})
elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
  separate_arguments(nvcc UNIX_COMMAND "$ENV{CUDACXX}")  # may have options, as for CMake itself
else()
  find_program(nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(nvcc)
    set(CMAKE_CUDA_COMPILER ${nvcc})
  endif()
endif()
if(NOT nvcc)
  message(STATUS "nvcc not found: no CUDA kernels")
  return()
endif()
string(REPLACE ";" " " nvcc_shown "${nvcc}")

# Code for each architecture that this nvcc knows. A driver makes code for the other GPUs from PTX:
# of the newest architecture for later GPUs, of the oldest for those in between.
execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE nvcc_architectures ERROR_QUIET)
list(SORT CTONNX_CUDA_ARCHITECTURES COMPARE NATURAL)
foreach(architecture ${CTONNX_CUDA_ARCHITECTURES})
  if(nvcc_architectures MATCHES "compute_${architecture}[^0-9a-z]")
    list(APPEND architectures ${architecture}-real)
    if(NOT oldest)
      set(oldest ${architecture})
    endif()
    set(newest ${architecture})
    string(APPEND architecture_names "sm_${architecture} ")
  endif()
endforeach()

# Compiles a probe with the options of the kernels: where nvcc does not work, enable_language would
# end the build.
set(options --threads=2 -Xfatbin=-compress-all)
set(host ${CMAKE_CUDA_HOST_COMPILER})
if(NOT host)
  set(host $ENV{CUDAHOSTCXX})
endif()
if(host)
  set(host -ccbin ${host})
endif()
if(newest)
  set(arch -arch=sm_${newest})
endif()
set(probe ${CMAKE_CURRENT_BINARY_DIR}/nvcc_probe)
file(WRITE ${probe}.cu [[
#include <cuda_runtime.h>
__global__ void kernel(const __grid_constant__ int2 work) {}
int main() {
  kernel<<<1, 1>>>(int2());
  return cudaGetLastError();
}
]])
execute_process(
  COMMAND ${nvcc} -std=c++17 -cudart static ${options} ${arch} ${host} -o ${probe} ${probe}.cu
  RESULT_VARIABLE error OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(error)
  string(STRIP "${output}" output)
  if(NOT output)
    set(output "${error}")
  endif()
  message(WARNING "${nvcc_shown} does not work, so the library is built without CUDA kernels "
                  "(CTONNX_CUDA=OFF turns them off): ${output}")
  return()
endif()
if(NOT newest)
  message(WARNING "${nvcc_shown} knows none of the architectures ${CTONNX_CUDA_ARCHITECTURES}, "
                  "so the library is built without CUDA kernels")
  return()
endif()
list(APPEND architectures ${oldest}-virtual ${newest}-virtual)
list(REMOVE_DUPLICATES architectures)
enable_language(CUDA)
message(STATUS "CUDA kernels: ${architecture_names}+ PTX")

target_sources(ctonnx_ops PRIVATE ctu_cuda.cu)
target_compile_features(ctonnx_ops PRIVATE cuda_std_17)
set_target_properties(ctonnx_ops PROPERTIES
  CUDA_ARCHITECTURES "${architectures}"
  CUDA_VISIBILITY_PRESET hidden
  CUDA_RUNTIME_LIBRARY Static)  # so that the library loads on a machine without CUDA
target_compile_definitions(ctonnx_ops PRIVATE CTONNX_CUDA
  CTONNX_CUDA_KERNELS="${architecture_names}+ PTX")
set_source_files_properties(ctu_cuda.cu PROPERTIES COMPILE_OPTIONS "${options}")

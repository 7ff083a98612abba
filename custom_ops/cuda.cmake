# Adds the CUDA kernels to ctonnx_ops. As a missing compiler, an nvcc that is missing or does not
# work is no error: the library is for the CPU alone then.
if(NOT CTONNX_CUDA)
  return()
endif()
if(DEFINED ENV{CUDACXX})
  set(nvcc $ENV{CUDACXX})
else()
  find_program(nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
endif()
if(NOT nvcc)
  message(STATUS "nvcc not found: no CUDA kernels")
  return()
endif()

# Tried here, as enable_language would end the build where it does not work.
set(probe ${CMAKE_CURRENT_BINARY_DIR}/nvcc_probe)
file(WRITE ${probe}.cu "#include <cuda_runtime.h>\nint main() { return cudaGetLastError(); }\n")
execute_process(COMMAND ${nvcc} -std=c++17 -cudart static -o ${probe} ${probe}.cu
  RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(failed)
  string(STRIP "${output}" output)
  if(NOT output)
    set(output "${failed}")
  endif()
  message(WARNING "${nvcc} does not work, so the library is built without CUDA kernels "
                  "(CTONNX_CUDA=OFF turns them off): ${output}")
  return()
endif()

# An older nvcc does not know every architecture.
execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE known)
foreach(architecture ${CTONNX_CUDA_ARCHITECTURES})
  if(known MATCHES "compute_${architecture}[^0-9]")
    list(APPEND architectures ${architecture}-real)
    set(newest ${architecture})
    string(APPEND held "sm_${architecture} ")
  endif()
endforeach()
if(NOT newest)
  message(WARNING "${nvcc} knows none of the architectures ${CTONNX_CUDA_ARCHITECTURES}, "
                  "so the library is built without CUDA kernels")
  return()
endif()
list(APPEND architectures ${newest}-virtual)
set(CMAKE_CUDA_COMPILER ${nvcc})
enable_language(CUDA)
message(STATUS "CUDA kernels: ${held}+ PTX")

target_sources(ctonnx_ops PRIVATE ctu_cuda.cu)
target_compile_features(ctonnx_ops PRIVATE cuda_std_17)
set_target_properties(ctonnx_ops PROPERTIES
  CUDA_ARCHITECTURES "${architectures}"
  CUDA_VISIBILITY_PRESET hidden
  CUDA_RUNTIME_LIBRARY Static)  # so that loading the library needs none of CUDA's
target_compile_definitions(ctonnx_ops PRIVATE CTONNX_CUDA CTONNX_CUDA_KERNELS="${held}+ PTX")
set_source_files_properties(ctu_cuda.cu PROPERTIES COMPILE_OPTIONS
  "--threads=2;-Xfatbin=-compress-all")

// The choice of an instruction set at run time.
#include "ctu_cpu.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(CTONNX_X86)
#include <cpuid.h>
#endif

namespace ctonnx {

#if defined(CTONNX_X86)
namespace avx512 {
extern const Level level;
}
namespace avx2 {
extern const Level level;
}
#endif
namespace portable {
extern const Level level;
}

namespace {

#if defined(CTONNX_X86)
// F16C needs a check of its own: not every compiler's __builtin_cpu_supports knows it.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
#endif

struct Candidate {
  const Level* level;
  bool (*supported)();
};

// Best first.
const Candidate kCandidates[] = {
#if defined(CTONNX_X86)
    {&avx512::level, has_avx512},
    {&avx2::level, has_avx2},
#endif
    {&portable::level, [] { return true; }},
};

const Level& choose_level() {
  const char* requested = std::getenv("CTONNX_CPU");
  const bool any = requested == nullptr || *requested == '\0';
  std::string supported_names;
  for (const Candidate& candidate : kCandidates) {
    if (!candidate.supported()) continue;
    if (any || std::strcmp(requested, candidate.level->name) == 0) return *candidate.level;
    supported_names += std::string(supported_names.empty() ? "" : ", ") + candidate.level->name;
  }
  throw std::runtime_error("CTONNX_CPU is \"" + std::string(requested) +
                           "\"; this machine can use: " + supported_names);
}

}  // namespace

const Level& cpu_level() {
  static const Level& level = choose_level();
  return level;
}

}  // namespace ctonnx

// The values of 16-bit elements, for slopes and for tests.
#include "ctu_cpu.h"
#include "ctu_math.h"

namespace ctonnx {

double to_double(Half half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(half.bits & 0x7fff) << 13;
  const float finite = bits_as<float>(rest) * 0x1p112f;  // the exponent bias of float32: 112 more
  const uint32_t magnitude = rest >= 0x0f800000 ? rest | 0x7f800000 : bits_as<uint32_t>(finite);
  return bits_as<float>(sign | magnitude);
}

double to_double(BFloat16 value) {
  return bits_as<float>(static_cast<uint32_t>(value.bits) << 16);
}

}  // namespace ctonnx

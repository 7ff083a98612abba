// The code of one GPU thread: the elements that it handles, and the unit of each. Nothing here
// needs CUDA, so tests/cuda_test.cc runs the same code on the host, thread by thread.
//
// The tensor consists of packets of 16 bytes that begin where Y is aligned, so the first and the
// last packet may be partial. A thread handles every kThreads-th packet of a tile. Where parameters
// change within 16 bytes, a packet is a single element instead.
//
// cub::DeviceTransform is no alternative: with the index that per-channel parameters need, it gives
// up 16-byte accesses, and its arithmetic cannot be tested without a GPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "ctu_cpu.h"
#include "ctu_math.h"

namespace ctonnx {

constexpr unsigned kThreads = 256;  // of a block
constexpr size_t kMaxAxes = 8;

template <class T>
constexpr int kPacketLanes = 16 / sizeof(T);

// The arguments of a kernel. All sizes are in elements unless they say otherwise.
template <class T>
struct Work {
  const T* x;
  T* y;
  uint64_t count;

  int lanes;       // elements of a packet: kPacketLanes or 1
  uint64_t shift;  // lanes of the first packet that lie before Y
  uint64_t packets;
  uint64_t whole_begin, whole_count;  // the packets with all lanes in Y
  uint64_t per_thread;                // packets of a thread in a tile
  bool aligned;                       // whether the packets of X are aligned too

  const float* beta;
  const float* coeff;
  const T* slope;  // null for slope 0

  bool bounded;  // whether it is an op with kinks elsewhere
  Bounds<const T*> bounds;  // null for those that the op does not have

  // As in Grid (ctu_plan.h), with neighbouring dimensions merged where every parameter allows it. A
  // single point means a single unit.
  uint64_t points, inner;
  size_t axes;
  uint64_t dims[kMaxAxes], beta_steps[kMaxAxes], coeff_steps[kMaxAxes], slope_steps[kMaxAxes];

  uint64_t origin;                 // where on the grid the first packet begins
  uint64_t next_point, next_rest;  // points and elements from a packet of a thread to its next

  CTONNX_HOST_DEVICE uint64_t tile() const { return per_thread * kThreads; }  // packets
};

// The unit of a point, in the form that its beta requires. A beta or c outside [0, 1], or NaN,
// gives NaN, because a GPU cannot raise an error.
template <class A, class M>
class AnyUnit {
 public:
  AnyUnit() = default;
  CTONNX_DEVICE AnyUnit(float beta, float coeff, A slope) {
    const bool valid = beta >= 0 && beta <= 1 && coeff >= 0 && coeff <= 1;
    form_ = !valid ? kNan : kHasFast && beta >= kFastFromBeta ? kFast : kExact;
    if (kHasFast && form_ == kFast) fast_ = FastUnit<M>(beta, coeff, static_cast<float>(slope));
    if (form_ == kExact) exact_ = Unit<A>(beta, coeff, static_cast<double>(slope));
  }

  template <int kLanes>
  CTONNX_DEVICE void apply(const A (&x)[kLanes], A (&y)[kLanes]) const {
    if (kHasFast && form_ == kFast) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) y[i] = fast_(static_cast<float>(x[i]));
    } else if (form_ == kExact) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) y[i] = ctu<true>(x[i], exact_);
    } else {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) y[i] = static_cast<A>(NAN);
    }
  }

  template <int kLanes>
  CTONNX_DEVICE void apply(const A (&x)[kLanes], A (&y)[kLanes], const Bounds<A>& bounds) const {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      if (kHasFast && form_ == kFast) {
        y[i] = static_cast<A>(bounded_ctu(static_cast<float>(x[i]), bounds, fast_));
      } else {
        y[i] = form_ == kExact ? bounded_ctu(x[i], bounds, exact_) : static_cast<A>(NAN);
      }
    }
  }

 private:
  static constexpr bool kHasFast = sizeof(A) == sizeof(float);

  enum Form { kNan, kFast, kExact } form_;
  FastUnit<M> fast_;
  Unit<A> exact_;
};

// The type that moves a packet of kBytes with one memory access.
template <size_t kBytes>
struct Bits;
template <>
struct Bits<16> {
#ifdef __CUDACC__
  using type = uint4;
#else
  struct alignas(16) type {
    uint32_t words[4];
  };
#endif
};
template <>
struct Bits<8> {
  using type = uint64_t;
};
template <>
struct Bits<4> {
  using type = uint32_t;
};
template <>
struct Bits<2> {
  using type = uint16_t;
};

template <class Chunk>
CTONNX_DEVICE void store_bits(Chunk* to, Chunk bits) {
  *to = bits;
}
#ifdef __CUDACC__
CTONNX_DEVICE void store_bits(uint4* to, uint4 bits) {
  // The compiler would split an assignment into four stores.
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(bits.x), "r"(bits.y),
               "r"(bits.z), "r"(bits.w)
               : "memory");
}
#endif

template <class T, int kLanes>
struct Packet {
  T lanes[kLanes];
};

CTONNX_DEVICE float widen(float value) { return value; }
CTONNX_DEVICE double widen(double value) { return value; }
// The bits of the nearest bfloat16, ties to even, for GPUs without an instruction; NaN stays NaN.
CTONNX_DEVICE uint16_t nearest_bfloat16(float from) {
  const uint32_t bits = bits_as<uint32_t>(from);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(from == from ? rounded : (bits >> 16) | 0x40);
}

template <int kLanes>
CTONNX_DEVICE void narrow(const float (&from)[kLanes], float (&to)[kLanes]) {
  std::memcpy(to, from, sizeof to);
}
template <int kLanes>
CTONNX_DEVICE void narrow(const double (&from)[kLanes], double (&to)[kLanes]) {
  std::memcpy(to, from, sizeof to);
}

// The packet of X from element `begin` on, with 0 outside X. For a first packet that begins before
// X, `begin` wraps around below 0.
template <int kLanes, class T>
CTONNX_DEVICE Packet<T, kLanes> load_packet(const Work<T>& work, uint64_t begin, bool whole) {
  if (whole && work.aligned) {
    using Chunk = typename Bits<kLanes * sizeof(T)>::type;
    return bits_as<Packet<T, kLanes>>(*reinterpret_cast<const Chunk*>(work.x + begin));
  }
  Packet<T, kLanes> loaded;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t at = begin + static_cast<uint64_t>(i);
    loaded.lanes[i] = at < work.count ? work.x[at] : T{};
  }
  return loaded;
}

template <int kLanes, class T>
CTONNX_DEVICE void store_packet(const Work<T>& work, uint64_t begin, bool whole,
                                const Packet<T, kLanes>& values) {
  if (whole) {
    using Chunk = typename Bits<kLanes * sizeof(T)>::type;
    store_bits(reinterpret_cast<Chunk*>(work.y + begin), bits_as<Chunk>(values));
    return;
  }
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t at = begin + static_cast<uint64_t>(i);
    if (at < work.count) work.y[at] = values.lanes[i];
  }
}

// The unit of a point of the grid.
template <class A, class M, class T>
CTONNX_DEVICE AnyUnit<A, M> unit_at(const Work<T>& work, uint64_t point) {
  uint64_t beta = 0, coeff = 0, slope = 0, rest = point;
  for (size_t axis = work.axes; axis-- > 0;) {
    // The first axis needs no division, and mostly it is the only one.
    const uint64_t place = axis > 0 ? rest % work.dims[axis] : rest;
    if (axis > 0) rest /= work.dims[axis];
    beta += place * work.beta_steps[axis];
    coeff += place * work.coeff_steps[axis];
    slope += place * work.slope_steps[axis];
  }
  return AnyUnit<A, M>(work.beta[beta], work.coeff[coeff],
                       work.slope != nullptr ? widen(work.slope[slope]) : A{});
}

template <class T, class A = typename Arithmetic<T>::type>
CTONNX_DEVICE Bounds<A> bounds_of(const Work<T>& work) {
  const auto value = [](const T* p, A absent) { return p != nullptr ? widen(*p) : absent; };
  return {value(work.bounds.alpha, kUnbounded.alpha), value(work.bounds.offset, kUnbounded.offset),
          value(work.bounds.lo, kUnbounded.lo), value(work.bounds.hi, kUnbounded.hi)};
}

// Runs one thread. kGrid is for grids of more than one point, kBounded for Work::bounded.
template <int kLanes, bool kGrid, bool kBounded, class M, class T>
CTONNX_DEVICE void run_thread(const Work<T>& work, uint64_t block, uint64_t blocks,
                              unsigned thread) {
  using A = typename Arithmetic<T>::type;
  const uint64_t tile = work.tile();
  Bounds<A> bounds;
  if (kBounded) bounds = bounds_of(work);
  for (uint64_t first = block * tile; first < work.packets; first += blocks * tile) {
    const uint64_t end = work.packets - first < tile ? work.packets : first + tile;
    uint64_t packet = first + thread;
    if (packet >= end) continue;
    const auto is_whole = [&](uint64_t p) { return p - work.whole_begin < work.whole_count; };
    uint64_t begin = packet * kLanes - work.shift;
    bool whole = is_whole(packet);
    // Loads early, so that the load overlaps with the reads of the parameters. Below, the load of
    // the next packet overlaps with the computation of this one.
    Packet<T, kLanes> next = load_packet<kLanes>(work, begin, whole);

    uint64_t point = 0, rest = 0;
    if (kGrid) {
      const uint64_t place = packet * kLanes + work.origin;
      point = place / work.inner % work.points;
      rest = place % work.inner;
    }
    AnyUnit<A, M> unit;
    uint64_t unit_point = work.points;  // the point of `unit`; work.points: none
    if (!kGrid) unit = unit_at<A, M>(work, 0);
#pragma unroll 1
    while (true) {
      A x[kLanes], y[kLanes] = {};
#pragma unroll
      for (int i = 0; i < kLanes; ++i) x[i] = widen(next.lanes[i]);
      const uint64_t this_begin = begin;
      const bool this_whole = whole;
      packet += kThreads;
      const bool last = packet >= end;
      if (!last) {
        begin += kThreads * kLanes;
        whole = is_whole(packet);
        next = load_packet<kLanes>(work, begin, whole);
      }

      // The lanes of the packet may belong to several points: those from `begin_lane` up to
      // `end_lane` belong to the point `lane_point`.
      int begin_lane = 0;
      uint64_t end_lane = work.inner - rest, lane_point = point;
#pragma unroll 1
      while (true) {
        if (kGrid && lane_point != unit_point) {
          unit = unit_at<A, M>(work, lane_point);
          unit_point = lane_point;
        }
        A values[kLanes];
        if (kBounded) {
          unit.apply(x, values, bounds);
        } else {
          unit.apply(x, values);
        }
#pragma unroll
        for (int i = 0; i < kLanes; ++i) y[i] = i < begin_lane ? y[i] : values[i];
        if (!kGrid || end_lane >= kLanes) break;
        begin_lane = static_cast<int>(end_lane);
        end_lane += work.inner;
        lane_point = lane_point + 1 == work.points ? 0 : lane_point + 1;
      }
      Packet<T, kLanes> result;
      narrow(y, result.lanes);
      store_packet<kLanes>(work, this_begin, this_whole, result);
      if (last) break;
      if (kGrid) {
        rest += work.next_rest;
        point += work.next_point;
        if (rest >= work.inner) {
          rest -= work.inner;
          ++point;
        }
        if (point >= work.points) point -= work.points;
      }
    }
  }
}

}  // namespace ctonnx

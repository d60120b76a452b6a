// Loops over vectors, compiled for each generation of processors; which one runs is decided when the program does.
//
// A loop is a `Body` whose `run<LANES>` works on vectors of LANES float32 numbers: sixteen where the processor has registers
// of that size (AVX-512), eight elsewhere. A vector that is wider than the registers would be right as well, but compilers
// move it through memory at every step, which makes loops four times slower.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
// Of a lambda: a piece of a loop that is compiled for each processor has to be compiled with it.
#define INLINED __attribute__((always_inline))

namespace {

template <int LANES>
struct Vectors {
  typedef float lanes __attribute__((vector_size(4 * LANES)));
  typedef std::int32_t whole __attribute__((vector_size(4 * LANES)));
  typedef std::uint32_t bits __attribute__((vector_size(4 * LANES)));
  typedef std::uint16_t halves __attribute__((vector_size(2 * LANES)));
};

// What loops do with them.
template <int LANES>
struct Loops {
  using lanes = typename Vectors<LANES>::lanes;
  using whole = typename Vectors<LANES>::whole;

  // Vectors added up in float32 before they join a float64 total: keeps the rounding error small.
  static constexpr std::int64_t STRETCH = 64;

  static INLINE lanes load(const float *from) {
    lanes values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }

  static INLINE void store(float *to, const lanes &values) { std::memcpy(to, &values, sizeof values); }

  // e^x of numbers up to 88, to a few units in the last place; 0 below e^-87. (Cephes' polynomial.)
  static INLINE lanes exponential(lanes x) {
    const lanes shifted = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // the nearest integer
    lanes rest = x - shifted * 0.693359375f;
    rest = rest + shifted * 2.12194440e-4f;
    lanes y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * (rest * rest) + rest + 1.0f;
    const whole power = (__builtin_convertvector(shifted, whole) + 127) << 23;
    lanes factor;
    std::memcpy(&factor, &power, sizeof factor);
    return x < -87.0f ? lanes{} : y * factor;
  }

  static INLINE float exponential(float x) { return x < -87.0f ? 0.0f : std::exp(x); }

  // A sum of vectors in float32 for a stretch, in float64 beyond it.
  struct Sum {
    lanes part{};
    double total = 0;

    INLINE void add(const lanes &values) { part += values; }
    INLINE void add(float value) { total += value; }
    INLINE void flush() {
      for (std::int64_t lane = 0; lane < LANES; lane++) total += part[lane];
      part = lanes{};
    }
  };

  // Calls `vector(index)` for every full vector, `flush()` after each stretch of them, and `single(index)` for the rest.
  template <typename Vector, typename Flush, typename Single>
  static INLINE void walk(std::int64_t count, Vector vector, Flush flush, Single single) {
    const std::int64_t full = count / LANES * LANES;
    for (std::int64_t start = 0; start < full; start += STRETCH * LANES) {
      const std::int64_t end = std::min(full, start + STRETCH * LANES);
      for (std::int64_t index = start; index < end; index += LANES) vector(index);
      flush();
    }
    for (std::int64_t index = full; index < count; index++) single(index);
  }
};

#if defined(__x86_64__)

inline bool has_sixteen_lanes() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
  return has;
}

inline bool has_eight_lanes() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  return has;
}

template <typename Body, typename... Arguments>
__attribute__((target("arch=x86-64-v4"))) void on_sixteen_lanes(Arguments... arguments) {
  Body::template run<16>(arguments...);
}

template <typename Body, typename... Arguments>
__attribute__((target("arch=x86-64-v3"))) void on_eight_lanes(Arguments... arguments) {
  Body::template run<8>(arguments...);
}

template <typename Body, typename... Arguments>
void on_any_processor(Arguments... arguments) {
  Body::template run<8>(arguments...);
}

template <typename Body, typename... Arguments>
void dispatch(Arguments... arguments) {
  if (has_sixteen_lanes())
    on_sixteen_lanes<Body, Arguments...>(arguments...);
  else if (has_eight_lanes())
    on_eight_lanes<Body, Arguments...>(arguments...);
  else
    on_any_processor<Body, Arguments...>(arguments...);
}

#else

inline bool has_sixteen_lanes() { return false; }
inline bool has_eight_lanes() { return false; }

template <typename Body, typename... Arguments>
void dispatch(Arguments... arguments) {
  Body::template run<8>(arguments...);
}

#endif

}  // namespace

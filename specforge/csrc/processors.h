// Loops over vectors, compiled for each generation of processors; which one runs is decided when the program does.
//
// A loop is a `Body` whose `run<LANES>` works on vectors of LANES float32 numbers: sixteen where the processor has registers
// of that size (AVX-512), eight elsewhere. A vector that is wider than the registers would be right as well, but compilers
// move it through memory at every step, which makes loops four times slower.

#pragma once

#include <cstdint>

#define INLINE inline __attribute__((always_inline))
// Of a lambda: a piece of a loop that is compiled for each processor has to be compiled with it.
#define INLINED __attribute__((always_inline))

namespace {

template <int LANES>
struct Vectors {
  typedef float lanes __attribute__((vector_size(4 * LANES)));
  typedef std::int32_t whole __attribute__((vector_size(4 * LANES)));
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

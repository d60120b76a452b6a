// A stand-in for NVIDIA's driver and its run-time compiler, beside the one for libtorch's CUDA half: it "compiles" the
// program's kernels by handing back what the C++ compiler made of the same file, and runs them on the CPU. One library is
// found under both names (libcuda.so.1, libnvrtc.so.13).
//
// A block is a few threads that take turns: each runs to the next place where all meet. So the text that a GPU runs is run,
// its barriers and its exchanges between threads among it; a thread that meets the others too late or not at all shows up
// as a wrong number or as a failed launch. Warps have two lanes here, so that several warps are few threads.
//
// REHEARSAL_REFUSES_KERNELS in the environment makes the compiler refuse.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// From libtorch_cuda.cpp.
extern "C" void *rehearsal_numbers(void *address, std::size_t *bytes, int *device);
extern "C" int rehearsal_devices();
extern "C" void rehearsal_launched(const char *kernel);
extern "C" void rehearsal_touched(const char *kernel, int argument, long count);

namespace rehearsal {

// ---- a block of threads ---------------------------------------------------------------------------------------------

constexpr int THREADS = 4;
constexpr std::size_t STACK = 1 << 18;

struct Block {
  std::vector<char> stacks = std::vector<char>(THREADS * STACK);
  ucontext_t threads[THREADS], meeting;
  bool done[THREADS];
  unsigned char passed[THREADS][16];
  int current = 0;
  std::function<void()> body;
};

Block block;

struct Number {
  unsigned x;
};

Number threadIdx{0}, blockIdx{0}, blockDim{THREADS};
constexpr int warpSize = 2;

void run_thread() {
  block.body();
  block.done[block.current] = true;
  swapcontext(&block.threads[block.current], &block.meeting);
}

// Goes on when all other threads are as far.
void meet() { swapcontext(&block.threads[block.current], &block.meeting); }

// Whether all threads met as often as the others.
bool run_block(unsigned number) {
  blockIdx.x = number;
  for (int thread = 0; thread < THREADS; thread++) {
    auto &context = block.threads[thread];
    getcontext(&context);
    context.uc_stack.ss_sp = block.stacks.data() + thread * STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, run_thread, 0);
    block.done[thread] = false;
  }
  for (;;) {
    int done = 0;
    for (int thread = 0; thread < THREADS; thread++) {
      block.current = thread;
      threadIdx.x = static_cast<unsigned>(thread);
      swapcontext(&block.meeting, &block.threads[thread]);
      done += block.done[thread];
    }
    if (done == THREADS) return true;
    if (done > 0) return false;
  }
}

void __syncthreads() { meet(); }

template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int offset) {
  static_assert(sizeof value <= sizeof block.passed[0]);
  const int own = block.current;
  std::memcpy(block.passed[own], &value, sizeof value);
  meet();
  std::memcpy(&value, block.passed[own ^ offset], sizeof value);
  meet();
  return value;
}

float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ---- numbers that are read and written ------------------------------------------------------------------------------

struct Matrix {
  const char *begin, *end;
  int argument;
  long touched;
};

std::vector<Matrix> matrices;

void touched(const void *place) {
  for (auto &matrix : matrices)
    if (matrix.begin <= place && place < matrix.end) {
      matrix.touched++;
      return;
    }
  std::abort();  // beside every tensor that the kernel was given
}

#define TOUCHED(place) touched(place)
#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
#include "../../specforge/csrc/vocabulary_loss.cu"

// ---- launches -------------------------------------------------------------------------------------------------------

// A context for each device; a kernel runs on the device of the last one that was pushed.
int contexts[8] = {0, 1, 2, 3, 4, 5, 6, 7};
thread_local std::vector<int *> pushed;

template <typename Argument>
Argument argument(void **arguments, int index) {
  Argument value;
  std::memcpy(&value, arguments[index], sizeof value);
  if constexpr (std::is_pointer_v<Argument>) {
    if (value == nullptr) return value;
    std::size_t bytes = 0;
    int device = -1;
    auto *numbers = rehearsal_numbers(const_cast<void *>(static_cast<const void *>(value)), &bytes, &device);
    // A GPU would stop at an address that is not its own.
    if (numbers == nullptr || pushed.empty() || device != *pushed.back()) std::abort();
    const auto *begin = static_cast<const char *>(numbers);
    matrices.push_back({begin, begin + bytes, index, 0});
    value = static_cast<Argument>(numbers);
  }
  return value;
}

template <typename... Arguments, std::size_t... Index>
std::function<void()> bound(void (*kernel)(Arguments...), void **arguments, std::index_sequence<Index...>) {
  matrices.clear();
  std::tuple<Arguments...> values{argument<Arguments>(arguments, static_cast<int>(Index))...};
  return [kernel, values] { std::apply(kernel, values); };
}

struct Function {
  const char *name;
  std::function<std::function<void()>(void **)> bind;
};

template <typename... Arguments>
Function function(const char *name, void (*kernel)(Arguments...)) {
  return {name, [kernel](void **arguments) { return bound(kernel, arguments, std::index_sequence_for<Arguments...>()); }};
}

Function functions[] = {function("hard_rows", &hard_rows), function("teacher_rows", &teacher_rows),
                        function("soft_rows", &soft_rows)};

std::mutex one_launch;

}  // namespace rehearsal

extern "C" {

using Program = std::string *;

// ---- nvrtc.h --------------------------------------------------------------------------------------------------------

int nvrtcGetNumSupportedArchs(int *count) { return *count = 2, 0; }
int nvrtcGetSupportedArchs(int *known) { return known[0] = 80, known[1] = 90, 0; }
int nvrtcCreateProgram(Program *program, const char *source, const char *, int, const char *const *,
                       const char *const *) {
  return *program = new std::string(source), 0;
}
int nvrtcCompileProgram(Program program, int, const char *const *) {
  if (std::getenv("REHEARSAL_REFUSES_KERNELS") == nullptr) return 0;
  *program = "vocabulary_loss.cu(1): error: the rehearsal refuses";
  return 6;
}
int nvrtcGetProgramLogSize(Program program, std::size_t *size) { return *size = program->size() + 1, 0; }
int nvrtcGetProgramLog(Program program, char *text) { return std::strcpy(text, program->c_str()), 0; }
int nvrtcGetCUBINSize(Program program, std::size_t *size) { return *size = program->size() + 1, 0; }
int nvrtcGetCUBIN(Program program, char *text) { return std::strcpy(text, program->c_str()), 0; }
int nvrtcDestroyProgram(Program *program) { return delete *program, 0; }

// ---- cuda.h ---------------------------------------------------------------------------------------------------------

int cuInit(unsigned) { return 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0 <= ordinal && ordinal < rehearsal_devices() ? 0 : 101; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
  *value = attribute == 75 ? 9 : 0;
  return attribute == 75 || attribute == 76 ? 0 : 1;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &rehearsal::contexts[device], 0; }
int cuCtxPushCurrent_v2(void *context) { return rehearsal::pushed.push_back(static_cast<int *>(context)), 0; }
int cuCtxPopCurrent_v2(void **context) {
  if (rehearsal::pushed.empty()) return 201;
  return *context = rehearsal::pushed.back(), rehearsal::pushed.pop_back(), 0;
}
int cuModuleLoadData(void **module, const void *image) { return *module = const_cast<void *>(image), 0; }
int cuModuleGetFunction(void **found, void *, const char *name) {
  for (auto &function : rehearsal::functions)
    if (std::string(function.name) == name) return *found = &function, 0;
  return 500;
}
int cuLaunchKernel(void *function, unsigned blocks, unsigned blocks_y, unsigned blocks_z, unsigned threads,
                   unsigned threads_y, unsigned threads_z, unsigned, void *, void **arguments, void **) {
  if (blocks == 0 || threads != BLOCK || blocks_y * blocks_z * threads_y * threads_z != 1) return 1;
  const std::lock_guard<std::mutex> guard(rehearsal::one_launch);
  auto &kernel = *static_cast<rehearsal::Function *>(function);
  rehearsal_launched(kernel.name);
  rehearsal::block.body = kernel.bind(arguments);
  for (unsigned number = 0; number < blocks; number++)
    if (!rehearsal::run_block(number)) return 719;
  for (const auto &matrix : rehearsal::matrices)
    if (matrix.touched > 0) rehearsal_touched(kernel.name, matrix.argument, matrix.touched);
  return 0;
}

}  // extern "C"

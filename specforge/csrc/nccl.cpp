// NCCL's process group of libtorch behind a C ABI, as a library of its own: the program links libtorch_cpu alone, and
// opens this one where libtorch_cuda is there. What it takes from libtorch stays undefined until then.
//
// A collective over NCCL is queued on the device and nobody waits for it on the host. So a peer that is gone cannot be
// reported by the call that needed it: libtorch's watchdog thread notices, by NCCL's own report or by the timeout, and
// ends the process, while the device still waits for the collective and has computed nothing with what never came.
// How it ends is decided here: a message like any other, and exit code 1.

#define USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#include <torch/version.h>

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <string>

#include "guarded.h"

#define TEXT_OF(value) #value
#define TEXT(value) TEXT_OF(value)

// Objects are made here and used by libtorch_cuda, so that both have to see the same layout. It follows from libtorch's
// version and from that of nccl.h, and these are the sizes that libtorch_cuda 2.11.0 itself allocates.
static_assert(TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR == 11 && TORCH_VERSION_PATCH == 0);
static_assert(sizeof(c10d::ProcessGroupNCCL) == 1112, "another nccl.h than libtorch was built with?");
static_assert(sizeof(c10d::ProcessGroupNCCL::Options) == 248, "another nccl.h than libtorch was built with?");

namespace {

std::atomic<int> own_rank{0};
std::terminate_handler earlier_handler = nullptr;

// The first line of an exception that libtorch's distributed engine threw where nobody can catch it; empty for others.
std::string engine_failure() {
  try {
    if (const auto exception = std::current_exception()) std::rethrow_exception(exception);
  } catch (const c10::DistError &failure) {
    const std::string text = failure.what_without_backtrace();
    return text.substr(0, text.find('\n'));
  } catch (...) {
  }
  return {};
}

[[noreturn]] void end_process() {
  const auto failure = engine_failure();
  if (failure.empty()) {
    if (earlier_handler) earlier_handler();
    std::abort();
  }
  const auto message = "error: rank " + std::to_string(own_rank) + ": NCCL: " + failure +
                       "\nhint: another process of the run ended first, or could not be reached: the first message of "
                       "the other ranks says why\n";
  const auto written = write(STDERR_FILENO, message.data(), message.size());
  // Nothing else is run: other threads may wait for the device, which waits for the peer.
  _exit(written < 0 ? 2 : 1);
}

void take_over_termination(int rank) {
  own_rank = rank;
  static const bool once = [] {
    earlier_handler = std::set_terminate(end_process);
    return true;
  }();
  (void)once;
}

}  // namespace

extern "C" {

// What this library was built for. It must be what the program was built for.
const char *specforge_nccl_build() {
  return "specforge " SPECFORGE_VERSION ", libtorch " TORCH_VERSION ", NCCL " TEXT(NCCL_MAJOR) "." TEXT(
      NCCL_MINOR) "." TEXT(NCCL_PATCH);
}

// Adds NCCL for CUDA tensors to a group, and meets the other ranks: all must call it. `group` and `store` point to
// intrusive pointers of the program. A collective that takes longer than the timeout ends the process.
int specforge_group_add_nccl(void *group, const void *store, int device, std::int64_t timeout_ms, char *error,
                             std::size_t error_size) {
  return guarded(
      [&] {
        using c10d::ProcessGroup;
        using c10d::ProcessGroupNCCL;
        auto &to = *static_cast<c10::intrusive_ptr<ProcessGroup> *>(group);
        const auto &table = *static_cast<const c10::intrusive_ptr<c10d::Store> *>(store);
        const c10::Device place(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
        // Without this, a timeout first waits for a record of all past collectives to be written to disk.
        setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0", /*overwrite=*/0);
        take_over_termination(to->getRank());
        auto options = ProcessGroupNCCL::Options::create();
        options->timeout = std::chrono::milliseconds(timeout_ms);
        auto own_keys = c10::make_intrusive<c10d::PrefixStore>("nccl", table);
        auto backend = c10::make_intrusive<ProcessGroupNCCL>(own_keys, to->getRank(), to->getSize(), options);
        backend->setBoundDeviceId(place);
        // Here and not at the first collective, so that what does not fit is said before any work is done.
        backend->eagerConnectSingleDevice(place);
        to->setBackend(c10::DeviceType::CUDA, ProcessGroup::BackendType::NCCL, backend);
      },
      error, error_size);
}

}  // extern "C"

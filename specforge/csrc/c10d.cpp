// libtorch's distributed engine behind a C ABI: TCPStore, process groups over Gloo, and the reducer of
// DistributedDataParallel. Every function returns 0, or 1 after writing a message into `error` (a buffer of
// `error_size` bytes). Tensor pointers are owned by the caller.
//
// Gloo's headers are needed for the declarations alone; its code is inside libtorch_cpu.so.

#define USE_C10D_GLOO
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "guarded.h"

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

std::int64_t nanoseconds(Clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

std::vector<at::Tensor> gather(at::Tensor *const *pointers, std::int64_t count) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(count);
  for (std::int64_t index = 0; index < count; ++index) tensors.push_back(*pointers[index]);
  return tensors;
}

// Waits for a collective. A backend reports what went wrong here, as an exception.
void finish(const c10::intrusive_ptr<c10d::Work> &work) {
  if (work) work->wait();
}

}  // namespace

struct specforge_store {
  c10::intrusive_ptr<c10d::Store> store;
};

struct specforge_group {
  c10::intrusive_ptr<c10d::ProcessGroup> group;
};

// When one bucket of gradients was handed to the process group and when it came back, in nanoseconds of a steady clock.
struct specforge_bucket_time {
  std::int64_t bytes;
  std::int64_t launched;
  std::int64_t finished;
};

namespace {

struct Timeline {
  std::mutex lock;
  std::vector<specforge_bucket_time> buckets;
};

// Sums a bucket over the ranks and notes when. Registered as a hook, it also keeps the reducer from dividing by the
// number of ranks: what is reduced here are shares of one sum.
class TimedSum : public c10d::CommHookInterface {
 public:
  TimedSum(c10::intrusive_ptr<c10d::ProcessGroup> group, std::shared_ptr<Timeline> timeline)
      : group_(std::move(group)), timeline_(std::move(timeline)) {}

  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket &bucket) override {
    std::size_t index = 0;
    {
      const std::lock_guard<std::mutex> guard(timeline_->lock);
      index = timeline_->buckets.size();
      const auto bytes = static_cast<std::int64_t>(bucket.getBufferRef().nbytes());
      timeline_->buckets.push_back({bytes, nanoseconds(Clock::now()), 0});
    }
    std::vector<at::Tensor> tensors{bucket.getBufferRef()};
    auto future = group_->allreduce(tensors)->getFuture();
    future->addCallback([timeline = timeline_, index](c10::ivalue::Future &) {
      const std::lock_guard<std::mutex> guard(timeline->lock);
      if (index < timeline->buckets.size()) timeline->buckets[index].finished = nanoseconds(Clock::now());
    });
    return future;
  }

  at::Tensor parseHookResult(const c10::IValue &result) override {
    return c10d::detail::parseCppCommHookResult(result);
  }

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::shared_ptr<Timeline> timeline_;
};

// A node whose backward pass gives no gradient: what is left of it are the hooks of the leaf it points to.
struct Announce : public torch::autograd::Function<Announce> {
  static at::Tensor forward(torch::autograd::AutogradContext *, const at::Tensor &leaf) {
    return at::zeros({}, leaf.options());
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *, torch::autograd::variable_list) {
    return {at::Tensor()};
  }
};

}  // namespace

struct specforge_reducer {
  std::vector<at::Tensor> leaves;
  std::shared_ptr<Timeline> timeline;
  std::unique_ptr<c10d::Reducer> reducer;
};

extern "C" {

// ---- store: a table of bytes that all processes of a run see -------------------------------------------------------

// Serves a store on a socket that listens already (and now belongs to it), and connects to it.
int specforge_store_host(const char *host, std::uint16_t port, int listener, std::int64_t timeout_ms,
                         specforge_store **output, char *error, std::size_t error_size) {
  return guarded(
      [&] {
        c10d::TCPStoreOptions options;
        options.port = port;
        options.isServer = true;
        options.waitWorkers = false;
        options.timeout = milliseconds(timeout_ms);
        options.masterListenFd = listener;
        *output = new specforge_store{c10::make_intrusive<c10d::TCPStore>(host, options)};
      },
      error, error_size);
}

int specforge_store_connect(const char *host, std::uint16_t port, std::int64_t timeout_ms, specforge_store **output,
                            char *error, std::size_t error_size) {
  return guarded(
      [&] {
        c10d::TCPStoreOptions options;
        options.port = port;
        options.waitWorkers = false;
        options.timeout = milliseconds(timeout_ms);
        *output = new specforge_store{c10::make_intrusive<c10d::TCPStore>(host, options)};
      },
      error, error_size);
}

// The same table, with `prefix` before every key.
int specforge_store_prefixed(const specforge_store *store, const char *prefix, specforge_store **output, char *error,
                             std::size_t error_size) {
  return guarded(
      [&] { *output = new specforge_store{c10::make_intrusive<c10d::PrefixStore>(prefix, store->store)}; }, error,
      error_size);
}

// A connection of its own: a wait on one does not hold up the other.
int specforge_store_clone(const specforge_store *store, specforge_store **output, char *error, std::size_t error_size) {
  return guarded([&] { *output = new specforge_store{store->store->clone()}; }, error, error_size);
}

void specforge_store_free(specforge_store *store) { delete store; }

int specforge_store_set(const specforge_store *store, const char *key, const std::uint8_t *value, std::size_t length,
                        char *error, std::size_t error_size) {
  return guarded([&] { store->store->set(key, std::vector<std::uint8_t>(value, value + length)); }, error, error_size);
}

// Waits for a key up to the store's timeout. `receive` is called once with the value.
int specforge_store_get(const specforge_store *store, const char *key,
                        void (*receive)(void *context, const std::uint8_t *value, std::size_t length), void *context,
                        char *error, std::size_t error_size) {
  return guarded(
      [&] {
        const auto value = store->store->get(key);
        receive(context, value.data(), value.size());
      },
      error, error_size);
}

int specforge_store_check(const specforge_store *store, const char *key, bool *present, char *error,
                          std::size_t error_size) {
  return guarded([&] { *present = store->store->check({key}); }, error, error_size);
}

int specforge_store_add(const specforge_store *store, const char *key, std::int64_t amount, std::int64_t *total,
                        char *error, std::size_t error_size) {
  return guarded([&] { *total = store->store->add(key, amount); }, error, error_size);
}

// ---- process group --------------------------------------------------------------------------------------------------

// A group over Gloo, for tensors in host memory. `address` is the local address that peers can reach; GLOO_SOCKET_IFNAME
// names an interface instead.
int specforge_group_gloo(const specforge_store *store, int rank, int world_size, const char *address,
                         std::int64_t timeout_ms, specforge_group **output, char *error, std::size_t error_size) {
  return guarded(
      [&] {
        using c10d::ProcessGroup;
        using c10d::ProcessGroupGloo;
        auto options = ProcessGroupGloo::Options::create_default(milliseconds(timeout_ms));
        const char *interface = std::getenv("GLOO_SOCKET_IFNAME");
        options->devices = {interface != nullptr && *interface != '\0'
                                ? ProcessGroupGloo::createDeviceForInterface(interface)
                                : ProcessGroupGloo::createDeviceForHostname(address)};
        auto backend = c10::make_intrusive<ProcessGroupGloo>(store->store, rank, world_size, options);
        auto group = c10::make_intrusive<ProcessGroup>(store->store, rank, world_size);
        group->setBackend(c10::DeviceType::CPU, ProcessGroup::BackendType::GLOO, backend);
        group->setDefaultBackend(ProcessGroup::BackendType::GLOO);
        *output = new specforge_group{group};
      },
      error, error_size);
}

// The underlying intrusive pointers, for a backend that is added to the group: see nccl.cpp.
void *specforge_group_inner(specforge_group *group) { return &group->group; }
const void *specforge_store_inner(const specforge_store *store) { return &store->store; }

// Gives up what is still under way: whoever frees a group after a failure must not wait for a peer that is gone.
void specforge_group_free(specforge_group *group) {
  char unheard[1];
  guarded([&] { group->group->abort(); }, unheard, sizeof unheard);
  delete group;
}

// operation: 0 sum, 1 maximum, 2 minimum
int specforge_group_all_reduce(const specforge_group *group, const at::Tensor *tensor, int operation, char *error,
                               std::size_t error_size) {
  return guarded(
      [&] {
        constexpr c10d::ReduceOp::RedOpType operations[] = {c10d::ReduceOp::SUM, c10d::ReduceOp::MAX,
                                                            c10d::ReduceOp::MIN};
        std::vector<at::Tensor> tensors{*tensor};
        c10d::AllreduceOptions options;
        options.reduceOp = operations[operation];
        finish(group->group->allreduce(tensors, options));
      },
      error, error_size);
}

int specforge_group_broadcast(const specforge_group *group, const at::Tensor *tensor, int root, char *error,
                              std::size_t error_size) {
  return guarded(
      [&] {
        std::vector<at::Tensor> tensors{*tensor};
        c10d::BroadcastOptions options;
        options.rootRank = root;
        finish(group->group->broadcast(tensors, options));
      },
      error, error_size);
}

// `whole` is `world_size` times as long as `part` and receives the parts in order of rank.
int specforge_group_all_gather(const specforge_group *group, const at::Tensor *whole, const at::Tensor *part, char *error,
                               std::size_t error_size) {
  return guarded(
      [&] {
        std::vector<std::vector<at::Tensor>> outputs{whole->chunk(group->group->getSize())};
        std::vector<at::Tensor> inputs{*part};
        finish(group->group->allgather(outputs, inputs));
      },
      error, error_size);
}

// `part` receives this rank's piece of the sum of all `whole`s.
int specforge_group_reduce_scatter(const specforge_group *group, const at::Tensor *part, const at::Tensor *whole,
                                   char *error, std::size_t error_size) {
  return guarded(
      [&] {
        at::Tensor output = *part, input = *whole;
        finish(group->group->_reduce_scatter_base(output, input));
      },
      error, error_size);
}

// Over host memory, and by the backend itself: the group's own barrier passes it a tensor that is one for the whole
// process, and groups of several threads would free it twice.
int specforge_group_barrier(const specforge_group *group, char *error, std::size_t error_size) {
  return guarded([&] { finish(group->group->getBackend(c10::DeviceType::CPU)->barrier()); }, error, error_size);
}

// ---- reducer: sums gradients over the ranks in buckets, while others are still being computed --------------------------

// `leaves` stand for the parameters: one for each gradient, of its shape and type, whose `.grad` is reduced. Their own
// values are a single zero each, seen many times: nobody reads them.
int specforge_reducer_new(const specforge_group *group, at::Tensor *const *values, std::int64_t count,
                          std::int64_t bucket_bytes, specforge_reducer **output, char *error, std::size_t error_size) {
  return guarded(
      [&] {
        auto made = std::make_unique<specforge_reducer>();
        for (const auto &value : gather(values, count))
          made->leaves.push_back(at::zeros({}, value.options()).expand(value.sizes()).requires_grad_(true));
        const auto bytes = static_cast<std::size_t>(bucket_bytes);
        auto buckets = std::get<0>(c10d::compute_bucket_assignment_by_size(made->leaves, {bytes}));
        made->timeline = std::make_shared<Timeline>();
        made->reducer = std::make_unique<c10d::Reducer>(
            made->leaves, buckets, group->group, std::vector<bool>(made->leaves.size(), false), bucket_bytes,
            /*find_unused_parameters=*/false, /*gradient_as_bucket_view=*/true,
            std::unordered_map<std::size_t, std::string>{}, /*first_bucket_bytes_cap=*/bucket_bytes,
            /*skip_all_reduce_unused_params=*/false, /*use_python_reducer=*/false, std::vector<std::int64_t>{});
        made->reducer->register_comm_hook(std::make_unique<TimedSum>(group->group, made->timeline));
        *output = made.release();
      },
      error, error_size);
}

void specforge_reducer_free(specforge_reducer *reducer) { delete reducer; }

// Before the pass whose gradients are the last of a step. After the first such pass, the buckets are made anew in the
// order in which gradients became ready, the same on every rank.
int specforge_reducer_prepare(specforge_reducer *reducer, char *error, std::size_t error_size) {
  return guarded(
      [&] {
        {
          const std::lock_guard<std::mutex> guard(reducer->timeline->lock);
          reducer->timeline->buckets.clear();
        }
        reducer->reducer->rebuild_buckets();
        reducer->reducer->prepare_for_backward({});
      },
      error, error_size);
}

// Gradient `index` is complete. When it was the last of its bucket, the bucket goes to the process group; when it was the
// last of all, this waits for every bucket.
int specforge_reducer_ready(specforge_reducer *reducer, std::int64_t index, const at::Tensor *gradient, char *error,
                            std::size_t error_size) {
  return guarded(
      [&] {
        auto &leaf = reducer->leaves.at(static_cast<std::size_t>(index));
        leaf.mutable_grad() = *gradient;
        const at::AutoGradMode with_graph(true);
        Announce::apply(leaf).backward();
      },
      error, error_size);
}

// The gradient's place in its bucket after a reduction: the sum over the ranks. A new tensor for the caller.
int specforge_reducer_gradient(const specforge_reducer *reducer, std::int64_t index, at::Tensor **output, char *error,
                               std::size_t error_size) {
  return guarded(
      [&] { *output = new at::Tensor(reducer->leaves.at(static_cast<std::size_t>(index)).grad().detach()); }, error,
      error_size);
}

// Copies the times of the last reduction's buckets, in order; returns how many there are in `count`.
int specforge_reducer_times(const specforge_reducer *reducer, specforge_bucket_time *times, std::int64_t capacity,
                            std::int64_t *count, char *error, std::size_t error_size) {
  return guarded(
      [&] {
        const std::lock_guard<std::mutex> guard(reducer->timeline->lock);
        const auto &buckets = reducer->timeline->buckets;
        *count = static_cast<std::int64_t>(buckets.size());
        for (std::int64_t index = 0; index < std::min(capacity, *count); ++index) times[index] = buckets[index];
      },
      error, error_size);
}

}  // extern "C"

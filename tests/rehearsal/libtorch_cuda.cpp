// A stand-in for libtorch's CUDA half, for machines without a GPU: it calls itself CUDA and computes on the CPU.
//
// Placed beside libtorch_cpu.so as libtorch_cuda.so, it is opened by the unchanged program, whose `--device cuda` then
// goes every way that it goes on a GPU. What shows up here instead of there: tensors of the CPU among those of the
// device, memory of the device that is read as if it were the host's, and how often the host waits for the device. What
// cannot show up: the limits of real kernels, their rounding, and time.
//
// Every operator goes through one fallback. It refuses tensors of two devices, as CUDA's kernels do, shows the CPU's
// kernel the device's memory, and hands its results back as tensors of the device. An address of the device is one that
// nothing is behind: the numbers lie elsewhere, and who reads it as the host's memory is ended by the system.
//
// REHEARSAL_DEVICES says how many devices there are, one without it: each has tensors, streams and statistics of its own.
// REHEARSAL_COUNTS names a file for what was counted: kernels by operator, waits of the host by their reason, bytes that
// were copied each way, and which tensors kernels read and wrote. libcuda.cpp plays the driver for the program's own kernels.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace rehearsal {

using at::Tensor;
using torch::jit::Stack;

// ---- what is counted ------------------------------------------------------------------------------------------------

struct Counts {
  std::mutex lock;
  std::map<std::string, long> kernels, waits, bytes{{"to_device", 0}, {"to_host", 0}, {"between", 0}};
  // "NAME|N": how often an operator read or wrote a tensor of N numbers; of a kernel of the program, how many numbers it read
  // and wrote of its argument N.
  std::map<std::string, long> touched;

  void kernel(const std::string &name) {
    const std::lock_guard<std::mutex> guard(lock);
    kernels[name]++;
  }
  // The host stands still until the device has done all that was asked of it.
  void wait(const std::string &why) {
    const std::lock_guard<std::mutex> guard(lock);
    waits[why]++;
  }
  void copied(const char *way, std::size_t count) {
    const std::lock_guard<std::mutex> guard(lock);
    bytes[way] += static_cast<long>(count);
  }
  void touch(const std::string &name, long which, long times) {
    const std::lock_guard<std::mutex> guard(lock);
    touched[name + "|" + std::to_string(which)] += times;
  }
  ~Counts() {
    if (const char *path = std::getenv("REHEARSAL_COUNTS")) write(path);
  }
  void write(const char *path) {
    std::ofstream file(path);
    const auto list = [&](const std::map<std::string, long> &counts) {
      const char *comma = "";
      for (const auto &[name, count] : counts) file << comma << '"' << name << "\": " << count, comma = ", ";
    };
    file << "{\"waits\": {", list(waits), file << "}, \"bytes\": {", list(bytes), file << "}, \"kernels\": {";
    list(kernels), file << "}, \"touched\": {", list(touched), file << "}}\n";
  }
};

Counts counts;

// ---- devices --------------------------------------------------------------------------------------------------------

constexpr int MOST_DEVICES = 8;

int devices() {
  static const int count = [] {
    const char *text = std::getenv("REHEARSAL_DEVICES");
    return text == nullptr ? 1 : std::max(1, std::min(MOST_DEVICES, std::atoi(text)));
  }();
  return count;
}

// The device of this thread's work where no tensor says another.
thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex become(c10::DeviceIndex device) {
  TORCH_CHECK(device < devices(), "CUDA error: invalid device ordinal");
  return device < 0 ? current : std::exchange(current, device);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

struct Piece {
  void *address;  // the device's; reserved, with nothing behind it
  void *numbers;
  std::size_t bytes;
  c10::DeviceIndex device;
};

struct Memory final : c10::DeviceAllocator {
  c10::CachingDeviceAllocator::DeviceStats stats[MOST_DEVICES];
  std::mutex lock;
  std::map<char *, Piece *> pieces;  // by the device's address

  static Memory &get() {
    static auto *memory = new Memory;  // outlives every tensor
    return *memory;
  }
  auto &allocated(c10::DeviceIndex device) {
    constexpr auto all = static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    return stats[std::max<int>(device, 0)].allocated_bytes[all];
  }
  void count(std::int64_t bytes, c10::DeviceIndex device) {
    const std::lock_guard<std::mutex> guard(lock);
    auto &all = allocated(device);
    all.current += bytes;
    all.peak = std::max(all.peak, all.current);
  }
  static void release(void *context) {
    auto *piece = static_cast<Piece *>(context);
    {
      const std::lock_guard<std::mutex> guard(get().lock);
      get().pieces.erase(static_cast<char *>(piece->address));
    }
    munmap(piece->address, piece->bytes);
    std::free(piece->numbers);
    get().count(-static_cast<std::int64_t>(piece->bytes), piece->device);
    delete piece;
  }
  c10::DataPtr allocate(std::size_t wanted) override { return allocate(wanted, current); }
  c10::DataPtr allocate(std::size_t wanted, c10::DeviceIndex index) {
    TORCH_CHECK(0 <= index && index < devices(), "CUDA error: invalid device ordinal");
    const c10::Device device(c10::DeviceType::CUDA, index);
    if (wanted == 0) return {nullptr, device};
    const std::size_t bytes = (wanted + 4095) / 4096 * 4096;
    void *address = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void *numbers = std::aligned_alloc(4096, bytes);
    const bool there = address != MAP_FAILED && numbers != nullptr;
    TORCH_CHECK(there, "CUDA out of memory. Tried to allocate ", wanted, " bytes.");
    count(static_cast<std::int64_t>(bytes), index);
    auto *piece = new Piece{address, numbers, bytes, index};
    const std::lock_guard<std::mutex> guard(lock);
    pieces[static_cast<char *>(address)] = piece;
    return {address, piece, &release, device};
  }
  // Where the numbers of an address are, how many bytes follow and whose they are; nothing for one of no device.
  void *numbers(void *address, std::size_t *bytes, int *device) {
    const std::lock_guard<std::mutex> guard(lock);
    auto after = pieces.upper_bound(static_cast<char *>(address));
    if (after == pieces.begin()) return nullptr;
    const auto &[begin, piece] = *--after;
    const auto offset = static_cast<std::size_t>(static_cast<char *>(address) - begin);
    if (offset >= piece->bytes) return nullptr;
    *bytes = piece->bytes - offset, *device = piece->device;
    return static_cast<char *>(piece->numbers) + offset;
  }
  // Where the numbers of a storage of the device are.
  static void *numbers(const c10::StorageImpl *storage) {
    const auto &data = storage->data_ptr();
    if (data.get() == nullptr) return nullptr;
    TORCH_CHECK(data.get_deleter() == &release, "rehearsal: memory that the device did not give out");
    return static_cast<Piece *>(data.get_context())->numbers;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void *, const void *, std::size_t) const override { TORCH_CHECK(false, "rehearsal: copy_data"); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr &, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    return stats[std::max<int>(device, 0)];
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override {
    const std::lock_guard<std::mutex> guard(lock);
    auto &all = allocated(device);
    all.peak = all.current;
  }
};

// Page-locked memory of the host: ordinary memory that is remembered.
struct Pinned final : c10::Allocator {
  static std::set<void *> &pieces() {
    static auto *pieces = new std::set<void *>;
    return *pieces;
  }
  static std::mutex &lock() {
    static auto *lock = new std::mutex;
    return *lock;
  }
  static void release(void *memory) {
    const std::lock_guard<std::mutex> guard(lock());
    pieces().erase(memory);
    std::free(memory);
  }
  c10::DataPtr allocate(std::size_t bytes) override {
    void *memory = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
    const std::lock_guard<std::mutex> guard(lock());
    pieces().insert(memory);
    return {memory, memory, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void *to, const void *from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

bool is_pinned(const Tensor &tensor) {
  const std::lock_guard<std::mutex> guard(Pinned::lock());
  return Pinned::pieces().count(tensor.storage().mutable_data()) > 0;
}

// ---- views between the two ------------------------------------------------------------------------------------------

// Tensors of the CPU over the numbers of tensors of one device, for one call: those that share memory share it here.
class HostViews {
 public:
  // What is made without a tensor of a device is the current one's.
  c10::DeviceIndex device() const { return device_ < 0 ? current : device_; }

  void claim(c10::DeviceIndex device) {
    TORCH_CHECK(device_ < 0 || device_ == device, "Expected all tensors to be on the same device, but found at least two "
                "devices, cuda:", int(device_), " and cuda:", int(device), "!");
    device_ = device;
  }

  Tensor of(const Tensor &tensor) {
    claim(tensor.get_device());
    auto *storage = tensor.storage().unsafeGetStorageImpl();
    auto found = storages_.find(storage);
    if (found == storages_.end()) {
      c10::DataPtr data(Memory::numbers(storage), c10::Device(c10::DeviceType::CPU));
      const auto bytes = storage->nbytes();
      c10::Storage seen(c10::Storage::use_byte_size_t(), bytes, std::move(data), c10::GetCPUAllocator(), true);
      found = storages_.emplace(storage, seen).first;
    }
    const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
    auto view = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(found->second), keys, tensor.dtype());
    view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    seen_.emplace_back(tensor, view);
    return view;
  }

  // The tensor of the device that a kernel's result is: one of those that were shown, or a new one.
  Tensor result(const Tensor &host, const std::string &name) {
    if (!host.defined()) return host;
    for (const auto &[tensor, view] : seen_)
      if (view.is_same(host)) return tensor;
    for (const auto &[storage, seen] : storages_)
      TORCH_CHECK(seen.unsafeGetStorageImpl() != host.storage().unsafeGetStorageImpl() || host.numel() == 0,
                  "rehearsal: ", name, " is a view of its argument and has no kernel here");
    return made(host);
  }

  // Results that the kernel made larger or smaller than what was shown.
  void resized() {
    for (auto &[tensor, view] : seen_) {
      if (view.sizes() == tensor.sizes()) continue;
      const auto made = this->made(view);
      tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(made.storage());
      tensor.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
    }
  }

  static Tensor empty(at::IntArrayRef sizes, at::IntArrayRef strides, caffe2::TypeMeta type,
                      c10::DeviceIndex device) {
    const auto bytes = at::detail::computeStorageNbytes(sizes, strides, type.itemsize());
    c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, Memory::get().allocate(bytes, device), &Memory::get(),
                         true);
    auto made =
        at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), type);
    made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
    return made;
  }

  // A new tensor of the device with these numbers.
  Tensor made(const Tensor &host) const {
    auto made = empty(host.sizes(), host.strides(), host.dtype(), device());
    HostViews views;
    views.of(made).copy_(host);
    return made;
  }

 private:
  c10::DeviceIndex device_ = -1;
  std::unordered_map<c10::StorageImpl *, c10::Storage> storages_;
  std::vector<std::pair<Tensor, Tensor>> seen_;
};

bool is_on_device(const Tensor &tensor) { return tensor.defined() && tensor.is_cuda(); }

// ---- the fallback of every operator ---------------------------------------------------------------------------------

// Where CUDA takes a tensor of the CPU: as a number, and as indices, which it copies.
bool may_be_of_the_host(const Tensor &tensor, const std::string &name) {
  if (tensor.dim() == 0) return true;
  if (name.rfind("aten::index.", 0) == 0 || name.rfind("aten::_index_put_impl_", 0) == 0) {
    counts.wait("indices of the host");
    counts.copied("to_device", tensor.nbytes());
    return true;
  }
  return false;
}

// The size of what these give depends on numbers of the device.
bool waits(const std::string &name) {
  for (const char *one : {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
                          "aten::unique_consecutive", "aten::bincount", "aten::equal", "aten::is_nonzero"})
    if (name.rfind(one, 0) == 0) return true;
  return false;
}

// Products read and write more cleverly than once.
bool is_product(const std::string &name) {
  for (const char *one : {"aten::mm", "aten::addmm", "aten::linear"})
    if (name.rfind(one, 0) == 0) return true;
  return false;
}

void fallback(const c10::OperatorHandle &operation, Stack *stack) {
  const auto name = c10::toString(operation.operator_name());
  const auto &schema = operation.schema();
  const auto first = stack->size() - schema.arguments().size();
  counts.kernel(name);
  HostViews views;
  bool counted = !is_product(name);
  const auto shown = [&](const Tensor &tensor) {
    if (is_on_device(tensor)) {
      if (counted) counts.touch(name, tensor.numel(), 1);
      return views.of(tensor);
    }
    TORCH_CHECK(!tensor.defined() || may_be_of_the_host(tensor, name),
                "Expected all tensors to be on the same device, but found at least two devices, cuda and cpu! (",
                name, ", a tensor of sizes ", tensor.sizes(), " is on the CPU)");
    return tensor;
  };
  for (std::size_t index = first; index < stack->size(); index++) {
    auto &argument = (*stack)[index];
    counted = !is_product(name) && !schema.arguments()[index - first].is_out();
    if (argument.isTensor()) {
      argument = shown(argument.toTensor());
    } else if (argument.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor &tensor : argument.toTensorVector()) list.push_back(shown(tensor));
      argument = list;
    } else if (argument.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor> &tensor : argument.toOptionalTensorList().vec())
        list.push_back(tensor && tensor->defined() ? std::optional<Tensor>(shown(*tensor)) : tensor);
      argument = list;
    } else if (argument.isDevice()) {
      if (argument.toDevice().has_index()) views.claim(argument.toDevice().index());
      argument = c10::Device(c10::DeviceType::CPU);
    }
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  operation.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  views.resized();
  bool is_number = waits(name);
  for (auto &result : *stack) {
    if (result.isTensor()) {
      if (!is_product(name) && result.toTensor().defined()) counts.touch(name, result.toTensor().numel(), 1);
      result = views.result(result.toTensor(), name);
    } else if (result.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor &tensor : result.toTensorVector()) list.push_back(views.result(tensor, name));
      result = list;
    } else {
      is_number |= result.isScalar() || result.isBool();
    }
  }
  if (is_number) counts.wait(name);
}

// ---- operators with a kernel of their own ---------------------------------------------------------------------------

Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> type,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const auto index = device && device->has_index() ? device->index() : current;
  return HostViews::empty(sizes, strides, c10::scalarTypeToTypeMeta(type.value_or(at::kFloat)), index);
}

Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> type, std::optional<at::Layout> layout,
             std::optional<at::Device> device, std::optional<bool> pinned, std::optional<at::MemoryFormat>) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  return empty_strided(sizes, c10::contiguous_strides(sizes), type, layout, device, pinned);
}

Tensor &copy_(Tensor &self, const Tensor &source, bool non_blocking) {
  HostViews views, other;
  const bool between = self.is_cuda() && source.is_cuda() && self.get_device() != source.get_device();
  if (between) counts.copied("between", source.numel() * source.element_size());
  if (self.is_cuda() && source.is_cuda()) {
    counts.kernel("aten::copy_");
    counts.touch("aten::copy_", self.numel(), 1);
    counts.touch("aten::copy_", source.numel(), 1);
  } else {
    const bool to_device = self.is_cuda();
    const auto &host = to_device ? source : self;
    counts.copied(to_device ? "to_device" : "to_host", source.numel() * source.element_size());
    if (self.numel() > 0 && !(non_blocking && is_pinned(host)))
      counts.wait(to_device ? "copy to the device" : "copy to the host");
  }
  const auto seen = [&](const Tensor &tensor, HostViews &views) { return tensor.is_cuda() ? views.of(tensor) : tensor; };
  seen(self, views).copy_(seen(source, between ? other : views));
  return self;
}

at::Scalar local_scalar_dense(const Tensor &self) {
  counts.wait("a number read");
  counts.copied("to_host", self.element_size());
  HostViews views;
  return views.of(self).item();
}

const Tensor &resize_(const Tensor &self, at::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  if (self.sizes() == sizes) return self;
  const auto bytes = at::detail::computeStorageNbytesContiguous(sizes, self.element_size(), self.storage_offset());
  auto *storage = self.storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) {
    auto larger = Memory::get().allocate(bytes, self.get_device());
    if (storage->nbytes() > 0)
      std::memcpy(static_cast<Piece *>(larger.get_context())->numbers, Memory::numbers(storage), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(larger));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

// Attention as CUDA's memory-efficient kernel takes it, written out. q [B, N, T, D], k and v [B, N, S, D].
struct Weights {
  Tensor scores, log_sum;  // [B, N, T, S], [B, N, T]
};

Weights weights_of(const Tensor &query, const Tensor &key, const std::optional<Tensor> &bias, bool causal,
                   double scale) {
  TORCH_CHECK(query.size(1) == key.size(1), "efficient attention: ", query.size(1), " heads of queries, ", key.size(1),
              " of keys");
  const auto wide = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto scores = at::matmul(query.to(wide), key.to(wide).transpose(-2, -1)) * scale;
  if (bias && bias->defined()) scores = scores + bias->to(wide);
  if (causal) {
    const auto visible = at::ones({query.size(2), key.size(2)}, at::kBool).tril();
    scores = scores.masked_fill(visible.logical_not(), -std::numeric_limits<double>::infinity());
  }
  return {scores, scores.logsumexp(-1)};
}

double scale_of(const Tensor &query, std::optional<double> scale) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(query.size(-1))));
}

// What the real kernel asks of its arguments.
void check_attention(const Tensor &query, const Tensor &key, const Tensor &value, const std::optional<Tensor> &bias) {
  for (const Tensor *tensor : {&query, &key, &value}) {
    TORCH_CHECK(tensor->is_cuda() && tensor->dim() == 4, "efficient attention: expected four dimensions on the device");
    TORCH_CHECK(tensor->stride(-1) == 1, "efficient attention: the last dimension must be contiguous");
    TORCH_CHECK(tensor->scalar_type() == at::kFloat || tensor->scalar_type() == at::kHalf ||
                    tensor->scalar_type() == at::kBFloat16,
                "efficient attention: expected float32, float16 or bfloat16, got ", tensor->scalar_type());
  }
  if (!bias || !bias->defined()) return;
  TORCH_CHECK(bias->is_cuda() && bias->scalar_type() == query.scalar_type(), "efficient attention: the bias has type ",
              bias->scalar_type());
  for (int dim = 0; dim < 3; dim++)
    TORCH_CHECK(bias->size(dim) == 1 || bias->stride(dim) % (16 / bias->element_size()) == 0,
                "(*bias): last dimension must be aligned to 16 bytes");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention(const Tensor &query, const Tensor &key,
                                                               const Tensor &value, const std::optional<Tensor> &bias,
                                                               bool with_log_sum, double dropout, bool causal,
                                                               std::optional<double> scale) {
  counts.kernel("aten::_scaled_dot_product_efficient_attention");
  check_attention(query, key, value, bias);
  HostViews views;
  const auto seen_bias = bias && bias->defined() ? std::optional<Tensor>(views.of(*bias)) : std::nullopt;
  const auto [scores, log_sum] = weights_of(views.of(query), views.of(key), seen_bias, causal, scale_of(query, scale));
  const auto weights = (scores - log_sum.unsqueeze(-1)).exp();
  const auto output = at::matmul(weights, views.of(value).to(weights.scalar_type())).to(query.scalar_type());
  // The kernel pads its rows to a multiple of 32.
  const auto rows = log_sum.size(2), padded = (rows + 31) / 32 * 32;
  auto sums = at::zeros({log_sum.size(0), log_sum.size(1), with_log_sum ? padded : 0}, at::kFloat);
  if (with_log_sum) sums.narrow(2, 0, rows).copy_(log_sum);
  const auto none = views.made(at::zeros({}, at::kLong));
  return {views.made(output), views.made(sums), none, none};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention_backward(const Tensor &slope, const Tensor &query,
                                                                        const Tensor &key, const Tensor &value,
                                                                        const Tensor &bias, const Tensor &output,
                                                                        const Tensor &log_sum, const Tensor &,
                                                                        const Tensor &, double, std::array<bool, 4>,
                                                                        bool causal, std::optional<double> scale) {
  counts.kernel("aten::_scaled_dot_product_efficient_attention_backward");
  check_attention(query, key, value, bias);
  TORCH_CHECK(log_sum.size(2) % 32 == 0, "efficient attention: log-sum-exp of ", log_sum.size(2),
              " rows is not padded");
  HostViews views;
  const auto q = views.of(query), k = views.of(key), v = views.of(value), s = views.of(slope), o = views.of(output);
  const auto seen_bias = bias.defined() ? std::optional<Tensor>(views.of(bias)) : std::nullopt;
  const auto factor = scale_of(query, scale);
  const auto scores = weights_of(q, k, seen_bias, causal, factor).scores;
  const auto wide = scores.scalar_type();
  const auto weights = (scores - views.of(log_sum).narrow(2, 0, q.size(2)).unsqueeze(-1).to(wide)).exp();
  const auto common = (s.to(wide) * o.to(wide)).sum(-1, true);
  const auto of_scores = weights * (at::matmul(s.to(wide), v.to(wide).transpose(-2, -1)) - common);
  const auto narrow = [&](const Tensor &tensor) { return views.made(tensor.to(query.scalar_type())); };
  return {narrow(at::matmul(of_scores, k.to(wide)) * factor),
          narrow(at::matmul(of_scores.transpose(-2, -1), q.to(wide)) * factor),
          narrow(at::matmul(weights.transpose(-2, -1), s.to(wide))), Tensor()};
}

// Attention of documents of several lengths in one call, written out: queries `queries[i] .. queries[i + 1]` stand at the
// end of keys `keys[i] .. keys[i + 1]`. q [R, N, D], k and v [S, G, D].
struct DocumentBounds {
  std::vector<std::int64_t> queries, keys;

  static std::vector<std::int64_t> read(const Tensor &bounds, HostViews &views, const char *name) {
    TORCH_CHECK(bounds.is_cuda() && bounds.scalar_type() == at::kInt && bounds.is_contiguous(), name,
                " must be contiguous int32 on the device");
    const auto seen = views.of(bounds).to(at::kLong).contiguous();
    return {seen.data_ptr<std::int64_t>(), seen.data_ptr<std::int64_t>() + seen.numel()};
  }

  DocumentBounds(const Tensor &query, const Tensor &key, const Tensor &cu_queries, const Tensor &cu_keys,
                 std::int64_t most_queries, std::int64_t most_keys, HostViews &views)
      : queries(read(cu_queries, views, "cu_seqlens_q")), keys(read(cu_keys, views, "cu_seqlens_k")) {
    TORCH_CHECK(queries.size() == keys.size() && queries.front() == 0 && keys.front() == 0 &&
                    queries.back() == query.size(0) && keys.back() == key.size(0),
                "the bounds of documents do not hold all rows");
    for (std::size_t at = 0; at + 1 < queries.size(); at++) {
      const auto rows = queries[at + 1] - queries[at], seen = keys[at + 1] - keys[at];
      TORCH_CHECK(0 <= rows && rows <= most_queries && rows <= seen && seen <= most_keys, "a document of ", rows,
                  " queries and ", seen, " keys, at most ", most_queries, " and ", most_keys, " were announced");
    }
  }

  // Calls `visit(document, its rows, its keys, hidden [rows, keys])`.
  template <typename Visit>
  void each(Visit visit) const {
    for (std::size_t at = 0; at + 1 < queries.size(); at++) {
      const auto rows = queries[at + 1] - queries[at], seen = keys[at + 1] - keys[at];
      if (rows == 0) continue;
      const auto visible = at::ones({rows, seen}, at::kBool).tril(seen - rows);
      visit(static_cast<std::int64_t>(at), at::indexing::Slice(queries[at], queries[at + 1]),
            at::indexing::Slice(keys[at], keys[at + 1]), visible.logical_not());
    }
  }
};

Tensor heads_first(const Tensor &rows, std::int64_t heads) {  // [n, G, D] to [N, n, D]
  return rows.to(at::kFloat).repeat_interleave(heads / rows.size(1), 1).transpose(0, 1);
}

// Output [R, N, D] and log-sum-exp [R, N] of CPU tensors.
std::pair<Tensor, Tensor> documents_forward(const Tensor &query, const Tensor &key, const Tensor &value,
                                            const DocumentBounds &bounds, double scale) {
  const auto heads = query.size(1);
  auto output = at::zeros_like(query, query.options(), at::MemoryFormat::Contiguous);
  auto sums = at::zeros({query.size(0), heads}, at::kFloat);
  bounds.each([&](std::int64_t, auto rows, auto seen, const Tensor &hidden) {
    const auto q = heads_first(query.index({rows}), heads), k = heads_first(key.index({seen}), heads);
    const auto scores = (at::matmul(q, k.transpose(1, 2)) * scale)
                            .masked_fill(hidden, -std::numeric_limits<double>::infinity());
    const auto sum = scores.logsumexp(-1);  // [N, n]
    const auto mixed = at::matmul((scores - sum.unsqueeze(-1)).exp(), heads_first(value.index({seen}), heads));
    output.index_put_({rows}, mixed.transpose(0, 1).to(query.scalar_type()));
    sums.index_put_({rows}, sum.t());
  });
  return {output, sums};
}

// Gradients of CPU tensors; those of keys have the heads of the queries.
std::array<Tensor, 3> documents_backward(const Tensor &slope, const Tensor &query, const Tensor &key,
                                         const Tensor &value, const Tensor &output, const Tensor &sums,
                                         const DocumentBounds &bounds, double scale) {
  const auto heads = query.size(1);
  auto of_query = at::zeros({query.size(0), heads, query.size(2)}, at::kFloat);
  auto of_key = at::zeros({key.size(0), heads, query.size(2)}, at::kFloat), of_value = at::zeros_like(of_key);
  bounds.each([&](std::int64_t, auto rows, auto seen, const Tensor &hidden) {
    const auto part = [&](const Tensor &tensor) { return heads_first(tensor.index({rows}), heads); };
    const auto q = part(query), s = part(slope), o = part(output), k = heads_first(key.index({seen}), heads),
               v = heads_first(value.index({seen}), heads);
    const auto scores = at::matmul(q, k.transpose(1, 2)) * scale;
    const auto weights = (scores - sums.index({rows}).t().unsqueeze(-1)).exp().masked_fill(hidden, 0.0);
    const auto of_scores = weights * (at::matmul(s, v.transpose(1, 2)) - (s * o).sum(-1, true)) * scale;
    of_query.index_put_({rows}, at::matmul(of_scores, k).transpose(0, 1));
    of_key.index_put_({seen}, at::matmul(of_scores.transpose(1, 2), q).transpose(0, 1));
    of_value.index_put_({seen}, at::matmul(weights.transpose(1, 2), s).transpose(0, 1));
  });
  return {of_query, of_key, of_value};
}

void check_flash(const Tensor &query, const Tensor &key, const Tensor &value) {
  for (const Tensor *tensor : {&query, &key, &value}) {
    TORCH_CHECK(tensor->is_cuda() && tensor->dim() == 3 && tensor->stride(-1) == 1,
                "flash attention: expected [tokens, heads, size] on the device with contiguous rows");
    TORCH_CHECK(tensor->scalar_type() == at::kHalf || tensor->scalar_type() == at::kBFloat16,
                "FlashAttention only support fp16 and bf16 data type");
  }
  TORCH_CHECK(query.size(2) % 8 == 0 && query.size(2) <= 256, "flash attention: head size ", query.size(2));
  TORCH_CHECK(query.size(1) % key.size(1) == 0, "Number of heads in key/value must divide number of heads in query");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flash_attention(
    const Tensor &query, const Tensor &key, const Tensor &value, const std::optional<Tensor> &cu_queries,
    const std::optional<Tensor> &cu_keys, std::int64_t most_queries, std::int64_t most_keys, double, bool causal, bool,
    std::optional<double> scale, std::optional<std::int64_t>, std::optional<std::int64_t>, const std::optional<Tensor> &,
    const std::optional<Tensor> &) {
  counts.kernel("aten::_flash_attention_forward");
  check_flash(query, key, value);
  TORCH_CHECK(causal && cu_queries && cu_keys, "rehearsal: flash attention of documents alone");
  HostViews views;
  const DocumentBounds bounds(query, key, *cu_queries, *cu_keys, most_queries, most_keys, views);
  const auto [output, sums] =
      documents_forward(views.of(query), views.of(key), views.of(value), bounds, scale_of(query, scale));
  const auto none = views.made(at::zeros({2}, at::kLong));
  return {views.made(output), views.made(sums.t().contiguous()), none, none, none};
}

std::tuple<Tensor, Tensor, Tensor> flash_attention_backward(
    const Tensor &slope, const Tensor &query, const Tensor &key, const Tensor &value, const Tensor &output,
    const Tensor &log_sum, const Tensor &cu_queries, const Tensor &cu_keys, std::int64_t most_queries,
    std::int64_t most_keys, double, bool causal, const Tensor &, const Tensor &, std::optional<double> scale,
    std::optional<std::int64_t>, std::optional<std::int64_t>) {
  counts.kernel("aten::_flash_attention_backward");
  check_flash(query, key, value);
  TORCH_CHECK(causal && log_sum.scalar_type() == at::kFloat && log_sum.is_contiguous() &&
                  log_sum.sizes() == at::IntArrayRef({query.size(1), query.size(0)}),
              "flash attention: expected contiguous log-sum-exps [heads, tokens]");
  HostViews views;
  const DocumentBounds bounds(query, key, cu_queries, cu_keys, most_queries, most_keys, views);
  const auto [of_query, of_key, of_value] =
      documents_backward(views.of(slope), views.of(query), views.of(key), views.of(value), views.of(output),
                         views.of(log_sum).t(), bounds, scale_of(query, scale));
  const auto grouped = [&](const Tensor &all) {
    return views.made(
        all.view({key.size(0), key.size(1), -1, key.size(2)}).sum(2).to(query.scalar_type()));
  };
  return {views.made(of_query.to(query.scalar_type())), grouped(of_key), grouped(of_value)};
}

// What the memory-saving kernel asks of documents: one row of a batch, a key for every head.
void check_efficient_documents(const Tensor &query, const Tensor &key, const Tensor &value,
                               const std::optional<Tensor> &bias, std::int64_t mask) {
  for (const Tensor *tensor : {&query, &key, &value}) {
    TORCH_CHECK(tensor->is_cuda() && tensor->dim() == 4 && tensor->size(0) == 1 && tensor->stride(-1) == 1,
                "efficient attention: expected one row of tokens on the device, contiguous in the last dimension");
    TORCH_CHECK(tensor->size(2) == query.size(2) && tensor->scalar_type() == query.scalar_type() &&
                    tensor->scalar_type() != at::kDouble,
                "efficient attention: one number of heads and one type, not float64");
  }
  TORCH_CHECK(!(bias && bias->defined()) && mask == 2, "rehearsal: documents are causal from their end");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt> efficient_documents(
    const Tensor &query, const Tensor &key, const Tensor &value, const std::optional<Tensor> &bias,
    const std::optional<Tensor> &cu_queries, const std::optional<Tensor> &cu_keys,
    std::optional<std::int64_t> most_queries, std::optional<std::int64_t> most_keys, double, std::int64_t mask,
    bool with_log_sum, std::optional<double> scale, const std::optional<Tensor> &, std::optional<std::int64_t>) {
  counts.kernel("aten::_efficient_attention_forward");
  check_efficient_documents(query, key, value, bias, mask);
  HostViews views;
  const auto q = views.of(query)[0], k = views.of(key)[0], v = views.of(value)[0];
  const DocumentBounds bounds(q, k, *cu_queries, *cu_keys, *most_queries, *most_keys, views);
  const auto [output, sums] = documents_forward(q, k, v, bounds, scale_of(query, scale));
  const auto documents = static_cast<std::int64_t>(bounds.queries.size()) - 1, padded = (*most_queries + 31) / 32 * 32;
  auto log_sum = at::zeros({documents, query.size(2), with_log_sum ? padded : 0}, at::kFloat);
  if (with_log_sum)
    for (std::int64_t at = 0; at < documents; at++) {
      const auto rows = bounds.queries[at + 1] - bounds.queries[at];
      log_sum[at].narrow(1, 0, rows).copy_(sums.narrow(0, bounds.queries[at], rows).t());
    }
  const auto none = views.made(at::zeros({}, at::kLong));
  return {views.made(output.unsqueeze(0)), views.made(log_sum), none, none, *most_queries,
          *most_keys};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_documents_backward(
    const Tensor &slope, const Tensor &query, const Tensor &key, const Tensor &value, const std::optional<Tensor> &bias,
    const Tensor &output, const std::optional<Tensor> &cu_queries, const std::optional<Tensor> &cu_keys,
    std::int64_t most_queries, std::int64_t most_keys, const Tensor &log_sum, double, const Tensor &, const Tensor &,
    std::int64_t mask, bool, std::optional<double> scale, std::optional<std::int64_t>, std::optional<std::int64_t>,
    bool) {
  counts.kernel("aten::_efficient_attention_backward");
  check_efficient_documents(query, key, value, bias, mask);
  TORCH_CHECK(log_sum.size(2) % 32 == 0 && log_sum.is_contiguous(), "efficient attention: log-sum-exps are not padded");
  HostViews views;
  const auto q = views.of(query)[0], k = views.of(key)[0], v = views.of(value)[0], seen = views.of(log_sum);
  const DocumentBounds bounds(q, k, *cu_queries, *cu_keys, most_queries, most_keys, views);
  auto sums = at::zeros({q.size(0), q.size(1)}, at::kFloat);
  for (std::size_t at = 0; at + 1 < bounds.queries.size(); at++) {
    const auto rows = bounds.queries[at + 1] - bounds.queries[at];
    sums.narrow(0, bounds.queries[at], rows).copy_(seen[at].narrow(1, 0, rows).t());
  }
  const auto slopes = documents_backward(views.of(slope)[0], q, k, v, views.of(output)[0], sums, bounds,
                                         scale_of(query, scale));
  const auto made = [&](const Tensor &tensor) {
    return views.made(tensor.unsqueeze(0).to(query.scalar_type()));
  };
  return {made(slopes[0]), made(slopes[1]), made(slopes[2]), Tensor()};
}

// The root mean square norm in one kernel, sums in float32; the second result is 1 / sqrt(mean(x^2) + epsilon).
at::ScalarType wide_type(const Tensor &tensor) { return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

std::tuple<Tensor, Tensor> rms_norm(const Tensor &input, at::IntArrayRef shape, const std::optional<Tensor> &weight,
                                    std::optional<double> epsilon) {
  counts.kernel("aten::_fused_rms_norm");
  TORCH_CHECK(shape.size() == 1 && weight && weight->is_cuda() && weight->scalar_type() == input.scalar_type(),
              "rehearsal: the norm of rows with a weight of their type");
  HostViews views;
  const auto x = views.of(input).to(wide_type(input)), w = views.of(*weight).to(x.scalar_type());
  const auto factor = (x.square().mean(-1, true) + epsilon.value_or(1e-6)).rsqrt();
  return {views.made((x * factor * w).to(input.scalar_type())), views.made(factor)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor &slope, const Tensor &input, at::IntArrayRef,
                                             const Tensor &factor, const std::optional<Tensor> &weight,
                                             std::array<bool, 2> wanted) {
  counts.kernel("aten::_fused_rms_norm_backward");
  HostViews views;
  const auto x = views.of(input).to(wide_type(input)), f = views.of(factor), normed = x * f;
  const auto s = views.of(slope).to(x.scalar_type()), w = views.of(*weight).to(x.scalar_type());
  const auto of_normed = s * w;
  const auto of_input = f * (of_normed - normed * (of_normed * normed).mean(-1, true));
  const auto made = [&](bool want, const Tensor &tensor) {
    return want ? views.made(tensor.to(input.scalar_type())) : Tensor();
  };
  return {made(wanted[0], of_input), made(wanted[1], (s * normed).reshape({-1, x.size(-1)}).sum(0))};
}

// Products of 16-bit factors that are added up and kept in float32.
Tensor wide_product(const Tensor &left, const Tensor &right, at::ScalarType type) {
  TORCH_CHECK(left.is_cuda() && right.is_cuda(), "Expected all tensors to be on the same device (mm.dtype)");
  TORCH_CHECK(left.scalar_type() == right.scalar_type() &&
                  (type == left.scalar_type() ||
                   (type == at::kFloat && (left.scalar_type() == at::kHalf || left.scalar_type() == at::kBFloat16))),
              "out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs");
  HostViews views;
  return at::mm(views.of(left).to(type), views.of(right).to(type));
}

Tensor mm_dtype(const Tensor &left, const Tensor &right, at::ScalarType type) {
  counts.kernel("aten::mm.dtype");
  HostViews views;
  views.claim(left.get_device());
  return views.made(wide_product(left, right, type));
}

Tensor &addmm_dtype_out(const Tensor &self, const Tensor &left, const Tensor &right, at::ScalarType type,
                        const at::Scalar &beta, const at::Scalar &alpha, Tensor &out) {
  counts.kernel("aten::addmm.dtype_out");
  HostViews views;
  views.of(out).copy_(views.of(self) * beta + wide_product(left, right, type) * alpha);
  return out;
}

std::int64_t choose_attention(const Tensor &query, const Tensor &, const Tensor &, const std::optional<Tensor> &,
                              double, bool, std::optional<double>, bool) {
  const bool narrow = query.scalar_type() != at::kDouble;
  return static_cast<std::int64_t>(narrow ? sdp::SDPBackend::efficient_attention : sdp::SDPBackend::math);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("copy_", TORCH_FN(copy_));
  library.impl("_local_scalar_dense", TORCH_FN(local_scalar_dense));
  library.impl("resize_", TORCH_FN(resize_));
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  library.impl("unfold", TORCH_FN(at::native::unfold));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  library.impl("_scaled_dot_product_efficient_attention", TORCH_FN(efficient_attention));
  library.impl("_scaled_dot_product_efficient_attention_backward", TORCH_FN(efficient_attention_backward));
  library.impl("_flash_attention_forward", TORCH_FN(flash_attention));
  library.impl("_flash_attention_backward", TORCH_FN(flash_attention_backward));
  library.impl("_efficient_attention_forward", TORCH_FN(efficient_documents));
  library.impl("_efficient_attention_backward", TORCH_FN(efficient_documents_backward));
  library.impl("_fused_rms_norm", TORCH_FN(rms_norm));
  library.impl("_fused_rms_norm_backward", TORCH_FN(rms_norm_backward));
  library.impl("mm.dtype", TORCH_FN(mm_dtype));
  library.impl("addmm.dtype_out", TORCH_FN(addmm_dtype_out));
}

// ---- what libtorch asks of its CUDA half ----------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;
  c10::DeviceType type() const override { return static_type; }
  static c10::Device at(c10::DeviceIndex index) { return {c10::DeviceType::CUDA, index}; }
  c10::Device exchangeDevice(c10::Device device) const override { return at(become(device.index())); }
  c10::Device getDevice() const override { return at(current); }
  void setDevice(c10::Device device) const override { become(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (0 <= device.index() && device.index() < devices()) current = device.index();
  }
  void *getStreamNativeHandle(const c10::Stream) const override { return nullptr; }
  static c10::Stream stream(c10::Device device) {
    return c10::Stream(c10::Stream::DEFAULT, device.has_index() ? device : at(current));
  }
  c10::Stream getStream(c10::Device device) const override { return stream(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return stream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return stream(device); }
  c10::Stream exchangeStream(c10::Stream other) const override { return stream(other.device()); }
  void destroyEvent(void *, const c10::DeviceIndex) const noexcept override {}
  void record(void **, const c10::Stream &, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void *, const c10::Stream &) const override {}
  bool queryEvent(void *) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(devices()); }
  bool queryStream(const c10::Stream &) const override { return true; }
  void synchronizeStream(const c10::Stream &) const override { counts.wait("a stream"); }
  void synchronizeEvent(void *) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override { counts.wait("synchronize"); }
  void recordDataPtrOnStream(const c10::DataPtr &, const c10::Stream &) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

const struct Register {
  Register() {
    c10::SetAllocator(c10::DeviceType::CUDA, &Memory::get(), /*priority=*/100);
    at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  }
} registered;

}  // namespace rehearsal

// ---- what libcuda.cpp and tests ask ---------------------------------------------------------------------------------

extern "C" {

void *rehearsal_numbers(void *address, std::size_t *bytes, int *device) {
  return rehearsal::Memory::get().numbers(address, bytes, device);
}
int rehearsal_devices() { return rehearsal::devices(); }
void rehearsal_launched(const char *kernel) { rehearsal::counts.kernel(kernel); }
void rehearsal_touched(const char *kernel, int argument, long count) {
  rehearsal::counts.touch(kernel, argument, count);
}

// Writes what was counted since the last time.
void rehearsal_report(const char *path) {
  auto &counts = rehearsal::counts;
  const std::lock_guard<std::mutex> guard(counts.lock);
  counts.write(path);
  counts.kernels.clear(), counts.waits.clear(), counts.touched.clear();
  counts.bytes = {{"to_device", 0}, {"to_host", 0}, {"between", 0}};
}

}  // extern "C"

namespace at {

// libtorch looks this name up.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(rehearsal::devices()); }
  int getNumGPUs() const override { return rehearsal::devices(); }
  DeviceIndex current_device() const override { return rehearsal::current; }
  DeviceIndex getCurrentDevice() const override { return rehearsal::current; }
  void setCurrentDevice(DeviceIndex device) const override { rehearsal::become(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return rehearsal::become(device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return rehearsal::become(device); }
  bool isPinnedPtr(const void *data) const override {
    const std::lock_guard<std::mutex> guard(rehearsal::Pinned::lock());
    return rehearsal::Pinned::pieces().count(const_cast<void *>(data)) > 0;
  }
  // Seeded with the others; kernels that draw take the CPU's own.
  const Generator &getDefaultGenerator(DeviceIndex) const override {
    static const auto generator = detail::createCPUGenerator();
    return generator;
  }
  Allocator *getPinnedMemoryAllocator() const override {
    static auto *pinned = new rehearsal::Pinned;
    return pinned;
  }
  Allocator *getCUDADeviceAllocator() const override { return &rehearsal::Memory::get(); }
  Device getDeviceFromPtr(void *address) const override {
    std::size_t bytes = 0;
    int device = 0;
    rehearsal::Memory::get().numbers(address, &bytes, &device);
    return {DeviceType::CUDA, static_cast<DeviceIndex>(device)};
  }
  void deviceSynchronize(DeviceIndex) const override { rehearsal::counts.wait("synchronize"); }
  std::string showConfig() const override { return "rehearsal of CUDA on the CPU"; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

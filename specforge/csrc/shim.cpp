// What tch lacks, behind a C ABI. Every function returns 0, or 1 after writing a message into `error`
// (a buffer of `error_size` bytes). A tensor pointer is an `at::Tensor *` owned by the caller.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/linear.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <optional>
#include <string_view>
#include <vector>

namespace {

void write_error(const char *message, char *error, std::size_t error_size) {
  if (error_size == 0) return;
  std::strncpy(error, message, error_size - 1);
  error[error_size - 1] = '\0';
}

template <typename Body>
int guarded(Body body, char *error, std::size_t error_size) {
  try {
    body();
    return 0;
  } catch (const std::exception &exception) {
    write_error(exception.what(), error, error_size);
  } catch (...) {
    write_error("an unknown C++ exception", error, error_size);
  }
  return 1;
}

std::vector<at::Tensor> gather(at::Tensor *const *pointers, std::int64_t count) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(count);
  for (std::int64_t index = 0; index < count; ++index) tensors.push_back(*pointers[index]);
  return tensors;
}

// oneDNN's inner product over plain tensors. libtorch registers it for compiled graphs only; there is no C++ function.
using LinearPointwise = at::Tensor(const at::Tensor &input, const at::Tensor &weight,
                                   const std::optional<at::Tensor> &bias, std::string_view attribute,
                                   c10::List<std::optional<at::Scalar>> scalars,
                                   std::optional<std::string_view> algorithm);

}  // namespace

extern "C" {

// One AdamW step over `count` tensors in one kernel. Gradients are divided by `gradient_scale` on the fly
// (clipping costs no extra pass), and nothing changes when `found_non_finite` holds 1.
int specforge_fused_adamw(at::Tensor *const *parameters, at::Tensor *const *gradients, at::Tensor *const *first_moments,
                          at::Tensor *const *second_moments, at::Tensor *const *steps, std::int64_t count,
                          double learning_rate, double beta1, double beta2, double weight_decay, double epsilon,
                          const at::Tensor *gradient_scale, const at::Tensor *found_non_finite, char *error,
                          std::size_t error_size) {
  return guarded(
      [&] {
        auto p = gather(parameters, count), g = gather(gradients, count), m = gather(first_moments, count),
             v = gather(second_moments, count), s = gather(steps, count);
        at::_fused_adamw_(p, g, m, v, /*max_exp_avg_sqs=*/{}, s, learning_rate, beta1, beta2, weight_decay, epsilon,
                          /*amsgrad=*/false, /*maximize=*/false, *gradient_scale, *found_non_finite);
      },
      error, error_size);
}

// Peak and current bytes that the caching allocator of a CUDA device handed out.
int specforge_cuda_memory(std::int32_t device, std::int64_t *current, std::int64_t *peak, char *error,
                          std::size_t error_size) {
  return guarded(
      [&] {
        const auto stats = at::getDeviceAllocator(c10::DeviceType::CUDA)->getDeviceStats(device);
        const auto &all = stats.allocated_bytes[static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
        *current = all.current;
        *peak = all.peak;
      },
      error, error_size);
}

// Starts a new peak measurement on a CUDA device.
int specforge_cuda_reset_peak(std::int32_t device, char *error, std::size_t error_size) {
  return guarded([&] { at::getDeviceAllocator(c10::DeviceType::CUDA)->resetPeakStats(device); }, error, error_size);
}

// `input [.., in]` times the transpose of `weight [out, in]`, plus `bias` where it is not null, without autograd.
// On the CPU, at::linear multiplies with MKL, which leaves half of a processor idle that is not Intel's.
int specforge_onednn_linear(const at::Tensor *input, const at::Tensor *weight, const at::Tensor *bias,
                            at::Tensor **output, char *error, std::size_t error_size) {
  return guarded(
      [&] {
        static const auto operation = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
        const auto offset = bias == nullptr ? std::optional<at::Tensor>() : std::optional<at::Tensor>(*bias);
        const c10::List<std::optional<at::Scalar>> none;
        *output = new at::Tensor(
            operation ? operation->typed<LinearPointwise>().call(*input, *weight, offset, "none", none, std::nullopt)
                      : at::linear(*input, *weight, offset));
      },
      error, error_size);
}

}  // extern "C"

// What tch lacks, behind a C ABI. Every function returns 0, or 1 after writing a message into `error`
// (a buffer of `error_size` bytes). A tensor pointer is an `at::Tensor *` owned by the caller.

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/headeronly/version.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "guarded.h"

namespace {

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

// One AdamW step over `count` tensors in one kernel. Gradients are divided by `gradient_scale` on the fly
// (clipping costs no extra pass) and come back divided, and nothing changes when `found_non_finite` holds 1.
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

// total += scale * left right, in place. A product of 16-bit matrices reaches a float32 total on CUDA in the product's
// own kernel; on the CPU the factors are widened first. Either way nothing in between has 16 bits: float16 could not hold
// every sum.
int specforge_add_product(at::Tensor *total, const at::Tensor *left, const at::Tensor *right, double scale, char *error,
                          std::size_t error_size) {
  return guarded(
      [&] {
        if (total->scalar_type() == left->scalar_type()) {
          total->addmm_(*left, *right, /*beta=*/1, /*alpha=*/scale);
        } else if (total->is_cuda()) {
          at::addmm_out(*total, *total, *left, *right, total->scalar_type(), /*beta=*/1, /*alpha=*/scale);
        } else {
          const auto kind = total->scalar_type();
          total->addmm_(left->to(kind), right->to(kind), /*beta=*/1, /*alpha=*/scale);
        }
      },
      error, error_size);
}

// Products of float32 matrices in float32, whatever the environment asks for: no TF32.
int specforge_exact_float32_products(char *error, std::size_t error_size) {
  return guarded([&] { at::globalContext().setFloat32MatmulPrecision("highest"); }, error, error_size);
}

// Whether every operator has to give the same bits for the same input, or refuse where it cannot.
int specforge_deterministic(int wanted, char *error, std::size_t error_size) {
  return guarded([&] { at::globalContext().setDeterministicAlgorithms(wanted != 0, /*warn_only=*/false); }, error,
                 error_size);
}

// The libtorch this was compiled against, such as "2.11.0".
const char *specforge_libtorch_version() { return TORCH_VERSION; }

// How it was built: compiler, matrix library, settings.
const char *specforge_libtorch_build() {
  static const std::string text = at::show_config();
  return text.c_str();
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

}  // extern "C"

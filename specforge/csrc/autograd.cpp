// A matrix product with a gradient of its own. Errors as in shim.cpp.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "guarded.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A matrix product whose three passes all go through oneDNN on the CPU. libtorch multiplies with MKL there, which leaves
// a good part of a processor idle that is not Intel's.

using LinearPointwise = at::Tensor(const at::Tensor &input, const at::Tensor &weight,
                                   const std::optional<at::Tensor> &bias, std::string_view attribute,
                                   c10::List<std::optional<at::Scalar>> scalars,
                                   std::optional<std::string_view> algorithm);

// input [r, in] times the transpose of weight [out, in].
at::Tensor product(const at::Tensor &input, const at::Tensor &weight) {
  static const auto operation = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (!operation || !input.is_cpu() || input.scalar_type() != at::kFloat || input.numel() == 0)
    return at::linear(input, weight);
  const c10::List<std::optional<at::Scalar>> none;
  return operation->typed<LinearPointwise>().call(input, weight, std::nullopt, "none", none, std::nullopt);
}

class OnednnLinear : public torch::autograd::Function<OnednnLinear> {
 public:
  static at::Tensor forward(AutogradContext *context, const at::Tensor &input, const at::Tensor &weight) {
    context->save_for_backward({input, weight});
    return product(input, weight);
  }

  static variable_list backward(AutogradContext *context, variable_list slopes) {
    const auto saved = context->get_saved_variables();
    const auto slope = slopes[0].contiguous();  // [r, out]
    at::Tensor input_slope, weight_slope;
    if (context->needs_input_grad(0)) input_slope = product(slope, saved[1].t());             // [r, in]
    if (context->needs_input_grad(1)) weight_slope = product(slope.t(), saved[0].t());        // [out, in]
    return {input_slope, weight_slope};
  }
};

}  // namespace

extern "C" {

int specforge_trained_linear(const at::Tensor *input, const at::Tensor *weight, at::Tensor **output, char *error,
                             std::size_t error_size) {
  return guarded([&] { *output = new at::Tensor(OnednnLinear::apply(*input, *weight)); }, error, error_size);
}

}  // extern "C"

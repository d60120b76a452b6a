// Parts of a layer with gradients of their own: matrix products, norms, gates. Errors as in shim.cpp.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string_view>

#include "guarded.h"
#include "layer_parts.h"

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

// The same in mixed precision: numbers are rounded to bfloat16 (they may be so already), and so is each sum of products, which
// is kept in float32 until it is whole.
at::Tensor product(const at::Tensor &input, const at::Tensor &weight, bool mixed) {
  if (!mixed) return product(input, weight);
  // libtorch gives these to oneDNN by itself, and better than the operator above, which copies what lies transposed.
  return at::mm(input.to(at::kBFloat16), weight.to(at::kBFloat16).t()).to(at::kFloat);
}

// What the products of a way back read: rounded once for all of them.
at::Tensor factor(const at::Tensor &tensor, bool mixed) { return mixed ? tensor.to(at::kBFloat16) : tensor; }

class OnednnLinear : public torch::autograd::Function<OnednnLinear> {
 public:
  static at::Tensor forward(AutogradContext *context, const at::Tensor &input, const at::Tensor &weight, bool mixed,
                            bool mixed_backward) {
    const auto rows = factor(input, mixed_backward);
    context->save_for_backward({rows, weight});
    context->saved_data["mixed"] = mixed_backward;
    return product(mixed ? rows : input, weight, mixed);
  }

  static variable_list backward(AutogradContext *context, variable_list slopes) {
    const auto saved = context->get_saved_variables();
    const bool mixed = context->saved_data["mixed"].toBool();
    const auto slope = factor(slopes[0].contiguous(), mixed);  // [r, out]
    at::Tensor input_slope, weight_slope;
    if (context->needs_input_grad(0)) input_slope = product(slope, saved[1].t(), mixed);       // [r, in]
    if (context->needs_input_grad(1)) weight_slope = product(slope.t(), saved[0].t(), mixed);  // [out, in]
    return {input_slope, weight_slope, at::Tensor(), at::Tensor()};
  }
};

// `silu(gate) up` times the transpose of `down`, all of float32 on the CPU. Of the wide rows gate and up alone are kept: their
// product is made again on the way back.
class GatedLinear : public torch::autograd::Function<GatedLinear> {
 public:
  static at::Tensor forward(AutogradContext *context, const at::Tensor &gate, const at::Tensor &up,
                            const at::Tensor &down, bool mixed) {
    TORCH_CHECK(gate.sizes() == up.sizes(), "a gate of ", gate.sizes(), ": expected the same of what it lets through, got ",
                up.sizes());
    const auto gates = gate.contiguous(), ups = up.contiguous();  // [r, in]
    context->save_for_backward({gates, ups, down});
    context->saved_data["mixed"] = mixed;
    return product(gated(gates, ups), down, mixed);
  }

  static variable_list backward(AutogradContext *context, variable_list slopes) {
    const auto saved = context->get_saved_variables();
    const auto &gate = saved[0], &up = saved[1], &down = saved[2];
    const bool mixed = context->saved_data["mixed"].toBool();
    const auto slope = factor(slopes[0].contiguous(), mixed);  // [r, out]
    at::Tensor down_slope;
    if (context->needs_input_grad(2)) down_slope = product(slope.t(), gated(gate, up).t(), mixed);  // [out, in]
    const auto of_product = product(slope, down.t(), mixed).contiguous();                           // [r, in]
    const auto of_gate = at::empty_like(gate);
    layer_parts::gate_backward(gate.numel(), gate.const_data_ptr<float>(), up.const_data_ptr<float>(),
                               of_product.const_data_ptr<float>(), of_gate.mutable_data_ptr<float>(),
                               of_product.mutable_data_ptr<float>());
    return {of_gate, of_product, down_slope, at::Tensor()};
  }

 private:
  static at::Tensor gated(const at::Tensor &gate, const at::Tensor &up) {
    const auto both = at::empty_like(gate);
    layer_parts::gate_forward(gate.numel(), gate.const_data_ptr<float>(), up.const_data_ptr<float>(),
                              both.mutable_data_ptr<float>());
    return both;
  }
};

// Rows `[.., width]` normed by their root mean square where there is a weight `[width]`, then turned where there are rotary
// tables, `[rows / heads, turned]` each; all of float32 on the CPU. Kept for the way back: the rows as they came, and one
// number of each.
class NormedRows : public torch::autograd::Function<NormedRows> {
 public:
  using Given = std::optional<at::Tensor>;

  static at::Tensor forward(AutogradContext *context, const at::Tensor &rows, const Given &weight, double epsilon,
                            const Given &cos, const Given &sin) {
    const auto input = rows.contiguous();
    const auto flat = [](const Given &tensor) { return tensor ? tensor->contiguous() : at::Tensor(); };
    const auto weights = flat(weight), cosines = flat(cos), sines = flat(sin);
    const auto norm = described(input, weights, epsilon, cosines, sines);
    const auto output = at::empty_like(input);
    const auto inverse = at::empty({weight ? norm.rows : 0}, input.options());
    layer_parts::norm_forward(norm, input.const_data_ptr<float>(), output.mutable_data_ptr<float>(),
                              inverse.mutable_data_ptr<float>());
    // Turning alone goes back without knowing what was turned.
    context->save_for_backward({weight ? input : at::Tensor(), weights, cosines, sines, inverse});
    context->saved_data["epsilon"] = epsilon;
    return output;
  }

  static variable_list backward(AutogradContext *context, variable_list slopes) {
    const auto saved = context->get_saved_variables();
    const auto &input = saved[0], &weight = saved[1], &inverse = saved[4];
    const auto slope = slopes[0].contiguous();
    const auto norm = described(slope, weight, context->saved_data["epsilon"].toDouble(), saved[2], saved[3]);
    const std::int64_t parts = std::min<std::int64_t>(norm.rows, PARTS);
    const auto rows_slope = at::empty_like(slope);
    at::Tensor weight_parts;
    if (weight.defined()) weight_parts = at::zeros({parts, norm.width}, slope.options());
    layer_parts::norm_backward(norm, weight.defined() ? input.const_data_ptr<float>() : nullptr,
                               inverse.const_data_ptr<float>(), slope.const_data_ptr<float>(),
                               rows_slope.mutable_data_ptr<float>(),
                               weight.defined() ? weight_parts.mutable_data_ptr<float>() : nullptr, parts);
    const auto weight_slope = weight.defined() ? weight_parts.sum(0) : at::Tensor();
    return {rows_slope, weight_slope, at::Tensor(), at::Tensor(), at::Tensor()};
  }

 private:
  static constexpr std::int64_t PARTS = 64;  // of a weight's slope

  static layer_parts::Norm described(const at::Tensor &rows, const at::Tensor &weight, double epsilon,
                                     const at::Tensor &cos, const at::Tensor &sin) {
    const auto width = rows.size(-1), count = width > 0 ? rows.numel() / width : 0;
    const auto data = [](const at::Tensor &tensor) {
      return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
    };
    TORCH_CHECK(!weight.defined() || weight.numel() == width, "a norm of ", weight.sizes(), " for rows of ", rows.sizes());
    const auto turned = cos.defined() ? cos.size(-1) : 0;
    const auto tables = std::max<std::int64_t>(1, turned > 0 ? cos.numel() / turned : 1);
    TORCH_CHECK(turned <= width && turned % 2 == 0 && count % tables == 0 && (turned == 0 || cos.sizes() == sin.sizes()),
                "rotary tables of ", tables, " x ", turned, " for heads of ", rows.sizes());
    return {count, width, std::max<std::int64_t>(1, count / tables), data(weight), static_cast<float>(epsilon),
            data(cos), data(sin), turned};
  }
};

}  // namespace

extern "C" {

// Mixed precision for float32 on the CPU alone.
int specforge_trained_linear(const at::Tensor *input, const at::Tensor *weight, int mixed, int mixed_backward,
                             at::Tensor **output, char *error, std::size_t error_size) {
  return guarded(
      [&] { *output = new at::Tensor(OnednnLinear::apply(*input, *weight, mixed != 0, mixed_backward != 0)); }, error,
      error_size);
}

// Whether this processor multiplies bfloat16 faster than float32.
int specforge_bfloat16_pays() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return 0;
#endif
}

// All of float32 on the CPU.
int specforge_gated_linear(const at::Tensor *gate, const at::Tensor *up, const at::Tensor *down, int mixed,
                           at::Tensor **output, char *error, std::size_t error_size) {
  return guarded([&] { *output = new at::Tensor(GatedLinear::apply(*gate, *up, *down, mixed != 0)); }, error, error_size);
}

// All of float32 on the CPU; `weight`, and `cos` with `sin`, may be null.
int specforge_normed_rows(const at::Tensor *rows, const at::Tensor *weight, double epsilon, const at::Tensor *cos,
                          const at::Tensor *sin, at::Tensor **output, char *error, std::size_t error_size) {
  const auto given = [](const at::Tensor *tensor) {
    return tensor == nullptr ? std::nullopt : std::optional<at::Tensor>(*tensor);
  };
  return guarded(
      [&] { *output = new at::Tensor(NormedRows::apply(*rows, given(weight), epsilon, given(cos), given(sin))); }, error,
      error_size);
}

}  // extern "C"

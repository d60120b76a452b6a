// Functions with a gradient of their own, for what tch cannot express. Errors as in shim.cpp.

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "guarded.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---------------------------------------------------------------------------------------------------------------------
// Attention on shared keys, with a few keys of each query's own. nn/merged_attention.rs says what it is for.
//
// R queries, S shared keys, I own keys of a query, N heads, G key/value heads, r = N / G heads of a group, D head size.

// Queries [first_query, first_query + count) stand at keys [first_key, first_key + count) and see keys from
// document_start up to their own.
struct Run {
  std::int64_t first_query, count, document_start, first_key;
};

// The keys of a run fall into two parts: those before it, all visible, and its own, causal.
struct Part {
  std::int64_t first_key, count;
  bool causal;
};

std::vector<Part> parts_of(const Run &run) {
  std::vector<Part> parts;
  if (run.first_key > run.document_start) parts.push_back({run.document_start, run.first_key - run.document_start, false});
  parts.push_back({run.first_key, run.count, true});
  return parts;
}

// [c, N, D] to [G, r, c, D]: a group of heads that shares its keys becomes a row of a batch.
at::Tensor grouped(const at::Tensor &heads, std::int64_t groups) {
  return heads.view({heads.size(0), groups, heads.size(1) / groups, heads.size(2)}).permute({1, 2, 0, 3});
}

// [G, r, c, D] to [c, N, D]
at::Tensor joined(const at::Tensor &grouped) {
  return grouped.permute({2, 0, 1, 3}).reshape({grouped.size(2), grouped.size(0) * grouped.size(1), grouped.size(3)});
}

// [n, G, D] to [G, r, n, D]. The kernel for CPUs walks strides, those for GPUs want memory.
at::Tensor shared_keys(const at::Tensor &keys, std::int64_t heads) {
  const auto groups = keys.size(1);
  auto expanded = keys.permute({1, 0, 2}).unsqueeze(1).expand({groups, heads / groups, keys.size(0), keys.size(2)});
  return keys.is_cuda() ? expanded.contiguous() : expanded;
}

struct Attended {
  at::Tensor output;   // [G, r, c, D]
  at::Tensor log_sum;  // [G, r, c], at least float32
};

Attended attend(const at::Tensor &query, const at::Tensor &key, const at::Tensor &value, bool causal, double scale) {
  if (query.is_cuda()) {
    auto [output, log_sum, seed, offset] = at::_scaled_dot_product_efficient_attention(
        query, key, value, std::nullopt, /*compute_log_sumexp=*/true, 0.0, causal, scale);
    return {output, log_sum.narrow(-1, 0, query.size(2))};
  }
  auto [output, log_sum] =
      at::_scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, std::nullopt, scale);
  return {output, log_sum};
}

// Gradients of one part, from the output and the log-sum-exp over *all* parts: the softmax weights of a part follow from
// its own scores and the common denominator.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attend_backward(const at::Tensor &slope, const at::Tensor &query,
                                                              const at::Tensor &key, const at::Tensor &value,
                                                              const at::Tensor &output, const at::Tensor &log_sum,
                                                              bool causal, double scale) {
  if (query.is_cuda()) {
    // The kernel reads rows padded to a multiple of 32.
    const auto count = log_sum.size(-1), padded = (count + 31) / 32 * 32;
    auto padded_sum = at::zeros({log_sum.size(0), log_sum.size(1), padded}, log_sum.options());
    padded_sum.narrow(-1, 0, count).copy_(log_sum);
    const auto none = at::zeros({}, query.options().dtype(at::kLong));
    auto [query_slope, key_slope, value_slope, bias_slope] = at::_scaled_dot_product_efficient_attention_backward(
        slope, query, key, value, at::Tensor(), output, padded_sum, none, none, 0.0, {true, true, true, false}, causal,
        scale);
    return {query_slope, key_slope, value_slope};
  }
  return at::_scaled_dot_product_flash_attention_for_cpu_backward(slope, query, key, value, output, log_sum, 0.0, causal,
                                                                  std::nullopt, scale);
}

class MergedAttention : public torch::autograd::Function<MergedAttention> {
 public:
  // query [R, N, D]; key, value [S, G, D]; own_key, own_value [R, I, G, D]. Returns [R, N, D].
  static at::Tensor forward(AutogradContext *context, const at::Tensor &query, const at::Tensor &key,
                            const at::Tensor &value, const at::Tensor &own_key, const at::Tensor &own_value,
                            std::vector<std::int64_t> numbers, double scale) {
    const auto heads = query.size(1), groups = key.size(1), own = own_key.size(1);
    std::vector<at::Tensor> outputs, log_sums;
    for (const auto &run : runs(numbers)) {
      const auto q = grouped(query.narrow(0, run.first_query, run.count), groups);
      std::optional<Attended> merged;
      for (const auto &part : parts_of(run)) {
        const auto k = shared_keys(key.narrow(0, part.first_key, part.count), heads);
        const auto v = shared_keys(value.narrow(0, part.first_key, part.count), heads);
        auto attended = attend(q, k, v, part.causal, scale);
        merged = merged ? merge(*merged, attended) : attended;
      }
      outputs.push_back(joined(merged->output));                       // [c, N, D]
      log_sums.push_back(joined(merged->log_sum.unsqueeze(-1)));       // [c, N, 1]
    }
    auto output = at::cat(outputs, 0);    // [R, N, D]
    auto log_sum = at::cat(log_sums, 0);  // [R, N, 1]
    if (own > 0) {
      const auto wide = log_sum.scalar_type();
      const auto scores = own_scores(query, own_key, scale, wide);  // [R, N, I]
      const auto all = at::logaddexp(log_sum, scores.logsumexp(-1, /*keepdim=*/true));
      const auto weights = (scores - all).exp_();  // [R, N, I]
      const auto mixed =
          at::matmul(weights.view({-1, groups, heads / groups, own}), own_value.to(wide).transpose(1, 2));
      output = (output * (log_sum - all).exp_() + mixed.view_as(output)).to(query.scalar_type());
      log_sum = all;
    }
    context->save_for_backward({query, key, value, own_key, own_value, output, log_sum});
    context->saved_data["numbers"] = numbers;
    context->saved_data["scale"] = scale;
    return output;
  }

  static variable_list backward(AutogradContext *context, variable_list slopes) {
    const auto saved = context->get_saved_variables();
    const auto &query = saved[0], &key = saved[1], &value = saved[2], &own_key = saved[3], &own_value = saved[4],
               &output = saved[5], &log_sum = saved[6];
    const auto numbers = context->saved_data["numbers"].toIntVector();
    const auto scale = context->saved_data["scale"].toDouble();
    const auto heads = query.size(1), groups = key.size(1), own = own_key.size(1);
    const auto slope = slopes[0].contiguous();  // [R, N, D]

    std::vector<at::Tensor> query_slopes;
    auto key_slope = at::zeros_like(key), value_slope = at::zeros_like(value);  // [S, G, D]
    for (const auto &run : runs(numbers)) {
      const auto rows = [&](const at::Tensor &tensor) {
        return grouped(tensor.narrow(0, run.first_query, run.count), groups);
      };
      const auto q = rows(query), o = rows(output), s = rows(slope), l = rows(log_sum).squeeze(-1);
      at::Tensor run_slope;
      for (const auto &part : parts_of(run)) {
        const auto k = shared_keys(key.narrow(0, part.first_key, part.count), heads);
        const auto v = shared_keys(value.narrow(0, part.first_key, part.count), heads);
        auto [dq, dk, dv] = attend_backward(s, q, k, v, o, l, part.causal, scale);
        run_slope = run_slope.defined() ? run_slope + dq : dq;
        const auto add = [&](at::Tensor &total, const at::Tensor &part_slope) {  // [G, r, n, D]
          total.narrow(0, part.first_key, part.count).add_(part_slope.sum(1).permute({1, 0, 2}));
        };
        add(key_slope, dk);
        add(value_slope, dv);
      }
      query_slopes.push_back(joined(run_slope));
    }
    auto query_slope = at::cat(query_slopes, 0);  // [R, N, D]
    at::Tensor own_key_slope, own_value_slope;
    if (own > 0) {
      const auto split = [&](const at::Tensor &tensor) {
        return tensor.view({-1, groups, heads / groups, tensor.size(-1)});  // [R, G, r, ..]
      };
      const auto wide = log_sum.scalar_type(), kind = query.scalar_type();
      const auto wide_slope = slope.to(wide);
      const auto weights = (own_scores(query, own_key, scale, wide) - log_sum).exp_();  // [R, N, I]
      const auto common = (wide_slope * output).sum(-1, /*keepdim=*/true);              // [R, N, 1]
      const auto of_weights =
          at::matmul(split(wide_slope), own_value.to(wide).permute({0, 2, 3, 1})).reshape_as(weights);
      const auto of_scores = weights * (of_weights - common) * scale;  // [R, N, I]
      const auto of_query = at::matmul(split(of_scores), own_key.to(wide).transpose(1, 2));
      query_slope = (query_slope + of_query.view_as(query)).to(kind);
      const auto own_slope = [&](const at::Tensor &left, const at::Tensor &right) {
        return at::matmul(split(left).transpose(2, 3), split(right)).transpose(1, 2).to(kind);  // [R, I, G, D]
      };
      own_key_slope = own_slope(of_scores, query.to(wide));
      own_value_slope = own_slope(weights, wide_slope);
    }
    return {query_slope, key_slope, value_slope, own_key_slope, own_value_slope, at::Tensor(), at::Tensor()};
  }

 private:
  static std::vector<Run> runs(const std::vector<std::int64_t> &numbers) {
    std::vector<Run> runs;
    for (std::size_t at = 0; at + 3 < numbers.size(); at += 4)
      runs.push_back({numbers[at], numbers[at + 1], numbers[at + 2], numbers[at + 3]});
    return runs;
  }

  // Two softmaxes over different keys as one over all of them.
  static Attended merge(const Attended &left, const Attended &right) {
    const auto all = at::logaddexp(left.log_sum, right.log_sum);
    const auto share = [&](const Attended &part) { return part.output * (part.log_sum - all).exp_().unsqueeze(-1); };
    return {(share(left) + share(right)).to(left.output.scalar_type()), all};
  }

  // Scores of each query with its own keys, [R, N, I], in float32 at least, as the kernels keep those of shared keys and
  // decoding keeps all: at a score of 40, one rounding to bfloat16 moves a weight by a tenth. What follows stays wide up to
  // the one rounding of each result; own keys are few, so that costs next to nothing.
  static at::Tensor own_scores(const at::Tensor &query, const at::Tensor &own_key, double scale, at::ScalarType kind) {
    const auto groups = own_key.size(2), heads = query.size(1);
    const auto q = query.to(kind).view({query.size(0), groups, heads / groups, query.size(2)});  // [R, G, r, D]
    return at::matmul(q, own_key.to(kind).permute({0, 2, 3, 1})).reshape({query.size(0), heads, -1}) * scale;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
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

int specforge_merged_attention(const at::Tensor *query, const at::Tensor *key, const at::Tensor *value,
                               const at::Tensor *own_key, const at::Tensor *own_value, const std::int64_t *runs,
                               std::int64_t run_count, double scale, at::Tensor **output, char *error,
                               std::size_t error_size) {
  return guarded(
      [&] {
        std::vector<std::int64_t> numbers(runs, runs + 4 * run_count);
        *output = new at::Tensor(
            MergedAttention::apply(*query, *key, *value, *own_key, *own_value, std::move(numbers), scale));
      },
      error, error_size);
}

int specforge_trained_linear(const at::Tensor *input, const at::Tensor *weight, at::Tensor **output, char *error,
                             std::size_t error_size) {
  return guarded([&] { *output = new at::Tensor(OnednnLinear::apply(*input, *weight)); }, error, error_size);
}

}  // extern "C"

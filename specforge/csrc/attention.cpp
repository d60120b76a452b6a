// Attention on shared keys, with a few keys of each query's own, and attention of packed documents. Errors as in
// shim.cpp; nn/merged_attention.rs says what the first is for.
//
// R queries, S shared keys, I own keys, N heads, G key/value heads, r = N / G heads of a group, D head size.
//
// On the CPU the kernel runs once for each run of queries. On CUDA, where a launch costs as much as a run's work, all runs
// of a batch go through one call of a kernel for documents of several lengths, each document a stretch of the packed keys
// with the queries that stand in its last rows.

#include <ATen/TensorOperators.h>
#include <ATen/ops/_efficient_attention_backward.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "guarded.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Queries [first_query, first_query + count) see keys [first_key, first_key + keys): all of them, or, if `causal`, the last
// query all and each query before it one less.
struct Run {
  std::int64_t first_query, count, first_key, keys;
  bool causal;
};

// All runs as documents for one call. Queries are spread so that each document's are consecutive rows up to its end; rows
// that no query stands in are zero.
struct Packed {
  at::Tensor slots;     // int64 [R], the row of each query
  at::Tensor sums;      // int64 [R], its place among log-sum-exps of [documents, longest queries padded]
  at::Tensor queries;   // int32 [documents + 1], where each document's rows begin
  at::Tensor keys;      // int32 [documents + 1], where its keys do
  std::int64_t rows = 0, most_queries = 0, most_keys = 0;

  bool empty() const { return !slots.defined(); }
  // Longest queries, as the memory-saving kernel keeps their log-sum-exps.
  std::int64_t padded() const { return (most_queries + 31) / 32 * 32; }
  // [R, ..] to [rows, ..]
  at::Tensor spread(const at::Tensor &values) const {
    auto shape = values.sizes().vec();
    shape[0] = rows;
    return at::zeros(shape, values.options()).index_copy_(0, slots, values);
  }
};

// ---- documents in one call -------------------------------------------------------------------------------------------

// Queries at the end of their document, as CUDA's memory-saving kernel calls it.
constexpr std::int64_t CAUSAL_FROM_THE_END = 2;

// Cleared where this GPU, or this build of libtorch, has no flash attention.
std::atomic<bool> flash_works{true};

bool wants_flash(const at::Tensor &query) {
  const auto kind = query.scalar_type();
  const auto dim = query.size(2);
  return (kind == at::kHalf || kind == at::kBFloat16) && dim % 8 == 0 && dim <= 256 && flash_works;
}

// Whether flash attention refused this device, and not these numbers.
bool is_no_flash(const c10::Error &error) {
  const std::string text = error.what_without_backtrace();
  return text.find("FlashAttention only") != std::string::npos || text.find("FLASH_ATTENTION") != std::string::npos;
}

// [S, G, D] to [S, N, D]: for kernels that want a key for every head.
at::Tensor for_all_heads(const at::Tensor &keys, std::int64_t heads) {
  const auto groups = keys.size(1);
  if (groups == heads) return keys;
  return keys.unsqueeze(2).expand({keys.size(0), groups, heads / groups, keys.size(2)}).reshape({keys.size(0), heads, -1});
}

struct Documents {
  at::Tensor output;         // [rows, N, D]
  at::Tensor log_sum;        // flash: [N, rows]; else [documents, N, padded]
  at::Tensor seed, offset;   // what the kernel wants back
  bool flash;
};

// query [rows, N, D], key and value [S, G, D].
Documents documents_forward(const at::Tensor &query, const at::Tensor &key, const at::Tensor &value,
                            const at::Tensor &queries, const at::Tensor &keys, std::int64_t most_queries,
                            std::int64_t most_keys, bool with_log_sum, double scale) {
  if (wants_flash(query)) {
    try {
      auto [output, log_sum, seed, offset, mask] =
          at::_flash_attention_forward(query, key, value, queries, keys, most_queries, most_keys, 0.0,
                                       /*is_causal=*/true, /*return_debug_mask=*/false, scale);
      if (!with_log_sum || log_sum.dim() == 2) return {output, log_sum, seed, offset, true};
      flash_works = false;
    } catch (const c10::Error &error) {
      if (!is_no_flash(error)) throw;
      flash_works = false;
    }
  }
  auto [output, log_sum, seed, offset, longest_query, longest_key] = at::_efficient_attention_forward(
      query.unsqueeze(0), for_all_heads(key, query.size(1)).unsqueeze(0),
      for_all_heads(value, query.size(1)).unsqueeze(0), std::nullopt, queries, keys, most_queries, most_keys, 0.0,
      CAUSAL_FROM_THE_END, with_log_sum, scale);
  return {output.squeeze(0), log_sum, seed, offset, false};
}

// ---- one run after the other -----------------------------------------------------------------------------------------

// The keys of a run in parts that a kernel knows: those before it, all visible, and its own, causal.
struct Part {
  std::int64_t first_key, count;
  bool causal;
};

std::vector<Part> parts_of(const Run &run) {
  if (!run.causal) {
    if (run.keys == 0) return {};
    return {{run.first_key, run.keys, false}};
  }
  std::vector<Part> parts;
  const auto before = run.keys - run.count;
  if (before > 0) parts.push_back({run.first_key, before, false});
  parts.push_back({run.first_key + before, run.count, true});
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

// Two softmaxes over different keys as one over all of them.
Attended merge(const Attended &left, const Attended &right) {
  const auto all = at::logaddexp(left.log_sum, right.log_sum);
  const auto share = [&](const Attended &part) { return part.output * (part.log_sum - all).exp_().unsqueeze(-1); };
  return {(share(left) + share(right)).to(left.output.scalar_type()), all};
}

// ---- both ------------------------------------------------------------------------------------------------------------

class MergedAttention : public torch::autograd::Function<MergedAttention> {
 public:
  // query [R, N, D]; key, value [S, G, D]; own_key, own_value [R / b, I, G, D], each set shared by b consecutive queries;
  // `hidden [I, I]`, booleans where there is one: which own keys query i of a set does not see, where I is b; or b is 1, and the
  // heads of a group are I queries of as many heads each, one behind the other. Returns [R, N, D].
  static at::Tensor forward(AutogradContext *context, const at::Tensor &query, const at::Tensor &key,
                            const at::Tensor &value, const at::Tensor &own_key, const at::Tensor &own_value,
                            const std::optional<at::Tensor> &hidden,
                            std::vector<std::int64_t> numbers, const Packed &packed, double scale) {
    const auto groups = key.size(1), own = own_key.size(1);
    at::Tensor output, log_sum;  // [R, N, D], [R, N, 1]
    if (packed.empty()) {
      std::tie(output, log_sum) = run_by_run(query, key, value, runs(numbers), scale);
    } else {
      const auto all = documents_forward(packed.spread(query), key, value, packed.queries, packed.keys,
                                         packed.most_queries, packed.most_keys, /*with_log_sum=*/true, scale);
      output = all.output.index_select(0, packed.slots);
      log_sum = all.flash ? all.log_sum.t().index_select(0, packed.slots)
                          : all.log_sum.transpose(1, 2).flatten(0, 1).index_select(0, packed.sums);
      log_sum = log_sum.unsqueeze(-1);
      context->saved_data["flash"] = all.flash;
      context->saved_data["seed"] = all.seed;
      context->saved_data["offset"] = all.offset;
      context->saved_data["places"] =
          std::vector<at::Tensor>{packed.slots, packed.sums, packed.queries, packed.keys};
      context->saved_data["sizes"] = std::vector<std::int64_t>{packed.rows, packed.most_queries, packed.most_keys};
    }
    if (own > 0) {
      const auto wide = log_sum.scalar_type();
      const auto scores = own_scores(query, own_key, hidden, scale, wide);  // [R, N, I]
      // One softmax over the shared keys, as if they were one, and the own ones.
      const auto shares = at::cat({log_sum, scores}, -1).log_softmax(-1);  // [R, N, 1 + I]
      log_sum = scores.narrow(-1, 0, 1) - shares.narrow(-1, 1, 1);         // [R, N, 1]
      const auto weights = shares.exp();
      const auto mixed = together(at::matmul(apart(weights.narrow(-1, 1, own), own_key), own_value.to(wide).transpose(1, 2)),
                                  query);  // [R, N, D]
      output = at::addcmul(mixed, output, weights.narrow(-1, 0, 1)).to(query.scalar_type());
    }
    context->save_for_backward({query, key, value, own_key, own_value, output, log_sum});
    context->saved_data["numbers"] = numbers;
    context->saved_data["scale"] = scale;
    if (hidden) context->saved_data["hidden"] = *hidden;
    return output;
  }

  static variable_list backward(AutogradContext *context, variable_list slopes) {
    const auto saved = context->get_saved_variables();
    const auto &query = saved[0], &key = saved[1], &value = saved[2], &own_key = saved[3], &own_value = saved[4],
               &output = saved[5], &log_sum = saved[6];
    const auto scale = context->saved_data["scale"].toDouble();
    const auto own = own_key.size(1);
    const auto slope = slopes[0].contiguous();  // [R, N, D]
    at::Tensor query_slope, key_slope, value_slope;
    if (context->saved_data.count("places") > 0) {
      std::tie(query_slope, key_slope, value_slope) =
          packed_backward(context, slope, query, key, value, output, log_sum, scale);
    } else {
      const auto numbers = context->saved_data["numbers"].toIntVector();
      std::tie(query_slope, key_slope, value_slope) =
          run_by_run_backward(slope, query, key, value, output, log_sum, runs(numbers), scale);
    }
    at::Tensor own_key_slope, own_value_slope;
    if (own > 0) {
      const auto wide = log_sum.scalar_type(), kind = query.scalar_type();
      std::optional<at::Tensor> hidden;
      if (context->saved_data.count("hidden") > 0) hidden = context->saved_data["hidden"].toTensor();
      const auto wide_slope = slope.to(wide);
      const auto weights = (own_scores(query, own_key, hidden, scale, wide) - log_sum).exp_();  // [R, N, I]
      const auto common = (wide_slope * output).sum(-1, /*keepdim=*/true);              // [R, N, 1]
      const auto split = [&](const at::Tensor &tensor) { return apart(tensor, own_key); };
      const auto of_weights =
          together(at::matmul(split(wide_slope), own_value.to(wide).permute({0, 2, 3, 1})), query);
      const auto of_scores = weights * (of_weights - common) * scale;  // [R, N, I]
      const auto of_query = together(at::matmul(split(of_scores), own_key.to(wide).transpose(1, 2)), query);
      query_slope = (query_slope + of_query).to(kind);
      const auto own_slope = [&](const at::Tensor &left, const at::Tensor &right) {
        return at::matmul(split(left).transpose(2, 3), split(right)).transpose(1, 2).to(kind);  // [R / b, I, G, D]
      };
      own_key_slope = own_slope(of_scores, query.to(wide));
      own_value_slope = own_slope(weights, wide_slope);
    }
    return {query_slope,  key_slope,    value_slope,  own_key_slope, own_value_slope,
            at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }

 private:
  static std::vector<Run> runs(const std::vector<std::int64_t> &numbers) {
    std::vector<Run> runs;
    for (std::size_t at = 0; at + 4 < numbers.size(); at += 5)
      runs.push_back({numbers[at], numbers[at + 1], numbers[at + 2], numbers[at + 3], numbers[at + 4] != 0});
    return runs;
  }

  static std::tuple<at::Tensor, at::Tensor> run_by_run(const at::Tensor &query, const at::Tensor &key,
                                                       const at::Tensor &value, const std::vector<Run> &runs,
                                                       double scale) {
    const auto heads = query.size(1), groups = key.size(1);
    const auto wide = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    std::vector<at::Tensor> outputs, log_sums;
    for (const auto &run : runs) {
      const auto rows = query.narrow(0, run.first_query, run.count);
      const auto q = grouped(rows, groups);
      std::optional<Attended> merged;
      for (const auto &part : parts_of(run)) {
        const auto k = shared_keys(key.narrow(0, part.first_key, part.count), heads);
        const auto v = shared_keys(value.narrow(0, part.first_key, part.count), heads);
        auto attended = attend(q, k, v, part.causal, scale);
        merged = merged ? merge(*merged, attended) : attended;
      }
      if (merged) {
        outputs.push_back(joined(merged->output));                  // [c, N, D]
        log_sums.push_back(joined(merged->log_sum.unsqueeze(-1)));  // [c, N, 1]
      } else {  // nothing to see but keys of its own
        outputs.push_back(at::zeros_like(rows));
        log_sums.push_back(at::full({run.count, heads, 1}, -std::numeric_limits<double>::infinity(),
                                    query.options().dtype(wide)));
      }
    }
    return {at::cat(outputs, 0), at::cat(log_sums, 0)};
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> run_by_run_backward(
      const at::Tensor &slope, const at::Tensor &query, const at::Tensor &key, const at::Tensor &value,
      const at::Tensor &output, const at::Tensor &log_sum, const std::vector<Run> &runs, double scale) {
    const auto heads = query.size(1), groups = key.size(1);
    std::vector<at::Tensor> query_slopes;
    auto key_slope = at::zeros_like(key), value_slope = at::zeros_like(value);  // [S, G, D]
    for (const auto &run : runs) {
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
      query_slopes.push_back(run_slope.defined() ? joined(run_slope)
                                                 : at::zeros_like(query.narrow(0, run.first_query, run.count)));
    }
    return {at::cat(query_slopes, 0), key_slope, value_slope};
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_backward(AutogradContext *context,
                                                                        const at::Tensor &slope, const at::Tensor &query,
                                                                        const at::Tensor &key, const at::Tensor &value,
                                                                        const at::Tensor &output,
                                                                        const at::Tensor &log_sum, double scale) {
    const auto places = context->saved_data["places"].toTensorVector();
    const auto sizes = context->saved_data["sizes"].toIntVector();
    const Packed packed{places[0], places[1], places[2], places[3], sizes[0], sizes[1], sizes[2]};
    const auto seed = context->saved_data["seed"].toTensor(), offset = context->saved_data["offset"].toTensor();
    const auto heads = query.size(1), groups = key.size(1);
    const auto s = packed.spread(slope), q = packed.spread(query), o = packed.spread(output);
    const auto sum = log_sum.squeeze(-1);  // [R, N]
    if (context->saved_data["flash"].toBool()) {
      auto [dq, dk, dv] = at::_flash_attention_backward(
          s, q, key, value, o, packed.spread(sum).t().contiguous(), packed.queries, packed.keys, packed.most_queries,
          packed.most_keys, 0.0, /*is_causal=*/true, seed, offset, scale);
      return {dq.index_select(0, packed.slots), dk, dv};
    }
    const auto documents = packed.queries.size(0) - 1;
    const auto sums = at::zeros({documents * packed.padded(), heads}, sum.options())
                          .index_copy_(0, packed.sums, sum)
                          .view({documents, packed.padded(), heads})
                          .transpose(1, 2)
                          .contiguous();
    auto [dq, dk, dv, none] = at::_efficient_attention_backward(
        s.unsqueeze(0), q.unsqueeze(0), for_all_heads(key, heads).unsqueeze(0), for_all_heads(value, heads).unsqueeze(0),
        std::nullopt, o.unsqueeze(0), packed.queries, packed.keys, packed.most_queries, packed.most_keys, sums, 0.0, seed,
        offset, CAUSAL_FROM_THE_END, /*bias_requires_grad=*/false, scale);
    const auto of_group = [&](const at::Tensor &all) {
      return heads == groups ? all.squeeze(0) : all.view({key.size(0), groups, heads / groups, -1}).sum(2);
    };
    return {dq.squeeze(0).index_select(0, packed.slots), of_group(dk), of_group(dv)};
  }

  // [R, N, x] to [R / b, G, b r, x]: what meets one set of own keys in one product.
  static at::Tensor apart(const at::Tensor &rows, const at::Tensor &own_key) {
    const auto sets = own_key.size(0), groups = own_key.size(2), heads = rows.size(1);
    return rows.reshape({sets, rows.size(0) / sets, groups, heads / groups, rows.size(2)})
        .transpose(1, 2)
        .reshape({sets, groups, -1, rows.size(2)});
  }

  // The way back, for as many queries as `query [R, N, D]` has.
  static at::Tensor together(const at::Tensor &products, const at::Tensor &query) {
    const auto sets = products.size(0), groups = products.size(1), heads = query.size(1);
    return products.reshape({sets, groups, query.size(0) / sets, heads / groups, products.size(3)})
        .transpose(1, 2)
        .reshape({query.size(0), heads, products.size(3)});
  }

  // Scores of each query with its own keys, [R, N, I], in float32 at least, as the kernels keep those of shared keys and
  // decoding keeps all: at a score of 40, one rounding to bfloat16 moves a weight by a tenth. What follows stays wide up to
  // the one rounding of each result; own keys are few, so that costs next to nothing.
  static at::Tensor own_scores(const at::Tensor &query, const at::Tensor &own_key,
                               const std::optional<at::Tensor> &hidden, double scale,
                               at::ScalarType kind) {
    const auto products = at::matmul(apart(query.to(kind), own_key), own_key.to(kind).permute({0, 2, 3, 1}));
    const auto scores = together(products, query) * scale;
    if (!hidden) return scores;
    const auto own = own_key.size(1), groups = own_key.size(2);
    const auto none = -std::numeric_limits<double>::infinity();
    if (own_key.size(0) * own == scores.size(0))
      return scores.view({-1, own, scores.size(1), own}).masked_fill(hidden->unsqueeze(1), none).view(scores.sizes());
    return scores.view({scores.size(0), groups, own, -1, own}).masked_fill(hidden->unsqueeze(1), none).view(scores.sizes());
  }
};

}  // namespace

extern "C" {

// `runs` holds five numbers a run; `places` is null, or the four tensors of `Packed` with `sizes` of three numbers.
int specforge_merged_attention(const at::Tensor *query, const at::Tensor *key, const at::Tensor *value,
                               const at::Tensor *own_key, const at::Tensor *own_value, const at::Tensor *hidden,
                               const std::int64_t *runs, std::int64_t run_count, const at::Tensor *const *places, const std::int64_t *sizes,
                               double scale, at::Tensor **output, char *error, std::size_t error_size) {
  return guarded(
      [&] {
        std::vector<std::int64_t> numbers(runs, runs + 5 * run_count);
        Packed packed;
        if (places != nullptr)
          packed = {*places[0], *places[1], *places[2], *places[3], sizes[0], sizes[1], sizes[2]};
        *output = new at::Tensor(
            MergedAttention::apply(*query, *key, *value, *own_key, *own_value,
                                                        hidden == nullptr ? std::nullopt : std::make_optional(*hidden),
                                                        std::move(numbers), packed,
                                   scale));
      },
      error, error_size);
}

// Causal attention of documents that follow each other, on CUDA and without gradients: query [T, N, D], key and value
// [T, G, D], `bounds` int32 [documents + 1], where each begins, and the length of the longest. Returns [T, N, D].
int specforge_packed_attention(const at::Tensor *query, const at::Tensor *key, const at::Tensor *value,
                               const at::Tensor *bounds, std::int64_t longest, double scale, at::Tensor **output,
                               char *error, std::size_t error_size) {
  return guarded(
      [&] {
        *output = new at::Tensor(documents_forward(*query, *key, *value, *bounds, *bounds, longest, longest,
                                                   /*with_log_sum=*/false, scale)
                                     .output);
      },
      error, error_size);
}

}  // extern "C"

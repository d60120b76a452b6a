// Losses against a large vocabulary on the CPU, row by row: all that a chunk of logits is asked for while its row is in
// the processor's cache. As operators of libtorch it takes some twenty passes over memory, each exponential up to five
// times. draft/loss.rs and draft/distillation.rs say what is computed; float32 alone, everything else goes by operators.
//
// Shape legend: V vocabulary of the target, D of the draft, m rows, u target positions.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "guarded.h"
#include "processors.h"

namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

struct Teacher {
  float *log_reachable, *reachable;  // [u, D] log p_S and p_S
  float *log_mass, *entropy;         // [u] log of the target's own probability of S; sum p_S log p_S
  std::int64_t *top;                 // [u] likeliest token as a draft id, -1 where there is none
};

// In the order of `DistillationLoss`.
enum class Loss : std::int64_t { cross_entropy, kl, reverse_kl, total_variation, lk_alpha, lk_lambda };

struct Outcomes {
  float *losses, *acceptance;  // [m]
  bool *hits, *covered;        // [m]
  double *objective;           // [m] weighted losses
};

struct Row {
  std::int64_t place, teacher;
  float weight;                      // 0 without gradients
  float parity_weight, parity_mean;  // as SpecForge divides; NaN where it does not
};

// The loops over a row, on vectors of LANES numbers.
template <int LANES>
struct Rows : Loops<LANES> {
  using Base = Loops<LANES>;
  using lanes = typename Base::lanes;
  using marks = typename Base::whole;
  using Sum = typename Base::Sum;
  using Base::exponential, Base::load, Base::store, Base::walk;

  // The largest of a row, and how many of it are at least `own`; numbers that are none are neither.
  struct Ranked {
    float most;
    std::int64_t rank;
  };

  static INLINE Ranked ranked(const float *row, std::int64_t count, float own) {
    lanes most{};
    marks least{};
    most += NOTHING;
    Ranked found{NOTHING, 0};
    walk(
        count,
        [&](std::int64_t index) INLINED {
          const lanes values = load(row + index);
          most = values > most ? values : most;
          least -= values >= own;
        },
        [&]() INLINED {},
        [&](std::int64_t index) INLINED {
          found.most = std::max(found.most, row[index]);
          found.rank += row[index] >= own;
        });
    for (std::int64_t lane = 0; lane < LANES; lane++) {
      found.most = std::max(found.most, most[lane]);
      found.rank += least[lane];
    }
    return found;
  }

  // Sum of e^(x - most), which `into` receives where it is given.
  static INLINE double exponentials(const float *row, std::int64_t count, float most, float *into) {
    Sum sum;
    walk(
        count,
        [&](std::int64_t index) INLINED {
          const lanes values = exponential(load(row + index) - most);
          if (into != nullptr) store(into + index, values);
          sum.add(values);
        },
        [&]() INLINED { sum.flush(); },
        [&](std::int64_t index) INLINED {
          const float value = exponential(row[index] - most);
          if (into != nullptr) into[index] = value;
          sum.add(value);
        });
    return sum.total;
  }

  // ---- one label a row -------------------------------------------------------------------------------------------------

  // Loss and rank of a label, and `softmax - onehot` in `slope`, which may be the row itself, where it is wanted.
  static INLINE void hard_row(const float *row, std::int64_t count, std::int64_t label, float *loss, float *rank,
                              float *slope) {
    const float own = row[label];
    const auto found = ranked(row, count, own);
    const double sum = exponentials(row, count, found.most, slope);
    const float value = static_cast<float>(std::log(sum) + (static_cast<double>(found.most) - own));
    *loss = value;
    *rank = static_cast<float>(found.rank);
    if (slope == nullptr) return;
    const float share = static_cast<float>(1.0 / sum);
    walk(
        count, [&](std::int64_t index) INLINED { store(slope + index, load(slope + index) * share); }, []() INLINED {},
        [&](std::int64_t index) INLINED { slope[index] *= share; });
    // Before any rounding: a confident row's slope would be lost otherwise.
    slope[label] = std::expm1(-value);
  }

  // ---- distributions ---------------------------------------------------------------------------------------------------

  // The first of the largest; numbers that are none count as larger, as argmax has it.
  static INLINE std::int64_t first_largest(const float *row, std::int64_t count, float most, bool sound) {
    for (std::int64_t index = 0; index < count; index++)
      if (sound ? row[index] == most : row[index] != row[index]) return index;
    return 0;
  }

  static INLINE void teacher_row(const float *row, std::int64_t size, const std::int64_t *target_ids,
                                 const std::int64_t *draft_ids, std::int64_t draft_size, std::int64_t place,
                                 const Teacher &into, bool with_entropy) {
    const float most = ranked(row, size, 0.0f).most;
    const double sum = exponentials(row, size, most, nullptr);
    const std::int64_t top = first_largest(row, size, most, sum == sum);
    into.top[place] = draft_ids == nullptr ? top : draft_ids[top];
    float *log_own = into.log_reachable + place * draft_size, *own = into.reachable + place * draft_size;
    double own_sum = sum;
    float own_most = most;
    const float *from = row;
    if (target_ids != nullptr) {
      for (std::int64_t token = 0; token < draft_size; token++) log_own[token] = row[target_ids[token]];
      own_most = ranked(log_own, draft_size, 0.0f).most;
      own_sum = exponentials(log_own, draft_size, own_most, nullptr);
      from = log_own;
    }
    into.log_mass[place] =
        target_ids == nullptr
            ? 0.0f
            : static_cast<float>((static_cast<double>(own_most) - most) + (std::log(own_sum) - std::log(sum)));
    const float log_sum = static_cast<float>(std::log(own_sum));
    Sum entropy;
    walk(
        draft_size,
        [&](std::int64_t index) INLINED {
          const lanes logs = (load(from + index) - own_most) - log_sum, values = exponential(logs);
          store(log_own + index, logs);
          store(own + index, values);
          if (with_entropy) entropy.add(values * logs);
        },
        [&]() INLINED { entropy.flush(); },
        [&](std::int64_t index) INLINED {
          const float log = (from[index] - own_most) - log_sum, value = exponential(log);
          log_own[index] = log;
          own[index] = value;
          if (with_entropy) entropy.add(value * log);
        });
    into.entropy[place] = static_cast<float>(entropy.total);
  }

  // Values of a row of logits, and in its place the gradient of the weighted loss where it is wanted.
  static INLINE void soft_row(float *row, float *scratch, std::int64_t size, const Teacher &teacher, Loss loss,
                              float lambda_scale, float lambda_decay, const Row &at, const Outcomes &into,
                              bool with_slope) {
    const std::int64_t top = teacher.top[at.teacher];
    const bool covered = top >= 0;
    const float *log_target = teacher.log_reachable + at.teacher * size, *target = teacher.reachable + at.teacher * size;
    const float log_mass = teacher.log_mass[at.teacher], mass = std::exp(log_mass);
    const auto found = ranked(row, size, row[std::max<std::int64_t>(top, 0)]);
    const double sum = exponentials(row, size, found.most, scratch);
    const float share = static_cast<float>(1.0 / sum), log_sum = static_cast<float>(std::log(sum)), most = found.most;
    // alpha = sum min(p, q); the part of q that is the smaller one; cross-entropy; sum q (log q - log p_S).
    Sum accepted, smaller, cross, reverse;
    const bool is_reverse = loss == Loss::reverse_kl;
    walk(
        size,
        [&](std::int64_t index) INLINED {
          const lanes draft = load(scratch + index) * share, log_draft = (load(row + index) - most) - log_sum;
          const lanes p = load(target + index), log_p = load(log_target + index), own = p * mass;
          store(scratch + index, draft);
          // Numbers that are none stay so.
          accepted.add(draft < own ? draft : (draft == draft ? own : draft));
          smaller.add(log_draft < log_p + log_mass ? draft : lanes{});
          cross.add(p * log_draft);
          if (is_reverse) reverse.add(draft * (log_draft - log_p));
        },
        [&]() INLINED { accepted.flush(), smaller.flush(), cross.flush(), reverse.flush(); },
        [&](std::int64_t index) INLINED {
          const float draft = scratch[index] * share, log_draft = (row[index] - most) - log_sum;
          const float p = target[index], log_p = log_target[index], own = p * mass;
          scratch[index] = draft;
          accepted.add(draft < own ? draft : (draft == draft ? own : draft));
          smaller.add(log_draft < log_p + log_mass ? draft : 0.0f);
          cross.add(p * log_draft);
          if (is_reverse) reverse.add(draft * (log_draft - log_p));
        });
    const float alpha = sum == sum ? static_cast<float>(accepted.total) : std::numeric_limits<float>::quiet_NaN();
    const float cross_entropy = static_cast<float>(-cross.total), inside = static_cast<float>(smaller.total);
    const auto lambda = [&](float acceptance) { return lambda_scale * std::exp(-lambda_decay * acceptance); };
    float value = 0;
    switch (loss) {
      case Loss::cross_entropy: value = cross_entropy; break;
      case Loss::kl: value = static_cast<float>(teacher.entropy[at.teacher] - cross.total); break;
      case Loss::reverse_kl: value = static_cast<float>(reverse.total); break;
      case Loss::total_variation: value = 1.0f - alpha; break;
      case Loss::lk_alpha: value = -std::log(alpha); break;
      case Loss::lk_lambda: value = lambda(alpha) * cross_entropy + (1.0f - lambda(alpha)) * (1.0f - alpha); break;
    }
    // No acceptance at all has no logarithm, and a row without a loss must not spread what it has instead.
    if (!covered || (loss == Loss::lk_alpha && !(alpha > 0.0f))) value = 0;
    into.losses[at.place] = value;
    into.acceptance[at.place] = alpha;
    into.hits[at.place] = covered && found.rank == 1;
    into.covered[at.place] = covered;
    if (!with_slope) return;

    // slope = of_draft q + of_target p_S + of_smaller [q is the smaller] q + of_ratio q (log q - log p_S)
    const float weight = covered ? at.weight : 0.0f;
    float of_draft = 0, of_target = 0, of_smaller = 0, of_ratio = 0;
    double objective = static_cast<double>(value) * weight;
    const auto by_cross_entropy = [&](float factor) { of_draft += factor, of_target -= factor; };
    // Gradient of alpha: q_j (m_j - sum of m q), where m_j says that q_j is the smaller one.
    const auto by_acceptance = [&](float factor) { of_smaller += factor, of_draft -= factor * inside; };
    switch (loss) {
      case Loss::cross_entropy:
      case Loss::kl: by_cross_entropy(weight); break;
      case Loss::reverse_kl: of_ratio = weight, of_draft = -weight * value; break;
      case Loss::total_variation: by_acceptance(-weight); break;
      case Loss::lk_alpha: {
        const float own = at.parity_weight == at.parity_weight ? (covered ? at.parity_weight : 0.0f) : weight;
        const float factor = own / alpha;
        by_acceptance(std::isfinite(factor) ? -factor : 0.0f);
        objective = static_cast<double>(value) * own;
        break;
      }
      case Loss::lk_lambda: {
        const bool parity = at.parity_weight == at.parity_weight;
        const float part = lambda(parity ? at.parity_mean : alpha);
        const float left = weight * part, right = (parity ? (covered ? at.parity_weight : 0.0f) : weight) * (1.0f - part);
        by_cross_entropy(left);
        by_acceptance(-right);
        if (parity) objective = static_cast<double>(left) * cross_entropy + static_cast<double>(right) * (1.0f - alpha);
        break;
      }
    }
    into.objective[at.place] = objective;
    walk(
        size,
        [&](std::int64_t index) INLINED {
          const lanes draft = load(scratch + index), p = load(target + index);
          lanes slope = draft * of_draft + p * of_target;
          if (of_smaller != 0.0f || is_reverse) {
            const lanes log_draft = (load(row + index) - most) - log_sum, log_p = load(log_target + index);
            if (is_reverse)
              slope += draft * (log_draft - log_p) * of_ratio;
            else
              slope += log_draft < log_p + log_mass ? draft * of_smaller : lanes{};
          }
          store(row + index, slope);
        },
        []() INLINED {},
        [&](std::int64_t index) INLINED {
          const float draft = scratch[index], log_draft = (row[index] - most) - log_sum, log_p = log_target[index];
          float slope = draft * of_draft + target[index] * of_target;
          if (is_reverse)
            slope += draft * (log_draft - log_p) * of_ratio;
          else if (log_draft < log_p + log_mass)
            slope += draft * of_smaller;
          row[index] = slope;
        });
  }
};

struct HardRow {
  template <int LANES, typename... Arguments>
  static INLINE void run(Arguments... arguments) {
    Rows<LANES>::hard_row(arguments...);
  }
};
struct TeacherRow {
  template <int LANES, typename... Arguments>
  static INLINE void run(Arguments... arguments) {
    Rows<LANES>::teacher_row(arguments...);
  }
};
struct SoftRow {
  template <int LANES, typename... Arguments>
  static INLINE void run(Arguments... arguments) {
    Rows<LANES>::soft_row(arguments...);
  }
};

void check(const at::Tensor &tensor, at::ScalarType kind, std::int64_t count, const char *name) {
  TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == kind && tensor.numel() == count,
              "losses of rows: `", name, "`: expected ", count, " contiguous numbers of ", kind, " on the CPU, got ",
              tensor.sizes(), " of ", tensor.scalar_type());
}

template <typename Number>
Number *numbers(const at::Tensor *tensor, at::ScalarType kind, std::int64_t count, const char *name) {
  check(*tensor, kind, count, name);
  return static_cast<Number *>(tensor->data_ptr());
}

void check_ids(const std::int64_t *ids, std::int64_t count, std::int64_t least, std::int64_t size, const char *name) {
  for (std::int64_t index = 0; index < count; index++)
    TORCH_CHECK(least <= ids[index] && ids[index] < size, "losses of rows: ", name, " ", ids[index], " is not below ",
                size);
}

// Losses and ranks [m] of logits [m, V] with labels [m], and slopes [m, V], which may be the logits themselves.
void hard_rows(const float *row, std::int64_t rows, std::int64_t size, const std::int64_t *label, float *loss, float *rank,
               float *slope) {
  check_ids(label, rows, 0, size, "label");
  at::parallel_for(0, rows, /*grain_size=*/1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t at = begin; at < end; at++)
      dispatch<HardRow>(row + at * size, size, label[at], loss + at, rank + at,
                        slope == nullptr ? nullptr : slope + at * size);
  });
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The same as an operator with a gradient, for logits that others read as well. Its slope is scaled where it lies, so it
// can be followed once.
class CrossEntropyRows : public torch::autograd::Function<CrossEntropyRows> {
 public:
  static at::Tensor forward(AutogradContext *context, const at::Tensor &logits, const at::Tensor &labels,
                            const at::Tensor &ranks, bool learns) {
    const std::int64_t rows = logits.size(0), size = logits.size(1);
    const auto *label = numbers<std::int64_t>(&labels, at::kLong, rows, "labels");
    const at::Tensor losses = at::empty({rows}, logits.options());
    const at::Tensor slope = learns ? at::empty_like(logits) : at::Tensor();
    hard_rows(numbers<float>(&logits, at::kFloat, rows * size, "logits"), rows, size, label,
              losses.mutable_data_ptr<float>(), numbers<float>(&ranks, at::kFloat, rows, "ranks"),
              learns ? slope.mutable_data_ptr<float>() : nullptr);
    context->saved_data["slope"] = slope;
    return losses;
  }

  static variable_list backward(AutogradContext *context, variable_list slopes) {
    at::Tensor slope = context->saved_data["slope"].toTensor();
    TORCH_CHECK(slope.defined(), "losses of rows: their gradient was followed before");
    context->saved_data["slope"] = at::Tensor();
    return {slope.mul_(slopes[0].unsqueeze(1)), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

extern "C" {

// Cross-entropy [m] of logits [m, V] with labels [m], with a graph where the logits have one; ranks [m] are written.
int specforge_cross_entropy_rows(const at::Tensor *logits, const at::Tensor *labels, const at::Tensor *ranks,
                                 at::Tensor **losses, char *error, std::size_t error_size) {
  return guarded(
      [&] {
        const bool learns = logits->requires_grad() && at::GradMode::is_enabled();
        *losses = new at::Tensor(CrossEntropyRows::apply(logits->contiguous(), labels->contiguous(), *ranks, learns));
      },
      error, error_size);
}

// Cross-entropy of logits [m, V] with labels [m]: losses and ranks [m], and `softmax - onehot` in place of the logits.
int specforge_hard_losses(const at::Tensor *logits, const at::Tensor *labels, const at::Tensor *losses,
                          const at::Tensor *ranks, int with_slope, char *error, std::size_t error_size) {
  return guarded(
      [&] {
        const std::int64_t rows = logits->size(0), size = logits->size(1);
        auto *row = numbers<float>(logits, at::kFloat, rows * size, "logits");
        const auto *label = numbers<std::int64_t>(labels, at::kLong, rows, "labels");
        auto *loss = numbers<float>(losses, at::kFloat, rows, "losses"), *rank = numbers<float>(ranks, at::kFloat, rows, "ranks");
        hard_rows(row, rows, size, label, loss, rank, with_slope ? row : nullptr);
      },
      error, error_size);
}

// What the target predicts at some positions, from its logits [u, V]. `vocabulary` is null, or the target ids of the
// draft's tokens [D] and the draft ids of the target's [V]. `into` holds log p_S and p_S [u, D], log mass, entropy, and
// the likeliest token [u].
int specforge_teacher_rows(const at::Tensor *logits, const at::Tensor *const *vocabulary, const at::Tensor *const *into,
                           int with_entropy, char *error, std::size_t error_size) {
  return guarded(
      [&] {
        const std::int64_t rows = logits->size(0), size = logits->size(1), own = into[0]->size(1);
        const auto *row = numbers<float>(logits, at::kFloat, rows * size, "logits");
        const std::int64_t *target_ids = nullptr, *draft_ids = nullptr;
        if (vocabulary != nullptr) {
          target_ids = numbers<std::int64_t>(vocabulary[0], at::kLong, own, "target ids");
          draft_ids = numbers<std::int64_t>(vocabulary[1], at::kLong, size, "draft ids");
          check_ids(target_ids, own, 0, size, "target id");
          check_ids(draft_ids, size, -1, own, "draft id");
        } else {
          TORCH_CHECK(own == size, "losses of rows: ", own, " tokens of a draft, ", size, " of the target");
        }
        const Teacher teacher{numbers<float>(into[0], at::kFloat, rows * own, "log p"),
                              numbers<float>(into[1], at::kFloat, rows * own, "p"),
                              numbers<float>(into[2], at::kFloat, rows, "log mass"),
                              numbers<float>(into[3], at::kFloat, rows, "entropy"),
                              numbers<std::int64_t>(into[4], at::kLong, rows, "top")};
        at::parallel_for(0, rows, /*grain_size=*/1, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t at = begin; at < end; at++)
            dispatch<TeacherRow>(row + at * size, size, target_ids, draft_ids, own, at, teacher, with_entropy != 0);
        });
      },
      error, error_size);
}

// Losses of logits [m, D] against those predictions: row i learns from position `own[i]`. `weights` is null, or the
// factor of each row; `parity` null, or two more numbers a row. `into` holds losses, acceptance, hits, covered and
// weighted losses [m]. With weights, the gradient takes the place of the logits.
int specforge_soft_losses(const at::Tensor *logits, const at::Tensor *own, const at::Tensor *const *teacher,
                          std::int64_t loss, double lambda_scale, double lambda_decay, const at::Tensor *weights,
                          const at::Tensor *const *parity, const at::Tensor *const *into, char *error,
                          std::size_t error_size) {
  return guarded(
      [&] {
        const std::int64_t rows = logits->size(0), size = logits->size(1), positions = teacher[0]->size(0);
        auto *row = numbers<float>(logits, at::kFloat, rows * size, "logits");
        const auto *place = numbers<std::int64_t>(own, at::kLong, rows, "own");
        check_ids(place, rows, 0, positions, "position");
        const Teacher from{numbers<float>(teacher[0], at::kFloat, positions * size, "log p"),
                           numbers<float>(teacher[1], at::kFloat, positions * size, "p"),
                           numbers<float>(teacher[2], at::kFloat, positions, "log mass"),
                           numbers<float>(teacher[3], at::kFloat, positions, "entropy"),
                           numbers<std::int64_t>(teacher[4], at::kLong, positions, "top")};
        const auto *weight = weights == nullptr ? nullptr : numbers<float>(weights, at::kFloat, rows, "weights");
        const auto extra = [&](int index) {
          return parity == nullptr ? nullptr : numbers<float>(parity[index], at::kFloat, rows, "parity");
        };
        const float *factors = extra(0), *means = extra(1);
        const Outcomes outcomes{numbers<float>(into[0], at::kFloat, rows, "losses"),
                                numbers<float>(into[1], at::kFloat, rows, "acceptance"),
                                numbers<bool>(into[2], at::kBool, rows, "hits"),
                                numbers<bool>(into[3], at::kBool, rows, "covered"),
                                numbers<double>(into[4], at::kDouble, rows, "weighted losses")};
        const float none = std::numeric_limits<float>::quiet_NaN();
        at::parallel_for(0, rows, /*grain_size=*/1, [&](std::int64_t begin, std::int64_t end) {
          std::vector<float> scratch(size);
          for (std::int64_t at = begin; at < end; at++) {
            const Row one{at, place[at], weight == nullptr ? 0.0f : weight[at], factors == nullptr ? none : factors[at],
                          means == nullptr ? none : means[at]};
            dispatch<SoftRow>(row + at * size, scratch.data(), size, from, static_cast<Loss>(loss),
                     static_cast<float>(lambda_scale), static_cast<float>(lambda_decay), one, outcomes,
                     weight != nullptr);
          }
        });
      },
      error, error_size);
}

}  // extern "C"

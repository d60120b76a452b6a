// Losses against a large vocabulary on a GPU, row by row: the formulas of vocabulary_loss.cpp, for blocks of threads. As
// operators of libtorch they take twenty passes over a chunk's logits and more; here a row is read once for its largest
// logit, the sum of its exponentials and a rank, once for everything that is summed over two distributions, and once for
// the slope, which takes its place. draft/loss.rs and draft/distillation.rs say what is computed.
//
// The program compiles this when the first row needs it, with NVIDIA's compiler that has no headers (cuda_kernels.rs), so
// nothing is included. A block takes a row, and a block of one thread is a plain loop: tests compile the same text as C++
// (tests/rehearsal/libcuda.cpp).
//
// Shape legend: V vocabulary of the target, D of the draft, m rows, u target positions.

typedef long long wide;  // int64 of tensors

#define INSIDE __device__ __forceinline__
// Most threads of a block; cuda_kernels.rs asks for as many.
#define BLOCK 512

// Numbers that a thread asks for before it uses the first of them: memory answers late.
constexpr int AHEAD = 4;
constexpr int MOST_WARPS = 32;
// Numbers that are added up in float32 before they join a float64 total: keeps the rounding error small.
constexpr int STRETCH = 32;
// Below every logit that is finite.
constexpr float LEAST = -3.402823466e+38f;

// Every number of a matrix goes through these two; tests count them.
#ifndef TOUCHED
#define TOUCHED(place)
#endif

template <typename Number>
INSIDE Number fetch(const Number *place) {
  TOUCHED(place);
  return *place;
}

template <typename Number>
INSIDE void put(Number *place, Number value) {
  TOUCHED(place);
  *place = value;
}

INSIDE float not_a_number() { return __uint_as_float(0x7fc00000u); }
INSIDE bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

// ---- sums -----------------------------------------------------------------------------------------------------------

// Numbers of one thread.
struct Sum {
  float part = 0;
  double total = 0;
  int waiting = 0;

  INSIDE void add(float value) {
    part += value;
    if (++waiting < STRETCH) return;
    total += part;
    part = 0;
    waiting = 0;
  }
  INSIDE double all() const { return total + part; }
};

// Logits that were seen: the largest, and sums of e^(x - most) and of e^(x - most) (x - most).
struct Mass {
  float most;
  double sum, tilt;
};

// `of` as seen from another largest logit, which is not smaller.
INSIDE Mass below(const Mass &of, float most) {
  const float shift = of.most - most;
  const double factor = expf(shift);
  return {most, of.sum * factor, of.sum == 0 ? 0 : (of.tilt + of.sum * shift) * factor};
}

// The same of one thread, as logits come.
struct Seen {
  float most = LEAST;
  Sum sum, tilt;

  // A number that is none is not the largest, and makes the sums none.
  INSIDE void add(float logit) {
    if (logit > most) {
      const Mass moved = below(all(), logit);
      most = logit;
      sum.part = tilt.part = 0;
      sum.total = moved.sum;
      tilt.total = moved.tilt;
    }
    const float shift = logit - most, power = expf(shift);
    sum.add(power);
    tilt.add(power * shift);
  }
  INSIDE Mass all() const { return {most, sum.all(), tilt.all()}; }
};

// The first of the largest; numbers that are none count as larger, as argmax has it.
struct Leader {
  float value;
  wide place;
};

INSIDE bool leads(const Leader &one, const Leader &other) {
  const bool none = one.value != one.value, other_none = other.value != other.value;
  if (none != other_none) return none;
  return one.value > other.value || ((none || one.value == other.value) && one.place < other.place);
}

// What is summed over two distributions.
struct Overlap {
  double accepted;  // sum of min(p, q): alpha
  double smaller;   // the part of q that is the smaller one
  double cross;     // sum of p_S log q
  double reverse;   // sum of q (log q - log p_S)
};

// ---- a block as one -------------------------------------------------------------------------------------------------

// What the thread `offset` lanes away has.
INSIDE int beside(int value, int offset) { return __shfl_xor_sync(0xffffffffu, value, offset); }
INSIDE float beside(float value, int offset) { return __shfl_xor_sync(0xffffffffu, value, offset); }
INSIDE double beside(double value, int offset) { return __shfl_xor_sync(0xffffffffu, value, offset); }
INSIDE wide beside(wide value, int offset) { return __shfl_xor_sync(0xffffffffu, value, offset); }
INSIDE Mass beside(const Mass &value, int offset) {
  return {beside(value.most, offset), beside(value.sum, offset), beside(value.tilt, offset)};
}
INSIDE Leader beside(const Leader &value, int offset) {
  return {beside(value.value, offset), beside(value.place, offset)};
}
INSIDE Overlap beside(const Overlap &value, int offset) {
  return {beside(value.accepted, offset), beside(value.smaller, offset), beside(value.cross, offset),
          beside(value.reverse, offset)};
}

INSIDE int joined(int one, int other) { return one + other; }
INSIDE Mass joined(const Mass &one, const Mass &other) {
  const float most = one.most > other.most ? one.most : other.most;
  const Mass left = below(one, most), right = below(other, most);
  return {most, left.sum + right.sum, left.tilt + right.tilt};
}
INSIDE Leader joined(const Leader &one, const Leader &other) { return leads(other, one) ? other : one; }
INSIDE Overlap joined(const Overlap &one, const Overlap &other) {
  return {one.accepted + other.accepted, one.smaller + other.smaller, one.cross + other.cross,
          one.reverse + other.reverse};
}

// What all threads have, joined in the same order every time; every thread gets it. Whatever they read of a row before is
// read when this is over.
template <typename Value>
INSIDE Value together(Value value) {
  __shared__ Value parts[MOST_WARPS];
  for (int offset = warpSize / 2; offset > 0; offset /= 2) value = joined(value, beside(value, offset));
  const int thread = threadIdx.x, warps = (blockDim.x + warpSize - 1) / warpSize;
  if (thread % warpSize == 0) parts[thread / warpSize] = value;
  __syncthreads();
  value = parts[0];
  for (int warp = 1; warp < warps; warp++) value = joined(value, parts[warp]);
  __syncthreads();
  return value;
}

// Calls `visit(index, number)` for this thread's share of a row. A visit may put another number in the same place.
template <typename Visit>
INSIDE void walk(const float *row, wide size, Visit visit) {
  const wide step = blockDim.x;
  wide at = threadIdx.x;
  for (; at + (AHEAD - 1) * step < size; at += AHEAD * step) {
    float values[AHEAD];
#pragma unroll
    for (int index = 0; index < AHEAD; index++) values[index] = fetch(row + at + index * step);
#pragma unroll
    for (int index = 0; index < AHEAD; index++) visit(at + index * step, values[index]);
  }
  for (; at < size; at += step) visit(at, fetch(row + at));
}

// The same of two rows: `visit(index, number, number of the other)`.
template <typename Visit>
INSIDE void walk(const float *row, const float *other, wide size, Visit visit) {
  const wide step = blockDim.x;
  wide at = threadIdx.x;
  for (; at + (AHEAD - 1) * step < size; at += AHEAD * step) {
    float values[AHEAD], others[AHEAD];
#pragma unroll
    for (int index = 0; index < AHEAD; index++) {
      values[index] = fetch(row + at + index * step);
      others[index] = fetch(other + at + index * step);
    }
#pragma unroll
    for (int index = 0; index < AHEAD; index++) visit(at + index * step, values[index], others[index]);
  }
  for (; at < size; at += step) visit(at, fetch(row + at), fetch(other + at));
}

// ---- slopes ---------------------------------------------------------------------------------------------------------

// Element types of a slope, in the order of cuda_kernels.rs.
enum Form : int { float32, bfloat16, float16 };

// To the nearest, ties to even.
INSIDE unsigned short bfloat16_of(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

INSIDE unsigned short float16_of(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  unsigned half;
  if (size > 0x7f800000u)
    half = 0x7e00u;
  else if (size >= 0x477ff000u)  // 65520, from where on it rounds to infinity
    half = 0x7c00u;
  else if (size < 0x38800000u)  // below 2^-14 the steps are those of float32 at 0.5
    half = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u;
  else
    half = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
  return static_cast<unsigned short>(sign | half);
}

// Puts a slope at a place of a matrix of that type.
INSIDE void put_slope(void *slopes, int form, wide place, float value) {
  if (form == float32)
    put(static_cast<float *>(slopes) + place, value);
  else
    put(static_cast<unsigned short *>(slopes) + place, form == bfloat16 ? bfloat16_of(value) : float16_of(value));
}

// ---- one label a row ------------------------------------------------------------------------------------------------

// Cross-entropy of logits [m, V] with labels [m]: losses and ranks [m], and `softmax - onehot` into `slopes` [m, V], which
// is null where nobody wants it and may be the logits. A label that is no token makes its loss none.
extern "C" __global__ void __launch_bounds__(BLOCK)
    hard_rows(float *logits, wide size, const wide *labels, float *losses, float *ranks, void *slopes, int form) {
  const wide start = blockIdx.x * size, label = labels[blockIdx.x];
  const float *row = logits + start;
  const float own = 0 <= label && label < size ? row[label] : not_a_number();
  Seen seen;
  int rank = 0;
  walk(row, size, [&](wide, float logit) {
    seen.add(logit);
    rank += logit >= own;
  });
  const Mass mass = together(seen.all());
  rank = together(rank);
  const float value = static_cast<float>(log(mass.sum) + (static_cast<double>(mass.most) - own));
  if (threadIdx.x == 0) {
    losses[blockIdx.x] = value;
    ranks[blockIdx.x] = static_cast<float>(rank);
  }
  if (slopes == nullptr) return;
  const float share = static_cast<float>(1.0 / mass.sum), most = mass.most;
  walk(row, size, [&](wide at, float logit) {
    // The label's before any rounding: a confident row's slope would be lost otherwise.
    put_slope(slopes, form, start + at, at == label ? expm1f(-value) : expf(logit - most) * share);
  });
}

// ---- distributions --------------------------------------------------------------------------------------------------

// What the target predicts at positions, from its logits [u, V]. `target_ids` [D] and `draft_ids` [V] are null where the
// draft has the whole vocabulary; else the logits that it can reach go to `reachable` [u, D]. Of those: the largest, the
// logarithm of the sum of e^(x - most), the logarithm of their share of the whole, and the sum of p_S log p_S [u]; and the
// likeliest token of all as a draft id, -1 where it has none.
extern "C" __global__ void __launch_bounds__(BLOCK)
    teacher_rows(const float *logits, wide size, const wide *target_ids, const wide *draft_ids, wide draft_size,
                 float *reachable, float *most, float *log_sum, float *log_mass, float *entropy, wide *top) {
  const float *row = logits + blockIdx.x * size;
  Seen seen;
  Leader leader{-__uint_as_float(0x7f800000u), size};
  walk(row, size, [&](wide at, float logit) {
    seen.add(logit);
    const Leader here{logit, at};
    if (leads(here, leader)) leader = here;
  });
  const Mass whole = together(seen.all());
  leader = together(leader);
  Mass own = whole;
  if (target_ids != nullptr) {
    Seen reached;
    float *to = reachable + blockIdx.x * draft_size;
    for (wide token = threadIdx.x; token < draft_size; token += blockDim.x) {
      const float logit = fetch(row + target_ids[token]);
      put(to + token, logit);
      reached.add(logit);
    }
    own = together(reached.all());
  }
  if (threadIdx.x != 0) return;
  const double log_own = log(own.sum);
  most[blockIdx.x] = own.most;
  log_sum[blockIdx.x] = static_cast<float>(log_own);
  log_mass[blockIdx.x] = target_ids == nullptr ? 0.0f
                                               : static_cast<float>((static_cast<double>(own.most) - whole.most) +
                                                                    (log_own - log(whole.sum)));
  entropy[blockIdx.x] = static_cast<float>(own.tilt / own.sum - log_own);
  top[blockIdx.x] = target_ids == nullptr ? leader.place : draft_ids[leader.place];
}

// In the order of `DistillationLoss`.
enum Loss : int { cross_entropy, kl, reverse_kl, total_variation, lk_alpha, lk_lambda };

// Losses of logits [m, D] against those predictions: row i learns from position `own[i]` of `positions`, whose reachable
// logits and numbers are the next arguments. `weights` is null where nobody wants gradients, or the factor of each row;
// `parity_weights` and `parity_means` are null, or two more numbers a row. Losses, acceptance, hits, covered and weighted
// losses [m] are written, and with weights the gradient of the weighted losses into `slopes` [m, D], which may be the
// logits.
extern "C" __global__ void __launch_bounds__(BLOCK)
    soft_rows(float *logits, wide size, const wide *own, wide positions, const float *reachable, const float *most_of,
              const float *log_sum_of, const float *log_mass_of, const float *entropy_of, const wide *top_of, int loss,
              float lambda_scale, float lambda_decay, const float *weights, const float *parity_weights,
              const float *parity_means, float *losses, float *acceptance, bool *hits, bool *covered_rows,
              double *objectives, void *slopes, int form) {
  const wide at = blockIdx.x, start = at * size, place = own[at];
  const float *row = logits + start;
  if (place < 0 || positions <= place) {
    if (threadIdx.x == 0) {
      losses[at] = acceptance[at] = not_a_number();
      hits[at] = covered_rows[at] = false;
      objectives[at] = not_a_number();
    }
    return;
  }
  const float *target = reachable + place * size;
  const float target_most = most_of[place], target_sum = log_sum_of[place], log_mass = log_mass_of[place];
  const float reached = expf(log_mass);
  const wide top = top_of[place];
  const bool covered = top >= 0;
  const float own_logit = row[covered ? top : 0];

  Seen seen;
  int rank = 0;
  walk(row, size, [&](wide, float logit) {
    seen.add(logit);
    rank += logit >= own_logit;
  });
  const Mass mass = together(seen.all());
  rank = together(rank);
  const float most = mass.most, log_sum = static_cast<float>(log(mass.sum)), share = static_cast<float>(1.0 / mass.sum);

  const bool with_slope = weights != nullptr, is_reverse = loss == reverse_kl;
  const float weight = with_slope && covered ? weights[at] : 0.0f;
  // The slope of these is known before anything is summed.
  const bool at_once = with_slope && (loss == cross_entropy || loss == kl);
  Sum accepted, smaller, cross, reverse;
  walk(row, target, size, [&](wide index, float logit, float of_target) {
    const float draft = expf(logit - most) * share, log_draft = (logit - most) - log_sum;
    const float log_p = (of_target - target_most) - target_sum, p = expf(log_p), whole = p * reached;
    // Numbers that are none stay so.
    accepted.add(draft < whole ? draft : (draft == draft ? whole : draft));
    smaller.add(log_draft < log_p + log_mass ? draft : 0.0f);
    cross.add(p * log_draft);
    if (is_reverse) reverse.add(draft * (log_draft - log_p));
    if (at_once) put_slope(slopes, form, start + index, draft * weight - p * weight);
  });
  const Overlap overlap = together(Overlap{accepted.all(), smaller.all(), cross.all(), reverse.all()});
  const float alpha = static_cast<float>(overlap.accepted), inside = static_cast<float>(overlap.smaller);
  const float of_cross = static_cast<float>(-overlap.cross);
  const auto lambda = [&](float of) { return lambda_scale * expf(-lambda_decay * of); };
  float value = 0;
  switch (loss) {
    case cross_entropy: value = of_cross; break;
    case kl: value = static_cast<float>(entropy_of[place] - overlap.cross); break;
    case reverse_kl: value = static_cast<float>(overlap.reverse); break;
    case total_variation: value = 1.0f - alpha; break;
    case lk_alpha: value = -logf(alpha); break;
    case lk_lambda: value = lambda(alpha) * of_cross + (1.0f - lambda(alpha)) * (1.0f - alpha); break;
  }
  // No acceptance at all has no logarithm, and a row without a loss must not spread what it has instead.
  if (!covered || (loss == lk_alpha && !(alpha > 0.0f))) value = 0;

  // slope = of_draft q + of_target p_S + of_smaller [q is the smaller] q + of_ratio q (log q - log p_S)
  float of_draft = 0, of_target = 0, of_smaller = 0, of_ratio = 0;
  double objective = static_cast<double>(value) * weight;
  // Gradient of alpha: q_j (m_j - sum of m q), where m_j says that q_j is the smaller one.
  const auto by_acceptance = [&](float factor) { of_smaller += factor, of_draft -= factor * inside; };
  const float parity = parity_weights == nullptr || !covered ? 0.0f : parity_weights[at];
  const float rejecting = parity_weights == nullptr ? weight : parity;
  if (loss == reverse_kl) {
    of_ratio = weight, of_draft = -weight * value;
  } else if (loss == total_variation) {
    by_acceptance(-weight);
  } else if (loss == lk_alpha) {
    const float factor = rejecting / alpha;
    by_acceptance(is_finite(factor) ? -factor : 0.0f);
    objective = static_cast<double>(value) * rejecting;
  } else if (loss == lk_lambda) {
    const float part = lambda(parity_weights == nullptr ? alpha : parity_means[at]);
    const float left = weight * part, right = rejecting * (1.0f - part);
    of_draft += left, of_target -= left;
    by_acceptance(-right);
    if (parity_weights != nullptr)
      objective = static_cast<double>(left) * of_cross + static_cast<double>(right) * (1.0f - alpha);
  }
  if (threadIdx.x == 0) {
    losses[at] = value;
    acceptance[at] = alpha;
    hits[at] = covered && rank == 1;
    covered_rows[at] = covered;
    objectives[at] = objective;
  }
  if (!with_slope || at_once) return;
  walk(row, target, size, [&](wide index, float logit, float of_other) {
    const float draft = expf(logit - most) * share, log_draft = (logit - most) - log_sum;
    const float log_p = (of_other - target_most) - target_sum;
    float slope = draft * of_draft;
    if (of_target != 0.0f) slope += expf(log_p) * of_target;
    if (is_reverse)
      slope += draft * (log_draft - log_p) * of_ratio;
    else if (log_draft < log_p + log_mass)
      slope += draft * of_smaller;
    put_slope(slopes, form, start + index, slope);
  });
}

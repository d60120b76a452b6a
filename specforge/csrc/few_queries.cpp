// Attention of a few new tokens on cached keys, as decoding a batch and verifying a draft tree need it.
//
// Such a pass reads every key and value once and multiplies each with a handful of numbers. libtorch's kernel makes matrix
// products of it that are too small for MKL to pack, and on processors that are not Intel's they cost as much as a tenth of
// the model. Here the queries that share a key head (the heads of a group, at every new token) are held four at a time
// while keys and values pass by once; what hidden slots hold, whatever it is, counts nothing.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "guarded.h"
#include "processors.h"

namespace {

constexpr int QUERIES = 4;           // held side by side
constexpr std::int64_t WIDTH = 32;   // keys and values are multiples of it
constexpr std::int64_t PADDING = 16;  // scores of a query are a multiple of it
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

template <typename lanes>
INLINE lanes load(const float *from) {
  lanes vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

// The first and the second halves of the blocks of S numbers of two vectors, added: half as long blocks, the first vector's first.
template <int LANES, int S, typename lanes, int... Place>
INLINE lanes halved(lanes first, lanes second, std::integer_sequence<int, Place...>) {
  constexpr auto from = [](int place) {
    const int block = place / (S / 2), blocks = LANES / S;
    return block / blocks * LANES + block % blocks * S + place % (S / 2);
  };
#if defined(__clang__)
  return __builtin_shufflevector(first, second, from(Place)...) + __builtin_shufflevector(first, second, (from(Place) + S / 2)...);
#else
  using whole = typename Vectors<LANES>::whole;
  return __builtin_shuffle(first, second, whole{from(Place)...}) +
         __builtin_shuffle(first, second, whole{(from(Place) + S / 2)...});
#endif
}

// The sum of each of COUNT vectors, whose blocks of COUNT numbers are partial sums of one each; the first becomes the result.
template <int LANES, int COUNT, typename lanes>
INLINE void add_up(lanes *vectors) {
  if constexpr (COUNT > 1) {
    for (int pair = 0; pair < COUNT / 2; pair++)
      vectors[pair] = halved<LANES, COUNT>(vectors[2 * pair], vectors[2 * pair + 1], std::make_integer_sequence<int, LANES>());
    add_up<LANES, COUNT / 2>(vectors);
  }
}

template <int LANES, typename lanes>
INLINE float sum_of(lanes vector) {
  float sums[LANES];
  std::memcpy(sums, &vector, sizeof sums);
  for (int left = LANES / 2; left > 0; left /= 2)
    for (int lane = 0; lane < left; lane++) sums[lane] += sums[lane + left];
  return sums[0];
}

// e to the power of numbers that are not positive, to two units in the last place: 2^n times a polynomial of the rest.
template <int LANES, typename lanes = typename Vectors<LANES>::lanes>
INLINE lanes exp_of(lanes x) {
  const lanes least = lanes{} - 87.3f;
  x = x < least ? least : x;
  const lanes rounds = lanes{} + 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits behind the point
  const lanes n = (x * 1.44269504f + rounds) - rounds;
  const lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  lanes p = lanes{} + 1.0f / 5040;
  for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + term;
  using whole = typename Vectors<LANES>::whole;
  const whole power = (__builtin_convertvector(n, whole) + 127) << 23;
  lanes scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

// Where queries that share keys, the keys, and the values of one row lie; strides count numbers.
struct Shared {
  const float *query[QUERIES];
  float *output[QUERIES];
  const bool *seen[QUERIES];  // null where nothing is hidden
  const float *key, *value;
  std::int64_t key_stride, value_stride, slots, key_width, value_width;
  float scale;
};

// Mixes the values of all slots, `VECTORS` vectors from `place` on, by the shares in `scores`.
template <int LANES, int VECTORS>
INLINE void mix(const Shared &at, int count, std::int64_t place, const float *scores, std::int64_t padded, std::int64_t end,
                const float *inverse) {
  using lanes = typename Vectors<LANES>::lanes;
  lanes sum[QUERIES][VECTORS] = {};
  for (std::int64_t slot = 0; slot < end; slot++) {
    float share[QUERIES];
    float any = 0.0f;
    for (int query = 0; query < QUERIES; query++) any += share[query] = scores[query * padded + slot];
    if (any == 0.0f) continue;
    const float *value = at.value + slot * at.value_stride + place;
    lanes values[VECTORS];
    for (int vector = 0; vector < VECTORS; vector++) values[vector] = load<lanes>(value + vector * LANES);
#pragma GCC unroll 4
    for (int query = 0; query < QUERIES; query++)
      for (int vector = 0; vector < VECTORS; vector++) sum[query][vector] += values[vector] * share[query];
  }
  for (int query = 0; query < count; query++)
    for (int vector = 0; vector < VECTORS; vector++) {
      const lanes result = sum[query][vector] * inverse[query];
      std::memcpy(at.output[query] + place + vector * LANES, &result, sizeof result);
    }
}

// `count` of four queries, of which those behind them repeat the first. `scores` holds four rows of `padded` numbers.
template <int LANES>
INLINE void attend(const Shared &at, int count, float *scores, std::int64_t padded) {
  using lanes = typename Vectors<LANES>::lanes;
  constexpr int SLOTS = LANES / QUERIES;  // at a time: a vector holds the scores of all queries
  const auto hidden = [&](int query, std::int64_t slot) INLINED { return at.seen[query] != nullptr && !at.seen[query][slot]; };
  const auto hidden_from_all = [&](std::int64_t slot) INLINED {
    for (int query = 0; query < count; query++)
      if (!hidden(query, slot)) return false;
    return true;
  };
  std::int64_t end = at.slots;  // slots behind it are seen by nobody
  while (end > 0 && hidden_from_all(end - 1)) end--;
  for (std::int64_t first = 0; first < end; first += SLOTS) {
    const int here = static_cast<int>(std::min<std::int64_t>(SLOTS, end - first));
    int unseen = 0;
    while (unseen < here && hidden_from_all(first + unseen)) unseen++;
    if (unseen == here) {
      for (int query = 0; query < QUERIES; query++)
        for (int slot = 0; slot < here; slot++) scores[query * padded + first + slot] = NOTHING;
      continue;
    }
    const float *keys[SLOTS];  // behind the end, the last
    for (int slot = 0; slot < SLOTS; slot++) keys[slot] = at.key + (first + std::min(slot, here - 1)) * at.key_stride;
    lanes sum[QUERIES * SLOTS] = {};
    for (std::int64_t place = 0; place < at.key_width; place += LANES) {
      lanes key[SLOTS];
      for (int slot = 0; slot < SLOTS; slot++) key[slot] = load<lanes>(keys[slot] + place);
#pragma GCC unroll 4
      for (int query = 0; query < QUERIES; query++) {
        const lanes asked = load<lanes>(at.query[query] + place);
#pragma GCC unroll 4
        for (int slot = 0; slot < SLOTS; slot++) sum[query * SLOTS + slot] += asked * key[slot];
      }
    }
    add_up<LANES, LANES>(sum);
    float found[LANES];
    const lanes scaled = sum[0] * at.scale;
    std::memcpy(found, &scaled, sizeof scaled);
    for (int query = 0; query < QUERIES; query++)
      for (int slot = 0; slot < here; slot++)
        scores[query * padded + first + slot] = hidden(query, first + slot) ? NOTHING : found[query * SLOTS + slot];
  }
  // Softmax, in place; the sums' inverses.
  const std::int64_t whole_vectors = (end + LANES - 1) / LANES;
  float inverse[QUERIES];
  for (int query = 0; query < QUERIES; query++) {
    float *row = scores + query * padded;
    for (std::int64_t slot = end; slot < whole_vectors * LANES; slot++) row[slot] = NOTHING;
    lanes maxima = lanes{} + NOTHING;
    for (std::int64_t vector = 0; vector < whole_vectors; vector++) {
      const lanes some = load<lanes>(row + vector * LANES);
      maxima = some > maxima ? some : maxima;
    }
    float most = NOTHING;
    for (int lane = 0; lane < LANES; lane++) most = std::max(most, maxima[lane]);
    lanes total = {};
    for (std::int64_t vector = 0; vector < whole_vectors; vector++) {
      const lanes some = load<lanes>(row + vector * LANES);
      // Not a number stays one: only what is minus infinity counts nothing.
      const lanes shares = some == lanes{} + NOTHING ? lanes{} : exp_of<LANES>(some - most);
      std::memcpy(row + vector * LANES, &shares, sizeof shares);
      total += shares;
    }
    const float sum = sum_of<LANES>(total);
    inverse[query] = sum == 0.0f ? 0.0f : 1.0f / sum;
  }
  std::int64_t place = 0;
  // Four vectors fit where registers are wide, since there are twice as many of them.
  if constexpr (LANES == 16)
    for (; place + 4 * LANES <= at.value_width; place += 4 * LANES)
      mix<LANES, 4>(at, count, place, scores, padded, end, inverse);
  for (; place < at.value_width; place += 2 * LANES) mix<LANES, 2>(at, count, place, scores, padded, end, inverse);
}

struct Attend {
  template <int LANES>
  static INLINE void run(const Shared *at, int count, float *scores, std::int64_t padded) {
    attend<LANES>(*at, count, scores, padded);
  }
};

}  // namespace

extern "C" {

// Attention of `query [B, N, T, D]` on `key [B, G, S, D]` and `value [B, G, S, E]`, float32 on the CPU, D and E multiples of
// 32, without autograd. `mask [B or 1, 1, T, S]` holds booleans, true where a key is seen; null where nothing is hidden. A
// query that sees nothing gets zeros. Gives `[B, N, T, E]`, whose numbers lie as `[B, T, N, E]`.
int specforge_few_queries_attention(const at::Tensor *query, const at::Tensor *key, const at::Tensor *value,
                                    const at::Tensor *mask, double scale, at::Tensor **output, char *error,
                                    std::size_t error_size) {
  return guarded(
      [&] {
        const std::int64_t rows = query->size(0), heads = query->size(1), tokens = query->size(2);
        const std::int64_t groups = key->size(1), slots = key->size(2), width = value->size(3);
        TORCH_CHECK(query->size(3) % WIDTH == 0 && width % WIDTH == 0 && heads % groups == 0, "unfit heads: ",
                    query->sizes(), " on ", key->sizes(), " and ", value->sizes());
        for (const at::Tensor *tensor : {query, key, value})
          TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == at::kFloat && tensor->stride(3) == 1,
                      "expected float32 on the CPU with heads that lie in one piece");
        TORCH_CHECK(mask == nullptr || (mask->scalar_type() == at::kBool && mask->stride(3) == 1 &&
                                        mask->size(2) == tokens && mask->size(3) == slots),
                    "expected booleans for ", tokens, " tokens and ", slots, " slots");
        at::Tensor result = at::empty({rows, tokens, heads, width}, query->options());
        const std::int64_t times = heads / groups, sharing = times * tokens;  // queries of one key head
        const std::int64_t parts = (sharing + QUERIES - 1) / QUERIES;
        const std::int64_t padded = (slots + PADDING - 1) / PADDING * PADDING;
        at::parallel_for(0, rows * groups * parts, /*grain_size=*/1, [&](std::int64_t begin, std::int64_t end) {
          std::vector<float> scores(QUERIES * padded);
          for (std::int64_t unit = begin; unit < end; unit++) {
            const std::int64_t row = unit / (groups * parts), group = unit / parts % groups;
            const std::int64_t first = unit % parts * QUERIES;
            const int count = static_cast<int>(std::min<std::int64_t>(QUERIES, sharing - first));
            Shared at;
            at.key = key->const_data_ptr<float>() + row * key->stride(0) + group * key->stride(1);
            at.value = value->const_data_ptr<float>() + row * value->stride(0) + group * value->stride(1);
            at.key_stride = key->stride(2), at.value_stride = value->stride(2);
            at.slots = slots, at.key_width = query->size(3), at.value_width = width;
            at.scale = static_cast<float>(scale);
            for (int place = 0; place < QUERIES; place++) {
              const std::int64_t which = first + (place < count ? place : 0);
              const std::int64_t token = which / times, head = group * times + which % times;
              at.query[place] = query->const_data_ptr<float>() + row * query->stride(0) + head * query->stride(1) +
                                token * query->stride(2);
              at.output[place] = result.mutable_data_ptr<float>() + ((row * tokens + token) * heads + head) * width;
              at.seen[place] = mask == nullptr ? nullptr
                                               : mask->const_data_ptr<bool>() +
                                                     (mask->size(0) == 1 ? 0 : row * mask->stride(0)) +
                                                     token * mask->stride(2);
            }
            dispatch<Attend>(static_cast<const Shared *>(&at), count, scores.data(), padded);
          }
        });
        *output = new at::Tensor(result.transpose(1, 2));
      },
      error, error_size);
}

}  // extern "C"

// See layer_parts.h. As operators of libtorch a norm with its rotation takes some twenty passes over memory each way, a
// gate five and fourteen; here it is one.

#include "layer_parts.h"

#include <ATen/Parallel.h>

#include <vector>

#include "processors.h"

namespace layer_parts {
namespace {

constexpr std::int64_t GRAIN = 1 << 14;  // numbers that are worth a thread

// Sum over a row of what `vector` and `single` give for its places.
template <int LANES, typename Vector, typename Single>
INLINE float sum_of(std::int64_t width, Vector vector, Single single) {
  typename Loops<LANES>::Sum sum;
  Loops<LANES>::walk(
      width, [&](std::int64_t index) INLINED { sum.add(vector(index)); }, [&]() INLINED { sum.flush(); },
      [&](std::int64_t index) INLINED { sum.add(single(index)); });
  return static_cast<float>(sum.total);
}

// Calls `vector` or `single` for all places below `count`.
template <int LANES, typename Vector, typename Single>
INLINE void each(std::int64_t count, Vector vector, Single single) {
  Loops<LANES>::walk(count, vector, []() INLINED {}, single);
}

// Pairs `(x[i], x[i + half])` times the matrix of their angle; `back` takes its transpose.
template <int LANES>
INLINE void turn(const float *cos, const float *sin, std::int64_t half, bool back, const float *from, float *to) {
  using V = Loops<LANES>;
  const float *to_first = back ? sin + half : sin, *to_second = back ? sin : sin + half;
  each<LANES>(
      half,
      [&](std::int64_t i) INLINED {
        const auto first = V::load(from + i), second = V::load(from + half + i);
        V::store(to + i, first * V::load(cos + i) + second * V::load(to_first + i));
        V::store(to + half + i, second * V::load(cos + half + i) + first * V::load(to_second + i));
      },
      [&](std::int64_t i) INLINED {
        const float first = from[i], second = from[half + i];
        to[i] = first * cos[i] + second * to_first[i];
        to[half + i] = second * cos[half + i] + first * to_second[i];
      });
}

struct NormForward {
  template <int LANES>
  static INLINE void run(const Norm &norm, const float *input, float *output, float *inverse, std::int64_t row) {
    using V = Loops<LANES>;
    const std::int64_t width = norm.width;
    const float *x = input + row * width;
    float *y = output + row * width;
    if (norm.weight != nullptr) {
      const float squares = sum_of<LANES>(
          width, [&](std::int64_t i) INLINED { return V::load(x + i) * V::load(x + i); },
          [&](std::int64_t i) INLINED { return x[i] * x[i]; });
      const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + norm.epsilon);
      inverse[row] = scale;
      each<LANES>(
          width, [&](std::int64_t i) INLINED { V::store(y + i, V::load(x + i) * scale * V::load(norm.weight + i)); },
          [&](std::int64_t i) INLINED { y[i] = x[i] * scale * norm.weight[i]; });
      x = y;
    }
    if (norm.cos == nullptr) return;
    const std::int64_t turned = norm.turned, place = row / norm.heads * turned;
    turn<LANES>(norm.cos + place, norm.sin + place, turned / 2, false, x, y);
    if (x != y) std::copy(x + turned, x + width, y + turned);
  }
};

struct NormBackward {
  template <int LANES>
  static INLINE void run(const Norm &norm, const float *input, const float *inverse, const float *slope,
                         float *input_slope, float *weight_part, std::int64_t row) {
    using V = Loops<LANES>;
    const std::int64_t width = norm.width, turned = norm.turned, place = row / norm.heads * turned;
    const float *x = input + row * width, *g = slope + row * width;
    float *to = input_slope + row * width;
    if (norm.cos != nullptr) {
      turn<LANES>(norm.cos + place, norm.sin + place, turned / 2, true, g, to);
      std::copy(g + turned, g + width, to + turned);
      g = to;
    }
    if (norm.weight == nullptr) return;
    const float scale = inverse[row], *weight = norm.weight;
    const float dot = sum_of<LANES>(
        width, [&](std::int64_t i) INLINED { return V::load(g + i) * V::load(weight + i) * V::load(x + i); },
        [&](std::int64_t i) INLINED { return g[i] * weight[i] * x[i]; });
    const float along = scale * scale * scale * dot / static_cast<float>(width);
    each<LANES>(
        width,
        [&](std::int64_t i) INLINED {
          const auto own = V::load(x + i), given = V::load(g + i);
          V::store(weight_part + i, V::load(weight_part + i) + given * own * scale);
          V::store(to + i, given * V::load(weight + i) * scale - own * along);
        },
        [&](std::int64_t i) INLINED {
          const float given = g[i];
          weight_part[i] += given * x[i] * scale;
          to[i] = given * weight[i] * scale - x[i] * along;
        });
  }
};

// 1 / (1 + e^-x)
template <int LANES>
INLINE auto sigmoid_of(const typename Loops<LANES>::lanes &x) {
  const typename Loops<LANES>::lanes away = x < -88.0f ? x - x + 88.0f : -x;  // e^88 is a number still
  return 1.0f / (1.0f + Loops<LANES>::exponential(away));
}

INLINE float sigmoid_of(float x) { return 1.0f / (1.0f + std::exp(-x)); }

struct GateForward {
  template <int LANES>
  static INLINE void run(std::int64_t count, const float *gate, const float *up, float *product) {
    using V = Loops<LANES>;
    each<LANES>(
        count,
        [&](std::int64_t i) INLINED {
          const auto x = V::load(gate + i);
          V::store(product + i, x * sigmoid_of<LANES>(x) * V::load(up + i));
        },
        [&](std::int64_t i) INLINED { product[i] = gate[i] * sigmoid_of(gate[i]) * up[i]; });
  }
};

struct GateBackward {
  template <int LANES>
  static INLINE void run(std::int64_t count, const float *gate, const float *up, const float *slope, float *gate_slope,
                         float *up_slope) {
    using V = Loops<LANES>;
    each<LANES>(
        count,
        [&](std::int64_t i) INLINED {
          const auto x = V::load(gate + i), given = V::load(slope + i), sigmoid = sigmoid_of<LANES>(x);
          const auto of_gate = given * V::load(up + i) * sigmoid * (1.0f + x * (1.0f - sigmoid));
          V::store(up_slope + i, given * x * sigmoid);
          V::store(gate_slope + i, of_gate);
        },
        [&](std::int64_t i) INLINED {
          const float x = gate[i], given = slope[i], sigmoid = sigmoid_of(x);
          const float of_gate = given * up[i] * sigmoid * (1.0f + x * (1.0f - sigmoid));
          up_slope[i] = given * x * sigmoid;
          gate_slope[i] = of_gate;
        });
  }
};

// A body for each row of a range: chosen by processor once for all of them.
template <typename Body>
struct OfRows {
  template <int LANES, typename... Arguments>
  static INLINE void run(std::int64_t begin, std::int64_t end, Arguments... arguments) {
    for (std::int64_t row = begin; row < end; row++) Body::template run<LANES>(arguments..., row);
  }
};

}  // namespace

void norm_forward(const Norm &norm, const float *input, float *output, float *inverse) {
  const std::int64_t grain = std::max<std::int64_t>(1, GRAIN / std::max<std::int64_t>(1, norm.width));
  at::parallel_for(0, norm.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    dispatch<OfRows<NormForward>>(begin, end, norm, input, output, inverse);
  });
}

void norm_backward(const Norm &norm, const float *input, const float *inverse, const float *slope, float *input_slope,
                   float *weight_parts, std::int64_t parts) {
  at::parallel_for(0, parts, /*grain_size=*/1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; part++) {
      const std::int64_t first = norm.rows * part / parts, last = norm.rows * (part + 1) / parts;
      float *weight_part = weight_parts == nullptr ? nullptr : weight_parts + part * norm.width;
      dispatch<OfRows<NormBackward>>(first, last, norm, input, inverse, slope, input_slope, weight_part);
    }
  });
}

void gate_forward(std::int64_t count, const float *gate, const float *up, float *product) {
  at::parallel_for(0, count, GRAIN, [&](std::int64_t begin, std::int64_t end) {
    dispatch<GateForward>(end - begin, gate + begin, up + begin, product + begin);
  });
}

void gate_backward(std::int64_t count, const float *gate, const float *up, const float *slope, float *gate_slope,
                   float *up_slope) {
  at::parallel_for(0, count, GRAIN, [&](std::int64_t begin, std::int64_t end) {
    dispatch<GateBackward>(end - begin, gate + begin, up + begin, slope + begin, gate_slope + begin, up_slope + begin);
  });
}

}  // namespace layer_parts

// A matrix product of a few rows, as decoding needs it: one row, or the 2 to 32 of a batch or a draft tree, times a weight that
// is far larger than they are.
//
// Such a product is bound by the weight's way through the processor. oneDNN rearranges a weight from 16 rows on, which
// costs more than the product itself; libtorch's MKL does as badly on processors that are not Intel's. Here every weight
// is read once, where it lies, and multiplies 8, 16, 24 or 32 rows at a time: a vector holds the same column of 8 or 16 rows,
// so that a scalar of the weight needs an instruction for each vector and no sum has to be made across one. A single row
// is nothing but the weight's way from memory: rows of the weight pass by one after the other, asked for ahead of time.
// A weight in bfloat16 is half as long on its way, and widened behind it: sums are those of the same numbers in float32.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "guarded.h"
#include "processors.h"

namespace {

using Half = std::uint16_t;  // a bfloat16: the upper half of a float32

constexpr std::int64_t LINE = 16;      // numbers that are taken at a time: of float32, a line of the cache
constexpr std::int64_t STRETCH = 128;  // terms added up before they join the total: keeps the rounding error small

// Rows of one vector, the vectors that are multiplied side by side, the outputs whose sums are held in registers (enough of them
// to hide an addition's latency, and no more than fit beside the columns and a scalar: 16 registers of eight lanes, 32 of
// sixteen), and whether a vector of eight rows follows.
template <int LANES, int VECTORS, int BLOCK, bool EIGHT_MORE = false>
struct Group {
  using lanes = typename Vectors<LANES>::lanes;
  static constexpr std::int64_t lane_count = LANES, vectors = VECTORS, block = BLOCK, full = LANES * VECTORS,
                                rows = full + (EIGHT_MORE ? 8 : 0);
  static constexpr bool eight_more = EIGHT_MORE;
};
using Eight = Group<8, 1, 12>;
using NarrowSixteen = Group<8, 2, 6>;
using Sixteen = Group<16, 1, 8>;
using TwentyFour = Group<16, 1, 8, true>;
using ThirtyTwo = Group<16, 2, 8>;

template <int LANES>
INLINE typename Vectors<LANES>::lanes wide_lanes(const float *from) {
  return Loops<LANES>::load(from);
}

template <int LANES>
INLINE typename Vectors<LANES>::lanes wide_lanes(const Half *from) {
  using bits = typename Vectors<LANES>::bits;
  typename Vectors<LANES>::halves narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  const bits upper = __builtin_convertvector(narrow, bits) << 16;
  typename Vectors<LANES>::lanes values;
  std::memcpy(&values, &upper, sizeof values);
  return values;
}

INLINE float wide(float number) { return number; }

INLINE float wide(Half number) {
  const std::uint32_t upper = static_cast<std::uint32_t>(number) << 16;
  float value;
  std::memcpy(&value, &upper, sizeof value);
  return value;
}

// `count` numbers of a weight in float32, where they lie or in `room`.
template <int LANES>
INLINE const float *wide_line(const float *from, float *, std::int64_t) {
  return from;
}

template <int LANES>
INLINE const float *wide_line(const Half *from, float *room, std::int64_t count) {
  if (count == LINE)
    for (std::int64_t term = 0; term < LINE; term += LANES) Loops<LANES>::store(room + term, wide_lanes<LANES>(from + term));
  else
    for (std::int64_t term = 0; term < count; term++) room[term] = wide(from[term]);
  return room;
}

// `COUNT` outputs of a group of rows: `weight` is [out, width], `rows` is [width, rows], `result` [row][out].
template <typename Group, int COUNT, typename Weight>
INLINE void outputs(const Weight *weight, const float *rows, float *result, std::int64_t width, std::int64_t out,
                    std::int64_t live) {
  using lanes = typename Group::lanes;
  using eight = typename Vectors<8>::lanes;
  constexpr int VECTORS = Group::vectors;
  lanes total[COUNT][VECTORS];
  eight more[COUNT];  // of the vector that follows
  for (int output = 0; output < COUNT; output++) {
    for (int vector = 0; vector < VECTORS; vector++) total[output][vector] = lanes{};
    more[output] = eight{};
  }
  for (std::int64_t start = 0; start < width; start += STRETCH) {
    const std::int64_t end = std::min(width, start + STRETCH);
    lanes sum[COUNT][VECTORS];
    eight sum_more[COUNT];
    for (int output = 0; output < COUNT; output++) {
      for (int vector = 0; vector < VECTORS; vector++) sum[output][vector] = lanes{};
      sum_more[output] = eight{};
    }
    for (std::int64_t line = start; line < end; line += LINE) {
      // The same place of the outputs after the next, into the second cache: the first one is full of rows.
#pragma GCC unroll 12
      for (int output = 0; output < COUNT; output++) __builtin_prefetch(weight + (2 * COUNT + output) * width + line, 0, 2);
      const std::int64_t count = std::min(end - line, LINE);
      alignas(64) float room[COUNT][LINE];
      const float *numbers[COUNT];
#pragma GCC unroll 12
      for (int output = 0; output < COUNT; output++)
        numbers[output] = wide_line<Group::lane_count>(weight + output * width + line, room[output], count);
      for (std::int64_t term = 0; term < count; term++) {
        const float *from = rows + (line + term) * Group::rows;
        lanes column[VECTORS];
        // A vector at a time: all in one copy go by narrower ones through memory, where the next read waits for them.
        for (int vector = 0; vector < VECTORS; vector++)
          column[vector] = Loops<Group::lane_count>::load(from + vector * Group::lane_count);
        eight column_more{};
        if constexpr (Group::eight_more) column_more = Loops<8>::load(from + Group::full);
#pragma GCC unroll 12
        for (int output = 0; output < COUNT; output++) {
          const float scalar = numbers[output][term];
#pragma GCC unroll 2
          for (int vector = 0; vector < VECTORS; vector++) sum[output][vector] += column[vector] * scalar;
          if constexpr (Group::eight_more) sum_more[output] += column_more * scalar;
        }
      }
    }
    for (int output = 0; output < COUNT; output++) {
      for (int vector = 0; vector < VECTORS; vector++) total[output][vector] += sum[output][vector];
      more[output] += sum_more[output];
    }
  }
  for (std::int64_t row = 0; row < live; row++)
    for (int output = 0; output < COUNT; output++)
      result[row * out + output] = row < Group::full
                                       ? total[output][row / Group::lane_count][row % Group::lane_count]
                                       : more[output][row - Group::full];
}

// Outputs `begin .. end` of `live` rows in groups: `rows` is [groups, width, rows].
template <typename Group, typename Weight>
INLINE void of_groups(const Weight *weight, const float *rows, float *result, std::int64_t begin, std::int64_t end,
                      std::int64_t width, std::int64_t out, std::int64_t live) {
  for (std::int64_t output = begin; output < end;) {
    const std::int64_t count = end - output >= Group::block ? Group::block : 1;
    for (std::int64_t first = 0; first < live; first += Group::rows) {
      const float *of_group = rows + first * width;
      float *into = result + first * out + output;
      const std::int64_t here = std::min(Group::rows, live - first);
      if (count == Group::block)
        outputs<Group, Group::block>(weight + output * width, of_group, into, width, out, here);
      else
        outputs<Group, 1>(weight + output * width, of_group, into, width, out, here);
    }
    output += count;
  }
}

// Outputs `begin .. end` of a single row. `rows` is [width].
template <int LANES, typename Weight>
INLINE void of_row(const Weight *weight, const float *row, float *result, std::int64_t begin, std::int64_t end,
                   std::int64_t width) {
  using lanes = typename Vectors<LANES>::lanes;
  constexpr std::int64_t STEP = 4 * LINE, SUMS = STEP / LANES, AHEAD = 1024;  // numbers that are asked for ahead
  for (std::int64_t output = begin; output < end; output++) {
    const Weight *line = weight + output * width;
    lanes sum[SUMS] = {};
    std::int64_t term = 0;
    for (; term + STEP <= width; term += STEP)
#pragma GCC unroll 8
      for (int part = 0; part < SUMS; part++) {
        const std::int64_t place = term + part * LANES;
        if (part * LANES % LINE == 0) __builtin_prefetch(line + place + AHEAD);
        sum[part] += wide_lanes<LANES>(line + place) * Loops<LANES>::load(row + place);
      }
    float rest = 0.0f;
    // One rounding a term, as the vectors have it, whichever the weight's type.
    for (; term < width; term++) rest = __builtin_fmaf(wide(line[term]), row[term], rest);
    for (int left = SUMS / 2; left > 0; left /= 2)
#pragma GCC unroll 4
      for (int part = 0; part < left; part++) sum[part] += sum[part + left];
    float total = 0.0f;
    for (int lane = 0; lane < LANES; lane++) total += sum[0][lane];
    result[output] = total + rest;
  }
}

template <typename Weight>
using Stretch = void(const Weight *, const float *, float *, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                     std::int64_t);

template <typename Weight>
struct One {
  template <int LANES>
  static INLINE void run(const Weight *weight, const float *row, float *result, std::int64_t begin, std::int64_t end,
                         std::int64_t width, std::int64_t, std::int64_t) {
    of_row<LANES>(weight, row, result, begin, end, width);
  }
};

template <typename Group, typename Weight>
struct Several {
  template <int>
  static INLINE void run(const Weight *weight, const float *rows, float *result, std::int64_t begin, std::int64_t end,
                         std::int64_t width, std::int64_t out, std::int64_t live) {
    of_groups<Group>(weight, rows, result, begin, end, width, out, live);
  }
};

// What multiplies so many rows, and how many of them and of the outputs it takes at a time.
struct Kernel {
  Stretch<float> *full;
  Stretch<Half> *half;
  std::int64_t rows, block;
};

template <typename Group>
Kernel kernel() {
  return {&dispatch<Several<Group, float>>, &dispatch<Several<Group, Half>>, Group::rows, Group::block};
}

Kernel kernel_of(std::int64_t live) {
  if (live == 1) return {&dispatch<One<float>>, &dispatch<One<Half>>, 1, 8};
  if (live <= Eight::rows) return kernel<Eight>();
  if (!has_sixteen_lanes()) return kernel<NarrowSixteen>();
  if (live <= Sixteen::rows) return kernel<Sixteen>();
  return live <= TwentyFour::rows ? kernel<TwentyFour>() : kernel<ThirtyTwo>();
}

// One of the products of the same rows: the transpose of `weight [out, width]`, into `result [live, out]`.
struct Product {
  const at::Tensor *weight;
  float *result;
  std::int64_t out;

  void stretch(const Kernel &kernel, const float *rows, std::int64_t begin, std::int64_t end, std::int64_t width,
               std::int64_t live) const {
    if (weight->scalar_type() == at::kBFloat16)
      kernel.half(reinterpret_cast<const Half *>(weight->const_data_ptr<at::BFloat16>()), rows, result, begin, end, width,
                  out, live);
    else
      kernel.full(weight->const_data_ptr<float>(), rows, result, begin, end, width, out, live);
  }
};

// Rows `[live, width]` in all products. Threads meet once, however many these are.
void multiply(const float *input, const std::vector<Product> &products, std::int64_t live, std::int64_t width) {
  const auto kernel = kernel_of(live);
  const std::int64_t groups = (live + kernel.rows - 1) / kernel.rows;
  // [groups, width, rows], where rows that are not there hold what an earlier product left: nobody reads what becomes of them.
  thread_local std::vector<float> kept;
  kept.resize(std::max<std::size_t>(kept.size(), groups * width * kernel.rows));
  float *rows = kept.data();
  for (std::int64_t first = 0; first < live; first += kernel.rows) {
    float *group = rows + first * width;
    const std::int64_t here = std::min(kernel.rows, live - first);
    for (std::int64_t term = 0; term < width; term++)
      for (std::int64_t row = 0; row < here; row++)
        group[term * kernel.rows + row] = input[(first + row) * width + term];
  }
  const std::int64_t block = kernel.block;
  const auto blocks_of = [block](const Product &product) { return (product.out + block - 1) / block; };
  std::int64_t blocks = 0;
  for (const auto &product : products) blocks += blocks_of(product);
  at::parallel_for(0, blocks, /*grain_size=*/4, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t before = 0;
    for (const auto &product : products) {
      const std::int64_t here = blocks_of(product);
      const std::int64_t from = std::max(begin - before, std::int64_t{0}), to = std::min(end - before, here);
      if (from < to) product.stretch(kernel, rows, from * block, std::min(to * block, product.out), width, live);
      before += here;
    }
  });
}

}  // namespace

extern "C" {

// Whether this processor has the vectors that make the product below worth it.
int specforge_few_rows_pay() { return has_eight_lanes(); }

// `input [.., in]` in float32 times the transposes of `count` weights `[out, in]` in float32 or bfloat16, all contiguous on the
// CPU, without autograd.
int specforge_few_rows_linear(const at::Tensor *input, const at::Tensor *const *weights, std::size_t count,
                              at::Tensor **outputs, char *error, std::size_t error_size) {
  return guarded(
      [&] {
        const auto check = [](const at::Tensor &tensor) {
          TORCH_CHECK(tensor.is_contiguous() && tensor.is_cpu(), "expected contiguous numbers on the CPU");
        };
        check(*input);
        TORCH_CHECK(input->scalar_type() == at::kFloat, "expected rows of float32, got ", input->scalar_type());
        const std::int64_t width = input->size(-1), live = input->numel() / std::max(width, std::int64_t{1});
        auto shape = input->sizes().vec();
        std::vector<at::Tensor> results;
        std::vector<Product> products;
        for (std::size_t index = 0; index < count; index++) {
          const at::Tensor &weight = *weights[index];
          check(weight);
          TORCH_CHECK(weight.size(1) == width, "expected rows of ", weight.size(1), " numbers, got ", input->sizes());
          TORCH_CHECK(weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16,
                      "expected a weight of float32 or bfloat16, got ", weight.scalar_type());
          shape.back() = weight.size(0);
          results.push_back(at::empty(shape, input->options()));
          products.push_back({&weight, results.back().mutable_data_ptr<float>(), weight.size(0)});
        }
        multiply(input->const_data_ptr<float>(), products, live, width);
        for (std::size_t index = 0; index < count; index++) outputs[index] = new at::Tensor(std::move(results[index]));
      },
      error, error_size);
}

}  // extern "C"

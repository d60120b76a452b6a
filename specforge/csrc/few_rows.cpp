// A matrix product of a few rows, as decoding needs it: one row, or the 2 to 32 of a batch or a draft tree, times a weight that
// is far larger than they are.
//
// Such a product is bound by the weight's way through the processor. oneDNN rearranges a weight from 16 rows on, which
// costs more than the product itself; libtorch's MKL does as badly on processors that are not Intel's. Here every weight
// is read once, where it lies, and multiplies 8, 16 or 32 rows at a time: a vector holds the same column of 8 or 16 rows,
// so that a scalar of the weight needs an instruction for each vector and no sum has to be made across one. A single row
// is nothing but the weight's way from memory: rows of the weight pass by one after the other, asked for ahead of time.

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

constexpr std::int64_t LINE = 16;      // numbers of a line of the cache
constexpr std::int64_t STRETCH = 128;  // terms added up before they join the total: keeps the rounding error small

// Rows of one vector, the vectors that are multiplied side by side, and the outputs whose sums are held in registers: enough
// of them to hide an addition's latency, and no more than fit beside the columns and a scalar (16 registers of eight lanes,
// 32 of sixteen).
template <int LANES, int VECTORS, int BLOCK>
struct Group {
  using lanes = typename Vectors<LANES>::lanes;
  static constexpr std::int64_t lane_count = LANES, vectors = VECTORS, block = BLOCK, rows = LANES * VECTORS;
};
using Eight = Group<8, 1, 12>;
using NarrowSixteen = Group<8, 2, 6>;
using Sixteen = Group<16, 1, 8>;
using ThirtyTwo = Group<16, 2, 8>;

// `COUNT` outputs of a group of rows: `weight` is [out, width], `rows` is [width, rows], `result` [row][out].
template <typename Group, int COUNT>
INLINE void outputs(const float *weight, const float *rows, float *result, std::int64_t width, std::int64_t out,
                    std::int64_t live) {
  using lanes = typename Group::lanes;
  constexpr int VECTORS = Group::vectors;
  lanes total[COUNT][VECTORS];
  for (int output = 0; output < COUNT; output++)
    for (int vector = 0; vector < VECTORS; vector++) total[output][vector] = lanes{};
  for (std::int64_t start = 0; start < width; start += STRETCH) {
    const std::int64_t end = std::min(width, start + STRETCH);
    lanes sum[COUNT][VECTORS];
    for (int output = 0; output < COUNT; output++)
      for (int vector = 0; vector < VECTORS; vector++) sum[output][vector] = lanes{};
    for (std::int64_t line = start; line < end; line += LINE) {
      // The same place of the outputs that come next, while there is time: every one is a line of its own in memory.
#pragma GCC unroll 12
      for (int output = 0; output < COUNT; output++) __builtin_prefetch(weight + (COUNT + output) * width + line);
      const std::int64_t stop = std::min(end, line + LINE);
      for (std::int64_t term = line; term < stop; term++) {
        lanes column[VECTORS];
        // A vector at a time: all in one copy go by narrower ones through memory, where the next read waits for them.
        for (int vector = 0; vector < VECTORS; vector++)
          std::memcpy(&column[vector], rows + term * Group::rows + vector * Group::lane_count, sizeof(lanes));
#pragma GCC unroll 12
        for (int output = 0; output < COUNT; output++) {
          const float scalar = weight[output * width + term];
#pragma GCC unroll 2
          for (int vector = 0; vector < VECTORS; vector++) sum[output][vector] += column[vector] * scalar;
        }
      }
    }
    for (int output = 0; output < COUNT; output++)
      for (int vector = 0; vector < VECTORS; vector++) total[output][vector] += sum[output][vector];
  }
  for (std::int64_t row = 0; row < live; row++)
    for (int output = 0; output < COUNT; output++)
      result[row * out + output] = total[output][row / Group::lane_count][row % Group::lane_count];
}

// Outputs `begin .. end` of `live` rows in groups: `rows` is [groups, width, rows].
template <typename Group>
INLINE void of_groups(const float *weight, const float *rows, float *result, std::int64_t begin, std::int64_t end,
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
template <int LANES>
INLINE void of_row(const float *weight, const float *row, float *result, std::int64_t begin, std::int64_t end,
                   std::int64_t width) {
  using lanes = typename Vectors<LANES>::lanes;
  constexpr std::int64_t STEP = 4 * LINE, SUMS = STEP / LANES, AHEAD = 1024;  // numbers that are asked for ahead
  for (std::int64_t output = begin; output < end; output++) {
    const float *line = weight + output * width;
    lanes sum[SUMS] = {};
    std::int64_t term = 0;
    for (; term + STEP <= width; term += STEP)
#pragma GCC unroll 8
      for (int part = 0; part < SUMS; part++) {
        const std::int64_t place = term + part * LANES;
        lanes scalars, column;
        std::memcpy(&scalars, line + place, sizeof scalars);
        std::memcpy(&column, row + place, sizeof column);
        if (part * LANES % LINE == 0) __builtin_prefetch(line + place + AHEAD);
        sum[part] += scalars * column;
      }
    float rest = 0.0f;
    for (; term < width; term++) rest += line[term] * row[term];
    for (int left = SUMS / 2; left > 0; left /= 2)
#pragma GCC unroll 4
      for (int part = 0; part < left; part++) sum[part] += sum[part + left];
    float total = 0.0f;
    for (int lane = 0; lane < LANES; lane++) total += sum[0][lane];
    result[output] = total + rest;
  }
}

using Stretch = void(const float *, const float *, float *, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                     std::int64_t);

struct One {
  template <int LANES>
  static INLINE void run(const float *weight, const float *row, float *result, std::int64_t begin, std::int64_t end,
                         std::int64_t width, std::int64_t, std::int64_t) {
    of_row<LANES>(weight, row, result, begin, end, width);
  }
};

template <typename Group>
struct Several {
  template <int>
  static INLINE void run(const float *weight, const float *rows, float *result, std::int64_t begin, std::int64_t end,
                         std::int64_t width, std::int64_t out, std::int64_t live) {
    of_groups<Group>(weight, rows, result, begin, end, width, out, live);
  }
};

// What multiplies so many rows, and how many of them and of the outputs it takes at a time.
struct Kernel {
  Stretch *stretch;
  std::int64_t rows, block;
};

template <typename Group>
Kernel kernel() {
  return {&dispatch<Several<Group>>, Group::rows, Group::block};
}

Kernel kernel_of(std::int64_t live) {
  if (live == 1) return {&dispatch<One>, 1, 8};
  if (live <= Eight::rows) return kernel<Eight>();
  if (!has_sixteen_lanes()) return kernel<NarrowSixteen>();
  return live <= Sixteen::rows ? kernel<Sixteen>() : kernel<ThirtyTwo>();
}

}  // namespace

extern "C" {

// Whether this processor has the vectors that make the product below worth it.
int specforge_few_rows_pay() { return has_eight_lanes(); }

// `input [.., in]` times the transpose of `weight [out, in]`, both contiguous float32 on the CPU, without autograd.
int specforge_few_rows_linear(const at::Tensor *input, const at::Tensor *weight, at::Tensor **output, char *error,
                              std::size_t error_size) {
  return guarded(
      [&] {
        const std::int64_t out = weight->size(0), width = weight->size(1), live = input->numel() / width;
        TORCH_CHECK(input->size(-1) == width, "expected rows of ", width, " numbers, got ", input->sizes());
        for (const at::Tensor *tensor : {input, weight})
          TORCH_CHECK(tensor->is_contiguous() && tensor->is_cpu(), "expected contiguous numbers on the CPU");
        const Kernel kernel = kernel_of(live);
        const std::int64_t groups = (live + kernel.rows - 1) / kernel.rows;
        // [groups, width, rows]: rows that are not there are zero.
        std::vector<float> rows(groups * width * kernel.rows, 0.0f);
        const float *from = input->const_data_ptr<float>();
        for (std::int64_t first = 0; first < live; first += kernel.rows) {
          float *group = rows.data() + first * width;
          const std::int64_t here = std::min(kernel.rows, live - first);
          for (std::int64_t term = 0; term < width; term++)
            for (std::int64_t row = 0; row < here; row++)
              group[term * kernel.rows + row] = from[(first + row) * width + term];
        }
        auto shape = input->sizes().vec();
        shape.back() = out;
        at::Tensor result = at::empty(shape, input->options());
        float *into = result.mutable_data_ptr<float>();
        const float *values = weight->const_data_ptr<float>();
        const std::int64_t block = kernel.block, blocks = (out + block - 1) / block;
        at::parallel_for(0, blocks, /*grain_size=*/4, [&](std::int64_t begin, std::int64_t end) {
          kernel.stretch(values, rows.data(), into, begin * block, std::min(end * block, out), width, out, live);
        });
        *output = new at::Tensor(std::move(result));
      },
      error, error_size);
}

}  // extern "C"

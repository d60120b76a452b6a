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

constexpr std::int64_t STRETCH = 128;  // terms added up before they join the total: keeps the rounding error small

// Rows of one vector, the vectors that are multiplied side by side, and the outputs whose sums are held in registers: enough
// of them to hide an addition's latency.
struct Eight {
  typedef float lanes __attribute__((vector_size(32)));
  static constexpr std::int64_t lane_count = 8, vectors = 1, block = 12, rows = lane_count * vectors;
};
struct Sixteen {
  typedef float lanes __attribute__((vector_size(64)));
  static constexpr std::int64_t lane_count = 16, vectors = 1, block = 8, rows = lane_count * vectors;
};
// The same for 16 vector registers: 12 sums, two columns and a scalar. With the sums above half of them would live in memory.
struct NarrowSixteen {
  typedef float lanes __attribute__((vector_size(32)));
  static constexpr std::int64_t lane_count = 8, vectors = 2, block = 6, rows = lane_count * vectors;
};
struct ThirtyTwo {
  typedef float lanes __attribute__((vector_size(64)));
  static constexpr std::int64_t lane_count = 16, vectors = 2, block = 8, rows = lane_count * vectors;
};

// `COUNT` outputs of a group of rows: `weight` is [out, width], `rows` is [width, rows], `result` [row][out].
template <typename Group, int COUNT>
inline __attribute__((always_inline)) void outputs(const float *weight, const float *rows, float *result,
                                                   std::int64_t width, std::int64_t out, std::int64_t live) {
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
    for (std::int64_t term = start; term < end; term++) {
      lanes column[VECTORS];
      std::memcpy(column, rows + term * Group::rows, sizeof column);
#pragma GCC unroll 12
      for (int output = 0; output < COUNT; output++) {
        const float scalar = weight[output * width + term];
#pragma GCC unroll 2
        for (int vector = 0; vector < VECTORS; vector++) sum[output][vector] += column[vector] * scalar;
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
inline __attribute__((always_inline)) void of_groups(const float *weight, const float *rows, float *result,
                                                     std::int64_t begin, std::int64_t end, std::int64_t width,
                                                     std::int64_t out, std::int64_t live) {
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
inline __attribute__((always_inline)) void of_row(const float *weight, const float *row, float *result,
                                                  std::int64_t begin, std::int64_t end, std::int64_t width) {
  typedef float lanes __attribute__((vector_size(64)));
  constexpr std::int64_t LANES = 16, SUMS = 4, STEP = LANES * SUMS, AHEAD = 1024;  // numbers that are asked for ahead
  for (std::int64_t output = begin; output < end; output++) {
    const float *line = weight + output * width;
    lanes sum[SUMS] = {};
    std::int64_t term = 0;
    for (; term + STEP <= width; term += STEP)
#pragma GCC unroll 4
      for (int part = 0; part < SUMS; part++) {
        lanes scalars, column;
        std::memcpy(&scalars, line + term + part * LANES, sizeof scalars);
        std::memcpy(&column, row + term + part * LANES, sizeof column);
        __builtin_prefetch(line + term + part * LANES + AHEAD);
        sum[part] += scalars * column;
      }
    float rest = 0.0f;
    for (; term < width; term++) rest += line[term] * row[term];
    const lanes both = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    float total = 0.0f;
    for (int lane = 0; lane < LANES; lane++) total += both[lane];
    result[output] = total + rest;
  }
}

using Stretch = void(const float *, const float *, float *, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                     std::int64_t);

FOR_EVERY_PROCESSOR void of_one(const float *weight, const float *rows, float *result, std::int64_t begin,
                                std::int64_t end, std::int64_t width, std::int64_t, std::int64_t) {
  of_row(weight, rows, result, begin, end, width);
}

FOR_EVERY_PROCESSOR void of_eight(const float *weight, const float *rows, float *result, std::int64_t begin,
                                  std::int64_t end, std::int64_t width, std::int64_t out, std::int64_t live) {
  of_groups<Eight>(weight, rows, result, begin, end, width, out, live);
}

FOR_EVERY_PROCESSOR void of_sixteen(const float *weight, const float *rows, float *result, std::int64_t begin,
                                    std::int64_t end, std::int64_t width, std::int64_t out, std::int64_t live) {
  of_groups<Sixteen>(weight, rows, result, begin, end, width, out, live);
}

FOR_EVERY_PROCESSOR void of_narrow_sixteen(const float *weight, const float *rows, float *result, std::int64_t begin,
                                           std::int64_t end, std::int64_t width, std::int64_t out,
                                           std::int64_t live) {
  of_groups<NarrowSixteen>(weight, rows, result, begin, end, width, out, live);
}

FOR_EVERY_PROCESSOR void of_thirty_two(const float *weight, const float *rows, float *result, std::int64_t begin,
                                       std::int64_t end, std::int64_t width, std::int64_t out, std::int64_t live) {
  of_groups<ThirtyTwo>(weight, rows, result, begin, end, width, out, live);
}

// What multiplies so many rows, and how many of them and of the outputs it takes at a time.
struct Kernel {
  Stretch *stretch;
  std::int64_t rows, block;
};

template <typename Group>
Kernel kernel(Stretch *stretch) {
  return {stretch, Group::rows, Group::block};
}

Kernel kernel_of(std::int64_t live) {
  if (live == 1) return {&of_one, 1, 8};
  if (live <= Eight::rows) return kernel<Eight>(&of_eight);
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx512f")) return kernel<NarrowSixteen>(&of_narrow_sixteen);
  // Sixteen sums of two vectors each want the 32 registers of AVX-512.
  if (live > Sixteen::rows) return kernel<ThirtyTwo>(&of_thirty_two);
#endif
  return kernel<Sixteen>(&of_sixteen);
}

}  // namespace

extern "C" {

// Whether this processor has the vectors that make the product below worth it.
int specforge_few_rows_pay() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 0;
#endif
}

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

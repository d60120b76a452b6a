// A matrix product of a few rows, as the verification of a draft tree needs it: 2 to 32 rows times a weight that is far
// larger than they are.
//
// Such a product is bound by the weight's way through the processor. oneDNN rearranges a weight from 16 rows on, which
// costs more than the product itself; libtorch's MKL does as badly on processors that are not Intel's. Here every weight
// is read where it lies, and multiplies 8 or 16 rows at a time: one vector holds the same column of all rows, so that a
// single scalar of the weight needs a single instruction and no sum has to be made across a vector.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "guarded.h"

namespace {

constexpr std::int64_t STRETCH = 128;  // terms added up before they join the total: keeps the rounding error small

// Rows of one vector, and the outputs whose sums are held in registers: enough of them to hide an addition's latency.
struct Eight {
  typedef float lanes __attribute__((vector_size(32)));
  static constexpr std::int64_t rows = 8, block = 12;
};
struct Sixteen {
  typedef float lanes __attribute__((vector_size(64)));
  static constexpr std::int64_t rows = 16, block = 8;
};

// `COUNT` outputs of the rows of one vector: `weight` is [out, width], `rows` is [width, rows], `result` [row][out].
template <typename Vector, int COUNT>
inline __attribute__((always_inline)) void outputs(const float *weight, const float *rows, float *result,
                                                   std::int64_t width, std::int64_t out, std::int64_t live) {
  using lanes = typename Vector::lanes;
  lanes total[COUNT];
  for (int output = 0; output < COUNT; output++) total[output] = lanes{};
  for (std::int64_t start = 0; start < width; start += STRETCH) {
    const std::int64_t end = std::min(width, start + STRETCH);
    lanes sum[COUNT];
    for (int output = 0; output < COUNT; output++) sum[output] = lanes{};
    for (std::int64_t term = start; term < end; term++) {
      lanes column;
      std::memcpy(&column, rows + term * Vector::rows, sizeof column);
#pragma GCC unroll 12
      for (int output = 0; output < COUNT; output++) sum[output] += column * weight[output * width + term];
    }
    for (int output = 0; output < COUNT; output++) total[output] += sum[output];
  }
  for (std::int64_t row = 0; row < live; row++)
    for (int output = 0; output < COUNT; output++) result[row * out + output] = total[output][row];
}

// Outputs `begin .. end` of `live` rows in groups of a vector's: `rows` is [groups, width, rows].
template <typename Vector>
inline __attribute__((always_inline)) void of_groups(const float *weight, const float *rows, float *result,
                                                     std::int64_t begin, std::int64_t end, std::int64_t width,
                                                     std::int64_t out, std::int64_t live) {
  for (std::int64_t output = begin; output < end;) {
    const std::int64_t count = end - output >= Vector::block ? Vector::block : 1;
    for (std::int64_t first = 0; first < live; first += Vector::rows) {
      const float *of_group = rows + first * width;
      float *into = result + first * out + output;
      const std::int64_t here = std::min(Vector::rows, live - first);
      if (count == Vector::block)
        outputs<Vector, Vector::block>(weight + output * width, of_group, into, width, out, here);
      else
        outputs<Vector, 1>(weight + output * width, of_group, into, width, out, here);
    }
    output += count;
  }
}

#if defined(__x86_64__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

using Stretch = void(const float *, const float *, float *, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                     std::int64_t);

FOR_EVERY_PROCESSOR void of_eight(const float *weight, const float *rows, float *result, std::int64_t begin,
                                  std::int64_t end, std::int64_t width, std::int64_t out, std::int64_t live) {
  of_groups<Eight>(weight, rows, result, begin, end, width, out, live);
}

FOR_EVERY_PROCESSOR void of_sixteen(const float *weight, const float *rows, float *result, std::int64_t begin,
                                    std::int64_t end, std::int64_t width, std::int64_t out, std::int64_t live) {
  of_groups<Sixteen>(weight, rows, result, begin, end, width, out, live);
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
        const bool eight = live <= Eight::rows;
        const std::int64_t lanes = eight ? Eight::rows : Sixteen::rows, block = eight ? Eight::block : Sixteen::block;
        const std::int64_t groups = (live + lanes - 1) / lanes;
        // [groups, width, lanes]: rows that are not there are zero.
        std::vector<float> rows(groups * width * lanes, 0.0f);
        const float *from = input->const_data_ptr<float>();
        for (std::int64_t row = 0; row < live; row++) {
          float *lane = rows.data() + (row / lanes) * width * lanes + row % lanes;
          for (std::int64_t term = 0; term < width; term++) lane[term * lanes] = from[row * width + term];
        }
        auto shape = input->sizes().vec();
        shape.back() = out;
        at::Tensor result = at::empty(shape, input->options());
        float *into = result.mutable_data_ptr<float>();
        const float *values = weight->const_data_ptr<float>();
        const std::int64_t blocks = (out + block - 1) / block;
        at::parallel_for(0, blocks, /*grain_size=*/4, [&](std::int64_t begin, std::int64_t end) {
          Stretch *stretch = eight ? &of_eight : &of_sixteen;
          stretch(values, rows.data(), into, begin * block, std::min(end * block, out), width, out, live);
        });
        *output = new at::Tensor(std::move(result));
      },
      error, error_size);
}

}  // extern "C"

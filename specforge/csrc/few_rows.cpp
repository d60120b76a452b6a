// A matrix product of a few rows, as the verification of a draft tree needs it: 6 to 32 rows times a weight that is far
// larger than they are.
//
// Such a product is bound by the weight's way through the processor. oneDNN rearranges a weight from 16 rows on, which
// costs more than the product itself; libtorch's MKL does as badly on processors that are not Intel's. Here every weight
// is read once, where it lies, and multiplies 16 rows at a time: one vector holds the same column of 16 rows, so that a
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

constexpr std::int64_t LANES = 16;   // rows of one vector
constexpr std::int64_t BLOCK = 8;    // outputs whose sums are held in registers
constexpr std::int64_t STRETCH = 128;  // terms added up before they join the total: keeps the rounding error small

typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));

// Outputs `first .. first + COUNT` of 16 rows. `weight` is [out, width], `rows` is [width, 16], `result` [row][out].
template <int COUNT>
inline __attribute__((always_inline)) void outputs(const float *weight, const float *rows, float *result,
                                                   std::int64_t width, std::int64_t out, std::int64_t live) {
  lanes total[COUNT];
  for (int output = 0; output < COUNT; output++) total[output] = lanes{};
  for (std::int64_t start = 0; start < width; start += STRETCH) {
    const std::int64_t end = std::min(width, start + STRETCH);
    lanes sum[COUNT];
    for (int output = 0; output < COUNT; output++) sum[output] = lanes{};
    for (std::int64_t term = start; term < end; term++) {
      lanes column;
      std::memcpy(&column, rows + term * LANES, sizeof column);
#pragma GCC unroll 8
      for (int output = 0; output < COUNT; output++) sum[output] += column * weight[output * width + term];
    }
    for (int output = 0; output < COUNT; output++) total[output] += sum[output];
  }
  for (std::int64_t row = 0; row < live; row++)
    for (int output = 0; output < COUNT; output++) result[row * out + output] = total[output][row];
}

#if defined(__x86_64__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

// Outputs `begin .. end` of `live` rows in groups of 16: `rows` is [groups, width, 16].
FOR_EVERY_PROCESSOR void stretch_of_outputs(const float *weight, const float *rows, float *result, std::int64_t begin,
                                            std::int64_t end, std::int64_t width, std::int64_t out,
                                            std::int64_t live) {
  for (std::int64_t output = begin; output < end;) {
    const std::int64_t count = end - output >= BLOCK ? BLOCK : 1;
    for (std::int64_t group = 0; group * LANES < live; group++) {
      const float *of_group = rows + group * width * LANES;
      float *into = result + group * LANES * out + output;
      const std::int64_t here = std::min(LANES, live - group * LANES);
      if (count == BLOCK)
        outputs<BLOCK>(weight + output * width, of_group, into, width, out, here);
      else
        outputs<1>(weight + output * width, of_group, into, width, out, here);
    }
    output += count;
  }
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
        const std::int64_t groups = (live + LANES - 1) / LANES;
        // [groups, width, 16]: rows that are not there are zero.
        std::vector<float> rows(groups * width * LANES, 0.0f);
        const float *from = input->const_data_ptr<float>();
        for (std::int64_t row = 0; row < live; row++) {
          float *lane = rows.data() + (row / LANES) * width * LANES + row % LANES;
          for (std::int64_t term = 0; term < width; term++) lane[term * LANES] = from[row * width + term];
        }
        auto shape = input->sizes().vec();
        shape.back() = out;
        at::Tensor result = at::empty(shape, input->options());
        float *into = result.mutable_data_ptr<float>();
        const float *values = weight->const_data_ptr<float>();
        const std::int64_t blocks = (out + BLOCK - 1) / BLOCK;
        at::parallel_for(0, blocks, /*grain_size=*/4, [&](std::int64_t begin, std::int64_t end) {
          stretch_of_outputs(values, rows.data(), into, begin * BLOCK, std::min(end * BLOCK, out), width, out, live);
        });
        *output = new at::Tensor(std::move(result));
      },
      error, error_size);
}

}  // extern "C"

// What stands between the products of a transformer layer, row by row on the CPU: plain float32 memory in, memory out.

#pragma once

#include <cstdint>

namespace layer_parts {

// Rows of `width` numbers, divided by their root mean square and multiplied with `weight` where there is one, then turned
// by rotary tables where there are some. `rows` may be heads: `heads` of them one behind the other share a row of a table.
struct Norm {
  std::int64_t rows, width, heads;
  const float *weight;     // [width], or null
  float epsilon;
  const float *cos, *sin;  // [rows / heads, turned], or null; the sine of the first half has its sign turned
  std::int64_t turned;     // the first numbers of a row, an even count; those behind them stay
};

// `inverse [rows]` is 1 / sqrt(mean(x^2) + epsilon), for the way back; not written without a weight.
void norm_forward(const Norm &norm, const float *input, float *output, float *inverse);

// `slope [rows, width]` of the output becomes `input_slope` of the input. What the weight gets is `weight_parts [parts,
// width]`, to be added up; every part is a fixed share of the rows, whatever number of threads there is.
void norm_backward(const Norm &norm, const float *input, const float *inverse, const float *slope, float *input_slope,
                   float *weight_parts, std::int64_t parts);

// `silu(gate) * up` of so many numbers.
void gate_forward(std::int64_t count, const float *gate, const float *up, float *product);

// From the slope of the product those of gate and up; the slope's memory may be one of theirs.
void gate_backward(std::int64_t count, const float *gate, const float *up, const float *slope, float *gate_slope,
                   float *up_slope);

}  // namespace layer_parts

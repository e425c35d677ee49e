// What the attention kernels are told; no torch, no device code.
#pragma once

#include <cstdint>
#include <cuda_runtime_api.h>

namespace stac {

enum class Type { float16, bfloat16 };

// Tokens [rows, length, dim], the last dimension contiguous; strides in elements.
struct Tokens {
  const void* data;
  int64_t row_stride;
  int64_t token_stride;
};

// One float32 per token [rows, length]; data may be null.
struct Numbers {
  const float* data;
  int64_t row_stride;
  int64_t token_stride;
};

// out and lse over one segment of keys, joined with those of the segments before it, if any.
struct ForwardArguments {
  Tokens q, k, v;
  Numbers bias;
  const float* before_out;  // [rows, queries, dim] and [rows, queries] without gaps, or null
  const float* before_lse;
  void* out;  // [rows, queries, dim] without gaps, in the type of q or, where out_is_float, float32
  bool out_is_float;
  float* lse;  // [rows, queries] without gaps
  int rows, queries, keys;
  float scale;
};

// Column sums of exp(logits − lse) over the given queries, times `factor`.
struct MassArguments {
  Tokens q, k;
  Numbers bias, lse;
  float* mass;  // [rows, keys] without gaps
  int rows, queries, keys;
  float scale, factor;
};

// Both return the launch's status; cudaErrorInvalidValue for a head width without a kernel.
cudaError_t launch_attend_forward(const ForwardArguments&, Type, int dim, cudaStream_t);
cudaError_t launch_attend_mass(const MassArguments&, Type, int dim, cudaStream_t);

}  // namespace stac

// What the attention kernels are told; no torch, no device code.
#pragma once

#include <cstdint>
#include <cuda_runtime_api.h>

namespace stac {

enum class Type { float16, bfloat16 };

constexpr int MOST_SEGMENTS = 8;  // of stac_core/kernels/attend.py
constexpr int CODE_GROUP = 64;    // channels that share a scale and an offset

// Numbers [rows, length, dim], the last dimension contiguous; strides in elements.
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

// Tokens as numbers, or as codes [rows, length, dim · bits / 8] of bytes with scale and offset of each
// group as float16 [rows, length, 2 · groups]; factor [rows, dim], if any, multiplies what is decoded.
struct Stored {
  Tokens tokens;  // strides of codes in bytes
  Tokens grid;
  const float* factor;
  int64_t factor_row_stride;
};

struct Segment {
  Stored keys, values;
  Numbers bias;
  int length;  // at least 1
  int bits;    // 16 = numbers, 8 or 4 = codes
};

// out and lse over all keys of all segments.
struct ForwardArguments {
  Tokens q;
  Segment segments[MOST_SEGMENTS];
  int count;   // of segments
  void* out;   // [rows, queries, dim] without gaps, in the type of q
  float* lse;  // [rows, queries] without gaps
  int rows, queries;
  float scale;
};

// Column sums of exp(logits − lse) over the given queries, times `factor`; values of segments are not read.
struct MassArguments {
  Tokens q;
  Segment segments[MOST_SEGMENTS];
  int count;
  Numbers lse;
  float* mass;  // [rows, columns] without gaps, segment after segment
  int rows, queries, columns;
  float scale, factor;
};

// Both return the launch's status; cudaErrorInvalidValue for a head width without a kernel.
cudaError_t launch_attend_forward(const ForwardArguments&, Type, int dim, cudaStream_t);
cudaError_t launch_attend_mass(const MassArguments&, Type, int dim, cudaStream_t);

}  // namespace stac

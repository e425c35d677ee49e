// What the gather is told; no torch, no device code. Contract: stac_core/kernels/gather.py.
#pragma once

#include <cstdint>
#include <cuda_runtime_api.h>

#include "attend.h"

namespace stac {

constexpr int MOST_PAGES = 32;  // of one launch

// Tokens in consecutive slots, without gaps: numbers, or codes with scale and offset as float16.
struct Page {
  const void* keys;
  const void* key_grid;
  const void* values;
  const void* value_grid;
  int64_t first;  // its first slot
};

// Tokens of one kind that lie in the given pages; with `pad` also the padding behind all kinds.
struct GatherArguments {
  Page pages[MOST_PAGES];
  int count;               // of pages
  int64_t stop;            // the slot behind the last page
  int bits;                // 16 = numbers, 8 or 4 = codes
  const int64_t* slots;    // [lanes, candidates] without gaps, like the members
  const float* members;
  const int64_t* before;   // [lanes] place of the first token of this kind
  const int64_t* wanted;   // [lanes] tokens of this kind
  const int64_t* total;    // [lanes] tokens of all kinds
  const float* factor;     // [lanes, dim] without gaps, or null
  void* keys;              // [lanes, budget, dim] without gaps
  void* values;
  float* bias;             // [lanes, budget] without gaps
  int lanes, candidates, budget, dim;  // dim is even
  bool pad;
};

enum class GatherType { float16, bfloat16, float32 };

cudaError_t launch_gather(const GatherArguments&, GatherType, cudaStream_t);

}  // namespace stac

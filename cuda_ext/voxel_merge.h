// What the voxel merge is told; no torch, no device code. Layouts are those of
// stac_core/kernels/voxel_merge.py, everything float32 and without gaps.
#pragma once

#include <cstdint>
#include <cuda_runtime_api.h>

namespace stac {

template <typename Number>
struct Rows {
  Number* pivot_keys;    // [rows, pivots, dim]
  Number* pivot_values;  // [rows, pivots, dim]
  Number* weight;        // [rows, pivots]
  Number* score_sum;     // [rows, pivots]
  Number* members;       // [rows, pivots]
  Number* buffer_keys;   // [rows, buffer, dim]
  Number* buffer_values; // [rows, buffer, dim]
  Number* buffer_score;  // [rows, buffer]
};

struct MergeArguments {
  Rows<const float> before;
  Rows<float> after;
  const int64_t* order;  // [tokens] numbers of the tokens, by row
  const int64_t* start;  // [rows + 1] first place of each row in `order`
  const float* keys;     // [tokens, dim]
  const float* values;   // [tokens, dim]
  const float* score;    // [tokens]
  float* score_left;     // [tokens] scratch, in the order of `order`
  int32_t* counts;       // [rows, 5] merged, buffered, gated, aggregated, remerged
  int rows, pivots, buffer, dim;
  float threshold, gate, heaviest;
};

constexpr int MOST_PIVOTS = 32;   // one lane each
constexpr int MERGE_WARPS = 4;    // rows per block, at most
constexpr int MOST_CHANNELS = 4;  // per lane: head widths up to 128

constexpr int MOST_SHARED_BYTES = 99 * 1024;  // that a block can have on every GPU since 8.0
static_assert(MOST_PIVOTS * 32 * MOST_CHANNELS * 4 * 4 <= MOST_SHARED_BYTES, "any row fits a block");

// Bytes of shared memory of one row: keys and values of the pivots, and what pulls at them.
inline int merge_row_bytes(int pivots, int dim) { return pivots * dim * 4 * 4; }

// Rows of a block: of large ones fewer fit.
inline int merge_warps(int pivots, int dim) {
  const int fit = MOST_SHARED_BYTES / merge_row_bytes(pivots, dim);
  return fit < MERGE_WARPS ? fit : MERGE_WARPS;
}

// The launch's status; cudaErrorInvalidValue where a size has no kernel.
cudaError_t launch_voxel_merge(const MergeArguments&, cudaStream_t);

}  // namespace stac

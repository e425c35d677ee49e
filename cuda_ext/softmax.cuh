// The softmax of attention, step by step over tiles of keys; logits are kept in base 2.
#ifndef STAC_SOFTMAX_CUH
#define STAC_SOFTMAX_CUH

#include <cmath>

#include "tiles.cuh"

namespace stac {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float INFINITE = INFINITY;

// Scale the products, add the bias of their columns, hide columns beyond the last key.
template <int DIM>
__device__ __forceinline__ void to_logits(
    Products<DIM>& products, const float* bias, float scale, int columns_left) {
  const int first = lane_index() % 4 * 2;
#pragma unroll
  for (int j = 0; j < Shape<DIM>::columns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = j * 8 + first + e;
      float shift = bias ? bias[column] * LOG2_E : 0.0f;
      if (column >= columns_left) shift = -INFINITE;
#pragma unroll
      for (int f = 0; f < Shape<DIM>::fragments; ++f) {
        products[f][j][e] = fmaf(products[f][j][e], scale, shift);
        products[f][j][2 + e] = fmaf(products[f][j][2 + e], scale, shift);
      }
    }
}

// Running softmax of the warp's rows; a thread serves two rows of every fragment.
template <int DIM>
struct Softmax {
  static constexpr int fragments = Shape<DIM>::fragments;
  float top[fragments][2];    // largest logit so far
  float total[fragments][2];  // this thread's share of the sum of weights
  WeightedSums<DIM> out;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
      top[f][0] = top[f][1] = -INFINITE;
      total[f][0] = total[f][1] = 0;
#pragma unroll
      for (int j = 0; j < DIM / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[f][j][e] = 0;
    }
  }

  // Turn logits into weights against the new maximum, and shrink what was summed before.
  __device__ __forceinline__ void absorb(Products<DIM>& logits) {
#pragma unroll
    for (int f = 0; f < fragments; ++f)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = top[f][half];
#pragma unroll
        for (int j = 0; j < Shape<DIM>::columns / 8; ++j)
          highest = fmaxf(highest, fmaxf(logits[f][j][2 * half], logits[f][j][2 * half + 1]));
        highest = row_max(highest);
        const float reference = highest == -INFINITE ? 0.0f : highest;  // −inf − (−inf) would be NaN
        const float shrink = exp2_fast(top[f][half] - reference);
        float sum = 0;
#pragma unroll
        for (int j = 0; j < Shape<DIM>::columns / 8; ++j)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e)
            sum += logits[f][j][e] = exp2_fast(logits[f][j][e] - reference);
        top[f][half] = highest;
        total[f][half] = total[f][half] * shrink + sum;
#pragma unroll
        for (int j = 0; j < DIM / 8; ++j) {
          out[f][j][2 * half] *= shrink;
          out[f][j][2 * half + 1] *= shrink;
        }
      }
  }
};

}  // namespace stac

#endif

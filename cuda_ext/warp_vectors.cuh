// Vectors spread over a warp: lane l owns channels l, l + 32, …
#ifndef STAC_WARP_VECTORS_CUH
#define STAC_WARP_VECTORS_CUH

#include "intrinsics.cuh"

namespace stac {

constexpr float SMALLEST_NORM = 1e-12f;

template <int CHANNELS>
struct Vector {  // one key or value
  float part[CHANNELS];
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The best score of the warp and its place; the lowest place among equals.
__device__ __forceinline__ void warp_best(float& score, int& place) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = shuffle_xor(score, mask);
    const int other_place = shuffle_xor(place, mask);
    if (other > score || (other == score && other_place < place)) {
      score = other;
      place = other_place;
    }
  }
}

template <int CHANNELS>
__device__ __forceinline__ float dot(const Vector<CHANNELS>& a, const Vector<CHANNELS>& b) {
  float sum = 0;
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) sum = fmaf(a.part[c], b.part[c], sum);
  return warp_sum(sum);
}

template <int CHANNELS>
__device__ __forceinline__ float norm(const Vector<CHANNELS>& a) {
  return fmaxf(sqrtf(dot(a, a)), SMALLEST_NORM);
}

template <int CHANNELS>
__device__ __forceinline__ void add(Vector<CHANNELS>& sum, float factor, const Vector<CHANNELS>& x) {
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) sum.part[c] = fmaf(factor, x.part[c], sum.part[c]);
}

}  // namespace stac

#endif

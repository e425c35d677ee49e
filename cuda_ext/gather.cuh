// Fetching retrieved tokens: one warp per place of the result, a lane two channels at a time.
#ifndef STAC_GATHER_CUH
#define STAC_GATHER_CUH

#include <cmath>

#include "gather.h"
#include "intrinsics.cuh"

namespace stac {

constexpr int GATHER_WARPS = 8;  // places per block

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

// Channels `channel` and the next of a token of a page.
template <typename T>
__device__ __forceinline__ Pair<float> read_pair(
    const void* stored, const void* grids, int64_t token, int channel, int dim, int bits) {
  if (bits == 16) {
    const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(static_cast<const T*>(stored) + token * dim + channel);
    return {static_cast<float>(pair.low), static_cast<float>(pair.high)};
  }
  const uint8_t* code = static_cast<const uint8_t*>(stored) + token * (dim * bits / 8) + channel * bits / 8;
  const int low = bits == 8 ? code[0] : code[0] & 15, high = bits == 8 ? code[1] : code[0] >> 4;
  const int groups = (dim + CODE_GROUP - 1) / CODE_GROUP;
  const __half* grid = static_cast<const __half*>(grids) + (token * groups + channel / CODE_GROUP) * 2;
  const float scale = __half2float(grid[0]), offset = __half2float(grid[1]);
  return {fmaf(static_cast<float>(low), scale, offset), fmaf(static_cast<float>(high), scale, offset)};
}

template <typename T>
__device__ __forceinline__ void write_pair(void* rows, int64_t at, Pair<float> pair) {
  *reinterpret_cast<Pair<T>*>(static_cast<T*>(rows) + at) = {static_cast<T>(pair.low), static_cast<T>(pair.high)};
}

template <typename T>
__global__ void __launch_bounds__(GATHER_WARPS * 32) gather_kernel(const __grid_constant__ GatherArguments args) {
  const int64_t lane = blockIdx.y;
  const int place = blockIdx.x * GATHER_WARPS + threadIdx.x / 32, own = threadIdx.x % 32;
  if (place >= args.budget) return;
  const int64_t row = lane * args.budget + place, token = place - args.before[lane];
  if (token >= 0 && token < args.wanted[lane]) {
    const int64_t slot = args.slots[lane * args.candidates + token];
    if (slot < args.pages[0].first || slot >= args.stop) return;
    int number = 0;
    while (number + 1 < args.count && slot >= args.pages[number + 1].first) ++number;
    const Page& page = args.pages[number];
    for (int channel = own * 2; channel < args.dim; channel += 64) {
      Pair<float> key = read_pair<T>(page.keys, page.key_grid, slot - page.first, channel, args.dim, args.bits);
      if (args.factor) {
        key.low *= args.factor[lane * args.dim + channel];
        key.high *= args.factor[lane * args.dim + channel + 1];
      }
      write_pair<T>(args.keys, row * args.dim + channel, key);
      write_pair<T>(
          args.values, row * args.dim + channel,
          read_pair<T>(page.values, page.value_grid, slot - page.first, channel, args.dim, args.bits));
    }
    if (own == 0) args.bias[row] = logf(args.members[lane * args.candidates + token]);
  } else if (args.pad && place >= args.total[lane]) {
    for (int channel = own * 2; channel < args.dim; channel += 64) {
      write_pair<T>(args.keys, row * args.dim + channel, {0.0f, 0.0f});
      write_pair<T>(args.values, row * args.dim + channel, {0.0f, 0.0f});
    }
    if (own == 0) args.bias[row] = -INFINITY;
  }
}

}  // namespace stac

#endif

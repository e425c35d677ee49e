// Tokens stored as codes: streamed as codes, numbers between two stretches of shared memory.
#ifndef STAC_CODES_CUH
#define STAC_CODES_CUH

#include "tiles.cuh"

namespace stac {

// Codes of COUNT tokens where a thread finds them: in shared memory, or still in the store.
struct CodeTile {
  const uint8_t* codes;
  int64_t codes_pitch;  // bytes from token to token
  const __half* grid;
  int64_t grid_pitch;  // elements from token to token
};

// The memory that COUNT tokens of K (index 0) or V (1) are streamed to as codes.
template <int DIM, int COUNT>
__device__ __forceinline__ CodeTile code_tile(void* memory, int index) {
  uint8_t* const bytes = static_cast<uint8_t*>(memory);
  const __half* const grids = reinterpret_cast<const __half*>(bytes + 2 * COUNT * DIM);
  constexpr int grid_pitch = 2 * Shape<DIM>::groups;
  return {bytes + index * COUNT * DIM, DIM, grids + index * COUNT * grid_pitch, grid_pitch};
}

// COUNT tokens from `first` on as codes; zeros, which decode to zeros, beyond the last token.
template <int DIM, int COUNT>
__device__ __forceinline__ void stream_codes(
    const CodeTile& tile, const Stored& stored, int bits, int row, int first, int length) {
  constexpr int piece = DIM >= 32 ? 16 : 8;  // bytes copied at once
  const int pieces = DIM * bits / 8 / piece;
  const uint8_t* codes = static_cast<const uint8_t*>(stored.tokens.data) + row * stored.tokens.row_stride;
  for (int i = threadIdx.x; i < COUNT * pieces; i += Shape<DIM>::threads) {
    const int token = i / pieces, at = i % pieces * piece;
    const bool inside = first + token < length;
    const int64_t from = inside ? (first + token) * stored.tokens.token_stride + at : 0;
    copy_async<piece>(const_cast<uint8_t*>(tile.codes) + token * tile.codes_pitch + at, codes + from, inside);
  }
  const __half* grid = static_cast<const __half*>(stored.grid.data) + row * stored.grid.row_stride;
  for (int i = threadIdx.x; i < COUNT * Shape<DIM>::groups; i += Shape<DIM>::threads) {
    const int token = i / Shape<DIM>::groups, at = i % Shape<DIM>::groups * 2;
    const bool inside = first + token < length;
    const int64_t from = inside ? (first + token) * stored.grid.token_stride + at : 0;
    copy_async<4>(const_cast<__half*>(tile.grid) + token * tile.grid_pitch + at, grid + from, inside);
  }
}

// Eight codes of four bits, the first in the lowest, as one byte each.
__device__ __forceinline__ uint2 spread_nibbles(uint32_t codes) {
  const auto spread = [](uint32_t x) {  // of 16 bits, to 32
    x = (x | x << 8) & 0x00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f;
  };
  return make_uint2(spread(codes & 0xffff), spread(codes >> 16));
}

// The first `present` of COUNT tokens as numbers, (code · scale + offset) · factor; zeros for the others.
template <typename T, int DIM, int COUNT>
__device__ __forceinline__ void decode_tokens(
    T* numbers, const CodeTile& tile, int bits, int present, const float* factor) {
  constexpr int parts = DIM / 8;
  static_assert(Shape<DIM>::threads % parts == 0, "a thread always has the same channels");
  const int channel = threadIdx.x % parts * 8;
  float factors[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) factors[e] = factor ? factor[channel + e] : 1.0f;
  for (int token = threadIdx.x / parts; token < COUNT; token += Shape<DIM>::threads / parts) {
    uint2 codes = make_uint2(0, 0);
    float scale = 0, offset = 0;
    if (token < present) {
      const uint8_t* from = tile.codes + token * tile.codes_pitch + channel * bits / 8;
      codes = bits == 8 ? *reinterpret_cast<const uint2*>(from)
                        : spread_nibbles(*reinterpret_cast<const uint32_t*>(from));
      const __half* grid = tile.grid + token * tile.grid_pitch + channel / CODE_GROUP * 2;
      scale = __half2float(grid[0]);
      offset = __half2float(grid[1]);
    }
    uint32_t packed[4];
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const uint32_t pair = (e < 4 ? codes.x : codes.y) >> e % 4 * 8;
      const float low = fmaf(static_cast<float>(pair & 0xff), scale, offset) * factors[e];
      const float high = fmaf(static_cast<float>(pair >> 8 & 0xff), scale, offset) * factors[e + 1];
      packed[e / 2] = pack<T>(low, high);
    }
    *reinterpret_cast<uint4*>(numbers + token * Shape<DIM>::pitch + channel) =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

// A row's factor per channel, if any.
__device__ __forceinline__ const float* factor_of(const Stored& stored, int row) {
  return stored.factor ? stored.factor + row * stored.factor_row_stride : nullptr;
}

}  // namespace stac

#endif

// A block of 4 warps keeps its rows of one operand in registers and streams tiles of the other through two
// stages of shared memory; what it multiplies them to stays in registers too.
#ifndef STAC_TILES_CUH
#define STAC_TILES_CUH

#include "attend.h"
#include "intrinsics.cuh"

namespace stac {

template <int DIM>
struct Shape {
  static constexpr int threads = 128;
  static constexpr int fragments = DIM <= 64 ? 2 : 1;       // 16 rows each, per warp
  static constexpr int warp_rows = 16 * fragments;
  static constexpr int rows = threads / 32 * warp_rows;     // rows of the block
  static constexpr int columns = DIM <= 64 ? 64 : 32;       // of a streamed tile
  static constexpr int pitch = DIM + 8;                     // 16 bytes of padding: no bank conflicts
  static constexpr int tile = columns * pitch;              // elements
  static constexpr int groups = (DIM + CODE_GROUP - 1) / CODE_GROUP;    // of channels, in codes
  static constexpr int forward_bytes = 4 * tile * 2 + 2 * columns * 4;  // K and V twice, bias twice
  static constexpr int mass_bytes = 2 * tile * 2 + 2 * columns * 4;     // Q twice, lse twice
  static_assert(rows * pitch <= 2 * tile, "the rows of the block pass through the tiles' memory");
  static_assert(2 * columns * (DIM + 4 * groups) <= 2 * tile, "codes of K and V fit a tile of numbers");
};

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

// What a thread holds of the warp's rows: numbers of 16 bits as A fragments, products with the columns of a
// tile, sums over columns in all channels.
template <int DIM>
using Rows16 = uint32_t[Shape<DIM>::fragments][DIM / 16][4];
template <int DIM>
using Products = float[Shape<DIM>::fragments][Shape<DIM>::columns / 8][4];
template <int DIM>
using WeightedSums = float[Shape<DIM>::fragments][DIM / 8][4];

// The row of fragment f that the first (half 0) or second (half 1) pair of a thread's numbers lies in.
template <int DIM>
__device__ __forceinline__ int own_row(int f, int half) {
  return warp_index() * Shape<DIM>::warp_rows + f * 16 + half * 8 + lane_index() / 4;
}

// The four lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// COUNT tokens from `first` on, into a tile of shared memory; zeros beyond the last token.
template <typename T, int DIM, int COUNT>
__device__ __forceinline__ void stream_tokens(T* tile, const Tokens& tokens, int row, int first, int length) {
  constexpr int chunks = DIM / 8;  // of 16 bytes
  const T* source = static_cast<const T*>(tokens.data) + row * tokens.row_stride;
  for (int i = threadIdx.x; i < COUNT * chunks; i += Shape<DIM>::threads) {
    const int token = i / chunks, channel = i % chunks * 8;
    const bool inside = first + token < length;
    const int64_t from = inside ? (first + token) * tokens.token_stride + channel : 0;
    copy_async<16>(tile + token * Shape<DIM>::pitch + channel, source + from, inside);
  }
}

template <int COUNT>
__device__ __forceinline__ void stream_numbers(
    float* tile, const Numbers& numbers, int row, int first, int length) {
  for (int i = threadIdx.x; i < COUNT; i += blockDim.x) {
    const bool inside = first + i < length;
    const int64_t from = inside ? (first + i) * numbers.token_stride : 0;
    copy_async<4>(tile + i, numbers.data + row * numbers.row_stride + from, inside);
  }
}

// Tiles 0 to `count` − 1: `stream` starts to copy one into stage tile % 2, `use` finds it there.
template <typename Stream, typename Use>
__device__ __forceinline__ void sweep_tiles(int count, const Stream& stream, const Use& use) {
  stream(0);
  commit_copies();
  for (int tile = 0; tile < count; ++tile) {
    if (tile + 1 < count) {
      stream(tile + 1);
      commit_copies();
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    synchronize_block();
    use(tile);
    synchronize_block();
  }
}

// The warp's rows of a tile as A fragments.
template <typename T, int DIM>
__device__ __forceinline__ void load_rows(Rows16<DIM>& a, const T* tile) {
  const int lane = lane_index();
  const int row = warp_index() * Shape<DIM>::warp_rows + lane % 16, column = lane / 16 * 8;
#pragma unroll
  for (int f = 0; f < Shape<DIM>::fragments; ++f)
#pragma unroll
    for (int c = 0; c < DIM / 16; ++c)
      load_matrices(a[f][c], tile + (row + f * 16) * Shape<DIM>::pitch + c * 16 + column);
}

// products = a · tileᵀ, tile [columns, DIM].
template <typename T, int DIM>
__device__ __forceinline__ void multiply_by_tile(
    Products<DIM>& products, const Rows16<DIM>& a, const T* tile) {
  const int lane = lane_index();
  const T* own_row = tile + (lane / 16 * 8 + lane % 8) * Shape<DIM>::pitch + lane / 8 % 2 * 8;
#pragma unroll
  for (int f = 0; f < Shape<DIM>::fragments; ++f)
#pragma unroll
    for (int j = 0; j < Shape<DIM>::columns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) products[f][j][e] = 0;
#pragma unroll
  for (int c = 0; c < DIM / 16; ++c)
#pragma unroll
    for (int j = 0; j < Shape<DIM>::columns / 8; j += 2) {
      uint32_t b[4];
      load_matrices(b, own_row + j * 8 * Shape<DIM>::pitch + c * 16);
#pragma unroll
      for (int f = 0; f < Shape<DIM>::fragments; ++f) {
        multiply_add<T>(products[f][j], a[f][c], b[0], b[1]);
        multiply_add<T>(products[f][j + 1], a[f][c], b[2], b[3]);
      }
    }
}

// out += weights · tile, tile [columns, DIM]; weights lie as the products of `multiply_by_tile`.
template <typename T, int DIM>
__device__ __forceinline__ void add_weighted_tile(
    WeightedSums<DIM>& out, const Products<DIM>& weights, const T* tile) {
  const int lane = lane_index();
  const T* own_row = tile + lane % 16 * Shape<DIM>::pitch + lane / 16 * 8;
#pragma unroll
  for (int c = 0; c < Shape<DIM>::columns / 16; ++c) {
    uint32_t a[Shape<DIM>::fragments][4];
#pragma unroll
    for (int f = 0; f < Shape<DIM>::fragments; ++f)
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // a C fragment is laid out like half an A fragment
        const float(&w)[4] = weights[f][2 * c + half];
        a[f][2 * half] = pack<T>(w[0], w[1]);
        a[f][2 * half + 1] = pack<T>(w[2], w[3]);
      }
#pragma unroll
    for (int j = 0; j < DIM / 8; j += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, own_row + c * 16 * Shape<DIM>::pitch + j * 8);
#pragma unroll
      for (int f = 0; f < Shape<DIM>::fragments; ++f) {
        multiply_add<T>(out[f][j], a[f], b[0], b[1]);
        multiply_add<T>(out[f][j + 1], a[f], b[2], b[3]);
      }
    }
  }
}

}  // namespace stac

#endif

// What keys have received of attention, the second pass of `attend_triton.py`: a block of keys sweeps the
// queries that count, whose lse the first pass has left.
//
// One launch serves all segments: a block finds the one its keys lie in. CODED as in the first pass. No
// atomics: every output element has one writer.
#ifndef STAC_ATTEND_MASS_CUH
#define STAC_ATTEND_MASS_CUH

#include "attend.h"
#include "codes.cuh"
#include "softmax.cuh"

namespace stac {

// Blocks that the keys of all segments are spread over; no block crosses from one to the next.
template <int DIM>
inline int key_blocks(const Segment* segments, int count) {
  int blocks = 0;
  for (int i = 0; i < count; ++i) blocks += (segments[i].length + Shape<DIM>::rows - 1) / Shape<DIM>::rows;
  return blocks;
}

// Keys of one block.
struct KeyBlock {
  int segment, first_key;  // in that segment
  int first_column;        // of the mass of that segment
};

template <int DIM>
__device__ __forceinline__ KeyBlock find_keys(const MassArguments& args, int block) {
  int own = 0, first_column = 0;
  for (; own + 1 < args.count; ++own) {
    const int length = args.segments[own].length;
    const int blocks = (length + Shape<DIM>::rows - 1) / Shape<DIM>::rows;
    if (block < blocks) break;
    block -= blocks;
    first_column += length;
  }
  return {own, block * Shape<DIM>::rows, first_column};
}

// Keys from `first_key` on as they are stored.
__device__ __forceinline__ CodeTile stored_codes(const Stored& keys, int row, int first_key) {
  return {
      static_cast<const uint8_t*>(keys.tokens.data) + row * keys.tokens.row_stride +
          first_key * keys.tokens.token_stride,
      keys.tokens.token_stride,
      static_cast<const __half*>(keys.grid.data) + row * keys.grid.row_stride +
          first_key * keys.grid.token_stride,
      keys.grid.token_stride};
}

// The keys of the block, by way of the memory of the tiles.
template <typename T, int DIM, bool CODED>
__device__ __forceinline__ void load_keys(
    Rows16<DIM>& k, T* tiles, const Segment& segment, int row, int first_key) {
  constexpr int rows = Shape<DIM>::rows;
  const Stored& keys = segment.keys;
  if (CODED && segment.bits != 16) {
    decode_tokens<T, DIM, rows>(
        tiles, stored_codes(keys, row, first_key), segment.bits, segment.length - first_key,
        factor_of(keys, row));
  } else {
    stream_tokens<T, DIM, rows>(tiles, keys.tokens, row, first_key, segment.length);
    commit_copies();
    wait_for_copies<0>();
  }
  synchronize_block();
  load_rows<T, DIM>(k, tiles);
  synchronize_block();
}

// One number for each of the keys that a thread serves: two of every fragment.
template <int DIM>
using OfKeys = float[Shape<DIM>::fragments][2];

// Their bias, in base 2.
template <int DIM>
__device__ __forceinline__ void load_bias(
    OfKeys<DIM>& bias, const Segment& segment, int row, int first_key) {
#pragma unroll
  for (int f = 0; f < Shape<DIM>::fragments; ++f)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = first_key + own_row<DIM>(f, half);
      const Numbers& numbers = segment.bias;
      const bool biased = numbers.data && key < segment.length;
      bias[f][half] =
          biased ? numbers.data[row * numbers.row_stride + key * numbers.token_stride] * LOG2_E : 0.0f;
    }
}

// sums += exp(logits − lse) over a tile of queries; scale, bias: to base 2.
template <int DIM>
__device__ __forceinline__ void add_shares(
    OfKeys<DIM>& sums, const Products<DIM>& products, const OfKeys<DIM>& bias, const float* lses, float scale,
    int first_query, const MassArguments& args) {
#pragma unroll
  for (int j = 0; j < Shape<DIM>::columns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = j * 8 + lane_index() % 4 * 2 + e;
      float lse = lses[column] * LOG2_E;
      if (lse == -INFINITE || first_query + column >= args.queries) lse = INFINITE;  // weighs 0
#pragma unroll
      for (int f = 0; f < Shape<DIM>::fragments; ++f) {
        sums[f][0] += exp2_fast(fmaf(products[f][j][e], scale, bias[f][0] - lse));
        sums[f][1] += exp2_fast(fmaf(products[f][j][2 + e], scale, bias[f][1] - lse));
      }
    }
}

template <int DIM>
__device__ __forceinline__ void store_mass(
    const OfKeys<DIM>& sums, const MassArguments& args, int row, const KeyBlock& own) {
#pragma unroll
  for (int f = 0; f < Shape<DIM>::fragments; ++f)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = own.first_key + own_row<DIM>(f, half);
      const float sum = row_sum(sums[f][half]);
      if (key < args.segments[own.segment].length && lane_index() % 4 == 0)
        args.mass[static_cast<int64_t>(row) * args.columns + own.first_column + key] = sum * args.factor;
    }
}

template <typename T, int DIM, bool CODED>
__global__ void __launch_bounds__(128, 2) attend_mass_kernel(const __grid_constant__ MassArguments args) {
  using S = Shape<DIM>;
  T* const tiles = reinterpret_cast<T*>(shared_memory());  // two stages of Q
  float* const lses = reinterpret_cast<float*>(tiles + 2 * S::tile);
  const int row = blockIdx.y;
  const KeyBlock own = find_keys<DIM>(args, blockIdx.x);
  const Segment& segment = args.segments[own.segment];

  Rows16<DIM> k;
  load_keys<T, DIM, CODED>(k, tiles, segment, row, own.first_key);
  OfKeys<DIM> bias, sums = {};
  load_bias<DIM>(bias, segment, row, own.first_key);
  const auto stream = [&](int tile) {
    const int stage = tile % 2, first = tile * S::columns;
    stream_tokens<T, DIM, S::columns>(tiles + stage * S::tile, args.q, row, first, args.queries);
    stream_numbers<S::columns>(lses + stage * S::columns, args.lse, row, first, args.queries);
  };
  const auto add_tile = [&](int tile) {
    const int stage = tile % 2;
    Products<DIM> products;
    multiply_by_tile<T, DIM>(products, k, tiles + stage * S::tile);
    add_shares<DIM>(
        sums, products, bias, lses + stage * S::columns, args.scale * LOG2_E, tile * S::columns, args);
  };
  sweep_tiles((args.queries + S::columns - 1) / S::columns, stream, add_tile);
  store_mass<DIM>(sums, args, row, own);
}

}  // namespace stac

#endif

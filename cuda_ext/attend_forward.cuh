// Attention on tensor cores, the first pass of `attend_triton.py`: a block of queries sweeps all keys.
//
// One launch serves all segments, one after the other; CODED is false where none is stored as codes. No
// atomics: every output element has one writer.
#ifndef STAC_ATTEND_FORWARD_CUH
#define STAC_ATTEND_FORWARD_CUH

#include "attend.h"
#include "codes.cuh"
#include "softmax.cuh"

namespace stac {

template <typename T, int DIM>
__device__ __forceinline__ void store(
    const Softmax<DIM>& state, const ForwardArguments& args, int row, int first_query) {
#pragma unroll
  for (int f = 0; f < Shape<DIM>::fragments; ++f)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first_query + own_row<DIM>(f, half);
      const float total = row_sum(state.total[f][half]);
      if (query >= args.queries) continue;
      const int64_t at = static_cast<int64_t>(row) * args.queries + query;
      if (lane_index() % 4 == 0) args.lse[at] = (state.top[f][half] + log2f(total)) / LOG2_E;
      const float share = total == 0 ? 0.0f : 1.0f / total;
      const int64_t first = at * DIM + lane_index() % 4 * 2;
#pragma unroll
      for (int j = 0; j < DIM / 8; ++j) {
        const float low = state.out[f][j][2 * half] * share, high = state.out[f][j][2 * half + 1] * share;
        *reinterpret_cast<uint32_t*>(static_cast<T*>(args.out) + first + j * 8) = pack<T>(low, high);
      }
    }
}

// Start to copy a tile of K and V. There are two stages of K then V; of codes, K and V as numbers, then two
// stages of both as codes.
template <typename T, int DIM>
__device__ __forceinline__ void stream_keys_and_values(
    T* tiles, float* biases, const Segment& segment, bool coded, int row, int tile) {
  using S = Shape<DIM>;
  const int stage = tile % 2, first = tile * S::columns;
  if (coded) {
    T* const memory = tiles + (2 + stage) * S::tile;
    stream_codes<DIM, S::columns>(
        code_tile<DIM, S::columns>(memory, 0), segment.keys, segment.bits, row, first, segment.length);
    stream_codes<DIM, S::columns>(
        code_tile<DIM, S::columns>(memory, 1), segment.values, segment.bits, row, first, segment.length);
  } else {
    T* const k = tiles + stage * 2 * S::tile;
    stream_tokens<T, DIM, S::columns>(k, segment.keys.tokens, row, first, segment.length);
    stream_tokens<T, DIM, S::columns>(k + S::tile, segment.values.tokens, row, first, segment.length);
  }
  if (segment.bias.data)
    stream_numbers<S::columns>(biases + stage * S::columns, segment.bias, row, first, segment.length);
}

// Turn the codes of a stage into numbers, K then V where `tiles` begin.
template <typename T, int DIM>
__device__ __forceinline__ void decode_keys_and_values(T* tiles, const Segment& segment, int row, int stage) {
  using S = Shape<DIM>;
  T* const memory = tiles + (2 + stage) * S::tile;
  decode_tokens<T, DIM, S::columns>(
      tiles, code_tile<DIM, S::columns>(memory, 0), segment.bits, S::columns, factor_of(segment.keys, row));
  decode_tokens<T, DIM, S::columns>(
      tiles + S::tile, code_tile<DIM, S::columns>(memory, 1), segment.bits, S::columns,
      factor_of(segment.values, row));
  synchronize_block();
}

// Sweep one segment: the softmax goes on where the segments before it left off.
template <typename T, int DIM, bool CODED>
__device__ __forceinline__ void attend_segment(
    Softmax<DIM>& state, const Rows16<DIM>& q, T* tiles, float* biases, const Segment& segment, int row,
    float scale) {
  using S = Shape<DIM>;
  const bool coded = CODED && segment.bits != 16;
  const auto stream = [&](int tile) {
    stream_keys_and_values<T, DIM>(tiles, biases, segment, coded, row, tile);
  };
  const auto attend_tile = [&](int tile) {
    const int stage = tile % 2;
    const T* k = tiles + stage * 2 * S::tile;
    if (coded) {
      k = tiles;
      decode_keys_and_values<T, DIM>(tiles, segment, row, stage);
    }
    Products<DIM> logits;
    multiply_by_tile<T, DIM>(logits, q, k);
    to_logits<DIM>(
        logits, segment.bias.data ? biases + stage * S::columns : nullptr, scale * LOG2_E,
        segment.length - tile * S::columns);
    state.absorb(logits);
    add_weighted_tile<T, DIM>(state.out, logits, k + S::tile);
  };
  sweep_tiles((segment.length + S::columns - 1) / S::columns, stream, attend_tile);
}

// The queries of the block, by way of the memory of the tiles.
template <typename T, int DIM>
__device__ __forceinline__ void load_queries(
    Rows16<DIM>& q, T* tiles, const ForwardArguments& args, int row, int first_query) {
  stream_tokens<T, DIM, Shape<DIM>::rows>(tiles, args.q, row, first_query, args.queries);
  commit_copies();
  wait_for_copies<0>();
  synchronize_block();
  load_rows<T, DIM>(q, tiles);
  synchronize_block();
}

template <typename T, int DIM, bool CODED>
__global__ void __launch_bounds__(128, 2) attend_forward_kernel(
    const __grid_constant__ ForwardArguments args) {
  using S = Shape<DIM>;
  T* const tiles = reinterpret_cast<T*>(shared_memory());
  float* const biases = reinterpret_cast<float*>(tiles + 4 * S::tile);
  const int row = blockIdx.y, first_query = blockIdx.x * S::rows;

  Rows16<DIM> q;
  load_queries<T, DIM>(q, tiles, args, row, first_query);
  Softmax<DIM> state;
  state.clear();
  for (int i = 0; i < args.count; ++i)
    attend_segment<T, DIM, CODED>(state, q, tiles, biases, args.segments[i], row, args.scale);
  store<T, DIM>(state, args, row, first_query);
}

}  // namespace stac

#endif

// Attention with key mass on tensor cores, in the two passes of `attend_triton.py`.
//
// A block of 4 warps keeps its rows of one operand in registers (queries in the forward pass, keys in
// the mass pass) and streams tiles of the other operand through two stages of shared memory. Logits
// are kept in base 2. No atomics: every output element has one writer.
#ifndef STAC_ATTEND_CUH
#define STAC_ATTEND_CUH

#include <cmath>

#include "attend.h"
#include "intrinsics.cuh"

namespace stac {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float INFINITE = INFINITY;

template <int DIM>
struct Shape {
  static constexpr int threads = 128;
  static constexpr int fragments = DIM <= 64 ? 2 : 1;       // 16 rows each, per warp
  static constexpr int warp_rows = 16 * fragments;
  static constexpr int rows = threads / 32 * warp_rows;     // rows of the block
  static constexpr int columns = DIM <= 64 ? 64 : 32;       // of a streamed tile
  static constexpr int pitch = DIM + 8;                     // 16 bytes of padding: no bank conflicts
  static constexpr int tile = columns * pitch;              // elements
  static constexpr int forward_bytes = 4 * tile * 2 + 2 * columns * 4;  // K and V twice, bias twice
  static constexpr int mass_bytes = 2 * tile * 2 + 2 * columns * 4;     // Q twice, lse twice
  static_assert(rows * pitch <= 2 * tile, "the rows of the block pass through the tiles' memory");
};

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

// COUNT tokens from `first` on, into a tile of shared memory; zeros beyond the last token.
template <typename T, int DIM, int COUNT>
__device__ __forceinline__ void stream_tokens(T* tile, const Tokens& tokens, int row, int first, int length) {
  constexpr int chunks = DIM / 8;  // of 16 bytes
  const T* source = static_cast<const T*>(tokens.data) + row * tokens.row_stride;
  for (int i = threadIdx.x; i < COUNT * chunks; i += Shape<DIM>::threads) {
    const int token = i / chunks, channel = i % chunks * 8;
    const bool inside = first + token < length;
    const int64_t from = inside ? (first + token) * tokens.token_stride + channel : 0;
    copy_async_16(tile + token * Shape<DIM>::pitch + channel, source + from, inside);
  }
}

template <int COUNT>
__device__ __forceinline__ void stream_numbers(
    float* tile, const Numbers& numbers, int row, int first, int length) {
  for (int i = threadIdx.x; i < COUNT; i += blockDim.x) {
    const bool inside = first + i < length;
    const int64_t from = inside ? (first + i) * numbers.token_stride : 0;
    copy_async_4(tile + i, numbers.data + row * numbers.row_stride + from, inside);
  }
}

// The warp's rows of a tile as A fragments.
template <typename T, int DIM>
__device__ __forceinline__ void load_rows(uint32_t (&a)[Shape<DIM>::fragments][DIM / 16][4], const T* tile) {
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
    float (&products)[Shape<DIM>::fragments][Shape<DIM>::columns / 8][4],
    const uint32_t (&a)[Shape<DIM>::fragments][DIM / 16][4], const T* tile) {
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
    float (&out)[Shape<DIM>::fragments][DIM / 8][4],
    const float (&weights)[Shape<DIM>::fragments][Shape<DIM>::columns / 8][4], const T* tile) {
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

// Scale the products, add the bias of their columns, hide columns beyond the last key.
template <int DIM, bool BIAS>
__device__ __forceinline__ void to_logits(
    float (&products)[Shape<DIM>::fragments][Shape<DIM>::columns / 8][4], const float* bias, float scale,
    int columns_left) {
  const int first = lane_index() % 4 * 2;
#pragma unroll
  for (int j = 0; j < Shape<DIM>::columns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = j * 8 + first + e;
      float shift = BIAS ? bias[column] * LOG2_E : 0.0f;
      if (column >= columns_left) shift = -INFINITE;
#pragma unroll
      for (int f = 0; f < Shape<DIM>::fragments; ++f) {
        products[f][j][e] = fmaf(products[f][j][e], scale, shift);
        products[f][j][2 + e] = fmaf(products[f][j][2 + e], scale, shift);
      }
    }
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

// Running softmax of the warp's rows; a thread serves two rows of every fragment.
template <int DIM>
struct Softmax {
  static constexpr int fragments = Shape<DIM>::fragments;
  float top[fragments][2];    // largest logit so far
  float total[fragments][2];  // this thread's share of the sum of weights
  float out[fragments][DIM / 8][4];

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
  __device__ __forceinline__ void absorb(float (&logits)[fragments][Shape<DIM>::columns / 8][4]) {
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

// The row of fragment f that the first (half 0) or second (half 1) pair of a thread's numbers lies in.
template <int DIM>
__device__ __forceinline__ int own_row(int f, int half) {
  return warp_index() * Shape<DIM>::warp_rows + f * 16 + half * 8 + lane_index() / 4;
}

// Start from the result of earlier segments as if it were a single key.
template <int DIM>
__device__ __forceinline__ void resume(
    Softmax<DIM>& state, const ForwardArguments& args, int row, int first_query) {
  const int first_lane = lane_index() % 4 == 0;
#pragma unroll
  for (int f = 0; f < Shape<DIM>::fragments; ++f)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first_query + own_row<DIM>(f, half);
      if (query >= args.queries) continue;
      const int64_t at = static_cast<int64_t>(row) * args.queries + query;
      state.top[f][half] = args.before_lse[at] * LOG2_E;
      state.total[f][half] = first_lane && state.top[f][half] != -INFINITE ? 1.0f : 0.0f;
      const float* out = args.before_out + at * DIM + lane_index() % 4 * 2;
#pragma unroll
      for (int j = 0; j < DIM / 8; ++j) {
        state.out[f][j][2 * half] = out[j * 8];
        state.out[f][j][2 * half + 1] = out[j * 8 + 1];
      }
    }
}

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
        if (args.out_is_float)
          *reinterpret_cast<float2*>(static_cast<float*>(args.out) + first + j * 8) = make_float2(low, high);
        else
          *reinterpret_cast<uint32_t*>(static_cast<T*>(args.out) + first + j * 8) = pack<T>(low, high);
      }
    }
}

template <typename T, int DIM, bool BIAS>
__global__ void __launch_bounds__(128, 2) attend_forward_kernel(const ForwardArguments args) {
  using S = Shape<DIM>;
  T* const tiles = reinterpret_cast<T*>(shared_memory());  // two stages of K then V
  float* const biases = reinterpret_cast<float*>(tiles + 4 * S::tile);
  const int row = blockIdx.y, first_query = blockIdx.x * S::rows;

  uint32_t q[S::fragments][DIM / 16][4];
  stream_tokens<T, DIM, S::rows>(tiles, args.q, row, first_query, args.queries);
  commit_copies();
  wait_for_copies<0>();
  synchronize_block();
  load_rows<T, DIM>(q, tiles);
  synchronize_block();  // the queries are in registers, their memory is free for the first tiles

  const auto stream = [&](int tile) {
    const int stage = tile % 2, first = tile * S::columns;
    stream_tokens<T, DIM, S::columns>(tiles + stage * 2 * S::tile, args.k, row, first, args.keys);
    stream_tokens<T, DIM, S::columns>(tiles + (stage * 2 + 1) * S::tile, args.v, row, first, args.keys);
    if (BIAS) stream_numbers<S::columns>(biases + stage * S::columns, args.bias, row, first, args.keys);
    commit_copies();
  };
  Softmax<DIM> state;
  state.clear();
  if (args.before_lse) resume<DIM>(state, args, row, first_query);

  const int count = (args.keys + S::columns - 1) / S::columns;
  stream(0);
  for (int tile = 0; tile < count; ++tile) {
    if (tile + 1 < count) {
      stream(tile + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    synchronize_block();
    const T* const k = tiles + tile % 2 * 2 * S::tile;
    float logits[S::fragments][S::columns / 8][4];
    multiply_by_tile<T, DIM>(logits, q, k);
    to_logits<DIM, BIAS>(
        logits, biases + tile % 2 * S::columns, args.scale * LOG2_E, args.keys - tile * S::columns);
    state.absorb(logits);
    add_weighted_tile<T, DIM>(state.out, logits, k + S::tile);
    synchronize_block();
  }
  store<T, DIM>(state, args, row, first_query);
}

template <typename T, int DIM, bool BIAS>
__global__ void __launch_bounds__(128, 2) attend_mass_kernel(const MassArguments args) {
  using S = Shape<DIM>;
  T* const tiles = reinterpret_cast<T*>(shared_memory());  // two stages of Q
  float* const lses = reinterpret_cast<float*>(tiles + 2 * S::tile);
  const int row = blockIdx.y, first_key = blockIdx.x * S::rows;

  uint32_t k[S::fragments][DIM / 16][4];
  stream_tokens<T, DIM, S::rows>(tiles, args.k, row, first_key, args.keys);
  commit_copies();
  wait_for_copies<0>();
  synchronize_block();
  load_rows<T, DIM>(k, tiles);
  synchronize_block();

  const auto stream = [&](int tile) {
    const int stage = tile % 2, first = tile * S::columns;
    stream_tokens<T, DIM, S::columns>(tiles + stage * S::tile, args.q, row, first, args.queries);
    stream_numbers<S::columns>(lses + stage * S::columns, args.lse, row, first, args.queries);
    commit_copies();
  };
  float bias[S::fragments][2], sums[S::fragments][2];
#pragma unroll
  for (int f = 0; f < S::fragments; ++f)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = first_key + own_row<DIM>(f, half);
      const bool biased = BIAS && key < args.keys;
      bias[f][half] =
          biased ? args.bias.data[row * args.bias.row_stride + key * args.bias.token_stride] * LOG2_E : 0.0f;
      sums[f][half] = 0;
    }

  const int count = (args.queries + S::columns - 1) / S::columns;
  const float scale = args.scale * LOG2_E;
  stream(0);
  for (int tile = 0; tile < count; ++tile) {
    if (tile + 1 < count) {
      stream(tile + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    synchronize_block();
    float products[S::fragments][S::columns / 8][4];
    multiply_by_tile<T, DIM>(products, k, tiles + tile % 2 * S::tile);
#pragma unroll
    for (int j = 0; j < S::columns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = j * 8 + lane_index() % 4 * 2 + e;
        float lse = lses[tile % 2 * S::columns + column] * LOG2_E;
        if (lse == -INFINITE || tile * S::columns + column >= args.queries) lse = INFINITE;  // weighs 0
#pragma unroll
        for (int f = 0; f < S::fragments; ++f) {
          sums[f][0] += exp2_fast(fmaf(products[f][j][e], scale, bias[f][0] - lse));
          sums[f][1] += exp2_fast(fmaf(products[f][j][2 + e], scale, bias[f][1] - lse));
        }
      }
    synchronize_block();
  }
#pragma unroll
  for (int f = 0; f < S::fragments; ++f)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = first_key + own_row<DIM>(f, half);
      const float sum = row_sum(sums[f][half]);
      if (key < args.keys && lane_index() % 4 == 0)
        args.mass[static_cast<int64_t>(row) * args.keys + key] = sum * args.factor;
    }
}

}  // namespace stac

#endif

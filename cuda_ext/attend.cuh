// Attention with key mass on tensor cores, in the two passes of `attend_triton.py`.
//
// A block of 4 warps keeps its rows of one operand in registers (queries in the forward pass, keys in
// the mass pass) and streams tiles of the other operand through two stages of shared memory. Logits
// are kept in base 2. No atomics: every output element has one writer.
//
// One launch serves all segments: the forward pass sweeps one after the other, and a block of the mass
// pass finds the segment its keys lie in. Codes are streamed as codes and become numbers between two
// stretches of shared memory; CODED is false where no segment needs that.
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
  static constexpr int groups = (DIM + CODE_GROUP - 1) / CODE_GROUP;    // of channels, in codes
  static constexpr int forward_bytes = 4 * tile * 2 + 2 * columns * 4;  // K and V twice, bias twice
  static constexpr int mass_bytes = 2 * tile * 2 + 2 * columns * 4;     // Q twice, lse twice
  static_assert(rows * pitch <= 2 * tile, "the rows of the block pass through the tiles' memory");
  static_assert(2 * columns * (DIM + 4 * groups) <= 2 * tile, "codes of K and V fit a tile of numbers");
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
template <int DIM>
__device__ __forceinline__ void to_logits(
    float (&products)[Shape<DIM>::fragments][Shape<DIM>::columns / 8][4], const float* bias, float scale,
    int columns_left) {
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

// Sweep one segment: the softmax goes on where the segments before it left off.
template <typename T, int DIM, bool CODED>
__device__ __forceinline__ void attend_segment(
    Softmax<DIM>& state, const uint32_t (&q)[Shape<DIM>::fragments][DIM / 16][4], T* tiles, float* biases,
    const Segment& segment, int row, float scale) {
  using S = Shape<DIM>;
  // Numbers: two stages of K then V. Codes: K and V as numbers, then two stages of both as codes.
  const bool coded = CODED && segment.bits != 16;
  const auto codes = [&](int stage, int index) {
    return code_tile<DIM, S::columns>(tiles + (2 + stage) * S::tile, index);
  };
  const auto stream = [&](int tile) {
    const int stage = tile % 2, first = tile * S::columns;
    if (coded) {
      stream_codes<DIM, S::columns>(codes(stage, 0), segment.keys, segment.bits, row, first, segment.length);
      stream_codes<DIM, S::columns>(codes(stage, 1), segment.values, segment.bits, row, first, segment.length);
    } else {
      T* const k = tiles + stage * 2 * S::tile;
      stream_tokens<T, DIM, S::columns>(k, segment.keys.tokens, row, first, segment.length);
      stream_tokens<T, DIM, S::columns>(k + S::tile, segment.values.tokens, row, first, segment.length);
    }
    if (segment.bias.data)
      stream_numbers<S::columns>(biases + stage * S::columns, segment.bias, row, first, segment.length);
    commit_copies();
  };
  const int count = (segment.length + S::columns - 1) / S::columns;
  stream(0);
  for (int tile = 0; tile < count; ++tile) {
    const int stage = tile % 2;
    if (tile + 1 < count) {
      stream(tile + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    synchronize_block();
    const T* k = tiles + stage * 2 * S::tile;
    if (coded) {
      k = tiles;
      decode_tokens<T, DIM, S::columns>(
          tiles, codes(stage, 0), segment.bits, S::columns, factor_of(segment.keys, row));
      decode_tokens<T, DIM, S::columns>(
          tiles + S::tile, codes(stage, 1), segment.bits, S::columns, factor_of(segment.values, row));
      synchronize_block();
    }
    float logits[S::fragments][S::columns / 8][4];
    multiply_by_tile<T, DIM>(logits, q, k);
    to_logits<DIM>(
        logits, segment.bias.data ? biases + stage * S::columns : nullptr, scale * LOG2_E,
        segment.length - tile * S::columns);
    state.absorb(logits);
    add_weighted_tile<T, DIM>(state.out, logits, k + S::tile);
    synchronize_block();
  }
}

template <typename T, int DIM, bool CODED>
__global__ void __launch_bounds__(128, 2) attend_forward_kernel(const __grid_constant__ ForwardArguments args) {
  using S = Shape<DIM>;
  T* const tiles = reinterpret_cast<T*>(shared_memory());
  float* const biases = reinterpret_cast<float*>(tiles + 4 * S::tile);
  const int row = blockIdx.y, first_query = blockIdx.x * S::rows;

  uint32_t q[S::fragments][DIM / 16][4];
  stream_tokens<T, DIM, S::rows>(tiles, args.q, row, first_query, args.queries);
  commit_copies();
  wait_for_copies<0>();
  synchronize_block();
  load_rows<T, DIM>(q, tiles);
  synchronize_block();  // the queries are in registers, their memory is free for the first tiles

  Softmax<DIM> state;
  state.clear();
  for (int i = 0; i < args.count; ++i)
    attend_segment<T, DIM, CODED>(state, q, tiles, biases, args.segments[i], row, args.scale);
  store<T, DIM>(state, args, row, first_query);
}

// Blocks that the keys of all segments are spread over; no block crosses from one to the next.
template <int DIM>
inline int key_blocks(const Segment* segments, int count) {
  int blocks = 0;
  for (int i = 0; i < count; ++i) blocks += (segments[i].length + Shape<DIM>::rows - 1) / Shape<DIM>::rows;
  return blocks;
}

template <typename T, int DIM, bool CODED>
__global__ void __launch_bounds__(128, 2) attend_mass_kernel(const __grid_constant__ MassArguments args) {
  using S = Shape<DIM>;
  T* const tiles = reinterpret_cast<T*>(shared_memory());  // two stages of Q
  float* const lses = reinterpret_cast<float*>(tiles + 2 * S::tile);
  const int row = blockIdx.y;

  int own = 0, block = blockIdx.x, first_column = 0;
  for (; own + 1 < args.count; ++own) {
    const int length = args.segments[own].length, blocks = (length + S::rows - 1) / S::rows;
    if (block < blocks) break;
    block -= blocks;
    first_column += length;
  }
  const Segment& segment = args.segments[own];
  const int first_key = block * S::rows;

  uint32_t k[S::fragments][DIM / 16][4];
  if (CODED && segment.bits != 16) {
    const Stored& keys = segment.keys;
    const CodeTile codes = {
        static_cast<const uint8_t*>(keys.tokens.data) + row * keys.tokens.row_stride +
            first_key * keys.tokens.token_stride,
        keys.tokens.token_stride,
        static_cast<const __half*>(keys.grid.data) + row * keys.grid.row_stride +
            first_key * keys.grid.token_stride,
        keys.grid.token_stride};
    decode_tokens<T, DIM, S::rows>(tiles, codes, segment.bits, segment.length - first_key, factor_of(keys, row));
  } else {
    stream_tokens<T, DIM, S::rows>(tiles, segment.keys.tokens, row, first_key, segment.length);
    commit_copies();
    wait_for_copies<0>();
  }
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
      const Numbers& numbers = segment.bias;
      const bool biased = numbers.data && key < segment.length;
      bias[f][half] =
          biased ? numbers.data[row * numbers.row_stride + key * numbers.token_stride] * LOG2_E : 0.0f;
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
      if (key < segment.length && lane_index() % 4 == 0)
        args.mass[static_cast<int64_t>(row) * args.columns + first_column + key] = sum * args.factor;
    }
}

}  // namespace stac

#endif

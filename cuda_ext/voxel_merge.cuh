// Merging evicted tokens into voxel rows: one warp per row, in the steps of `voxel_merge_torch.py`.
//
// A pivot's weight, score and members live in the lane of its number. Waiting tokens are never sorted: each
// step looks for the best score behind the one taken last, ties by age, as the stable sort of the reference
// would order them.
#ifndef STAC_VOXEL_MERGE_CUH
#define STAC_VOXEL_MERGE_CUH

#include <cmath>

#include "intrinsics.cuh"
#include "voxel_merge.h"
#include "warp_vectors.cuh"

namespace stac {

constexpr float LEAST_SCORE = 1e-6f;

// Sets of vectors [pivots, dim] in shared memory; what pulls at keys or values comes two sets behind them.
enum Set { KEYS, VALUES, KEY_PULLS, VALUE_PULLS };

// One row, served by one warp.
template <int CHANNELS>
struct Row {
  using V = Vector<CHANNELS>;
  const MergeArguments& args;
  const int64_t row;
  const int lane;
  const int64_t first, last;  // its tokens in `order`
  float* const memory;        // of the sets
  float weight, score, members;  // of the pivot whose number is `lane`
  int merged = 0, passed = 0, remerged = 0;
  float last_score = INFINITY;  // of the waiting token taken last
  int last_place = -1;

  __device__ Row(const MergeArguments& a, int64_t r, float* shared)
      : args(a), row(r), lane(threadIdx.x % 32), first(a.start[r]), last(a.start[r + 1]), memory(shared) {
    const bool real = lane < args.pivots;
    const int64_t at = row * args.pivots + lane;
    weight = real ? args.before.weight[at] : 0.0f;
    score = real ? args.before.score_sum[at] : 0.0f;
    members = real ? args.before.members[at] : 0.0f;
    for (int g = 0; g < args.pivots; ++g) {
      put(KEYS, g, load(args.before.pivot_keys + (row * args.pivots + g) * args.dim));
      put(VALUES, g, load(args.before.pivot_values + (row * args.pivots + g) * args.dim));
      put(KEY_PULLS, g, V{});
      put(VALUE_PULLS, g, V{});
    }
  }

  // A lane touches its own channels only, so shared memory needs no synchronisation.
  __device__ V load(const float* source) const {
    V x;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
      x.part[c] = lane + 32 * c < args.dim ? source[lane + 32 * c] : 0.0f;
    return x;
  }
  __device__ void save(float* target, const V& x) const {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
      if (lane + 32 * c < args.dim) target[lane + 32 * c] = x.part[c];
  }
  __device__ float* place_of(int set, int g) const { return memory + (set * args.pivots + g) * args.dim; }
  __device__ V get(int set, int g) const { return load(place_of(set, g)); }
  __device__ void put(int set, int g, const V& x) const { save(place_of(set, g), x); }

  struct Token {
    V key, value;
    float score;
  };
  __device__ Token load_token(int64_t i) const {
    const int64_t token = args.order[i];
    return {load(args.keys + token * args.dim), load(args.values + token * args.dim), args.score[token]};
  }

  // 1. Join the most similar pivot, all against the pivots as they were.
  __device__ void join() {
    const float old_members = members, old_weight = weight, lengths = pivot_lengths();
    Token next = first < last ? load_token(first) : Token{};
    for (int64_t i = first; i < last; ++i) {
      const Token token = next;
      if (i + 1 < last) next = load_token(i + 1);  // on its way while this one is merged
      const float own_score = fmaxf(token.score, LEAST_SCORE);
      const Nearest nearest = most_similar(token.key, lengths, old_members);
      const bool joins = nearest.cosine >= args.threshold;
      if (lane == 0) args.score_left[i] = joins ? -INFINITY : own_score;
      if (!joins) continue;
      const float omega = expf(nearest.cosine);
      pull(KEYS, nearest.pivot, omega, token.key);
      pull(VALUES, nearest.pivot, omega, token.value);
      if (lane == nearest.pivot) {
        weight += omega;
        score += own_score;
        members += 1;
      }
      ++merged;
    }
    move_means(old_weight);
    synchronize_warp();  // lane 0 has written the scores left
  }

  // Of the key of the pivot whose number is `lane`.
  __device__ float pivot_lengths() const {
    float own = 1;
    for (int g = 0; g < args.pivots; ++g) {
      const float length = norm(get(KEYS, g));
      if (lane == g) own = length;
    }
    return own;
  }

  struct Nearest {
    int pivot;
    float cosine;
  };
  // lengths, present: of the pivot whose number is `lane`, the latter 0 where there is none.
  __device__ Nearest most_similar(const V& key, float lengths, float present) const {
    const float length = norm(key);
    Nearest nearest{0, -INFINITY};
    for (int g = 0; g < args.pivots; ++g) {
      const float cosine = dot(get(KEYS, g), key) / (shuffle_from(lengths, g) * length);
      if (shuffle_from(present, g) > 0 && cosine > nearest.cosine) nearest = {g, cosine};
    }
    return nearest;
  }

  // Towards `x`, away from the mean as it was.
  __device__ void pull(int set, int g, float omega, const V& x) const {
    V sum = get(set + KEY_PULLS, g);
    add(sum, omega, x);
    add(sum, -omega, get(set, g));
    put(set + KEY_PULLS, g, sum);
  }

  // All that was pulled at, by their weights now.
  __device__ void move_means(float old_weight) const {
    for (int g = 0; g < args.pivots; ++g) {
      const float total = fmaxf(shuffle_from(weight, g), LEAST_SCORE);
      if (shuffle_from(weight, g) == shuffle_from(old_weight, g)) continue;
      for (int set = KEYS; set <= VALUES; ++set) {
        V mean = get(set, g);
        add(mean, 1 / total, get(set + KEY_PULLS, g));
        put(set, g, mean);
      }
    }
  }

  // 2. What scores too little beside what was merged here does not wait; → how many do.
  __device__ int count_waiting(float& lowest) {
    const float total = warp_sum(members), sum = warp_sum(score);
    lowest = total > 0 ? fmaxf(args.gate * (sum / total), 0.0f) : 0.0f;
    float fresh = 0, old = 0;
    for (int64_t i = first + lane; i < last; i += 32) fresh += args.score_left[i] > lowest;
    for (int b = lane; b < args.buffer; b += 32)
      old += args.before.buffer_score[row * args.buffer + b] > -INFINITY;
    passed = static_cast<int>(warp_sum(fresh));
    return passed + static_cast<int>(warp_sum(old));
  }

  // The next waiting token by falling score; places count the buffer first, then the row's own tokens.
  __device__ void take_next(float lowest) {
    float best = -INFINITY;
    int place = INT32_MAX;
    const auto offer = [&](float s, int p) {
      const bool behind = s < last_score || (s == last_score && p > last_place);
      if (s > -INFINITY && behind && (s > best || (s == best && p < place))) {
        best = s;
        place = p;
      }
    };
    for (int b = lane; b < args.buffer; b += 32) offer(args.before.buffer_score[row * args.buffer + b], b);
    for (int64_t i = first + lane; i < last; i += 32)
      if (args.score_left[i] > lowest)
        offer(args.score_left[i], args.buffer + static_cast<int>(i - first));
    warp_best(best, place);
    last_score = best;
    last_place = place;
  }

  __device__ V taken(const float* buffered, const float* fresh) const {
    if (last_place < args.buffer) return load(buffered + (row * args.buffer + last_place) * args.dim);
    return load(fresh + args.order[first + last_place - args.buffer] * args.dim);
  }

  // 3. The best of the waiting tokens become one pivot.
  __device__ void found_pivot(float lowest) {
    V keys{}, values{}, seed{};
    float seed_length = 1, sum_weight = 0, sum_score = 0;
    for (int b = 0; b < args.buffer; ++b) {
      take_next(lowest);
      const V key = taken(args.before.buffer_keys, args.keys);
      const float length = norm(key);
      if (b == 0) {
        seed = key;
        seed_length = length;
      }
      const float omega = expf(dot(seed, key) / (seed_length * length));
      add(keys, omega, key);
      add(values, omega, taken(args.before.buffer_values, args.values));
      sum_weight += omega;
      sum_score += last_score;
    }
    const int slot = make_room();
    V mean{}, mean_value{};
    add(mean, 1 / sum_weight, keys);
    add(mean_value, 1 / sum_weight, values);
    put(KEYS, slot, mean);
    put(VALUES, slot, mean_value);
    if (lane == slot) {
      weight = sum_weight;
      score = sum_score;
      members = args.buffer;
    }
  }

  // 4. The first free slot; in a full row the lightest pivot joins its nearest neighbour first.
  __device__ int make_room() {
    float free = lane < args.pivots && members == 0 ? 1.0f : -INFINITY;
    int slot = lane;
    warp_best(free, slot);
    if (free > 0) return slot;
    float lightness = lane < args.pivots ? -weight : -INFINITY;
    int victim = lane;
    warp_best(lightness, victim);
    fold(victim);
    return victim;
  }

  // A pivot joins its most similar neighbour.
  __device__ void fold(int victim) {
    const V victim_key = get(KEYS, victim);
    const float length = norm(victim_key);
    Nearest nearest{0, -INFINITY};
    for (int g = 0; g < args.pivots; ++g) {
      const V pivot = get(KEYS, g);
      const float cosine = dot(pivot, victim_key) / (norm(pivot) * length);
      if (g != victim && cosine > nearest.cosine) nearest = {g, cosine};
    }
    const float joining = shuffle_from(weight, victim) * expf(nearest.cosine - 1);
    const float share = joining / (shuffle_from(weight, nearest.pivot) + joining);
    for (int set = KEYS; set <= VALUES; ++set) {
      V mean = get(set, nearest.pivot);
      const V old = mean;
      add(mean, share, get(set, victim));
      add(mean, -share, old);
      put(set, nearest.pivot, mean);
    }
    const float victim_score = shuffle_from(score, victim), victim_members = shuffle_from(members, victim);
    if (lane == nearest.pivot) {
      weight += joining;
      score += victim_score;
      members += victim_members;
    }
    ++remerged;
  }

  // Write the row: pivots, and what waits on; unused slots of the buffer are cleared.
  __device__ void finish(int waiting, float lowest) {
    for (int g = 0; g < args.pivots; ++g) {
      save(args.after.pivot_keys + (row * args.pivots + g) * args.dim, get(KEYS, g));
      save(args.after.pivot_values + (row * args.pivots + g) * args.dim, get(VALUES, g));
    }
    if (lane < args.pivots) {
      const int64_t at = row * args.pivots + lane;
      args.after.weight[at] = fminf(weight, args.heaviest);
      args.after.score_sum[at] = score;
      args.after.members[at] = members;
    }
    for (int b = 0; b < args.buffer; ++b) {
      const bool used = b < waiting % args.buffer;
      if (used) take_next(lowest);
      const int64_t at = row * args.buffer + b;
      const V key = used ? taken(args.before.buffer_keys, args.keys) : V{};
      save(args.after.buffer_keys + at * args.dim, key);
      const V value = used ? taken(args.before.buffer_values, args.values) : V{};
      save(args.after.buffer_values + at * args.dim, value);
      if (lane == 0) args.after.buffer_score[at] = used ? last_score : -INFINITY;
    }
    if (lane == 0) {
      int32_t* counts = args.counts + row * 5;
      counts[0] = merged;
      counts[1] = passed;
      counts[2] = static_cast<int32_t>(last - first) - merged - passed;
      counts[3] = waiting / args.buffer;
      counts[4] = remerged;
    }
  }
};

template <int CHANNELS>
__global__ void __launch_bounds__(MERGE_WARPS * 32, 4) voxel_merge_kernel(const MergeArguments args) {
  const int warp = threadIdx.x / 32;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + warp;
  if (index >= args.rows) return;
  float* const shared = reinterpret_cast<float*>(shared_memory()) + warp * args.pivots * args.dim * 4;
  Row<CHANNELS> row(args, index, shared);
  row.join();
  float lowest;
  const int waiting = row.count_waiting(lowest);
  for (int turn = 0; turn < waiting / args.buffer; ++turn) row.found_pivot(lowest);
  row.finish(waiting, lowest);
}

}  // namespace stac

#endif

// Run a CUDA kernel of cuda_ext on the host, one block at a time, every thread a fiber.
//
// Stands in for intrinsics.cuh: warp-wide instructions exchange their operands between the fibers of a
// warp with the documented fragment layouts. Made to be unkind: warps and threads run in random order,
// each as far as it can get; asynchronous copies land at once or as late as their wait allows; shared
// memory starts as NaN; a barrier that not every thread reaches is reported as a deadlock.
#pragma once
#define STAC_INTRINSICS_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>
#include <vector_functions.h>

#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int MOST_SHARED = 101376;  // bytes of shared memory that a block can have on every GPU since 8.0

struct Copy {
  void* target;
  const void* source;
  int bytes;
  bool inside;
  int group;
};

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool finished = false;
  const Barrier* waiting = nullptr;
  int generation = 0;
  std::vector<Copy> copies;
  int open_group = 0;
  unsigned collectives = 0;
};

struct Slot {  // one lane's operands of a warp-wide instruction
  uint32_t a[4], b[2];
  const void* address;
  uint32_t value;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  std::vector<Slot> slots[2];  // used in turn, so one barrier per instruction is enough
  std::vector<unsigned char> shared;
  ucontext_t scheduler;
  int current = 0;
  std::function<void()> kernel;
  std::mt19937* random;
  std::exception_ptr failure;
};

static Block* block = nullptr;

inline void wait_at(Barrier& barrier, int expected) {
  Fiber& fiber = block->fibers[block->current];
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  fiber.waiting = &barrier;
  fiber.generation = barrier.generation;
  swapcontext(&fiber.context, &block->scheduler);
}

inline void fiber_main() {
  try {
    block->kernel();
  } catch (...) {  // must not unwind past this fiber's stack; the scheduler throws it again
    block->failure = std::current_exception();
  }
  Fiber& fiber = block->fibers[block->current];
  fiber.finished = true;
  swapcontext(&fiber.context, &block->scheduler);
}

inline bool runnable(Fiber& fiber) {
  if (fiber.finished) return false;
  if (fiber.waiting && fiber.waiting->generation == fiber.generation) return false;
  fiber.waiting = nullptr;
  return true;
}

// The threads of one warp, in random order, until each waits for another warp or has returned.
inline bool run_warp(Block& here, int warp, std::mt19937& random, int& left) {
  const int first = warp * 32, count = std::min<int>(32, here.fibers.size() - first);
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), first);
  bool moved_at_all = false;
  for (bool moved = true; moved;) {
    std::shuffle(order.begin(), order.end(), random);
    moved = false;
    for (int i : order) {
      if (!runnable(here.fibers[i])) continue;
      here.current = i;
      threadIdx.x = i;
      swapcontext(&here.scheduler, &here.fibers[i].context);
      if (here.failure) std::rethrow_exception(here.failure);
      left -= here.fibers[i].finished;
      moved = moved_at_all = true;
    }
  }
  return moved_at_all;
}

// Every thread of one block: warp after warp in random order, each as far as it can get.
inline void run_block(Index at, int threads, int shared_bytes, std::mt19937& random, std::function<void()> kernel) {
  Block here;
  here.fibers.resize(threads);
  here.warps.resize((threads + 31) / 32);
  here.slots[0].resize(threads);
  here.slots[1].resize(threads);
  here.shared.assign(shared_bytes, 0xff);
  here.kernel = std::move(kernel);
  here.random = &random;
  block = &here;
  blockIdx = at;
  blockDim = {unsigned(threads), 1, 1};
  for (Fiber& fiber : here.fibers) {
    constexpr size_t stack_bytes = 1 << 16;
    fiber.stack = std::make_unique<char[]>(stack_bytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, stack_bytes};
    makecontext(&fiber.context, fiber_main, 0);
  }
  std::vector<int> warps(here.warps.size());
  std::iota(warps.begin(), warps.end(), 0);
  for (int left = threads; left > 0;) {
    std::shuffle(warps.begin(), warps.end(), random);
    bool moved = false;
    for (int warp : warps) moved |= run_warp(here, warp, random, left);
    if (!moved) throw std::runtime_error("deadlock: some thread never reaches the barrier");
  }
  block = nullptr;
}

// A grid of blocks, one after another in random order.
inline void run_grid(Index grid, int threads, int shared_bytes, int seed, std::function<void()> kernel) {
  if (shared_bytes > MOST_SHARED)
    throw std::runtime_error(std::to_string(shared_bytes) + " bytes of shared memory: more than a block can have");
  std::mt19937 random(seed);
  std::vector<Index> blocks;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, 0});
  std::shuffle(blocks.begin(), blocks.end(), random);
  gridDim = grid;
  for (Index at : blocks) run_block(at, threads, shared_bytes, random, kernel);
}

// Deposit this lane's operands, wait for the warp, return the first lane's slot.
inline const Slot* exchange(const Slot& mine) {
  Fiber& fiber = block->fibers[block->current];
  std::vector<Slot>& slots = block->slots[fiber.collectives++ % 2];
  slots[block->current] = mine;
  wait_at(block->warps[block->current / 32], 32);
  return &slots[block->current / 32 * 32];
}

inline void land(const Copy& copy) {
  if (copy.inside)
    std::memcpy(copy.target, copy.source, copy.bytes);
  else
    std::memset(copy.target, 0, copy.bytes);
}

inline void finish_copies(int pending) {
  Fiber& fiber = block->fibers[block->current];
  std::vector<Copy> later;
  for (const Copy& copy : fiber.copies)
    if (copy.group >= fiber.open_group - pending)
      later.push_back(copy);
    else
      land(copy);
  fiber.copies = std::move(later);
}

template <typename T>
float to_float(uint32_t pair, int high) {
  uint16_t bits = high ? pair >> 16 : pair & 0xffff;
  T number;
  std::memcpy(static_cast<void*>(&number), &bits, 2);
  return float(number);
}

}  // namespace emulator

namespace stac {

inline unsigned char* shared_memory() { return emulator::block->shared.data(); }
inline void synchronize_block() {
  emulator::wait_at(emulator::block->all, int(emulator::block->fibers.size()));
}

template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulator::Slot* warp = emulator::exchange({{a[0], a[1], a[2], a[3]}, {b0, b1}, nullptr, 0});
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int e = 0; e < 4; ++e) {
    const int column = 2 * t + e % 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2, high = k / 8;
      const float left = emulator::to_float<T>(warp[g * 4 + pair].a[2 * high + e / 2], k % 2);
      const float right = emulator::to_float<T>(warp[column * 4 + pair].b[high], k % 2);
      d[e] += left * right;
    }
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("ldmatrix: row is not 16-byte aligned");
  const emulator::Slot* warp = emulator::exchange({{}, {}, row, 0});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i)
    std::memcpy(&r[i], static_cast<const uint16_t*>(warp[8 * i + lane / 4].address) + lane % 4 * 2, 4);
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("ldmatrix: row is not 16-byte aligned");
  const emulator::Slot* warp = emulator::exchange({{}, {}, row, 0});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e)
      pair[e] = static_cast<const uint16_t*>(warp[8 * i + lane % 4 * 2 + e].address)[lane / 4];
    std::memcpy(&r[i], pair, 4);
  }
}

inline void start_copy(void* target, const void* source, int bytes, bool inside) {
  if (reinterpret_cast<uintptr_t>(target) % bytes || reinterpret_cast<uintptr_t>(source) % bytes)
    throw std::runtime_error("cp.async: address is not aligned to its size");
  emulator::Fiber& fiber = emulator::block->fibers[emulator::block->current];
  const emulator::Copy copy{target, source, bytes, inside, fiber.open_group};
  if ((*emulator::block->random)() % 2)
    emulator::land(copy);
  else
    fiber.copies.push_back(copy);
}
template <int BYTES>
void copy_async(void* target, const void* source, bool inside) {
  start_copy(target, source, BYTES, inside);
}
inline void commit_copies() { ++emulator::block->fibers[emulator::block->current].open_group; }
template <int PENDING>
void wait_for_copies() {
  emulator::finish_copies(PENDING);
}

inline void synchronize_warp() { emulator::exchange({}); }

template <typename Number>
Number shuffle_from(Number value, int lane) {
  static_assert(sizeof(Number) == 4, "one register per lane");
  emulator::Slot mine{};
  std::memcpy(&mine.value, &value, 4);
  std::memcpy(&value, &emulator::exchange(mine)[lane].value, 4);
  return value;
}

template <typename Number>
Number shuffle_xor(Number value, int mask) {
  return shuffle_from(value, (threadIdx.x % 32) ^ mask);
}

inline float exp2_fast(float x) { return std::exp2(x); }

template <typename T>
uint32_t pack(float low, float high) {
  const T numbers[2] = {T(low), T(high)};
  uint32_t bits;
  std::memcpy(&bits, numbers, 4);
  return bits;
}

}  // namespace stac

// The voxel merge of cuda_ext as a host library for ctypes; returns null or an error text.
#include "emulator.h"

#include "voxel_merge.cuh"

extern "C" const char* voxel_merge(const stac::MergeArguments* args, int seed) {
  static std::string message;
  const int warps = stac::merge_warps(args->pivots, args->dim);
  const int bytes = warps * stac::merge_row_bytes(args->pivots, args->dim);
  const Index grid{unsigned((args->rows + warps - 1) / warps), 1, 1};
  try {
    emulator::run_grid(grid, warps * 32, bytes, seed, [&] {
      if (args->dim <= 32) return stac::voxel_merge_kernel<1>(*args);
      if (args->dim <= 64) return stac::voxel_merge_kernel<2>(*args);
      stac::voxel_merge_kernel<stac::MOST_CHANNELS>(*args);
    });
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// The gather of cuda_ext as a host library for ctypes; returns null or an error text.
#include "emulator.h"

#include "gather.cuh"

extern "C" const char* gather(const stac::GatherArguments* args, int type, int seed) {
  static std::string message;
  const Index grid{unsigned((args->budget + stac::GATHER_WARPS - 1) / stac::GATHER_WARPS), unsigned(args->lanes), 1};
  try {
    emulator::run_grid(grid, stac::GATHER_WARPS * 32, 0, seed, [&] {
      switch (static_cast<stac::GatherType>(type)) {
        case stac::GatherType::float16: return stac::gather_kernel<__half>(*args);
        case stac::GatherType::bfloat16: return stac::gather_kernel<__nv_bfloat16>(*args);
        case stac::GatherType::float32: return stac::gather_kernel<float>(*args);
      }
    });
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// The attention kernels of cuda_ext as a host library for ctypes; returns null or an error text.
#include "emulator.h"

#include "attend.cuh"

namespace {

thread_local std::string message;

const char* guarded(const std::function<void()>& run) {
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

template <typename T, int DIM>
void forward(const stac::ForwardArguments& args, int seed) {
  using S = stac::Shape<DIM>;
  const Index grid{unsigned((args.queries + S::rows - 1) / S::rows), unsigned(args.rows), 1};
  emulator::run_grid(grid, S::threads, S::forward_bytes, seed, [&] {
    args.bias.data ? stac::attend_forward_kernel<T, DIM, true>(args)
                   : stac::attend_forward_kernel<T, DIM, false>(args);
  });
}

template <typename T, int DIM>
void mass(const stac::MassArguments& args, int seed) {
  using S = stac::Shape<DIM>;
  const Index grid{unsigned((args.keys + S::rows - 1) / S::rows), unsigned(args.rows), 1};
  emulator::run_grid(grid, S::threads, S::mass_bytes, seed, [&] {
    args.bias.data ? stac::attend_mass_kernel<T, DIM, true>(args)
                   : stac::attend_mass_kernel<T, DIM, false>(args);
  });
}

}  // namespace

// Both types and all widths are covered, though not every pair, to keep the build short.
extern "C" const char* attend_forward(const stac::ForwardArguments* args, bool half, int dim, int seed) {
  return guarded([&] {
    if (half && dim == 16) return forward<__half, 16>(*args, seed);
    if (!half && dim == 32) return forward<__nv_bfloat16, 32>(*args, seed);
    if (half && dim == 64) return forward<__half, 64>(*args, seed);
    if (!half && dim == 64) return forward<__nv_bfloat16, 64>(*args, seed);
    if (!half && dim == 128) return forward<__nv_bfloat16, 128>(*args, seed);
    throw std::runtime_error("this pair of type and width is not built");
  });
}

extern "C" const char* attend_mass(const stac::MassArguments* args, bool half, int dim, int seed) {
  return guarded([&] {
    if (half && dim == 16) return mass<__half, 16>(*args, seed);
    if (!half && dim == 32) return mass<__nv_bfloat16, 32>(*args, seed);
    if (half && dim == 64) return mass<__half, 64>(*args, seed);
    if (!half && dim == 64) return mass<__nv_bfloat16, 64>(*args, seed);
    if (!half && dim == 128) return mass<__nv_bfloat16, 128>(*args, seed);
    throw std::runtime_error("this pair of type and width is not built");
  });
}

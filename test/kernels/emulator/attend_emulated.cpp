// The attention kernels of cuda_ext as a host library for ctypes; returns null or an error text.
#include "emulator.h"

#include "attend_forward.cuh"
#include "attend_mass.cuh"

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

bool any_coded(const stac::Segment* segments, int count) {
  return std::any_of(segments, segments + count, [](const stac::Segment& s) { return s.bits != 16; });
}

struct Forward {
  const stac::ForwardArguments& args;
  int seed;

  template <typename T, int DIM>
  void run() const {
    using S = stac::Shape<DIM>;
    const Index grid{unsigned((args.queries + S::rows - 1) / S::rows), unsigned(args.rows), 1};
    const bool coded = any_coded(args.segments, args.count);
    emulator::run_grid(grid, S::threads, S::forward_bytes, seed, [&] {
      coded ? stac::attend_forward_kernel<T, DIM, true>(args) : stac::attend_forward_kernel<T, DIM, false>(args);
    });
  }
};

struct Mass {
  const stac::MassArguments& args;
  int seed;

  template <typename T, int DIM>
  void run() const {
    using S = stac::Shape<DIM>;
    const Index grid{unsigned(stac::key_blocks<DIM>(args.segments, args.count)), unsigned(args.rows), 1};
    const bool coded = any_coded(args.segments, args.count);
    emulator::run_grid(grid, S::threads, S::mass_bytes, seed, [&] {
      coded ? stac::attend_mass_kernel<T, DIM, true>(args) : stac::attend_mass_kernel<T, DIM, false>(args);
    });
  }
};

// Both types and all widths are covered, though not every pair, to keep the build short.
template <typename Pass>
const char* dispatch(const Pass& pass, bool half, int dim) {
  return guarded([&] {
    if (half && dim == 16) return pass.template run<__half, 16>();
    if (!half && dim == 32) return pass.template run<__nv_bfloat16, 32>();
    if (half && dim == 64) return pass.template run<__half, 64>();
    if (!half && dim == 64) return pass.template run<__nv_bfloat16, 64>();
    if (!half && dim == 128) return pass.template run<__nv_bfloat16, 128>();
    throw std::runtime_error("this pair of type and width is not built");
  });
}

}  // namespace

extern "C" const char* attend_forward(const stac::ForwardArguments* args, bool half, int dim, int seed) {
  return dispatch(Forward{*args, seed}, half, dim);
}

extern "C" const char* attend_mass(const stac::MassArguments* args, bool half, int dim, int seed) {
  return dispatch(Mass{*args, seed}, half, dim);
}

// Choose the instance of a kernel and launch it; plain CUDA, no torch.
#include "attend_forward.cuh"
#include "attend_mass.cuh"

namespace stac {
namespace {

template <typename Kernel, typename Arguments>
cudaError_t launch(
    Kernel kernel, const Arguments& args, int blocks, int threads, int shared_bytes, cudaStream_t stream) {
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  kernel<<<dim3(blocks, args.rows), threads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

bool any_coded(const Segment* segments, int count) {
  for (int i = 0; i < count; ++i)
    if (segments[i].bits != 16) return true;
  return false;
}

template <typename T, int DIM>
cudaError_t forward(const ForwardArguments& args, cudaStream_t stream) {
  using S = Shape<DIM>;
  const auto kernel = any_coded(args.segments, args.count) ? attend_forward_kernel<T, DIM, true>
                                                           : attend_forward_kernel<T, DIM, false>;
  return launch(kernel, args, (args.queries + S::rows - 1) / S::rows, S::threads, S::forward_bytes, stream);
}

template <typename T, int DIM>
cudaError_t mass(const MassArguments& args, cudaStream_t stream) {
  using S = Shape<DIM>;
  const auto kernel = any_coded(args.segments, args.count) ? attend_mass_kernel<T, DIM, true>
                                                           : attend_mass_kernel<T, DIM, false>;
  return launch(kernel, args, key_blocks<DIM>(args.segments, args.count), S::threads, S::mass_bytes, stream);
}

}  // namespace

cudaError_t launch_attend_forward(const ForwardArguments& args, Type type, int dim, cudaStream_t stream) {
  const bool half = type == Type::float16;
  switch (dim) {
    case 16: return half ? forward<__half, 16>(args, stream) : forward<__nv_bfloat16, 16>(args, stream);
    case 32: return half ? forward<__half, 32>(args, stream) : forward<__nv_bfloat16, 32>(args, stream);
    case 64: return half ? forward<__half, 64>(args, stream) : forward<__nv_bfloat16, 64>(args, stream);
    case 128: return half ? forward<__half, 128>(args, stream) : forward<__nv_bfloat16, 128>(args, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t launch_attend_mass(const MassArguments& args, Type type, int dim, cudaStream_t stream) {
  const bool half = type == Type::float16;
  switch (dim) {
    case 16: return half ? mass<__half, 16>(args, stream) : mass<__nv_bfloat16, 16>(args, stream);
    case 32: return half ? mass<__half, 32>(args, stream) : mass<__nv_bfloat16, 32>(args, stream);
    case 64: return half ? mass<__half, 64>(args, stream) : mass<__nv_bfloat16, 64>(args, stream);
    case 128: return half ? mass<__half, 128>(args, stream) : mass<__nv_bfloat16, 128>(args, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace stac

// Choose the instance of the gather and launch it; plain CUDA, no torch.
#include "gather.cuh"

namespace stac {
namespace {

template <typename T>
cudaError_t gather(const GatherArguments& args, cudaStream_t stream) {
  const dim3 grid((args.budget + GATHER_WARPS - 1) / GATHER_WARPS, args.lanes);
  gather_kernel<T><<<grid, GATHER_WARPS * 32, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_gather(const GatherArguments& args, GatherType type, cudaStream_t stream) {
  switch (type) {
    case GatherType::float16: return gather<__half>(args, stream);
    case GatherType::bfloat16: return gather<__nv_bfloat16>(args, stream);
    case GatherType::float32: return gather<float>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace stac

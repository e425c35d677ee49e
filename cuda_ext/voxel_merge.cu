// Choose the instance of the merge and launch it; plain CUDA, no torch.
#include "voxel_merge.cuh"

namespace stac {
namespace {

template <int CHANNELS>
cudaError_t merge(const MergeArguments& args, cudaStream_t stream) {
  const int warps = merge_warps(args.pivots, args.dim), bytes = warps * merge_row_bytes(args.pivots, args.dim);
  cudaError_t status = cudaFuncSetAttribute(
      voxel_merge_kernel<CHANNELS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const int blocks = (args.rows + warps - 1) / warps;
  voxel_merge_kernel<CHANNELS><<<blocks, warps * 32, bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_voxel_merge(const MergeArguments& args, cudaStream_t stream) {
  if (args.pivots > MOST_PIVOTS || args.dim > 32 * MOST_CHANNELS) return cudaErrorInvalidValue;
  if (args.dim <= 32) return merge<1>(args, stream);
  if (args.dim <= 64) return merge<2>(args, stream);
  return merge<MOST_CHANNELS>(args, stream);
}

}  // namespace stac

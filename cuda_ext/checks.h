// One wording for argument errors and for failed CUDA calls.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

namespace stac {

// `like` is the argument that all others share a device with.
inline void check_tensor(
    const at::Tensor& x, const char* name, at::IntArrayRef shape, at::ScalarType type, const at::Tensor& like) {
  TORCH_CHECK_VALUE(x.sizes() == shape, name, ": expected shape ", shape, ", got ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == type, name, ": expected ", type, ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(
      x.device() == like.device(), name, ": is on ", x.device(), ", other arguments on ", like.device());
}

inline void check_packed(
    const at::Tensor& x, const char* name, at::IntArrayRef shape, at::ScalarType type, const at::Tensor& like) {
  check_tensor(x, name, shape, type, like);
  TORCH_CHECK_VALUE(x.is_contiguous(), name, ": must be contiguous, got strides ", x.strides());
}

// Tokens are read so many bytes at a time.
inline void check_aligned(const at::Tensor& x, const char* name, int64_t bytes) {
  TORCH_CHECK_VALUE(x.stride(2) == 1, name, ": the last dimension must be contiguous, got strides ", x.strides());
  const int64_t elements = bytes / x.element_size();
  TORCH_CHECK_VALUE(
      x.stride(0) % elements == 0 && x.stride(1) % elements == 0 &&
          reinterpret_cast<uintptr_t>(x.const_data_ptr()) % bytes == 0,
      name, ": rows and tokens must start at multiples of ", bytes, " bytes, got strides ", x.strides(),
      " and offset ", x.storage_offset(), "; make it contiguous");
}

inline void check_cuda(cudaError_t status, const char* what) {
  TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status));
}

}  // namespace stac

// PyTorch's view of the kernels: schemas, argument checks, allocation of results, launch.
//
// Depends on PyTorch's core only, so one build loads next to PyTorch with and without CUDA.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "attend.h"
#include "checks.h"

// Part of PyTorch's stable C interface since 2.2; weak, because a PyTorch without CUDA lacks it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace stac {
namespace {

cudaStream_t current_stream(const at::Tensor& x) {
  void* stream = nullptr;
  TORCH_CHECK(
      aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(x.get_device(), &stream) == 0,
      "no current CUDA stream: this PyTorch has no CUDA support");
  return static_cast<cudaStream_t>(stream);
}

Type type_of(const at::Tensor& q) {
  TORCH_CHECK_VALUE(
      q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16,
      "q: this backend computes in float16 or bfloat16, got ", q.scalar_type());
  return q.scalar_type() == at::kHalf ? Type::float16 : Type::bfloat16;
}

void check_queries(const at::Tensor& q) {
  TORCH_CHECK_VALUE(q.dim() == 3, "q: expected [rows, queries, dim], got ", q.sizes());
  const auto dim = q.size(2);
  TORCH_CHECK_VALUE(
      dim == 16 || dim == 32 || dim == 64 || dim == 128, "q: head width ", dim, "; there are kernels for 16, 32, 64, 128");
  TORCH_CHECK_VALUE(q.size(0) <= 65535, "q: ", q.size(0), " rows; at most 65535");
  check_aligned(q, "q");
}

void check_keys(const at::Tensor& x, const char* name, const at::Tensor& q) {
  TORCH_CHECK_VALUE(x.dim() == 3, name, ": expected [rows, keys, dim], got ", x.sizes());
  check_tensor(x, name, {q.size(0), x.size(1), q.size(2)}, q.scalar_type(), q);
  check_aligned(x, name);
}

Tokens tokens(const at::Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

Numbers numbers(const at::Tensor& x) { return {x.const_data_ptr<float>(), x.stride(0), x.stride(1)}; }

Numbers checked_bias(const std::optional<at::Tensor>& bias, const at::Tensor& q, const at::Tensor& k) {
  if (!bias) return {nullptr, 0, 0};
  check_tensor(*bias, "bias", {q.size(0), k.size(1)}, at::kFloat, q);
  return numbers(*bias);
}

std::tuple<at::Tensor, at::Tensor> attend_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& before_out, const std::optional<at::Tensor>& before_lse, bool last) {
  const Type type = type_of(q);
  check_queries(q);
  check_keys(k, "k", q);
  check_keys(v, "v", q);
  TORCH_CHECK_VALUE(k.size(1) == v.size(1), "v: ", v.size(1), " values for ", k.size(1), " keys");
  TORCH_CHECK_VALUE(k.size(1) > 0 && q.numel() > 0, "no keys or no queries: ", k.sizes(), ", ", q.sizes());
  ForwardArguments args{};
  args.bias = checked_bias(bias, q, k);
  TORCH_CHECK_VALUE(before_out.has_value() == before_lse.has_value(), "before_out and before_lse go together");
  if (before_out) {
    check_tensor(*before_out, "before_out", q.sizes(), at::kFloat, q);
    check_tensor(*before_lse, "before_lse", {q.size(0), q.size(1)}, at::kFloat, q);
    TORCH_CHECK_VALUE(before_out->is_contiguous() && before_lse->is_contiguous(), "before: must be contiguous");
    args.before_out = before_out->const_data_ptr<float>();
    args.before_lse = before_lse->const_data_ptr<float>();
  }
  const c10::DeviceGuard guard(q.device());
  const at::Tensor out = at::empty(q.sizes(), q.options().dtype(last ? q.scalar_type() : at::kFloat));
  const at::Tensor lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
  args.q = tokens(q);
  args.k = tokens(k);
  args.v = tokens(v);
  args.out = out.mutable_data_ptr();
  args.out_is_float = !last;
  args.lse = lse.mutable_data_ptr<float>();
  args.rows = q.size(0);
  args.queries = q.size(1);
  args.keys = k.size(1);
  args.scale = 1 / std::sqrt(static_cast<float>(q.size(2)));
  check_cuda(launch_attend_forward(args, type, q.size(2), current_stream(q)), "attend_forward");
  return {out, lse};
}

at::Tensor attend_mass(
    const at::Tensor& q, const at::Tensor& k, const std::optional<at::Tensor>& bias, const at::Tensor& lse,
    double factor) {
  const Type type = type_of(q);
  check_queries(q);
  check_keys(k, "k", q);
  check_tensor(lse, "lse", {q.size(0), q.size(1)}, at::kFloat, q);
  MassArguments args{};
  args.bias = checked_bias(bias, q, k);
  const c10::DeviceGuard guard(q.device());
  const at::Tensor mass = at::empty({q.size(0), k.size(1)}, q.options().dtype(at::kFloat));
  if (!mass.numel()) return mass;
  args.q = tokens(q);
  args.k = tokens(k);
  args.lse = numbers(lse);
  args.mass = mass.mutable_data_ptr<float>();
  args.rows = q.size(0);
  args.queries = q.size(1);
  args.keys = k.size(1);
  args.scale = 1 / std::sqrt(static_cast<float>(q.size(2)));
  args.factor = factor;
  check_cuda(launch_attend_mass(args, type, q.size(2), current_stream(q)), "attend_mass");
  return mass;
}

}  // namespace

TORCH_LIBRARY(stac, library) {
  library.def(
      "attend_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? before_out, Tensor? before_lse, "
      "bool last) -> (Tensor out, Tensor lse)");
  library.def("attend_mass(Tensor q, Tensor k, Tensor? bias, Tensor lse, float factor) -> Tensor");
}

TORCH_LIBRARY_IMPL(stac, CUDA, library) {
  library.impl("attend_forward", attend_forward);
  library.impl("attend_mass", attend_mass);
}

}  // namespace stac

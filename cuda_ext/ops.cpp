// PyTorch's view of the kernels: schemas, argument checks, allocation of results, launch.
//
// Depends on PyTorch's core only, so one build loads next to PyTorch with and without CUDA.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "attend.h"
#include "checks.h"
#include "voxel_merge.h"

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

// state: the eight tensors of a RowState; → those of the state after, and counts [rows, 5].
std::vector<at::Tensor> voxel_merge(
    at::TensorList state, const at::Tensor& order, const at::Tensor& start, const at::Tensor& keys,
    const at::Tensor& values, const at::Tensor& score, double threshold, double gate, double heaviest) {
  TORCH_CHECK_VALUE(state.size() == 8, "state: expected 8 tensors, got ", state.size());
  TORCH_CHECK_VALUE(state[0].dim() == 3 && state[5].dim() == 3, "state: keys must be [rows, slots, dim]");
  const auto rows = state[0].size(0), pivots = state[0].size(1), dim = state[0].size(2);
  const auto buffer = state[5].size(1), count = keys.size(0);
  TORCH_CHECK_VALUE(pivots >= 2 && pivots <= MOST_PIVOTS, "state: ", pivots, " pivots; expected 2 to ", MOST_PIVOTS);
  TORCH_CHECK_VALUE(buffer >= 2, "state: ", buffer, " buffered tokens; expected at least 2");
  TORCH_CHECK_VALUE(dim <= 32 * MOST_CHANNELS, "state: head width ", dim, "; at most ", 32 * MOST_CHANNELS);
  const std::array<std::vector<int64_t>, 8> shapes = {
      {{rows, pivots, dim}, {rows, pivots, dim}, {rows, pivots}, {rows, pivots}, {rows, pivots},
       {rows, buffer, dim}, {rows, buffer, dim}, {rows, buffer}}};
  const c10::DeviceGuard guard(keys.device());
  MergeArguments args{};
  std::vector<at::Tensor> after;
  for (size_t i = 0; i < 8; ++i) {
    check_packed(state[i], "state", shapes[i], at::kFloat, keys);
    after.push_back(at::empty(state[i].sizes(), state[i].options()));
  }
  const auto from = [&](int i) { return state[i].const_data_ptr<float>(); };
  const auto to = [&](int i) { return after[i].mutable_data_ptr<float>(); };
  args.before = {from(0), from(1), from(2), from(3), from(4), from(5), from(6), from(7)};
  args.after = {to(0), to(1), to(2), to(3), to(4), to(5), to(6), to(7)};
  check_packed(order, "order", {count}, at::kLong, keys);
  check_packed(start, "start", {rows + 1}, at::kLong, keys);
  check_packed(keys, "keys", {count, dim}, at::kFloat, keys);
  check_packed(values, "values", {count, dim}, at::kFloat, keys);
  check_packed(score, "score", {count}, at::kFloat, keys);
  const at::Tensor score_left = at::empty(score.sizes(), score.options());
  const at::Tensor counts = at::empty({rows, 5}, keys.options().dtype(at::kInt));
  after.push_back(counts);
  if (!rows) return after;
  args.order = order.const_data_ptr<int64_t>();
  args.start = start.const_data_ptr<int64_t>();
  args.keys = keys.const_data_ptr<float>();
  args.values = values.const_data_ptr<float>();
  args.score = score.const_data_ptr<float>();
  args.score_left = score_left.mutable_data_ptr<float>();
  args.counts = counts.mutable_data_ptr<int32_t>();
  args.rows = rows;
  args.pivots = pivots;
  args.buffer = buffer;
  args.dim = dim;
  args.threshold = threshold;
  args.gate = gate;
  args.heaviest = heaviest;
  check_cuda(launch_voxel_merge(args, current_stream(keys)), "voxel_merge");
  return after;
}

}  // namespace

TORCH_LIBRARY(stac, library) {
  library.def(
      "attend_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? before_out, Tensor? before_lse, "
      "bool last) -> (Tensor out, Tensor lse)");
  library.def("attend_mass(Tensor q, Tensor k, Tensor? bias, Tensor lse, float factor) -> Tensor");
  library.def(
      "voxel_merge(Tensor[] state, Tensor order, Tensor start, Tensor keys, Tensor values, Tensor score, "
      "float threshold, float gate, float heaviest) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(stac, CUDA, library) {
  library.impl("attend_forward", attend_forward);
  library.impl("attend_mass", attend_mass);
  library.impl("voxel_merge", voxel_merge);
}

}  // namespace stac

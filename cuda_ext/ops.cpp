// PyTorch's view of the kernels: schemas, argument checks, allocation of results, launch.
//
// Depends on PyTorch's core only, so one build loads next to PyTorch with and without CUDA.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "attend.h"
#include "checks.h"
#include "gather.h"
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
  TORCH_CHECK_VALUE(q.dim() == 3 && q.numel() > 0, "q: expected a non-empty [rows, queries, dim], got ", q.sizes());
  const auto dim = q.size(2);
  TORCH_CHECK_VALUE(
      dim == 16 || dim == 32 || dim == 64 || dim == 128, "q: head width ", dim, "; there are kernels for 16, 32, 64, 128");
  TORCH_CHECK_VALUE(q.size(0) <= 65535, "q: ", q.size(0), " rows; at most 65535");
  check_aligned(q, "q", 16);
}

using Tensors = at::TensorList;
using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// All segments of one call, one entry of each list per segment.
struct SegmentLists {
  Tensors keys;
  const OptionalTensors& key_grids;
  const OptionalTensors& factors;
  Tensors values;
  const OptionalTensors& value_grids;
  const OptionalTensors& biases;
  at::IntArrayRef bits;
};

Tokens tokens(const at::Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

Numbers numbers(const at::Tensor& x) { return {x.const_data_ptr<float>(), x.stride(0), x.stride(1)}; }

// Tokens of one segment as numbers (16 bits) or as codes with their grid.
Stored checked_tokens(
    const at::Tensor& x, const std::optional<at::Tensor>& grid, const std::optional<at::Tensor>& factor,
    int64_t bits, int64_t length, const char* name, const at::Tensor& q) {
  const auto rows = q.size(0), dim = q.size(2);
  Stored stored{};
  if (bits == 16) {
    check_tensor(x, name, {rows, length, dim}, q.scalar_type(), q);
    check_aligned(x, name, 16);
    stored.tokens = tokens(x);
    return stored;
  }
  TORCH_CHECK_VALUE(bits == 8 || bits == 4, "bits: expected 16, 8 or 4, got ", bits);
  check_tensor(x, name, {rows, length, dim * bits / 8}, at::kByte, q);
  check_aligned(x, name, dim >= 32 ? 16 : 8);
  TORCH_CHECK_VALUE(grid.has_value(), name, ": codes of ", bits, " bits need their grid");
  const int64_t groups = (dim + CODE_GROUP - 1) / CODE_GROUP;
  check_tensor(*grid, "grid", {rows, length, 2 * groups}, at::kHalf, q);
  check_aligned(*grid, "grid", 4);
  stored.tokens = tokens(x);
  stored.grid = tokens(*grid);
  if (factor) {
    check_tensor(*factor, "factor", {rows, dim}, at::kFloat, q);
    TORCH_CHECK_VALUE(factor->stride(1) == 1, "factor: the last dimension must be contiguous");
    stored.factor = factor->const_data_ptr<float>();
    stored.factor_row_stride = factor->stride(0);
  }
  return stored;
}

// Fills the table of a launch; → keys of all segments. Without values only keys are looked at.
int64_t check_segments(Segment* table, const SegmentLists& lists, bool with_values, const at::Tensor& q) {
  const size_t count = lists.keys.size();
  TORCH_CHECK_VALUE(
      count >= 1 && count <= MOST_SEGMENTS, "segments: ", count, " of them; expected 1 to ", MOST_SEGMENTS);
  TORCH_CHECK_VALUE(
      lists.key_grids.size() == count && lists.factors.size() == count && lists.biases.size() == count &&
          lists.bits.size() == count,
      "segments: lists of different lengths");
  TORCH_CHECK_VALUE(
      !with_values || (lists.values.size() == count && lists.value_grids.size() == count),
      "segments: lists of different lengths");
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& keys = lists.keys[i];
    TORCH_CHECK_VALUE(keys.dim() == 3 && keys.size(1) > 0, "keys: expected [rows, keys, dim], got ", keys.sizes());
    const int64_t length = keys.size(1), bits = lists.bits[i];
    Segment& segment = table[i];
    segment.keys = checked_tokens(keys, lists.key_grids.get(i), lists.factors.get(i), bits, length, "keys", q);
    if (with_values)
      segment.values = checked_tokens(
          lists.values[i], lists.value_grids.get(i), std::nullopt, bits, length, "values", q);
    const std::optional<at::Tensor> bias = lists.biases.get(i);
    if (bias) {
      check_tensor(*bias, "bias", {q.size(0), length}, at::kFloat, q);
      segment.bias = numbers(*bias);
    }
    segment.length = length;
    segment.bits = bits;
    total += length;
  }
  return total;
}

std::tuple<at::Tensor, at::Tensor> attend_forward(
    const at::Tensor& q, Tensors keys, const OptionalTensors& key_grids, const OptionalTensors& factors,
    Tensors values, const OptionalTensors& value_grids, const OptionalTensors& biases, at::IntArrayRef bits) {
  const Type type = type_of(q);
  check_queries(q);
  ForwardArguments args{};
  check_segments(args.segments, {keys, key_grids, factors, values, value_grids, biases, bits}, true, q);
  const c10::DeviceGuard guard(q.device());
  const at::Tensor out = at::empty(q.sizes(), q.options());
  const at::Tensor lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
  args.q = tokens(q);
  args.count = keys.size();
  args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr<float>();
  args.rows = q.size(0);
  args.queries = q.size(1);
  args.scale = 1 / std::sqrt(static_cast<float>(q.size(2)));
  check_cuda(launch_attend_forward(args, type, q.size(2), current_stream(q)), "attend_forward");
  return {out, lse};
}

at::Tensor attend_mass(
    const at::Tensor& q, Tensors keys, const OptionalTensors& key_grids, const OptionalTensors& factors,
    const OptionalTensors& biases, at::IntArrayRef bits, const at::Tensor& lse, double factor) {
  const Type type = type_of(q);
  check_queries(q);
  check_tensor(lse, "lse", {q.size(0), q.size(1)}, at::kFloat, q);
  MassArguments args{};
  const auto columns =
      check_segments(args.segments, {keys, key_grids, factors, {}, OptionalTensors(), biases, bits}, false, q);
  const c10::DeviceGuard guard(q.device());
  const at::Tensor mass = at::empty({q.size(0), columns}, q.options().dtype(at::kFloat));
  args.q = tokens(q);
  args.count = keys.size();
  args.lse = numbers(lse);
  args.mass = mass.mutable_data_ptr<float>();
  args.rows = q.size(0);
  args.queries = q.size(1);
  args.columns = columns;
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
  TORCH_CHECK_VALUE(
      dim >= 1 && dim <= 32 * MOST_CHANNELS, "state: head width ", dim, "; expected 1 to ", 32 * MOST_CHANNELS);
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

GatherType gather_type(const at::Tensor& keys) {
  switch (keys.scalar_type()) {
    case at::kHalf: return GatherType::float16;
    case at::kBFloat16: return GatherType::bfloat16;
    case at::kFloat: return GatherType::float32;
    default: TORCH_CHECK_VALUE(false, "keys: expected float16, bfloat16 or float32, got ", keys.scalar_type());
  }
}

// One kind of tokens from some pages into keys, values and bias [lanes, budget, …], which it writes to.
void gather(
    const at::Tensor& keys, const at::Tensor& values, const at::Tensor& bias, Tensors page_keys,
    const OptionalTensors& key_grids, Tensors page_values, const OptionalTensors& value_grids, int64_t first,
    int64_t bits, const at::Tensor& slots, const at::Tensor& members, const at::Tensor& before,
    const at::Tensor& wanted, const at::Tensor& total, const std::optional<at::Tensor>& factor, bool pad) {
  TORCH_CHECK_VALUE(keys.dim() == 3 && slots.dim() == 2, "expected keys [lanes, budget, dim], slots [lanes, n]");
  const auto lanes = keys.size(0), budget = keys.size(1), dim = keys.size(2), candidates = slots.size(1);
  const auto type = keys.scalar_type();
  check_packed(keys, "keys", {lanes, budget, dim}, type, slots);
  check_packed(values, "values", {lanes, budget, dim}, type, slots);
  check_packed(bias, "bias", {lanes, budget}, at::kFloat, slots);
  check_packed(slots, "slots", {lanes, candidates}, at::kLong, slots);
  check_packed(members, "members", {lanes, candidates}, at::kFloat, slots);
  check_packed(before, "before", {lanes}, at::kLong, slots);
  check_packed(wanted, "wanted", {lanes}, at::kLong, slots);
  check_packed(total, "total", {lanes}, at::kLong, slots);
  TORCH_CHECK_VALUE(dim % 2 == 0, "keys: expected an even head width, got ", dim);
  TORCH_CHECK_VALUE(bits == 16 || bits == 8 || bits == 4, "bits: expected 16, 8 or 4, got ", bits);
  const size_t count = page_keys.size();
  TORCH_CHECK_VALUE(count <= MOST_PAGES, "pages: ", count, " of them, at most ", MOST_PAGES);
  TORCH_CHECK_VALUE(
      page_values.size() == count && key_grids.size() == count && value_grids.size() == count,
      "pages: lists of different lengths");
  GatherArguments args{};
  args.pages[0].first = args.stop = first;
  const int64_t grid = 2 * ((dim + CODE_GROUP - 1) / CODE_GROUP);
  const auto grid_of = [&](const OptionalTensors& grids, size_t i, int64_t tokens) -> const void* {
    if (bits == 16) return nullptr;
    const std::optional<at::Tensor> x = grids.get(i);
    TORCH_CHECK_VALUE(x.has_value(), "pages: codes of ", bits, " bits need their grid");
    check_packed(*x, "grid", {tokens, grid}, at::kHalf, slots);
    return x->const_data_ptr();
  };
  for (size_t i = 0; i < count; ++i) {
    const int64_t tokens = page_keys[i].size(0), width = bits == 16 ? dim : dim * bits / 8;
    check_packed(page_keys[i], "page_keys", {tokens, width}, bits == 16 ? type : at::kByte, slots);
    check_packed(page_values[i], "page_values", {tokens, width}, bits == 16 ? type : at::kByte, slots);
    args.pages[i] = {
        page_keys[i].const_data_ptr(), grid_of(key_grids, i, tokens), page_values[i].const_data_ptr(),
        grid_of(value_grids, i, tokens), args.stop};
    args.stop += tokens;
  }
  if (factor) {
    check_packed(*factor, "factor", {lanes, dim}, at::kFloat, slots);
    args.factor = factor->const_data_ptr<float>();
  }
  if (!keys.numel()) return;
  const c10::DeviceGuard guard(slots.device());
  args.count = count;
  args.bits = bits;
  args.slots = slots.const_data_ptr<int64_t>();
  args.members = members.const_data_ptr<float>();
  args.before = before.const_data_ptr<int64_t>();
  args.wanted = wanted.const_data_ptr<int64_t>();
  args.total = total.const_data_ptr<int64_t>();
  args.keys = keys.mutable_data_ptr();
  args.values = values.mutable_data_ptr();
  args.bias = bias.mutable_data_ptr<float>();
  args.lanes = lanes;
  args.candidates = candidates;
  args.budget = budget;
  args.dim = dim;
  args.pad = pad;
  check_cuda(launch_gather(args, gather_type(keys), current_stream(slots)), "gather");
}

}  // namespace

TORCH_LIBRARY(stac, library) {
  library.def(
      "attend_forward(Tensor q, Tensor[] keys, Tensor?[] key_grids, Tensor?[] factors, Tensor[] values, "
      "Tensor?[] value_grids, Tensor?[] biases, int[] bits) -> (Tensor out, Tensor lse)");
  library.def(
      "attend_mass(Tensor q, Tensor[] keys, Tensor?[] key_grids, Tensor?[] factors, Tensor?[] biases, "
      "int[] bits, Tensor lse, float factor) -> Tensor");
  library.def(
      "voxel_merge(Tensor[] state, Tensor order, Tensor start, Tensor keys, Tensor values, Tensor score, "
      "float threshold, float gate, float heaviest) -> Tensor[]");
  library.def(
      "gather(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) bias, Tensor[] page_keys, Tensor?[] key_grids, "
      "Tensor[] page_values, Tensor?[] value_grids, int first, int bits, Tensor slots, Tensor members, "
      "Tensor before, Tensor wanted, Tensor total, Tensor? factor, bool pad) -> ()");
}

TORCH_LIBRARY_IMPL(stac, CUDA, library) {
  library.impl("attend_forward", attend_forward);
  library.impl("attend_mass", attend_mass);
  library.impl("voxel_merge", voxel_merge);
  library.impl("gather", gather);
}

}  // namespace stac

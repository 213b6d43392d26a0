// The kernels as operators of torch, by its stable ABI: one build serves later versions of torch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "kernels.h"

#ifdef MEGATRON_RW_EMULATED
#define MEGATRON_RW_KEY CPU
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define MEGATRON_RW_KEY CUDA
#endif

namespace megatron_rw {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The tensor's device made current, and the stream that torch uses on it.
#ifdef MEGATRON_RW_EMULATED
class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};
#else
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor)
      : guard_(tensor.get_device_index()), index_(tensor.get_device_index()) {}
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t index_;
};
#endif

int narrow(int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= INT32_MAX, "a size of ", value, " does not fit 32 bits");
  return static_cast<int>(value);
}

Dtype dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, "must be float32, bfloat16 or float16");
  }
}

Logits logits_of(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 3, "logits must be [s, b, v]");
  return {logits.data_ptr(), dtype_of(logits), logits.stride(0), logits.stride(1),
          logits.stride(2)};
}

Shape shape_of(const Tensor& logits) {
  narrow(logits.size(0) * logits.size(1));
  return {narrow(logits.size(0)), narrow(logits.size(1))};
}

template <typename T>
PerToken<const T> per_token(const Tensor& tensor, const char* name, ScalarType dtype,
                            Shape shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " is of the wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == shape.sequence &&
                      tensor.size(1) == shape.batch, name, " must be [s, b]");
  return {static_cast<const T*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1)};
}

// Data of a tensor that must be contiguous.
template <typename T>
T* whole(const Tensor& tensor, const char* name, ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " is of the wrong dtype");
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == size, name,
                  " must be contiguous and hold ", size, " elements");
  return static_cast<T*>(tensor.data_ptr());
}

Launch launch_of(int64_t threads, int64_t columns, int64_t width) {
  STD_TORCH_CHECK(threads >= 32 && threads <= 1024 && threads % 32 == 0,
                  "threads must be a multiple of 32 up to 1024, not ", threads);
  STD_TORCH_CHECK(columns > 0 && (width + columns - 1) / columns <= 65535,
                  "columns of a block must be above 0 and make at most 65535 blocks of a row");
  return {static_cast<int>(threads), narrow(columns)};
}

Tensor statistics(const Tensor& logits, const Tensor& target, int64_t start, int64_t columns,
                  int64_t ignore_index, double softcap, bool with_sum, int64_t threads,
                  int64_t block_columns) {
  const Shape shape = shape_of(logits);
  STD_TORCH_CHECK(columns > 0 && columns <= logits.size(2), "columns must be within the logits");
  const Launch launch = launch_of(threads, block_columns, columns);
  const int64_t parts = (columns + block_columns - 1) / block_columns;
  Tensor tables = torch::stable::new_empty(
      logits, {parts, with_sum ? 4 : 3, shape.sequence, shape.batch}, ScalarType::Float);
  const OnDevice device(logits);
  launch_statistics({.logits = logits_of(logits),
                     .target = per_token<int64_t>(target, "target", ScalarType::Long, shape),
                     .tables = static_cast<float*>(tables.data_ptr()),
                     .shape = shape,
                     .start = start,
                     .columns = narrow(columns),
                     .ignore_index = ignore_index,
                     .softcap = static_cast<float>(softcap),
                     .with_sum = with_sum},
                    launch, device.stream());
  return tables;
}

Tensor merge(const Tensor& tables) {
  STD_TORCH_CHECK(tables.dim() == 4 && (tables.size(1) == 3 || tables.size(1) == 4),
                  "tables must be [parts, 3 or 4, s, b]");
  const int64_t rows = tables.size(2) * tables.size(3);
  Tensor merged = torch::stable::new_empty(
      tables, {1, tables.size(1), tables.size(2), tables.size(3)}, ScalarType::Float);
  const OnDevice device(tables);
  launch_merge({.tables = whole<float>(tables, "tables", ScalarType::Float, tables.numel()),
                .merged = static_cast<float*>(merged.data_ptr()),
                .parts = narrow(tables.size(0)),
                .rows = rows,
                .with_sum = tables.size(1) == 4},
               device.stream());
  return merged;
}

std::tuple<Tensor, Tensor, Tensor> combine(const Tensor& tables, const Tensor& target,
                                           const OptionalTensor& loss_mask, int64_t vocab_size,
                                           int64_t ignore_index, double z_loss,
                                           double smoothing) {
  STD_TORCH_CHECK(tables.dim() == 4 && (tables.size(1) == 3 || tables.size(1) == 4),
                  "tables must be [parts, 3 or 4, s, b]");
  const Shape shape = {narrow(tables.size(2)), narrow(tables.size(3))};
  STD_TORCH_CHECK(shape.batch <= 65535, "at most 65535 samples, not ", shape.batch);
  const int64_t chunks = loss_mask ? (shape.sequence + kChunk - 1) / kChunk : 0;
  Tensor losses =
      torch::stable::new_empty(tables, {shape.sequence, shape.batch}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(tables, {shape.sequence, shape.batch}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(tables, {2, chunks, shape.batch}, ScalarType::Float);
  PerToken<const float> mask = {nullptr, 0, 0};
  if (loss_mask) mask = per_token<float>(*loss_mask, "loss_mask", ScalarType::Float, shape);
  const OnDevice device(tables);
  launch_combine({.tables = whole<float>(tables, "tables", ScalarType::Float, tables.numel()),
                  .target = per_token<int64_t>(target, "target", ScalarType::Long, shape),
                  .mask = mask,
                  .losses = static_cast<float*>(losses.data_ptr()),
                  .lse = static_cast<float*>(lse.data_ptr()),
                  .sums = static_cast<float*>(sums.data_ptr()),
                  .shape = shape,
                  .parts = narrow(tables.size(0)),
                  .vocab_size = vocab_size,
                  .ignore_index = ignore_index,
                  .z_loss = static_cast<float>(z_loss),
                  .smoothing = static_cast<float>(smoothing),
                  .with_sum = tables.size(1) == 4},
                 device.stream());
  return {losses, lse, sums};
}

void gradient(const Tensor& logits, const Tensor& target, const Tensor& lse,
              const Tensor& upstream, int64_t start, int64_t columns, int64_t ignore_index,
              double softcap, double z_loss, double smoothing, double uniform, int64_t threads,
              int64_t block_columns, const Tensor& out) {
  const Shape shape = shape_of(logits);
  const int64_t rows = logits.size(0) * logits.size(1);
  STD_TORCH_CHECK(columns > 0 && columns <= logits.size(2), "columns must be within the logits");
  STD_TORCH_CHECK(out.dim() == 3 && out.size(0) == logits.size(0) &&
                      out.size(1) == logits.size(1) && out.size(2) == logits.size(2) &&
                      out.scalar_type() == logits.scalar_type(),
                  "out must be like the logits");
  const Launch launch = launch_of(threads, block_columns, logits.size(2));
  const OnDevice device(logits);
  launch_gradient({.logits = logits_of(logits),
                   .out = logits_of(out),
                   .target = per_token<int64_t>(target, "target", ScalarType::Long, shape),
                   .lse = whole<float>(lse, "lse", ScalarType::Float, rows),
                   .upstream = per_token<float>(upstream, "upstream", ScalarType::Float, shape),
                   .shape = shape,
                   .start = start,
                   .columns = narrow(columns),
                   .width = narrow(logits.size(2)),
                   .ignore_index = ignore_index,
                   .softcap = static_cast<float>(softcap),
                   .z_loss = static_cast<float>(z_loss),
                   .smoothing = static_cast<float>(smoothing),
                   .uniform = static_cast<float>(uniform)},
                  launch, device.stream());
}

// Rows of a contiguous [rows, width], for [s, b, width] logits.
void* logits_in_place(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.is_contiguous(),
                  "logits must be [s, b, v] and contiguous");
  return logits.data_ptr();
}

Tensor probabilities(const Tensor& logits, const Tensor& target, int64_t start, int64_t columns,
                     int64_t ignore_index, double softcap, int64_t threads) {
  void* const data = logits_in_place(logits);
  const Shape shape = shape_of(logits);
  STD_TORCH_CHECK(columns > 0 && columns <= logits.size(2), "columns must be within the logits");
  const Launch launch = launch_of(threads, columns, columns);
  Tensor table =
      torch::stable::new_empty(logits, {1, 3, shape.sequence, shape.batch}, ScalarType::Float);
  const OnDevice device(logits);
  launch_probabilities({.logits = data,
                        .dtype = dtype_of(logits),
                        .target = per_token<int64_t>(target, "target", ScalarType::Long, shape),
                        .table = static_cast<float*>(table.data_ptr()),
                        .shape = shape,
                        .start = start,
                        .columns = narrow(columns),
                        .width = narrow(logits.size(2)),
                        .ignore_index = ignore_index,
                        .softcap = static_cast<float>(softcap)},
                       launch.threads, device.stream());
  return table;
}

Tensor subtract_targets(const Tensor& probabilities, const Tensor& table, const Tensor& target,
                        const Tensor& lse, int64_t start, int64_t columns, int64_t ignore_index,
                        double softcap, double z_loss, double largest_ratio) {
  void* const data = logits_in_place(probabilities);
  const Shape shape = shape_of(probabilities);
  const int64_t rows = probabilities.size(0) * probabilities.size(1);
  STD_TORCH_CHECK(columns > 0 && columns <= probabilities.size(2),
                  "columns must be within the probabilities");
  Tensor scale =
      torch::stable::new_empty(lse, {shape.sequence, shape.batch}, ScalarType::Float);
  const OnDevice device(probabilities);
  launch_subtract_targets(
      {.probabilities = data,
       .dtype = dtype_of(probabilities),
       .target = per_token<int64_t>(target, "target", ScalarType::Long, shape),
       .table = whole<float>(table, "table", ScalarType::Float, 3 * rows),
       .lse = whole<float>(lse, "lse", ScalarType::Float, rows),
       .scale = static_cast<float*>(scale.data_ptr()),
       .shape = shape,
       .start = start,
       .columns = narrow(columns),
       .width = narrow(probabilities.size(2)),
       .ignore_index = ignore_index,
       .softcap = static_cast<float>(softcap),
       .z_loss = static_cast<float>(z_loss),
       .largest_ratio = static_cast<float>(largest_ratio)},
      device.stream());
  return scale;
}

void scale_rows(const Tensor& matrix, const Tensor& scale, const Tensor& out) {
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.is_contiguous(), "matrix must be [n, h]");
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.size(0) == matrix.size(0) &&
                      out.size(1) == matrix.size(1),
                  "out must be of the matrix's shape and contiguous");
  STD_TORCH_CHECK(matrix.scalar_type() == ScalarType::Float ||
                      matrix.scalar_type() == out.scalar_type(),
                  "matrix must be float32 or of the dtype of out");
  const OnDevice device(matrix);
  launch_scale_rows({.matrix = matrix.data_ptr(),
                     .dtype = dtype_of(matrix),
                     .out = out.data_ptr(),
                     .out_dtype = dtype_of(out),
                     .scale = whole<float>(scale, "scale", ScalarType::Float, matrix.size(0)),
                     .rows = narrow(matrix.size(0)),
                     .width = narrow(matrix.size(1))},
                    device.stream());
}

std::tuple<Tensor, Tensor> weigh(const Tensor& losses, const OptionalTensor& mask,
                                 const OptionalTensor& given_range,
                                 const OptionalTensor& temperature_tensor, double temperature,
                                 int64_t strategy, double delta, double largest_score) {
  constexpr int64_t kStatistics = 9, kStrategies = 4;
  const int64_t count = losses.numel();
  STD_TORCH_CHECK(count > 0, "there must be losses");
  STD_TORCH_CHECK(strategy >= 0 && strategy < kStrategies, "there is no strategy ", strategy);
  const float* const data = whole<const float>(losses, "losses", ScalarType::Float, count);
  Tensor weights = torch::stable::new_empty(losses, {count}, ScalarType::Float);
  Tensor statistics = torch::stable::new_empty(losses, {kStatistics}, ScalarType::Float);
  Weigh arguments = {.losses = data,
                     .mask = nullptr,
                     .given_range = nullptr,
                     .temperature_tensor = nullptr,
                     .weights = static_cast<float*>(weights.data_ptr()),
                     .statistics = static_cast<float*>(statistics.data_ptr()),
                     .count = narrow(count),
                     .temperature = static_cast<float>(temperature),
                     .strategy = static_cast<Strategy>(strategy),
                     .delta = static_cast<float>(delta),
                     .largest_score = static_cast<float>(largest_score)};
  if (mask) arguments.mask = whole<const bool>(*mask, "mask", ScalarType::Bool, count);
  if (given_range) {
    arguments.given_range = whole<const float>(*given_range, "given_range", ScalarType::Float, 2);
  }
  if (temperature_tensor) {
    arguments.temperature_tensor =
        whole<const float>(*temperature_tensor, "temperature", ScalarType::Float, 1);
  }
  const OnDevice device(losses);
  launch_weigh(arguments, device.stream());
  return {weights, statistics};
}

}  // namespace
}  // namespace megatron_rw

STABLE_TORCH_LIBRARY(megatron_rw_cuda, library) {
  library.def(
      "statistics(Tensor logits, Tensor target, int start, int columns, int ignore_index, "
      "float softcap, bool with_sum, int threads, int block_columns) -> Tensor");
  library.def("merge(Tensor tables) -> Tensor");
  library.def(
      "combine(Tensor tables, Tensor target, Tensor? loss_mask, int vocab_size, "
      "int ignore_index, float z_loss, float smoothing) -> (Tensor, Tensor, Tensor)");
  library.def(
      "gradient(Tensor logits, Tensor target, Tensor lse, Tensor upstream, int start, "
      "int columns, int ignore_index, float softcap, float z_loss, float smoothing, "
      "float uniform, int threads, int block_columns, Tensor(a!) out) -> ()");
  library.def(
      "probabilities(Tensor(a!) logits, Tensor target, int start, int columns, int ignore_index, "
      "float softcap, int threads) -> Tensor");
  library.def(
      "subtract_targets(Tensor(a!) probabilities, Tensor table, Tensor target, Tensor lse, "
      "int start, int columns, int ignore_index, float softcap, float z_loss, "
      "float largest_ratio) -> Tensor");
  library.def("scale_rows(Tensor matrix, Tensor scale, Tensor(a!) out) -> ()");
  library.def(
      "weigh(Tensor losses, Tensor? mask, Tensor? given_range, Tensor? temperature_tensor, "
      "float temperature, int strategy, float delta, float largest_score) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_rw_cuda, MEGATRON_RW_KEY, library) {
  library.impl("statistics", TORCH_BOX(&megatron_rw::statistics));
  library.impl("merge", TORCH_BOX(&megatron_rw::merge));
  library.impl("combine", TORCH_BOX(&megatron_rw::combine));
  library.impl("gradient", TORCH_BOX(&megatron_rw::gradient));
  library.impl("probabilities", TORCH_BOX(&megatron_rw::probabilities));
  library.impl("subtract_targets", TORCH_BOX(&megatron_rw::subtract_targets));
  library.impl("scale_rows", TORCH_BOX(&megatron_rw::scale_rows));
  library.impl("weigh", TORCH_BOX(&megatron_rw::weigh));
}

// What the kernels compute and how they are called: the interface between torch and CUDA.
//
// Everything runs on `stream` and returns at once. Pointers are of the device. Strides are in
// elements. The mathematics are those of megatron_rw/kernels/options.py and weights.py.

#pragma once

#include <cstdint>

#include "platform.cuh"

namespace megatron_rw {

enum class Dtype { kFloat, kBFloat16, kHalf };

// A row is a token; logits are [sequence, batch, width].
struct Logits {
  const void* data;
  Dtype dtype;
  int64_t stride_sequence, stride_sample, stride_column;
};

// [sequence, batch]
template <typename T>
struct PerToken {
  T* data;
  int64_t stride_sequence, stride_sample;
};

struct Shape {
  int sequence, batch;
};

// How a pass over the logits is cut.
struct Launch {
  int threads;  // of a block, a multiple of 32 up to 1024
  int columns;  // of a row that one block takes
};

// One read of the logits. Into tables[part][statistic][row] go the largest logit, the sum of
// exp(z - largest), the target's logit (0 where it is elsewhere), and with `with_sum` the sum of z.
// Part p is the columns from p * launch.columns on.
struct Statistics {
  Logits logits;
  PerToken<const int64_t> target;
  float* tables;
  Shape shape;
  int64_t start;  // of this shard in the whole vocabulary
  int columns;    // that take part
  int64_t ignore_index;
  float softcap;  // 0: none
  bool with_sum;
};
void launch_statistics(const Statistics& arguments, Launch launch, cudaStream_t stream);

// The parts of a shard become one.
struct Merge {
  const float* tables;  // [parts, statistics, rows]
  float* merged;        // [1, statistics, rows]
  int parts;
  int64_t rows;
  bool with_sum;
};
void launch_merge(const Merge& arguments, cudaStream_t stream);

// The parts of all shards become losses and log-sum-exps, [sequence, batch], and, with a mask, each
// sample's masked loss sum and token count, sums[2][chunks][batch].
struct Combine {
  const float* tables;
  PerToken<const int64_t> target;
  PerToken<const float> mask;  // data may be null
  float* losses;
  float* lse;
  float* sums;
  Shape shape;
  int parts;
  int64_t vocab_size;
  int64_t ignore_index;
  float z_loss;
  float smoothing;
  bool with_sum;
};
// Tokens of a sample that one block joins: chunks = ceil(sequence / kChunk).
constexpr int kChunk = 8192;
void launch_combine(const Combine& arguments, cudaStream_t stream);

// One read of the logits, one write of their gradient; `out` may be the logits.
struct Gradient {
  Logits logits;
  Logits out;  // of the same dtype
  PerToken<const int64_t> target;
  const float* lse;  // [sequence, batch]
  PerToken<const float> upstream;
  Shape shape;
  int64_t start;
  int columns;
  int width;  // columns and padding, which gets zeros
  int64_t ignore_index;
  float softcap;  // 0: none
  float z_loss;
  float smoothing;
  float uniform;  // smoothing over the size of the vocabulary
};
void launch_gradient(const Gradient& arguments, Launch launch, cudaStream_t stream);

// Logits of a contiguous [rows, width] become the probabilities within the shard, q in
// probabilities.py without its target, in place. Into table[statistic][row] go the largest logit, the
// sum of exp(z - largest) and the target's logit, as those of one part of `Statistics`.
struct Probabilities {
  void* logits;
  Dtype dtype;
  PerToken<const int64_t> target;
  float* table;
  Shape shape;
  int64_t start;
  int columns;
  int width;  // columns and padding, which gets zeros
  int64_t ignore_index;
  float softcap;  // 0: none
};
void launch_probabilities(const Probabilities& arguments, int threads, cudaStream_t stream);

// The target is subtracted from q, in place, and s in probabilities.py goes into `scale`. Rows that
// are not finite become zeros.
struct SubtractTargets {
  void* probabilities;
  Dtype dtype;
  PerToken<const int64_t> target;
  const float* table;  // of Probabilities
  const float* lse;    // [sequence, batch]
  float* scale;        // [sequence, batch]
  Shape shape;
  int64_t start;
  int columns;
  int width;
  int64_t ignore_index;
  float softcap;  // 0: none
  float z_loss;
  float largest_ratio;
};
void launch_subtract_targets(const SubtractTargets& arguments, cudaStream_t stream);

// out = diag(scale) * matrix, both contiguous [rows, width]; zeros where the scale is 0. The matrix is
// fp32 or of the dtype of `out`.
struct ScaleRows {
  const void* matrix;
  Dtype dtype;
  void* out;  // may be the matrix
  Dtype out_dtype;
  const float* scale;
  int64_t rows;
  int width;
};
void launch_scale_rows(const ScaleRows& arguments, cudaStream_t stream);

enum class Strategy { kUniform, kLinUpper, kQuadratic, kExtremes };

// Weights and their statistics, see `Statistic` in weights.py, of one set.
struct Weigh {
  const float* losses;              // [count]
  const bool* mask;                 // [count] or null
  const float* given_range;         // [2] or null
  const float* temperature_tensor;  // [] or null
  float* weights;                   // [count]
  float* statistics;                // [9]
  int count;
  float temperature;  // where there is no tensor
  Strategy strategy;
  float delta;
  float largest_score;
};
void launch_weigh(const Weigh& arguments, cudaStream_t stream);

}  // namespace megatron_rw

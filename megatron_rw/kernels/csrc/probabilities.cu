// The row passes of the fused output layer: logits to probabilities, targets, rows scaled.

#include "online.cuh"

namespace megatron_rw {
namespace {

// Vectors of a row that a thread keeps in registers from the first reading to the writing. What of
// the row lies beyond is read again, from the L2 cache as far as that holds it.
constexpr int kHeld = 4;

// Reading that will be repeated: not marked as done with.
template <typename T>
__device__ __forceinline__ Vector<T> load_again(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}

template <bool kCapped>
__device__ __forceinline__ float probability_of(float z, float within, float softcap) {
  if (kCapped) z = capped(z, softcap);
  const float q = fast_exp(z - within);
  return kCapped ? q * (1.0f - (z / softcap) * (z / softcap)) : q;
}

template <typename T, bool kCapped>
__device__ __forceinline__ Vector<T> probabilities_of(const Vector<T>& logits, float within,
                                                      float softcap) {
  Vector<T> made;
#pragma unroll
  for (int lane = 0; lane < Vector<T>::kSize; ++lane) {
    const float z = to_float(logits.values[lane]);
    made.values[lane] = from_float<T>(probability_of<kCapped>(z, within, softcap));
  }
  return made;
}

template <typename T, bool kCapped>
__device__ __forceinline__ void accumulate_vector(Running& running, const Vector<T>& logits,
                                                  float softcap) {
  float z[Vector<T>::kSize];
#pragma unroll
  for (int lane = 0; lane < Vector<T>::kSize; ++lane) z[lane] = to_float(logits.values[lane]);
  accumulate<!kCapped>(running, z, softcap);
}

// A block a row.
template <typename T, bool kCapped>
__global__ void __launch_bounds__(kMostThreads, 1) probabilities_kernel(const Probabilities a) {
  const int threads = blockDim.x, thread = threadIdx.x;
  const unsigned row = blockIdx.x;
  const int64_t sequence = row / a.shape.batch, sample = row % a.shape.batch;
  T* const begin = static_cast<T*>(a.logits) + static_cast<int64_t>(row) * a.width;
  const int64_t rows = static_cast<int64_t>(a.shape.sequence) * a.shape.batch;
  float* const table = a.table + row;
  const int64_t label = a.target.data[sequence * a.target.stride_sequence +
                                      sample * a.target.stride_sample];
  if (label == a.ignore_index) {
    // Nothing of it is used: it need not even be read.
    fill_zeros(begin, 1, a.width);
    if (thread == 0) {
      table[0] = -INFINITY;
      table[rows] = table[2 * rows] = 0.0f;
    }
    return;
  }
  const Cut piece = cut(begin, a.columns, true);
  Vector<T>* const vectors = reinterpret_cast<Vector<T>*>(begin + piece.head);
  const int rest = kHeld * threads;

  Running running;
  Vector<T> held[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int at = thread + k * threads;
    if (at < piece.vectors) held[k] = load_vector(vectors[at].values);
  }
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (thread + k * threads < piece.vectors) {
      accumulate_vector<T, kCapped>(running, held[k], a.softcap);
    }
  }
#pragma unroll 2
  for (int at = rest + thread; at < piece.vectors; at += threads) {
    accumulate_vector<T, kCapped>(running, load_again(vectors[at].values), a.softcap);
  }
  const auto one = [&](int column) {
    float z[1] = {to_float(begin[column])};
    accumulate<!kCapped>(running, z, a.softcap);
  };
  for (int column = thread; column < piece.head; column += threads) one(column);
  for (int column = piece.tail + thread; column < a.columns; column += threads) one(column);
  // Before anything is written: the reduction has all threads wait.
  float target = 0.0f;
  const int64_t own = label - a.start;
  if (thread == 0 && own >= 0 && own < a.columns) {
    target = to_float(begin[own]);
    if (kCapped) target = capped(target, a.softcap);
  }
  running = block_reduce(running, Join());

  const float within = anchor(running.top) + logf(running.total);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int at = thread + k * threads;
    if (at < piece.vectors) {
      store_vector(vectors[at].values, probabilities_of<T, kCapped>(held[k], within, a.softcap));
    }
  }
#pragma unroll 1
  for (int at = rest + thread; at < piece.vectors; at += threads) {
    const Vector<T> logits = load_vector(vectors[at].values);
    store_vector(vectors[at].values, probabilities_of<T, kCapped>(logits, within, a.softcap));
  }
  const auto write = [&](int column) {
    const float z = to_float(begin[column]);
    begin[column] = from_float<T>(probability_of<kCapped>(z, within, a.softcap));
  };
  for (int column = thread; column < piece.head; column += threads) write(column);
  for (int column = piece.tail + thread; column < a.columns; column += threads) write(column);
  fill_zeros(begin + a.columns, 1, a.width - a.columns);
  if (thread != 0) return;
  table[0] = running.top;
  table[rows] = running.total;
  table[2 * rows] = target;
}

// A warp a row, of which all but a few change one element.
template <typename T>
__global__ void __launch_bounds__(kWarp)
    subtract_targets_kernel(const SubtractTargets a) {
  const int64_t rows = static_cast<int64_t>(a.shape.sequence) * a.shape.batch;
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x;
  const int64_t sequence = row / a.shape.batch, sample = row % a.shape.batch;
  const int64_t label = a.target.data[sequence * a.target.stride_sequence +
                                      sample * a.target.stride_sample];
  if (label == a.ignore_index) {
    if (lane == 0) a.scale[row] = 0.0f;
    return;
  }
  const float target = a.table[2 * rows + row], lse = a.lse[row];
  const float within = anchor(a.table[row]) + logf(a.table[rows + row]);
  const float ratio = expf(lse - within) / (1.0f + 2.0f * a.z_loss * lse);
  const bool kept = fabsf(ratio) <= a.largest_ratio;
  float value = kept ? expf(target - within) - ratio : -1.0f;
  if (a.softcap > 0) value *= 1.0f - (target / a.softcap) * (target / a.softcap);
  T* const begin = static_cast<T*>(a.probabilities) + row * a.width;
  int64_t own = label - a.start;
  if (own < 0 || own >= a.columns) own = -1;
  if (!kept) {
    for (int column = lane; column < a.width; column += kWarp) {
      begin[column] = from_float<T>(column == own ? value : 0.0f);
    }
  } else if (lane == 0 && own >= 0) {
    begin[own] = from_float<T>(value);
  }
  if (lane == 0) a.scale[row] = fabsf(lse) < INFINITY ? (kept ? 1.0f / ratio : 1.0f) : NAN;
}

// A block a row.
template <typename T, typename Out>
__global__ void __launch_bounds__(kMostThreads, 1) scale_rows_kernel(const ScaleRows a) {
  const int64_t row = blockIdx.x;
  const T* const from = static_cast<const T*>(a.matrix) + row * a.width;
  Out* const to = static_cast<Out*>(a.out) + row * a.width;
  const float scale = a.scale[row];
  if (scale == 0.0f) {
    // Literal zeros: 0 * NaN is NaN. The row need not even be read.
    fill_zeros(to, 1, a.width);
    return;
  }
#pragma unroll 4
  for (int column = threadIdx.x; column < a.width; column += blockDim.x) {
    to[column] = from_float<Out>(to_float(from[column]) * scale);
  }
}

template <typename T>
void launch_probabilities_of(const Probabilities& a, int threads, cudaStream_t stream) {
  const dim3 grid(a.shape.sequence * a.shape.batch);
  if (a.softcap > 0) {
    start(probabilities_kernel<T, true>, grid, threads, stream, a);
  } else {
    start(probabilities_kernel<T, false>, grid, threads, stream, a);
  }
}

template <typename Out>
void launch_scale_rows_to(const ScaleRows& a, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const dim3 grid(static_cast<unsigned>(a.rows));
  if (a.dtype == a.out_dtype) {
    start(scale_rows_kernel<Out, Out>, grid, kThreads, stream, a);
  } else {
    start(scale_rows_kernel<float, Out>, grid, kThreads, stream, a);
  }
}

}  // namespace

void launch_probabilities(const Probabilities& a, int threads, cudaStream_t stream) {
  switch (a.dtype) {
    case Dtype::kFloat:
      return launch_probabilities_of<float>(a, threads, stream);
    case Dtype::kBFloat16:
      return launch_probabilities_of<__nv_bfloat16>(a, threads, stream);
    case Dtype::kHalf:
      return launch_probabilities_of<__half>(a, threads, stream);
  }
}

void launch_subtract_targets(const SubtractTargets& a, cudaStream_t stream) {
  const dim3 grid(a.shape.sequence * a.shape.batch);
  switch (a.dtype) {
    case Dtype::kFloat:
      return start(subtract_targets_kernel<float>, grid, kWarp, stream, a);
    case Dtype::kBFloat16:
      return start(subtract_targets_kernel<__nv_bfloat16>, grid, kWarp, stream, a);
    case Dtype::kHalf:
      return start(subtract_targets_kernel<__half>, grid, kWarp, stream, a);
  }
}

void launch_scale_rows(const ScaleRows& a, cudaStream_t stream) {
  switch (a.out_dtype) {
    case Dtype::kFloat:
      return launch_scale_rows_to<float>(a, stream);
    case Dtype::kBFloat16:
      return launch_scale_rows_to<__nv_bfloat16>(a, stream);
    case Dtype::kHalf:
      return launch_scale_rows_to<__half>(a, stream);
  }
}

}  // namespace megatron_rw

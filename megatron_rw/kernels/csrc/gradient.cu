// The backward pass over the logits: their gradient, in place where the caller says so.

#include "device.cuh"

namespace megatron_rw {
namespace {

// What all elements of a row have in common.
struct Row {
  float scale;    // upstream gradient
  float lse;
  float lift;     // 1 + 2 z_loss lse
  int own;        // the target's column in the stretch, or one that it does not have
};

template <bool kCapped>
__device__ __forceinline__ float gradient_of(float z, int column, const Row& row,
                                             const Gradient& a) {
  if (kCapped) z = capped(z, a.softcap);
  float gradient = fast_exp(z - row.lse) * row.lift - a.uniform;
  // The target joins in fp32, before the one rounding: p - 1 cancels as p nears 1.
  if (column == row.own) gradient -= 1.0f - a.smoothing;
  gradient *= row.scale;
  if (kCapped) gradient *= 1.0f - (z / a.softcap) * (z / a.softcap);
  return gradient;
}

template <typename T, bool kCapped>
__global__ void __launch_bounds__(kMostThreads, 1) gradient_kernel(const Gradient a,
                                                                int block_columns) {
  constexpr int kSize = Vector<T>::kSize;
  const int threads = blockDim.x, thread = threadIdx.x;
  const unsigned token = blockIdx.x;
  const int64_t sequence = token / a.shape.batch, sample = token % a.shape.batch;
  const int first = blockIdx.y * block_columns;
  const int count = min(block_columns, a.width - first);
  const int64_t stride = a.logits.stride_column, out_stride = a.out.stride_column;
  // Not `restrict`: they may be the same. Each element is read and written by one thread.
  const T* const mine = static_cast<const T*>(a.logits.data) +
                        sequence * a.logits.stride_sequence + sample * a.logits.stride_sample +
                        first * stride;
  T* const out = static_cast<T*>(const_cast<void*>(a.out.data)) +
                 sequence * a.out.stride_sequence + sample * a.out.stride_sample +
                 first * out_stride;
  const float scale = a.upstream.data[sequence * a.upstream.stride_sequence +
                                      sample * a.upstream.stride_sample];
  const int64_t label = a.target.data[sequence * a.target.stride_sequence +
                                      sample * a.target.stride_sample];
  if (scale == 0.0f || label == a.ignore_index) {
    // Literal zeros: 0 * NaN is NaN. The logits need not even be read.
    fill_zeros(out, out_stride, count);
    return;
  }
  const float lse = a.lse[token];
  const int64_t column = label - a.start - first;
  const int live = min(count, max(0, a.columns - first));
  const Row row = {scale, lse, 1.0f + 2.0f * a.z_loss * lse,
                   column >= 0 && column < live ? static_cast<int>(column) : -1};
  const bool aligned_alike = ((reinterpret_cast<uintptr_t>(mine) ^
                               reinterpret_cast<uintptr_t>(out)) % sizeof(Vector<T>)) == 0;
  const Cut piece = cut(mine, live, stride == 1 && out_stride == 1 && aligned_alike);

  const auto one = [&](int at) {
    const float gradient = gradient_of<kCapped>(to_float(mine[at * stride]), at, row, a);
    out[at * out_stride] = from_float<T>(gradient);
  };
  for (int at = thread; at < piece.head; at += threads) one(at);
  const Vector<T>* const vectors = reinterpret_cast<const Vector<T>*>(mine + piece.head);
  Vector<T>* const places = reinterpret_cast<Vector<T>*>(out + piece.head);
  for (int index = thread; index < piece.vectors; index += kInFlight * threads) {
    Vector<T> loaded[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int at = index + k * threads;
      if (at < piece.vectors) loaded[k] = load_vector(vectors[at].values);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int at = index + k * threads;
      if (at < piece.vectors) {
        Vector<T> made;
#pragma unroll
        for (int lane = 0; lane < kSize; ++lane) {
          made.values[lane] = from_float<T>(gradient_of<kCapped>(
              to_float(loaded[k].values[lane]), piece.head + at * kSize + lane, row, a));
        }
        store_vector(places[at].values, made);
      }
    }
  }
  for (int at = piece.tail + thread; at < live; at += threads) one(at);
  fill_zeros(out + live * out_stride, out_stride, count - live);
}

template <typename T>
void launch_gradient_of(const Gradient& a, Launch launch, dim3 grid, cudaStream_t stream) {
  if (a.softcap > 0) {
    start(gradient_kernel<T, true>, grid, launch.threads, stream, a, launch.columns);
  } else {
    start(gradient_kernel<T, false>, grid, launch.threads, stream, a, launch.columns);
  }
}

}  // namespace

void launch_gradient(const Gradient& a, Launch launch, cudaStream_t stream) {
  const dim3 grid(a.shape.sequence * a.shape.batch, blocks_for(a.width, launch.columns));
  switch (a.logits.dtype) {
    case Dtype::kFloat:
      return launch_gradient_of<float>(a, launch, grid, stream);
    case Dtype::kBFloat16:
      return launch_gradient_of<__nv_bfloat16>(a, launch, grid, stream);
    case Dtype::kHalf:
      return launch_gradient_of<__half>(a, launch, grid, stream);
  }
}

}  // namespace megatron_rw

// The backward pass over the logits.

template <typename T>
__device__ __forceinline__ void fill_zeros(T* out, int64 stride, int count) {
  const int threads = blockDim.x, thread = threadIdx.x;
  const Cut piece = cut(out, count, stride == 1);
#pragma unroll 1
  for (int column = thread; column < piece.head; column += threads) {
    store(out + column * stride, 0.0f);
  }
  uint4* const vectors = reinterpret_cast<uint4*>(out + piece.head);
#pragma unroll 1
  for (int at = thread; at < piece.vectors; at += threads) __stcs(vectors + at, uint4{});
#pragma unroll 1
  for (int column = piece.tail + thread; column < count; column += threads) {
    store(out + column * stride, 0.0f);
  }
}

// A block a row [width], of which `columns` take part and the others get zeros. `out` may be the
// logits: each element is read and written by one thread. A row whose upstream gradient is 0 or
// whose label is ignored gets literal zeros, as 0·NaN is NaN, and its logits are not read.
template <typename T>
__global__ void __launch_bounds__(kMostThreads, 2)
    gradient(const T* logits, int64 stride_sequence, int64 stride_sample, int64 stride, T* out,
             int64 out_stride_sequence, int64 out_stride_sample, int64 out_stride,
             const int64* targets, int64 target_stride_sequence, int64 target_stride_sample,
             const float* lses, const float* upstream, int64 upstream_stride_sequence,
             int64 upstream_stride_sample, int64 batch, int64 start, int64 columns, int64 width,
             int64 ignore_index) {
  const uint32 row = blockIdx.x, samples = static_cast<uint32>(batch);
  const int64 sequence = row / samples, sample = row % samples;
  const int count = static_cast<int>(columns), padding = static_cast<int>(width - columns);
  logits += sequence * stride_sequence + sample * stride_sample;
  out += sequence * out_stride_sequence + sample * out_stride_sample;
  const int64 label = targets[sequence * target_stride_sequence + sample * target_stride_sample];
  const float scale =
      upstream[sequence * upstream_stride_sequence + sample * upstream_stride_sample];
  if (scale == 0.0f || label == ignore_index) {
    fill_zeros(out, out_stride, count + padding);
    return;
  }
  const bool alike = ((reinterpret_cast<unsigned long long>(logits) ^
                       reinterpret_cast<unsigned long long>(out)) % 16) == 0;
  const Cut piece = cut(logits, count, stride == 1 && out_stride == 1 && alike);
  const float top = lses[row], log_total = lses[gridDim.x + row];

  // The target's own, p − 1 in all its digits; read before it may be overwritten.
  const int64 own = label - start;
  const bool mine = own >= 0 && own < count &&
                    owner<T>(piece, static_cast<int>(own)) == static_cast<int>(threadIdx.x);
  float own_gradient = 0.0f;
  if (mine) own_gradient = scale * expm1f((to_float(logits[own * stride]) - top) - log_total);

  const float base = base_of(top);
  const float factor = scale * (exp2f(-rest_of(top)) * expf(-log_total));
  const auto gradient_of = [&](float z) { return fast_exp2(fmaf(z, kLog2E, -base)) * factor; };
  const auto write_one = [&](int at) {
    store(out + at * out_stride, gradient_of(to_float(logits[at * stride])));
  };
  const uint4* const vectors = reinterpret_cast<const uint4*>(logits + piece.head);
  uint4* const places = reinterpret_cast<uint4*>(out + piece.head);
  const auto write_vector = [&](const uint4& vector, int at) {
    float z[kSize<T>];
    unpack(vector, z, T());
#pragma unroll
    for (float& value : z) value = gradient_of(value);
    __stcs(places + at, packed(z, T()));
  };
  each(piece, vectors, count, write_one, write_vector);
  if (mine) store(out + own * out_stride, own_gradient);
  fill_zeros(out + count * out_stride, out_stride, padding);
}

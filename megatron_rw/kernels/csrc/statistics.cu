// The forward pass over the logits, and the joining of its parts.

#include "online.cuh"

namespace megatron_rw {
namespace {

template <typename T, bool kPlain>
__global__ void __launch_bounds__(kMostThreads, 1) statistics_kernel(const Statistics a,
                                                                  int block_columns) {
  constexpr int kSize = Vector<T>::kSize;
  const int threads = blockDim.x, thread = threadIdx.x;
  const unsigned row = blockIdx.x, part = blockIdx.y;
  const int64_t sequence = row / a.shape.batch, sample = row % a.shape.batch;
  const int64_t stride = a.logits.stride_column;
  const T* const begin = static_cast<const T*>(a.logits.data) +
                         sequence * a.logits.stride_sequence + sample * a.logits.stride_sample;
  const int first = part * block_columns;
  const int count = min(block_columns, a.columns - first);
  const T* const mine = begin + first * stride;
  const Cut piece = cut(mine, count, stride == 1);

  Running running;
  const auto one = [&](int column) {
    float z[1] = {to_float(mine[column * stride])};
    accumulate<kPlain>(running, z, a.softcap);
  };
  for (int column = thread; column < piece.head; column += threads) one(column);
  const Vector<T>* const vectors = reinterpret_cast<const Vector<T>*>(mine + piece.head);
  for (int index = thread; index < piece.vectors; index += kInFlight * threads) {
    Vector<T> loaded[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int at = index + k * threads;
      if (at < piece.vectors) loaded[k] = load_vector(vectors[at].values);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (index + k * threads < piece.vectors) {
        float z[kSize];
#pragma unroll
        for (int lane = 0; lane < kSize; ++lane) z[lane] = to_float(loaded[k].values[lane]);
        accumulate<kPlain>(running, z, a.softcap);
      }
    }
  }
  for (int column = piece.tail + thread; column < count; column += threads) one(column);

  running = block_reduce(running, Join());
  if (thread != 0) return;
  const int64_t label = a.target.data[sequence * a.target.stride_sequence +
                                      sample * a.target.stride_sample];
  const int64_t own = label - a.start;
  float target = 0.0f;
  if (label != a.ignore_index && own >= first && own < first + count) {
    target = to_float(begin[own * stride]);
    if (!kPlain && a.softcap > 0) target = capped(target, a.softcap);
  }
  const int64_t rows = static_cast<int64_t>(a.shape.sequence) * a.shape.batch;
  float* const table = a.tables + part * (a.with_sum ? 4 : 3) * rows + row;
  table[0] = running.top;
  table[rows] = running.total;
  table[2 * rows] = target;
  if (a.with_sum) table[3 * rows] = running.plain;
}

// Of one token, from all parts.
struct Token {
  Running running;
  float target;
};

__device__ __forceinline__ Token join_parts(const float* tables, int64_t row, int64_t rows,
                                            int parts, bool with_sum) {
  const int64_t step = (with_sum ? 4 : 3) * rows;
  Token token = {Running(), 0.0f};
#pragma unroll 2
  for (int part = 0; part < parts; ++part) {
    const float* const table = tables + part * step + row;
    token.running = Join()(
        token.running, {table[0], table[rows], with_sum ? table[3 * rows] : 0.0f});
    token.target += table[2 * rows];
  }
  return token;
}

__global__ void __launch_bounds__(kMostThreads, 1) merge_kernel(const Merge a) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < a.rows;
       row += threads) {
    const Token token = join_parts(a.tables, row, a.rows, a.parts, a.with_sum);
    a.merged[row] = token.running.top;
    a.merged[a.rows + row] = token.running.total;
    a.merged[2 * a.rows + row] = token.target;
    if (a.with_sum) a.merged[3 * a.rows + row] = token.running.plain;
  }
}

// Of the tokens of one sample.
struct Totals {
  Sum loss;
  Sum tokens;
};

struct AddTotals {
  __device__ __forceinline__ Totals operator()(Totals a, const Totals& b) const {
    a.loss.add(b.loss);
    a.tokens.add(b.tokens);
    return a;
  }
};

__global__ void __launch_bounds__(kMostThreads, 1) combine_kernel(const Combine a) {
  const int chunk = blockIdx.x, sample = blockIdx.y;
  const int64_t rows = static_cast<int64_t>(a.shape.sequence) * a.shape.batch;
  const int last = min(a.shape.sequence, (chunk + 1) * kChunk);
  Totals totals;
  for (int position = chunk * kChunk + threadIdx.x; position < last; position += blockDim.x) {
    const int64_t row = static_cast<int64_t>(position) * a.shape.batch + sample;
    const int64_t label = a.target.data[position * a.target.stride_sequence +
                                        sample * a.target.stride_sample];
    const Token token = join_parts(a.tables, row, rows, a.parts, a.with_sum);
    const float base = anchor(token.running.top);
    const float log_total = logf(token.running.total);
    const float lse = base + log_total;
    // Not lse - z_y: a common offset of the logits would cost both their digits.
    float loss = log_total + (base - token.target) + a.z_loss * lse * lse;
    if (a.with_sum) {
      loss += a.smoothing * (token.target - token.running.plain / static_cast<float>(a.vocab_size));
    }
    // A label beyond the vocabulary would pass as a loss without a target.
    if (label < 0 || label >= a.vocab_size) loss = NAN;
    if (label == a.ignore_index) loss = 0.0f;
    a.losses[row] = loss;
    a.lse[row] = lse;
    if (a.mask.data != nullptr) {
      const float mask =
          a.mask.data[position * a.mask.stride_sequence + sample * a.mask.stride_sample];
      // 0 * NaN is NaN.
      if (mask > 0) totals.loss.add(loss * mask);
      totals.tokens.add(mask);
    }
  }
  if (a.mask.data == nullptr) return;
  totals = block_reduce(totals, AddTotals());
  if (threadIdx.x != 0) return;
  float* const sums = a.sums + static_cast<int64_t>(chunk) * a.shape.batch + sample;
  sums[0] = totals.loss.value();
  sums[static_cast<int64_t>(gridDim.x) * a.shape.batch] = totals.tokens.value();
}

template <typename T>
void launch_statistics_of(const Statistics& a, Launch launch, dim3 grid, cudaStream_t stream) {
  if (a.softcap > 0 || a.with_sum) {
    start(statistics_kernel<T, false>, grid, launch.threads, stream, a, launch.columns);
  } else {
    start(statistics_kernel<T, true>, grid, launch.threads, stream, a, launch.columns);
  }
}

}  // namespace

void launch_statistics(const Statistics& a, Launch launch, cudaStream_t stream) {
  const dim3 grid(a.shape.sequence * a.shape.batch, blocks_for(a.columns, launch.columns));
  switch (a.logits.dtype) {
    case Dtype::kFloat:
      return launch_statistics_of<float>(a, launch, grid, stream);
    case Dtype::kBFloat16:
      return launch_statistics_of<__nv_bfloat16>(a, launch, grid, stream);
    case Dtype::kHalf:
      return launch_statistics_of<__half>(a, launch, grid, stream);
  }
}

void launch_merge(const Merge& a, cudaStream_t stream) {
  constexpr int kThreads = 128;
  start(merge_kernel, dim3(blocks_for(a.rows, kThreads)), kThreads, stream, a);
}

void launch_combine(const Combine& a, cudaStream_t stream) {
  const int most = blocks_for(min(a.shape.sequence, kChunk), kWarp) * kWarp;
  const dim3 grid(blocks_for(a.shape.sequence, kChunk), a.shape.batch);
  start(combine_kernel, grid, min(most, kMostThreads), stream, a);
}

}  // namespace megatron_rw

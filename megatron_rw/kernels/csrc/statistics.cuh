// The forward pass over the logits, and the joining of the shards.

// Of some logits: the largest, the sum of exp(z − largest) but for rounding of its base, and where
// kEntropy of (z·log2 e − base)·exp(z − largest).
template <bool kEntropy>
struct Running {
  float top = -kInfinity;
  float base = base_of(-kInfinity);
  float total = 0.0f, spread = 0.0f;

  __device__ __forceinline__ void move(float new_top) {
    const float new_base = base_of(new_top), step = base - new_base;
    const float factor = fast_exp2(step);
    if (kEntropy) spread = factor * (spread + step * total);
    total *= factor;
    top = new_top;
    base = new_base;
  }

  template <int kCount>
  __device__ __forceinline__ void add(const float (&z)[kCount]) {
    float most = z[0];
#pragma unroll
    for (int k = 1; k < kCount; ++k) most = fmaxf(most, z[k]);
    // Seldom, after the first few.
    if (most > top) move(most);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float power = fmaf(z[k], kLog2E, -base);
      const float value = fast_exp2(power);
      total += value;
      // 0·−inf is NaN.
      if (kEntropy) spread = fmaf(value, fmaxf(power, -1e4f), spread);
    }
  }

  // Of all lanes of a warp, the same for each of them.
  __device__ __forceinline__ void join_warp() {
    move(warp_reduce(kMax, top));
    total = warp_reduce(kSum, total);
    if (kEntropy) spread = warp_reduce(kSum, spread);
  }
};

// A block a row [columns]. Into table[statistic][row] go the largest logit, the sum of
// exp(z − largest), the target's logit (0 where it is elsewhere), and where kEntropy the sum of
// exp(z − largest)·(z − largest).
template <typename T, bool kEntropy>
__global__ void __launch_bounds__(kMostThreads, kEntropy ? 1 : 2)
    statistics(const T* logits, int64 stride_sequence, int64 stride_sample, int64 stride,
               const int64* targets, int64 target_stride_sequence, int64 target_stride_sample,
               float* table, int64 batch, int64 start, int64 columns, int64 ignore_index) {
  const int threads = blockDim.x, thread = threadIdx.x;
  const uint32 row = blockIdx.x, samples = static_cast<uint32>(batch);
  const int64 sequence = row / samples, sample = row % samples;
  logits += sequence * stride_sequence + sample * stride_sample;
  const int count = static_cast<int>(columns);
  const Cut piece = cut(logits, count, stride == 1);

  float target = 0.0f;
  if (thread == 0) {
    const int64 label =
        targets[sequence * target_stride_sequence + sample * target_stride_sample];
    const int64 own = label - start;
    if (label != ignore_index && own >= 0 && own < count) target = to_float(logits[own * stride]);
  }

  Running<kEntropy> running;
  const auto add_one = [&](int column) {
    const float z[1] = {to_float(logits[column * stride])};
    running.add(z);
  };
  const auto add_vector = [&](const uint4& vector, int) {
    float z[kSize<T>];
    unpack(vector, z, T());
    running.add(z);
  };
  const uint4* const vectors = reinterpret_cast<const uint4*>(logits + piece.head);
  each(piece, vectors, count, add_one, add_vector);

  __shared__ float scratch[3][kMostThreads / kWarp];
  const int lane = thread % kWarp, warp = thread / kWarp;
  running.join_warp();
  if (lane == 0) {
    scratch[0][warp] = running.top;
    scratch[1][warp] = running.total;
    scratch[2][warp] = running.spread;
  }
  __syncthreads();
  const bool used = lane < threads / kWarp;
  running.top = used ? scratch[0][lane] : -kInfinity;
  running.base = base_of(running.top);
  running.total = used ? scratch[1][lane] : 0.0f;
  if (kEntropy) running.spread = used ? scratch[2][lane] : 0.0f;
  running.join_warp();
  if (thread != 0) return;
  const int64 rows = gridDim.x;
  const float rest = rest_of(running.top), factor = exp2f(-rest);
  table[row] = running.top;
  table[rows + row] = running.total * factor;
  table[2 * rows + row] = target;
  if (kEntropy) table[3 * rows + row] = (running.spread - rest * running.total) * (factor * kLn2);
}

// Tokens of a sample that one block joins.
constexpr int kChunk = 8192;

// The tables [shards][statistics][sequence · batch] become losses [sequence, batch] and log-sum-exps
// in two parts, [2, sequence, batch], and, where the pointers are not null, entropies, as losses, and
// each sample's masked loss sum and token count, sums[2][chunks][batch]. A block a chunk of a sample.
__global__ void __launch_bounds__(kMostThreads, 1)
    combine(const float* tables, int64 shards, int64 statistics, const int64* targets,
            int64 target_stride_sequence, int64 target_stride_sample, const float* masks,
            int64 mask_stride_sequence, int64 mask_stride_sample, float* losses, float* lses,
            float* entropies, float* sums, int64 sequence, int64 batch, int64 vocab_size,
            int64 ignore_index) {
  const int64 sample = blockIdx.x, chunk = blockIdx.y, rows = sequence * batch;
  const int64 end = min(sequence, (chunk + 1) * kChunk);
  Sum loss_sum, tokens;
  for (int64 position = chunk * kChunk + threadIdx.x; position < end; position += blockDim.x) {
    const int64 row = position * batch + sample;
    const int64 label =
        targets[position * target_stride_sequence + sample * target_stride_sample];
    const auto value = [&](int64 shard, int64 statistic) {
      return tables[(shard * statistics + statistic) * rows + row];
    };
    float top = -kInfinity;
    for (int64 shard = 0; shard < shards; ++shard) top = fmaxf(top, value(shard, 0));
    // Of a row of −inf nothing is subtracted, as exp(−inf + inf) is NaN.
    const float base = top == -kInfinity ? 0.0f : top;
    float total = 0.0f, target = 0.0f, spread = 0.0f;
    for (int64 shard = 0; shard < shards; ++shard) {
      const float step = value(shard, 0) - base, part = value(shard, 1), factor = expf(step);
      total += part * factor;
      target += value(shard, 2);
      // A shard of −inf has no part in it.
      if (entropies != nullptr && part > 0) spread += factor * (value(shard, 3) + step * part);
    }
    const float log_total = logf(total);
    // Not lse − z_y: a common offset of the logits would cost both their digits.
    float loss = log_total + (base - target);
    // A label beyond the vocabulary would pass as a loss without a target.
    if (label < 0 || label >= vocab_size) loss = __uint_as_float(0x7fc00000u);
    if (label == ignore_index) loss = 0.0f;
    losses[row] = loss;
    lses[row] = base;
    lses[rows + row] = log_total;
    if (entropies != nullptr) entropies[row] = log_total - spread / total;
    if (masks != nullptr && label != ignore_index) {
      const float mask = masks[position * mask_stride_sequence + sample * mask_stride_sample];
      // 0·NaN is NaN.
      if (mask > 0) loss_sum.add(loss * mask);
      tokens.add(mask);
    }
  }
  if (masks == nullptr) return;
  float both[] = {loss_sum.value(), tokens.value()};
  block_reduce<kSum, kSum>(both);
  if (threadIdx.x != 0) return;
  sums[chunk * batch + sample] = both[0];
  sums[(gridDim.y + chunk) * batch + sample] = both[1];
}

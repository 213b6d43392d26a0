// Sample weights and their statistics: one block, as a set is small and launches are not free.

// Below this range of losses a set has no order to speak of: COLLAPSED_RANGE in options.py.
constexpr float kCollapsed = 1e-6f;
// Samples that a thread keeps in registers; it reads those beyond again in every pass.
constexpr int kKept = 8;
constexpr int kWeighThreads = 512;

enum Strategy { kUniform, kLinUpper, kQuadratic, kExtremes };

// What turns a loss into the logarithm of its weight, times the temperature.
struct Score {
  float low, spread, inverse, delta;
  Strategy strategy;

  __device__ __forceinline__ float operator()(float loss) const {
    float u = 0.0f;
    if (spread >= kCollapsed) {
      // A division without its call; exactly 1 at the end of the range.
      const float distance = loss - low, guess = distance * inverse;
      const float share = fmaf(fmaf(-guess, spread, distance), inverse, guess);
      // Subtract before dividing: 2 delta l / range − ... cancels when the range is small.
      u = fminf(fmaxf(fmaf(2.0f * delta, share, -delta), -delta), delta);
    }
    switch (strategy) {
      case kUniform:
        return 0.0f;
      case kLinUpper:
        return fminf(u + delta, delta);
      case kQuadratic:
        return 1.0f - (u / delta) * (u / delta);
      case kExtremes:
        return fabsf(u);
    }
    return 0.0f;
  }
};

// Weights [count] and statistics [9] of losses [count], see `Statistic` in options.py. Of mask
// [count], given_range [2] and temperature_tensor [] any may be null.
__global__ void __launch_bounds__(kWeighThreads, 1)
    weigh(const float* losses, const bool* mask, const float* given_range,
          const float* temperature_tensor, float* weights, float* statistics, int64 count,
          double temperature, int64 strategy, double delta, double largest_score) {
  const int threads = blockDim.x, thread = threadIdx.x, samples = static_cast<int>(count);
  const float absent = __uint_as_float(0x7fc00000u);
  const auto read = [&](int sample) {
    return sample < samples && (mask == nullptr || mask[sample]) ? losses[sample] : absent;
  };
  float kept[kKept];
#pragma unroll
  for (int k = 0; k < kKept; ++k) kept[k] = read(thread + k * threads);
  // Calls `visit` with each loss of the set that is this thread's, which it may change.
  const auto each = [&](auto visit) {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      if (fabsf(kept[k]) < kInfinity) visit(kept[k]);
    }
    for (int sample = thread + kKept * threads; sample < samples; sample += threads) {
      const float loss = read(sample);
      if (fabsf(loss) < kInfinity) visit(loss);
    }
  };

  Sum loss_sum;
  float range[] = {kInfinity, -kInfinity, 0.0f, 0.0f};
  each([&](float loss) {
    range[0] = fminf(range[0], loss);
    range[1] = fmaxf(range[1], loss);
    range[2] += 1.0f;
    loss_sum.add(loss);
  });
  range[3] = loss_sum.value();
  block_reduce<kMin, kMax, kSum, kSum>(range);
  const float active = range[2], mean = range[3] / fmaxf(active, 1.0f);
  const bool given = given_range != nullptr;
  const float low = given ? given_range[0] : range[0];
  const float spread = (given ? given_range[1] : range[1]) - low;
  const Score score = {low, spread, 1.0f / spread, static_cast<float>(delta),
                       static_cast<Strategy>(strategy)};

  Sum squares;
  float second[] = {-kInfinity, 0.0f};
  each([&](float loss) {
    second[0] = fmaxf(second[0], score(loss));
    squares.add((loss - mean) * (loss - mean));
  });
  second[1] = squares.value();
  block_reduce<kMax, kSum>(second);

  // exp(0) for the best sample: no overflow at any temperature.
  const float best = given ? static_cast<float>(largest_score) : second[0];
  const float sharpness =
      1.0f / (temperature_tensor != nullptr ? *temperature_tensor : static_cast<float>(temperature));
  const auto weight_of = [&](float loss) { return expf((score(loss) - best) * sharpness); };
  Sum total_sum, square_sum, objective_sum;
  each([&](float loss) {
    const float weight = weight_of(loss);
    total_sum.add(weight);
    square_sum.add(weight * weight);
    objective_sum.add(weight * loss);
  });
  float sums[] = {total_sum.value(), square_sum.value(), objective_sum.value()};
  block_reduce<kSum, kSum, kSum>(sums);
  const float total = sums[0], divisor = total > 0.0f ? total : 1.0f;
  const float scale = given ? 1.0f : 1.0f / divisor;
  const auto write = [&](int sample, float loss) {
    weights[sample] = fabsf(loss) < kInfinity ? weight_of(loss) * scale : 0.0f;
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    if (thread + k * threads < samples) write(thread + k * threads, kept[k]);
  }
  for (int sample = thread + kKept * threads; sample < samples; sample += threads) {
    write(sample, read(sample));
  }
  if (thread != 0) return;
  const float largest = active > 0.0f ? expf((second[0] - best) * sharpness) : 0.0f;
  // In the order of `Statistic`.
  const float values[] = {active, range[0], range[1], mean, second[1] / fmaxf(active, 1.0f),
                          given ? total : total / divisor,
                          sums[1] > 0.0f ? total * (total / sums[1]) : 0.0f, largest / divisor,
                          sums[2] / divisor};
  for (int k = 0; k < 9; ++k) statistics[k] = values[k];
}

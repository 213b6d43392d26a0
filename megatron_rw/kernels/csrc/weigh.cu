// Sample weights and their statistics: one block, as a set is small and launches are not free.

#include "device.cuh"

namespace megatron_rw {
namespace {

// Below this range of losses a set has no order to speak of: COLLAPSED_RANGE in weights.py.
constexpr float kCollapsed = 1e-6f;

struct Moments {
  float low = INFINITY;
  float high = -INFINITY;
  uint32_t count = 0;
  Sum loss;
};

struct Spread {
  float best = -INFINITY;  // score
  Sum squares;             // of the distances from the mean
};

struct Weights {
  float largest = 0.0f;
  Sum total;
  Sum squares;
  Sum objective;
};

struct AddMoments {
  __device__ Moments operator()(Moments a, const Moments& b) const {
    a.low = fminf(a.low, b.low);
    a.high = fmaxf(a.high, b.high);
    a.count += b.count;
    a.loss.add(b.loss);
    return a;
  }
};

struct AddSpread {
  __device__ Spread operator()(Spread a, const Spread& b) const {
    a.best = fmaxf(a.best, b.best);
    a.squares.add(b.squares);
    return a;
  }
};

struct AddWeights {
  __device__ Weights operator()(Weights a, const Weights& b) const {
    a.largest = fmaxf(a.largest, b.largest);
    a.total.add(b.total);
    a.squares.add(b.squares);
    a.objective.add(b.objective);
    return a;
  }
};

__device__ __forceinline__ float score_of(float loss, float low, float high, const Weigh& a) {
  const float spread = high - low;
  float u = 0.0f;
  if (spread >= kCollapsed) {
    // Subtract before dividing: h = 2 delta l / range - ... cancels when the range is small.
    u = 2.0f * a.delta * ((loss - low) / spread) - a.delta;
    u = fminf(fmaxf(u, -a.delta), a.delta);
  }
  switch (a.strategy) {
    case Strategy::kUniform:
      return 0.0f;
    case Strategy::kLinUpper:
      return fminf(u + a.delta, a.delta);
    case Strategy::kQuadratic:
      return 1.0f - (u / a.delta) * (u / a.delta);
    case Strategy::kExtremes:
      return fabsf(u);
  }
  return 0.0f;
}

__global__ void __launch_bounds__(kMostThreads, 1) weigh_kernel(const Weigh a) {
  const int threads = blockDim.x, thread = threadIdx.x;
  const float temperature =
      a.temperature_tensor != nullptr ? *a.temperature_tensor : a.temperature;
  const auto active = [&](int sample, float loss) {
    return fabsf(loss) < INFINITY && (a.mask == nullptr || a.mask[sample]);
  };

  Moments moments;
  for (int sample = thread; sample < a.count; sample += threads) {
    const float loss = a.losses[sample];
    if (active(sample, loss)) {
      moments.low = fminf(moments.low, loss);
      moments.high = fmaxf(moments.high, loss);
      moments.count += 1;
      moments.loss.add(loss);
    }
  }
  moments = block_reduce(moments, AddMoments());
  const float count = static_cast<float>(moments.count);
  const float mean = moments.loss.value() / fmaxf(count, 1.0f);

  const bool given = a.given_range != nullptr;
  const float low = given ? a.given_range[0] : moments.low;
  const float high = given ? a.given_range[1] : moments.high;
  Spread spread;
  for (int sample = thread; sample < a.count; sample += threads) {
    const float loss = a.losses[sample];
    if (active(sample, loss)) {
      spread.squares.add((loss - mean) * (loss - mean));
      spread.best = fmaxf(spread.best, score_of(loss, low, high, a));
    }
  }
  spread = block_reduce(spread, AddSpread());

  // exp(0) for the best sample: no overflow at any temperature.
  const float best = given ? a.largest_score : spread.best;
  Weights weights;
  for (int sample = thread; sample < a.count; sample += threads) {
    const float loss = a.losses[sample];
    float weight = 0.0f;
    if (active(sample, loss)) {
      weight = expf((score_of(loss, low, high, a) - best) / temperature);
      weights.largest = fmaxf(weights.largest, weight);
      weights.total.add(weight);
      weights.squares.add(weight * weight);
      weights.objective.add(weight * loss);
    }
    a.weights[sample] = weight;
  }
  weights = block_reduce(weights, AddWeights());
  const float total = weights.total.value(), squares = weights.squares.value();
  const float divisor = total > 0.0f ? total : 1.0f;
  if (!given) {
    // The thread's own.
    for (int sample = thread; sample < a.count; sample += threads) a.weights[sample] /= divisor;
  }
  if (thread != 0) return;
  // In the order of `Statistic` in weights.py.
  a.statistics[0] = count;
  a.statistics[1] = moments.low;
  a.statistics[2] = moments.high;
  a.statistics[3] = mean;
  a.statistics[4] = spread.squares.value() / fmaxf(count, 1.0f);
  a.statistics[5] = given ? total : total / divisor;
  a.statistics[6] = squares > 0.0f ? total * (total / squares) : 0.0f;
  a.statistics[7] = weights.largest / divisor;
  a.statistics[8] = weights.objective.value() / divisor;
}

}  // namespace

void launch_weigh(const Weigh& a, cudaStream_t stream) {
  const int threads = min(kMostThreads, blocks_for(a.count, kWarp) * kWarp);
  start(weigh_kernel, dim3(1), threads, stream, a);
}

}  // namespace megatron_rw

// Weights of units, their statistics and their plan: one block, as a set is small and launches are
// not free. Passes over the set follow one another, and each thread has the same units in all of
// them: `weights` keeps the signals until the last pass, those of units beside the set as NaN.

// Below this range of signals a set has no order to speak of: COLLAPSED_RANGE in options.py.
constexpr float kCollapsed = 1e-6f;
// The sharpest that a temperature is made: LARGEST_EXPONENT in options.py.
constexpr double kLargestExponent = 20.0;
constexpr int kWeighThreads = 512;

enum Strategy { kUniform, kLinUpper, kQuadratic, kExtremes, kTopK, kSoftmax };

// What turns a signal into the logarithm of its relative weight, times the temperature.
struct Score {
  float low, high, threshold, delta;
  Strategy strategy;

  __device__ __forceinline__ float operator()(float signal) const {
    if (strategy == kSoftmax) return fminf(fmaxf(signal, low), high);
    if (strategy == kTopK) return signal >= threshold ? 0.0f : -kInfinity;
    float u = 0.0f;
    const float spread = high - low;
    if (spread >= kCollapsed) {
      // A division without its call; exactly 1 at the end of the range.
      const float distance = signal - low, inverse = 1.0f / spread, guess = distance * inverse;
      const float share = fmaf(fmaf(-guess, spread, distance), inverse, guess);
      // Subtract before dividing: 2 delta s / range − ... cancels when the range is small.
      u = fminf(fmaxf(fmaf(2.0f * delta, share, -delta), -delta), delta);
    }
    switch (strategy) {
      case kLinUpper:
        return fminf(u + delta, delta);
      case kQuadratic:
        return 1.0f - (u / delta) * (u / delta);
      case kExtremes:
        return fabsf(u);
      default:
        return 0.0f;
    }
  }
  // The largest score of any signal, for a plan that serves other sets.
  __device__ __forceinline__ float top(double largest_score) const {
    return strategy == kSoftmax ? high : static_cast<float>(largest_score);
  }
};

// A number's place in the order of all floats: its bits, those of a negative one turned round.
__device__ __forceinline__ uint32 place_of(float value) {
  const uint32 bits = __float_as_uint(value);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float at_place(uint32 place) {
  return __uint_as_float(place ^ (place >> 31 ? 0x80000000u : 0xffffffffu));
}

// The largest number in [0, end], to 32 bits, where `holds`, which it does from 0 up to there.
template <typename Holds>
__device__ __forceinline__ double largest(double end, Holds holds) {
  double found = 0.0, step = end;
  for (int k = 0; k <= 32; ++k, step *= 0.5) {
    if (found + step <= end && holds(found + step)) found += step;
  }
  return found;
}

// Weights [rows], statistics [5] and plan [5] of signals [rows]; see `Units`, `Statistic` and `Plan`
// in options.py. Of mask, base, counts [rows], given [5] and temperature_tensor [] any may be null.
// Unused are a tail and a target_ess of 0, and a max_weight of infinity.
__global__ void __launch_bounds__(kWeighThreads, 1)
    weigh(const float* __restrict__ signals, const bool* __restrict__ mask,
          const float* __restrict__ base, const float* __restrict__ counts, const float* given,
          const float* temperature_tensor, float* __restrict__ weights, float* statistics,
          float* plan, int64 rows, int64 strategy, double temperature, double delta,
          double largest_score, double top_share, double target_ess, double max_weight,
          double tail) {
  const int thread = threadIdx.x, threads = blockDim.x;
  const auto base_of = [&](int row) { return base == nullptr ? 1.0f : base[row]; };
  const auto count_of = [&](int row) { return counts == nullptr ? 1.0f : counts[row]; };
  // Calls `visit` with each unit of the set that is this thread's.
  const auto each = [&](auto visit) {
#pragma unroll 1
    for (int row = thread; row < rows; row += threads) {
      if (const float signal = weights[row]; fabsf(signal) < kInfinity) visit(signal, row);
    }
  };
  double set[] = {kInfinity, -kInfinity, 0.0, 0.0};
#pragma unroll 1
  for (int first = thread; first < rows; first += kInFlight * threads) {
    float loaded[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int row = first + k * threads;
      const bool used = row < rows && (mask == nullptr || mask[row]) && base_of(row) > 0.0f;
      loaded[k] = used ? signals[row] : __uint_as_float(0x7fc00000u);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int row = first + k * threads;
      if (row < rows) weights[row] = loaded[k];
      if (!(fabsf(loaded[k]) < kInfinity)) continue;
      set[0] = fmin(set[0], static_cast<double>(loaded[k]));
      set[1] = fmax(set[1], static_cast<double>(loaded[k]));
      set[2] += count_of(row);
      set[3] += base_of(row);
    }
  }
  block_reduce<kMin, kMax, kSum, kSum>(set);
  const double units = set[2], whole = set[3];
  const bool any = whole > 0.0;

  // The smallest of the signals, times `sign`, that is this share of all with those below it.
  const auto with_share = [&](double share, float sign) {
    // What a product such as 0.7 * 10 is too large by must not ask for one more unit.
    const double wanted = fmax(share * units - 1e-6, 1e-6);
    const double place = largest(4294967296.0, [&](double end) {
      double below[] = {0.0};
      each([&](float signal, int row) {
        if (place_of(sign * signal) < end) below[0] += count_of(row);
      });
      __syncthreads();
      block_reduce<kSum>(below);
      return below[0] < wanted;
    });
    return at_place(static_cast<uint32>(place));
  };
  Score score = {static_cast<float>(set[0]), static_cast<float>(set[1]), 0.0f,
                 static_cast<float>(delta), static_cast<Strategy>(strategy)};
  if (tail > 0.0 && any) {
    score.low = with_share(tail, 1.0f);
    score.high = with_share(1.0 - tail, 1.0f);
  }
  if (score.strategy == kTopK) score.threshold = any ? -with_share(top_share, -1.0f) : -kInfinity;

  // The scores, and what the search for a temperature and for a cap makes of them.
  double ends[] = {-kInfinity, kInfinity};
  each([&](float signal, int) {
    ends[0] = fmax(ends[0], static_cast<double>(score(signal)));
    ends[1] = fmin(ends[1], static_cast<double>(score(signal)));
  });
  block_reduce<kMax, kMin>(ends);
  const float best = static_cast<float>(ends[0]);
  const double spread = any ? ends[0] - ends[1] : 0.0;
  float r = temperature_tensor == nullptr ? static_cast<float>(temperature) : *temperature_tensor;
  const float wished = r;
  // Sums over the set of b*w and b*w^2, w = exp(min(-sharpness*(best − h), cap) − cap).
  const auto moments = [&](double sharpness, double cap, double (&sums)[2]) {
    sums[0] = sums[1] = 0.0;
    each([&](float signal, int row) {
      const double b = base_of(row), w = exp(fmin(-sharpness * (best - score(signal)), cap) - cap);
      sums[0] += b * w;
      sums[1] += b * w * w;
    });
    __syncthreads();
    block_reduce<kSum, kSum>(sums);
  };
  const bool chosen = target_ess > 0.0 && score.strategy != kTopK;
  if (chosen) {
    const double end = spread > 0.0 ? kLargestExponent : 0.0;
    const double sharpness = largest(end, [&](double sharpness) {
      double sums[2];
      moments(sharpness / spread, 0.0, sums);
      return sums[0] * sums[0] >= target_ess * whole * sums[1];
    });
    r = spread > 0.0 ? static_cast<float>(spread / fmax(sharpness, 1e-9)) : 1.0f;
  }
  if (given != nullptr && any && (chosen || score.strategy == kSoftmax)) {
    // The plan is for exponents that count from the largest possible score, maybe above `best`.
    const double lowest = (score.top(largest_score) - best + spread) / kLargestExponent;
    r = fmaxf(r, static_cast<float>(lowest));
  }
  float cap = 0.0f, level = 0.0f;
  if (max_weight < kInfinity && any && score.strategy != kTopK) {
    const double lowest = -spread / r;
    cap = static_cast<float>(lowest + largest(-lowest, [&](double above) {
      double sums[2];
      moments(1.0 / r, lowest + above, sums);
      return whole <= max_weight * sums[0];
    }));
    level = cap - (score.top(largest_score) - best) / r;
  }
  if (thread == 0) {
    // In the order of `Plan`.
    const float values[] = {score.low, score.high, r, score.threshold, level};
    for (int k = 0; k < 5; ++k) plan[k] = values[k];
  }

  // The best unit of the set has an exponent of 0, so that none overflows at any temperature.
  float top = best, shift = cap;
  if (given != nullptr) {
    score.low = given[0], score.high = given[1], score.threshold = given[3];
    top = score.top(largest_score), cap = given[4], shift = 0.0f;
    r = chosen ? given[2] : wished;
    if (!chosen && score.strategy == kSoftmax) {
      r = fmaxf(r, (score.high - score.low) / static_cast<float>(kLargestExponent));
    }
    // The plan of no units weighs all alike.
    if (!(score.low <= score.high)) score.strategy = kUniform, top = cap = 0.0f;
  }
  const float sharpness = 1.0f / r;
  const auto relative = [&](float signal) {
    return expf(fminf((score(signal) - top) * sharpness, cap) - shift);
  };
  double sums[] = {0.0, 0.0, 0.0};
  each([&](float signal, int row) {
    const double b = base_of(row), w = relative(signal);
    sums[0] += b * w;
    sums[1] += b * w * w;
    sums[2] = fmax(sums[2], w);
  });
  block_reduce<kSum, kSum, kMax>(sums);
  const double total = sums[0], divisor = total > 0.0 ? total : 1.0;
  const double scale = given != nullptr ? 1.0 : 1.0 / divisor;
#pragma unroll 1
  for (int row = thread; row < rows; row += threads) {
    const float signal = weights[row];
    weights[row] = fabsf(signal) < kInfinity ? base_of(row) * relative(signal) * scale : 0.0f;
  }
  if (thread != 0) return;
  // In the order of `Statistic`.
  const double values[] = {units, whole, total * scale,
                           sums[1] > 0.0 ? total * total / (whole * sums[1]) : 0.0,
                           sums[2] * whole / divisor};
  for (int k = 0; k < 5; ++k) statistics[k] = static_cast<float>(values[k]);
}

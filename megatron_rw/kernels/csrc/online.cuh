// Log-sum-exp of a stream of logits: a running maximum, and the sum of exp(z - maximum).

#pragma once

#include "device.cuh"

namespace megatron_rw {

// Of some logits: the largest, the sum of exp(z - largest), the sum of z.
struct Running {
  float top = -INFINITY;
  float total = 0.0f;
  float plain = 0.0f;
};

// What to subtract from logits of which `top` is the largest: of a row of -inf nothing, as
// exp(-inf + inf) is NaN.
__device__ __forceinline__ float anchor(float top) { return top == -INFINITY ? 0.0f : top; }

struct Join {
  __device__ __forceinline__ Running operator()(const Running& a, const Running& b) const {
    const float top = fmaxf(a.top, b.top);
    const float base = anchor(top);
    return {top, a.total * expf(a.top - base) + b.total * expf(b.top - base), a.plain + b.plain};
  }
};

// Adds `kCount` logits at once. kPlain: neither a soft-cap nor a sum of the logits.
template <bool kPlain, int kCount>
__device__ __forceinline__ void accumulate(Running& running, float (&z)[kCount], float softcap) {
  if (!kPlain) {
    for (float& value : z) {
      if (softcap > 0) value = capped(value, softcap);
      running.plain += value;
    }
  }
  float top = z[0];
#pragma unroll
  for (int k = 1; k < kCount; ++k) top = fmaxf(top, z[k]);
  // Seldom, after the first few.
  if (top > running.top) {
    running.total *= fast_exp(running.top - top);
    running.top = top;
  }
  const float base = anchor(running.top);
  float total = 0.0f;
#pragma unroll
  for (int k = 0; k < kCount; ++k) total += fast_exp(z[k] - base);
  running.total += total;
}

}  // namespace megatron_rw

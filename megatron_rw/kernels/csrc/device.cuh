// Pieces that the kernels share: number types, 16-byte vectors, reductions, sums.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace megatron_rw {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;

inline int blocks_for(int64_t work, int of_a_block) {
  return static_cast<int>((work + of_a_block - 1) / of_a_block);
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float(float value) {
  return __float2half_rn(value);
}

// 16 bytes, what one thread loads or stores at once.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Read or written once: keep out of the way of what is used again.
template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* from) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
  Vector<T> vector;
  memcpy(&vector, &bits, sizeof(bits));
  return vector;
}

template <typename T>
__device__ __forceinline__ void store_vector(T* to, const Vector<T>& vector) {
  uint4 bits;
  memcpy(&bits, &vector, sizeof(bits));
  __stcs(reinterpret_cast<uint4*>(to), bits);
}

// A stretch of a row: `head` single elements, then vectors, then fewer elements than a vector has.
struct Cut {
  int head;
  int vectors;
  int tail;  // where the last elements begin
};

// Vectors begin at multiples of 16 bytes; all elements are single ones where `wide` is false.
template <typename T>
__device__ __forceinline__ Cut cut(const T* begin, int count, bool wide) {
  constexpr int kSize = Vector<T>::kSize;
  if (!wide) return {count, 0, count};
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(begin) / sizeof(T)) & (kSize - 1);
  const int head = min(count, (kSize - past) & (kSize - 1));
  const int vectors = (count - head) / kSize;
  return {head, vectors, head + vectors * kSize};
}

// Vectors that a thread loads before it uses the first.
constexpr int kInFlight = 4;

__device__ __forceinline__ float capped(float z, float softcap) {
  return softcap * tanhf(z / softcap);
}

template <typename T>
__device__ void fill_zeros(T* out, int64_t stride, int count) {
  const int threads = blockDim.x, thread = threadIdx.x;
  const Cut piece = cut(out, count, stride == 1);
  const T zero = from_float<T>(0.0f);
  for (int column = thread; column < piece.head; column += threads) out[column * stride] = zero;
  Vector<T>* const vectors = reinterpret_cast<Vector<T>*>(out + piece.head);
  Vector<T> zeros;
#pragma unroll
  for (T& value : zeros.values) value = zero;
  for (int index = thread; index < piece.vectors; index += threads) {
    store_vector(vectors[index].values, zeros);
  }
  for (int column = piece.tail + thread; column < count; column += threads) {
    out[column * stride] = zero;
  }
}

// The same of every thread `distance` lanes away, for a type made of 32-bit words.
template <typename T>
__device__ __forceinline__ T shuffle_xor(const T& value, int distance) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0, "made of 32-bit words");
  uint32_t words[sizeof(T) / sizeof(uint32_t)];
  memcpy(words, &value, sizeof(T));
  for (uint32_t& word : words) word = __shfl_xor_sync(0xffffffffu, word, distance);
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

template <typename T, typename Join>
__device__ __forceinline__ T warp_reduce(T value, Join join) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = join(value, shuffle_xor(value, distance));
  }
  return value;
}

// What `join` makes of the values of all threads of the block, the same for each of them and in
// every run. T{} is its neutral element. All threads must call it.
template <typename T, typename Join>
__device__ T block_reduce(T value, Join join) {
  // T may have a constructor, which shared memory may not.
  alignas(T) __shared__ unsigned char storage[kWarp * sizeof(T)];
  T* const scratch = reinterpret_cast<T*>(storage);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  value = warp_reduce(value, join);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = lane < static_cast<int>(blockDim.x) / kWarp ? scratch[lane] : T{};
    value = warp_reduce(value, join);
    if (lane == 0) scratch[0] = value;
  }
  __syncthreads();
  value = scratch[0];
  // Before the next reduction writes there.
  __syncthreads();
  return value;
}

// A sum in fp32 that carries what rounding lost (Knuth's two-sum).
struct Sum {
  float total = 0.0f;
  float lost = 0.0f;

  __device__ void add(float value) {
    const float sum = total + value;
    const float part = sum - total;
    lost += (total - (sum - part)) + (value - part);
    total = sum;
  }
  __device__ void add(const Sum& other) {
    add(other.total);
    lost += other.lost;
  }
  __device__ float value() const { return total + lost; }
};

}  // namespace megatron_rw

// Pieces that the kernels share: number types, vectors of 16 bytes, reductions, sums.
//
// One translation unit is made of all files of this folder. It needs no header of CUDA or of C++.
// Every parameter of a kernel has 8 bytes: a pointer, an integer or a double.

using int64 = long long;
using uint32 = unsigned int;

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
// Vectors that a thread loads before it uses the first, but where a soft-cap makes long code.
constexpr int kInFlight = 4;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);

struct bf16 {
  unsigned short bits;
};
struct half {
  unsigned short bits;
};

#ifndef MEGATRON_RW_EMULATED
// 2^value to about 2 ulp; what is below 2^-126 is 0.
__device__ __forceinline__ float fast_exp2(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
  return result;
}
// Two numbers, rounded to the nearest, the first in the lower half of a word.
__device__ __forceinline__ uint32 pack(float low, float high, bf16) {
  uint32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32 pack(float low, float high, half) {
  uint32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#endif

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) {
  return __uint_as_float(static_cast<uint32>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(half value) { return half_to_float(value.bits); }

__device__ __forceinline__ void store(float* to, float value) { *to = value; }
template <typename T>
__device__ __forceinline__ void store(T* to, float value) {
  to->bits = static_cast<unsigned short>(pack(value, 0.0f, T()));
}

// What one thread loads or stores at once.
template <typename T>
constexpr int kSize = 16 / sizeof(T);

__device__ __forceinline__ void unpack(const uint4& vector, float (&z)[4], float) {
  const uint32 words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) z[k] = __uint_as_float(words[k]);
}
__device__ __forceinline__ void unpack(const uint4& vector, float (&z)[8], bf16) {
  const uint32 words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    z[2 * k] = __uint_as_float(words[k] << 16);
    z[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
  }
}
__device__ __forceinline__ void unpack(const uint4& vector, float (&z)[8], half) {
  const uint32 words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    z[2 * k] = half_to_float(static_cast<unsigned short>(words[k]));
    z[2 * k + 1] = half_to_float(static_cast<unsigned short>(words[k] >> 16));
  }
}

__device__ __forceinline__ uint4 packed(const float (&z)[4], float) {
  return {__float_as_uint(z[0]), __float_as_uint(z[1]), __float_as_uint(z[2]),
          __float_as_uint(z[3])};
}
template <typename T>
__device__ __forceinline__ uint4 packed(const float (&z)[8], T kind) {
  return {pack(z[0], z[1], kind), pack(z[2], z[3], kind), pack(z[4], z[5], kind),
          pack(z[6], z[7], kind)};
}

// A row of `count` elements: `head` single ones, then vectors, which begin at multiples of 16 bytes,
// then fewer elements than a vector has, from `tail` on. All are single ones unless `wide`.
struct Cut {
  int head, vectors, tail;
};

template <typename T>
__device__ __forceinline__ Cut cut(const T* row, int count, bool wide) {
  if (!wide) return {count, 0, count};
  const uint32 past = static_cast<uint32>(reinterpret_cast<unsigned long long>(row) / sizeof(T));
  const int head = min(count, static_cast<int>(-past & (kSize<T> - 1)));
  const int vectors = (count - head) / kSize<T>;
  return {head, vectors, head + vectors * kSize<T>};
}

// Shares a row out to the threads of the block: calls `one` with the column of a single element, and
// `many` with a vector and its number. Several vectors are loaded before the first is used.
template <typename One, typename Many>
__device__ __forceinline__ void each(const Cut& piece, const uint4* vectors, int count, One one,
                                     Many many) {
  const int threads = blockDim.x, thread = threadIdx.x;
#pragma unroll 1
  for (int column = thread; column < piece.head; column += threads) one(column);
  int index = thread;
#pragma unroll 1
  for (; index + (kInFlight - 1) * threads < piece.vectors; index += kInFlight * threads) {
    uint4 loaded[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) loaded[k] = __ldcs(vectors + index + k * threads);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) many(loaded[k], index + k * threads);
  }
#pragma unroll 1
  for (; index < piece.vectors; index += threads) many(__ldcs(vectors + index), index);
#pragma unroll 1
  for (int column = piece.tail + thread; column < count; column += threads) one(column);
}

// The thread to which `each` gives a column.
template <typename T>
__device__ __forceinline__ int owner(const Cut& piece, int column) {
  if (column < piece.head) return column % blockDim.x;
  if (column >= piece.tail) return (column - piece.tail) % blockDim.x;
  return (column - piece.head) / kSize<T> % blockDim.x;
}

// 2^(z·log2 e − base) is exp(z − top), but for 2^rest_of(top), as base is rounded. Beyond ±kFar the
// rounding alone would overflow: logits that far down, as masks of −1e30 and −inf, have no part.
constexpr float kFar = 2147483648.0f;

__device__ __forceinline__ float base_of(float top) {
  return fminf(fmaxf(top * kLog2E, -kFar), kFar);
}

__device__ __forceinline__ float rest_of(float top) {
  return fminf(fmaxf(fmaf(top, kLog2E, -base_of(top)), -64.0f), 64.0f);
}

enum Operation { kMin, kMax, kSum };

template <typename T>
__device__ __forceinline__ T joined(Operation operation, T a, T b) {
  if (operation == kSum) return a + b;
  return operation == kMin ? fmin(a, b) : fmax(a, b);
}

template <typename T>
__device__ __forceinline__ T warp_reduce(Operation operation, T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = joined(operation, value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// What each operation makes of the values of all threads of the block, the same for each of them
// and in every run. All threads must call it; before it is called again with the same operations
// there must be a barrier.
template <Operation... kOperations, typename T>
__device__ __forceinline__ void block_reduce(T (&values)[sizeof...(kOperations)]) {
  constexpr Operation operations[] = {kOperations...};
  constexpr int count = sizeof...(kOperations);
  __shared__ T scratch[kMostThreads / kWarp][count];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    values[k] = warp_reduce(operations[k], values[k]);
    if (lane == 0) scratch[warp][k] = values[k];
  }
  __syncthreads();
  // An idle lane repeats the first warp where that changes nothing, and adds 0.
  const bool used = lane < static_cast<int>(blockDim.x) / kWarp;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    const T idle = operations[k] == kSum ? T(0) : scratch[0][k];
    values[k] = warp_reduce(operations[k], used ? scratch[lane][k] : idle);
  }
}

// A sum in fp32 that carries what rounding lost (Knuth's two-sum).
struct Sum {
  float total = 0.0f;
  float lost = 0.0f;

  __device__ __forceinline__ void add(float value) {
    const float sum = total + value;
    const float part = sum - total;
    lost += (total - (sum - part)) + (value - part);
    total = sum;
  }
  // Of an infinite total the rest is NaN.
  __device__ __forceinline__ float value() const {
    return fabsf(total) < kInfinity ? total + lost : total;
  }
};

// Runs CUDA kernels on the CPU, to test their logic without a GPU: the threads of a block are
// threads of the operating system, its barriers are barriers, its shared memory is shared. Blocks
// run one after the other.
//
// What it cannot show: a GPU's memory consistency (what only a weaker order of stores breaks), warps
// that run in lockstep or diverge, the approximate exponential, registers, and any time.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define MEGATRON_RW_EMULATED
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::fmax;
using std::fmin;
using std::max;
using std::min;

struct Index {
  unsigned x, y;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct Warp {
  pthread_barrier_t barrier;
  uint64_t words[2][32];
};

struct Block {
  pthread_barrier_t barrier;
  std::vector<Warp> warps;
};

inline thread_local Block* block = nullptr;
// No thread is two shuffles ahead of another of its warp: two places for the words take turns.
inline thread_local bool turn = false;
inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { pthread_barrier_wait(&block->barrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  turn = !turn;
  Warp& warp = block->warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  memcpy(&warp.words[turn][lane], &value, sizeof(value));
  pthread_barrier_wait(&warp.barrier);
  T other;
  memcpy(&other, &warp.words[turn][lane ^ distance], sizeof(other));
  return other;
}

inline uint4 __ldcs(const uint4* from) { return *from; }
inline void __stcs(uint4* to, uint4 value) { *to = value; }
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct bf16;
struct half;

inline float fast_exp2(float value) { return std::exp2(value); }
inline float half_to_float(unsigned short bits) {
  _Float16 value;
  memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
}

// To the nearest, ties to even.
inline uint32_t rounded(float value, const bf16*) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t bits = __float_as_uint(value);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline uint32_t rounded(float value, const half*) {
  const _Float16 number = static_cast<_Float16>(value);
  uint16_t bits;
  memcpy(&bits, &number, sizeof(bits));
  return bits;
}
template <typename T>
uint32_t pack(float low, float high, const T& kind) {
  return rounded(low, &kind) | rounded(high, &kind) << 16;
}

// Arguments as `cuda.core` passes them: addresses of values of 8 bytes.
template <typename... Parameters, size_t... kPlaces>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<kPlaces...>) {
  static_assert(((sizeof(Parameters) == 8) && ...));
  kernel(*static_cast<Parameters*>(arguments[kPlaces])...);
}

template <typename... Parameters>
void run(void (*kernel)(Parameters...), unsigned width, unsigned height, unsigned threads,
         void** arguments) {
  // Shared memory is static.
  static std::mutex one_kernel;
  const std::lock_guard<std::mutex> lock(one_kernel);
  Block shared{{}, std::vector<Warp>(threads / 32)};
  pthread_barrier_init(&shared.barrier, nullptr, threads);
  for (Warp& warp : shared.warps) pthread_barrier_init(&warp.barrier, nullptr, 32);
  const auto work = [&](unsigned thread) {
    block = &shared;
    threadIdx = {thread, 0};
    blockDim = {threads, 1};
    gridDim = {width, height};
    for (unsigned y = 0; y < height; ++y) {
      for (unsigned x = 0; x < width; ++x) {
        blockIdx = {x, y};
        call(kernel, arguments, std::index_sequence_for<Parameters...>());
        __syncthreads();
      }
    }
  };
  std::vector<std::thread> pool;
  for (unsigned thread = 0; thread < threads; ++thread) pool.emplace_back(work, thread);
  for (std::thread& thread : pool) thread.join();
}

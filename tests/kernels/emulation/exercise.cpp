// Runs every kernel in every variant for the sanitizers: emulated for the compiler's, on a GPU for
// compute-sanitizer. Each buffer is an allocation of its own size, poisoned with NaN: what is read or
// written beyond it, not written, or written by two threads shows. That the values are right is for
// the Python tests.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels.h"

namespace {

using namespace megatron_rw;

std::mt19937 generator(0);
int failures = 0;

template <typename T>
T number(float value);
template <>
float number(float value) { return value; }
template <>
__nv_bfloat16 number(float value) { return __float2bfloat16_rn(value); }
template <>
__half number(float value) { return __float2half_rn(value); }

float back(float value) { return value; }
float back(__nv_bfloat16 value) { return __bfloat162float(value); }
float back(__half value) { return __half2float(value); }

// Memory where the kernels run.
#ifdef MEGATRON_RW_EMULATED
template <typename T>
using Buffer = std::vector<T>;

template <typename T>
std::vector<T> fetch(const Buffer<T>& buffer) {
  return buffer;
}
#else
void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(2);
}

template <typename T>
class Buffer {
 public:
  Buffer(const std::vector<T>& values) : size_(values.size()) {
    check(cudaMalloc(&data_, size_ * sizeof(T)));
    check(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  Buffer(size_t size, T value) : Buffer(std::vector<T>(size, value)) {}
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  T* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  size_t size_;
};

template <typename T>
std::vector<T> fetch(const Buffer<T>& buffer) {
  check(cudaDeviceSynchronize());
  std::vector<T> values(buffer.size());
  check(cudaMemcpy(values.data(), buffer.data(), values.size() * sizeof(T),
                   cudaMemcpyDeviceToHost));
  return values;
}
#endif

template <typename T>
void expect_written(const Buffer<T>& buffer, const char* what) {
  for (const T element : fetch(buffer)) {
    const float value = back(element);
    if (!std::isfinite(value)) {
      std::printf("%s: not written, or not finite\n", what);
      ++failures;
      return;
    }
  }
}

std::vector<float> random_floats(size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

struct Variant {
  int columns;     // that take part, of all
  int offset;      // elements before the first row
  bool transposed; // the vocabulary is not the last in memory
  bool in_place;
  float softcap, smoothing;
  Launch launch;
};

template <typename T>
void cross_entropy(Dtype dtype, const Variant& v) {
  constexpr int kSequence = 3, kBatch = 2, kWidth = 203, kRows = kSequence * kBatch;
  std::vector<T> numbers;
  for (const float value : random_floats(kRows * kWidth + v.offset)) {
    numbers.push_back(number<T>(value));
  }
  Buffer<T> data(numbers), apart(kRows * kWidth, number<T>(NAN));
  std::vector<int64_t> labels(kRows);
  for (int row = 0; row < kRows; ++row) labels[row] = row == 1 ? -100 : (row * 37) % v.columns;
  const Buffer<int64_t> target(labels);
  const Buffer<float> upstream(std::vector<float>{1.0f, 2.0f, 0.0f, -1.0f, 0.5f, 3.0f});
  const Buffer<float> mask(std::vector<float>{1.0f, 1.0f, 0.0f, 1.0f, 1.0f, 1.0f});

  Logits logits = {data.data() + v.offset, dtype, kBatch * kWidth, kWidth, 1};
  if (v.transposed) logits = {data.data() + v.offset, dtype, kBatch, 1, kRows};
  Logits out = logits;
  if (!v.in_place) out.data = apart.data();
  const Shape shape = {kSequence, kBatch};
  const int parts = (v.columns + v.launch.columns - 1) / v.launch.columns;
  const bool with_sum = v.smoothing > 0;
  const int statistics = with_sum ? 4 : 3;
  Buffer<float> tables(parts * statistics * kRows, NAN), merged(statistics * kRows, NAN);
  Buffer<float> losses(kRows, NAN), lse(kRows, NAN), sums(2 * kBatch, NAN);

  launch_statistics({logits, {target.data(), kBatch, 1}, tables.data(), shape, 0, v.columns, -100,
                     v.softcap, with_sum},
                    v.launch, nullptr);
  expect_written(tables, "statistics");
  launch_merge({tables.data(), merged.data(), parts, kRows, with_sum}, nullptr);
  expect_written(merged, "merge");
  launch_combine({tables.data(), {target.data(), kBatch, 1}, {mask.data(), kBatch, 1},
                  losses.data(), lse.data(), sums.data(), shape, parts, v.columns, -100, 0.01f,
                  v.smoothing, with_sum},
                 nullptr);
  expect_written(losses, "losses");
  expect_written(lse, "log-sum-exp");
  expect_written(sums, "sums");
  launch_gradient({logits, out, {target.data(), kBatch, 1}, lse.data(),
                   {upstream.data(), kBatch, 1}, shape, 0, v.columns, kWidth, -100, v.softcap,
                   0.01f, v.smoothing, v.smoothing / v.columns},
                  v.launch, nullptr);
  expect_written(v.in_place ? data : apart, "gradient");
}

template <typename T>
void probabilities(Dtype dtype, int columns, float softcap, int threads) {
  constexpr int kSequence = 3, kBatch = 2, kWidth = 1203, kRows = kSequence * kBatch;
  std::vector<T> numbers;
  for (const float value : random_floats(kRows * kWidth)) numbers.push_back(number<T>(value));
  // A row without a finite sum.
  numbers[4 * kWidth + 7] = number<T>(INFINITY);
  Buffer<T> data(numbers);
  std::vector<int64_t> labels(kRows);
  for (int row = 0; row < kRows; ++row) labels[row] = row == 1 ? -100 : (row * 137) % columns;
  const Buffer<int64_t> target(labels);
  Buffer<float> table(3 * kRows, NAN), scale(kRows, NAN);
  launch_probabilities({data.data(), dtype, {target.data(), kBatch, 1}, table.data(),
                        {kSequence, kBatch}, 0, columns, kWidth, -100, softcap},
                       threads, nullptr);
  // One row's target is lost in this shard.
  const Buffer<float> lse(std::vector<float>{9.0f, 9.0f, 9.0f, 9.0f, 9.0f, 200.0f});
  launch_subtract_targets({data.data(), dtype, {target.data(), kBatch, 1}, table.data(),
                           lse.data(), scale.data(), {kSequence, kBatch}, 0, columns, kWidth, -100,
                           softcap, 0.01f, 3000.0f},
                          nullptr);
  expect_written(data, "targets");
  expect_written(scale, "factors");
  const Buffer<float> factors(std::vector<float>{1.0f, 2.0f, 0.0f, -1.0f, 0.5f, 3.0f});
  const Buffer<float> wide(random_floats(kRows * kWidth));
  Buffer<T> narrow(kRows * kWidth, number<T>(NAN));
  launch_scale_rows({wide.data(), Dtype::kFloat, narrow.data(), dtype, factors.data(), kRows,
                     kWidth},
                    nullptr);
  expect_written(narrow, "rows of fp32");
  launch_scale_rows({data.data(), dtype, data.data(), dtype, factors.data(), kRows, kWidth},
                    nullptr);
  expect_written(data, "rows in place");
}

void weigh(int count, Strategy strategy, bool masked, bool given) {
  const Buffer<float> losses(random_floats(count));
  const Buffer<float> range(std::vector<float>{-1.0f, 1.0f}), temperature(1, 0.4f);
  // Not std::vector<bool>, which has no bool in memory.
  std::vector<uint8_t> used(count);
  for (int sample = 0; sample < count; ++sample) used[sample] = sample % 3 != 1;
  const Buffer<uint8_t> mask(used);
  Buffer<float> weights(count, NAN), statistics(9, NAN);
  launch_weigh({losses.data(), masked ? reinterpret_cast<const bool*>(mask.data()) : nullptr,
                given ? range.data() : nullptr, masked ? temperature.data() : nullptr,
                weights.data(), statistics.data(), count, 0.7f, strategy, 1.0f, 1.0f},
               nullptr);
  expect_written(weights, "weights");
  expect_written(statistics, "statistics of the weights");
}

}  // namespace

int main() {
  const Launch whole = {64, 4096}, cut = {256, 50};
  const Variant variants[] = {
      {203, 0, false, true, 0.0f, 0.0f, whole},  {203, 3, false, false, 0.0f, 0.1f, whole},
      {190, 1, false, true, 5.0f, 0.1f, cut},    {150, 5, false, false, 5.0f, 0.0f, cut},
      {190, 0, true, true, 0.0f, 0.0f, cut},     {203, 2, true, false, 5.0f, 0.1f, whole},
  };
  for (const Variant& variant : variants) {
    cross_entropy<float>(Dtype::kFloat, variant);
    cross_entropy<__nv_bfloat16>(Dtype::kBFloat16, variant);
    cross_entropy<__half>(Dtype::kHalf, variant);
  }
  for (const float softcap : {0.0f, 5.0f}) {
    for (const int columns : {1203, 1100}) {
      const int threads = columns == 1203 ? 64 : 512;
      probabilities<float>(Dtype::kFloat, columns, softcap, threads);
      probabilities<__nv_bfloat16>(Dtype::kBFloat16, columns, softcap, threads);
      probabilities<__half>(Dtype::kHalf, columns, softcap, threads);
    }
  }
  for (int strategy = 0; strategy < 4; ++strategy) {
    for (const int count : {1, 37, 1300}) {
      weigh(count, static_cast<Strategy>(strategy), strategy % 2 == 0, strategy > 1);
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

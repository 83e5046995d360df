// The operators of kernels.py in C++, as parts of a compiled step.
//
// kernels.py writes in front of this file what is known beforehand: T, the type of what is computed
// with; E, the width of a head; K key heads, each for G query heads; BITS of a number in the cache
// (0: it is a T); THREADS. Sums are kept in float32.

#include <ATen/cpu/vec/functional.h>

#include <numeric>

using Vec = at::vec::Vectorized<float>;
constexpr int W = Vec::size();

inline float add_up(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, x);
}

inline float largest(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, x);
}

// 2 W numbers.
inline void load(const float* numbers, Vec& first, Vec& second) {
  first = Vec::loadu(numbers), second = Vec::loadu(numbers + W);
}

template <typename Half>
void load(const Half* numbers, Vec& first, Vec& second) {
  auto both = at::vec::Vectorized<Half>::loadu(numbers);
  std::tie(first, second) = at::vec::convert_to_float<Half>(both);
}

template <typename Number>
Number* data_of(AtenTensorHandle tensor) {
  void* data;
  aoti_torch_get_data_ptr(tensor, &data);
  return static_cast<Number*>(data);
}

inline int64_t size_of(AtenTensorHandle tensor, int64_t dimension) {
  int64_t size;
  aoti_torch_get_size(tensor, dimension, &size);
  return size;
}

// A tensor [rows, columns] of the type of another one.
inline T* make_result(
    AtenTensorHandle other, int64_t rows, int64_t columns, AtenTensorHandle* result) {
  int32_t type;
  aoti_torch_get_dtype(other, &type);
  const int64_t shape[] = {rows, columns}, strides[] = {columns, 1};
  aoti_torch_empty_strided(2, shape, strides, type, aoti_torch_device_type_cpu(), 0, result);
  return data_of<T>(*result);
}

// ---- A matrix times a vector --------------------------------------------------------------------

extern "C" AOTITorchError aoti_torch_cpu_multiply_vector(
    AtenTensorHandle x_1I, AtenTensorHandle weight_OI, AtenTensorHandle* result) {
  const int64_t I = size_of(weight_OI, 1), O = size_of(weight_OI, 0);
  const T *x = data_of<T>(x_1I), *weight = data_of<T>(weight_OI);
  T* y = make_result(x_1I, 1, O, result);
  const std::vector<float> numbers(x, x + I);
#pragma omp parallel for num_threads(THREADS)
  for (int64_t o = 0; o < O; ++o) {
    const T* row = weight + o * I;
    Vec even(0), odd(0), first, second;  // two sums, so that one need not wait for the other
    int64_t i = 0;
    for (; i + 2 * W <= I; i += 2 * W) {
      __builtin_prefetch(row + I + i);  // the next row
      load(row + i, first, second);
      even = at::vec::fmadd(Vec::loadu(numbers.data() + i), first, even);
      odd = at::vec::fmadd(Vec::loadu(numbers.data() + i + W), second, odd);
    }
    float sum = add_up(even + odd);
    for (; i < I; ++i) sum += numbers[i] * static_cast<float>(row[i]);
    y[o] = static_cast<T>(sum);
  }
  return AOTI_TORCH_SUCCESS;
}

using Ints = int32_t __attribute__((vector_size(4 * W)));
using Floats = float __attribute__((vector_size(4 * W)));

// The lowest 4 bits of each number. Where a register holds a table of 16, looking them up in it is
// faster than masking and converting.
inline Vec low_bits(Ints numbers) {
#if defined(CPU_CAPABILITY_AVX512) && !defined(__clang__)
  const Floats floats = __builtin_shuffle(
      Floats{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, numbers);
#else
  const Floats floats = __builtin_convertvector(numbers & 0xF, Floats);
#endif
  return Vec::loadu(&floats);
}

extern "C" AOTITorchError aoti_torch_cpu_multiply_vector_4_bits(
    AtenTensorHandle x_1I, AtenTensorHandle words, AtenTensorHandle scales_GO,
    AtenTensorHandle zeros_GO, AtenTensorHandle* result) {
  const int64_t I = size_of(x_1I, 1), groups = size_of(scales_GO, 0), O = size_of(scales_GO, 1);
  const int64_t size = I / groups;
  const T* x = data_of<T>(x_1I);
  const int32_t* packed = data_of<int32_t>(words);
  const float *scales = data_of<float>(scales_GO), *zeros = data_of<float>(zeros_GO);
  T* y = make_result(x_1I, 1, O, result);
  const std::vector<float> numbers(x, x + I);
  std::vector<float> sums;
  for (auto input = numbers.begin(); input < numbers.end(); input += size)
    sums.push_back(std::accumulate(input, input + size, 0.f));
#pragma omp parallel for num_threads(THREADS)
  for (int64_t o = 0; o < O; o += W) {  // W outputs, a lane for each
    const int32_t* word = packed + o / 16 * 16 * (I / 8) + o % 16;
    const float* input = numbers.data();
    Vec y_W(0);
    for (int64_t g = 0; g < groups; ++g) {
      Vec lower(0), upper(0);  // halves of the bytes: two sums, as above
      for (int64_t i = 0; i < size; i += 8, input += 8, word += 16) {
        __builtin_prefetch(word + 512);
        Ints eight;
        std::memcpy(&eight, word, sizeof(eight));
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          lower = at::vec::fmadd(low_bits(eight >> (8 * k)), Vec(input[k]), lower);
          upper = at::vec::fmadd(low_bits(eight >> (8 * k + 4)), Vec(input[k + 4]), upper);
        }
      }
      // The zero point and the scale are the same in the whole group.
      const Vec products = lower + upper - Vec::loadu(zeros + g * O + o) * Vec(sums[g]);
      y_W = at::vec::fmadd(products, Vec::loadu(scales + g * O + o), y_W);
    }
    float outputs[W];
    y_W.store(outputs);
    for (int i = 0; i < W; ++i) y[o + i] = static_cast<T>(outputs[i]);
  }
  return AOTI_TORCH_SUCCESS;
}

// ---- Attention over the cache -------------------------------------------------------------------

constexpr int N = (E + 2 * W - 1) / (2 * W) * 2;  // registers for a head, the last ones with zeros
constexpr int BYTES = BITS ? E * BITS / 8 : E * sizeof(T);
constexpr int AHEAD = 8;  // slots

// A function of its own, for torch builds without the vectorizer of loops, and this loop needs it.
__attribute__((noinline, optimize("tree-loop-vectorize")))
void dequantize(const uint8_t* bytes, float scale, float zero, float* numbers) {
#pragma omp simd
  for (int e = 0; e < BYTES; ++e) {
    numbers[e] = ((BITS == 8 ? bytes[e] : bytes[e] & 0xF) - zero) * scale;
    if (BITS == 4) numbers[E / 2 + e] = ((bytes[e] >> 4) - zero) * scale;
  }
}

// The keys, or the values, of a layer: [slots, K, E], quantized ones with a scale and a zero point
// for each head's vector, [slots, K, 2].
struct Rows {
  const uint8_t* data;
  const T* scales_zeros;

  void fetch(int64_t slot, int64_t head) const {  // into the processor's cache
    for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(data + (slot * K + head) * BYTES + i);
  }

  void read(int64_t slot, int64_t head, Vec (&row)[N]) const {
    const int64_t place = slot * K + head;
    const uint8_t* bytes = data + place * BYTES;
    if constexpr (BITS == 0 && E % (2 * W) == 0) {
      for (int i = 0; i < N; i += 2)
        load(reinterpret_cast<const T*>(bytes) + i * W, row[i], row[i + 1]);
    } else {
      float numbers[N * W] = {};
      if constexpr (BITS == 0) {
        for (int e = 0; e < E; ++e)
          numbers[e] = static_cast<float>(reinterpret_cast<const T*>(bytes)[e]);
      } else {
        dequantize(bytes, scales_zeros[2 * place], scales_zeros[2 * place + 1], numbers);
      }
      for (int i = 0; i < N; ++i) row[i] = Vec::loadu(numbers + i * W);
    }
  }
};

// One key head of one sequence, q and y [G, E]: a score for each of the query heads that share the
// key head, the softmax over the scores, and the weighted sum of the values. A row of the cache is
// read where it lies, and turned into floats once for all G heads.
inline void attend(const T* q, const Rows& keys, const Rows& values, const int64_t* slots,
                   int64_t length, int64_t head, T* y) {
  const int64_t padded = (length + W - 1) / W * W;
  std::vector<float> weights(G * padded, -INFINITY);
  float query[G][N * W] = {};
  for (int g = 0; g < G; ++g)
    for (int e = 0; e < E; ++e)
      query[g][e] = static_cast<float>(q[g * E + e]) / std::sqrt(float(E));

  Vec row[N];
  for (int64_t l = 0; l < length; ++l) {
    if (l + AHEAD < length) keys.fetch(slots[l + AHEAD], head);
    keys.read(slots[l], head, row);
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g) {
      Vec score(0);
      for (int i = 0; i < N; ++i)
        score = at::vec::fmadd(Vec::loadu(query[g] + i * W), row[i], score);
      weights[g * padded + l] = add_up(score);
    }
  }

  for (int g = 0; g < G; ++g) {
    float* scores = weights.data() + g * padded;
    Vec highest(-INFINITY), total(0);
    for (int64_t l = 0; l < padded; l += W)
      highest = at::vec::maximum(highest, Vec::loadu(scores + l));
    const Vec top(largest(highest));
    for (int64_t l = 0; l < padded; l += W) {
      const Vec weight = (Vec::loadu(scores + l) - top).exp_u20();
      weight.store(scores + l);
      total = total + weight;
    }
    const Vec part(1 / add_up(total));
    for (int64_t l = 0; l < padded; l += W) (Vec::loadu(scores + l) * part).store(scores + l);
  }

  Vec sum[G][N];  // zeros; unrolled below, so that they stay in registers
  for (int64_t l = 0; l < length; ++l) {
    if (l + AHEAD < length) values.fetch(slots[l + AHEAD], head);
    values.read(slots[l], head, row);
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g) {
      const Vec weight(weights[g * padded + l]);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) sum[g][i] = at::vec::fmadd(weight, row[i], sum[g][i]);
    }
  }
  for (int g = 0; g < G; ++g) {
    float numbers[N * W];
    for (int i = 0; i < N; ++i) sum[g][i].store(numbers + i * W);
    for (int e = 0; e < E; ++e) y[g * E + e] = static_cast<T>(numbers[e]);
  }
}

extern "C" AOTITorchError aoti_torch_cpu_paged_attention(
    AtenTensorHandle q_BHE, AtenTensorHandle keys, AtenTensorHandle values,
    AtenTensorHandle* key_scales, AtenTensorHandle* value_scales, AtenTensorHandle slots_BL,
    AtenTensorHandle positions_B, AtenTensorHandle* result) {
  const T* q = data_of<T>(q_BHE);
  const Rows key_rows{data_of<uint8_t>(keys), BITS ? data_of<T>(*key_scales) : nullptr};
  const Rows value_rows{data_of<uint8_t>(values), BITS ? data_of<T>(*value_scales) : nullptr};
  const int64_t* slots = data_of<int64_t>(slots_BL);
  const int64_t* positions = data_of<int64_t>(positions_B);
  const int64_t B = size_of(slots_BL, 0), L = size_of(slots_BL, 1);
  T* y = make_result(q_BHE, B, K * G * E, result);
#pragma omp parallel for num_threads(THREADS)
  for (int64_t task = 0; task < B * K; ++task) {
    const int64_t b = task / K, place = task * G * E;
    attend(q + place, key_rows, value_rows, slots + b * L, std::min(positions[b] + 1, L), task % K,
           y + place);
  }
  return AOTI_TORCH_SUCCESS;
}

// The product of rows and one layer of quantised weights, on CPUs: for float32 rows and weights in QuantisedPanels
// (quantised_panels.py).
//
// The rows are quantised, too. A block is 32 inputs of a row, or of a column of weights; it is stored as small integers
// and a scale. The products of two blocks are summed in int32, exactly, and then scaled. Each thread takes some panels
// and reads them as they are stored.

#include <cstdint>
#include <cstring>

#include "cpu_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace {

// A panel is computed kWide columns at once, for up to kTile rows: their sums fit in the registers.
#if defined(__AVX512VNNI__)
constexpr int kWide = 16, kTile = 12;
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kWide = 4, kTile = 12;
#else
constexpr int kWide = 8, kTile = 4;
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kUnsigned = true;  // the instruction multiplies unsigned weights with signed inputs
#else
constexpr bool kUnsigned = false;
#endif
constexpr int kBlock = 32;            // inputs of a block
constexpr int kQuads = kBlock / 4;    // an instruction sums the products of four inputs, a quad
constexpr int kShares = 4;            // the panels are cut into this many shares for each thread
constexpr int kTogether = 16 * kTile; // rows multiplied at once; a cache holds them while the panels are read

typedef float Wide __attribute__((vector_size(4 * kWide), aligned(4), may_alias));
typedef int WideInts __attribute__((vector_size(4 * kWide), aligned(4), may_alias));
typedef signed char Bytes __attribute__((vector_size(kLanes)));

WideInts SplatWide(int x) { return WideInts{} + x; }

// The weights of one layer, or of a part of it: integers of `Bits` bits, without minima or with them.
template <int Bits, bool HasMinima>
struct Weights {
  static constexpr int kBytes = kBlock * kPanel * Bits / 8;  // of a block of a panel
  // What a stored integer has too much, as Dot takes it.
  static constexpr int kZero = Bits == 4 ? (HasMinima ? 0 : 8) : (kUnsigned ? 128 : 0);
  const uint8_t* values;
  const uint8_t* scales;
  const uint8_t* minima;
  bool half;  // whether scales and minima are in half precision, not in single

  // Returns the weights from a block of all panels on, and from a column of the panel on.
  Weights at(size_t block, int column) const {
    const size_t scale = (block * kPanel + column) * (half ? 2 : 4);
    return {values + block * kBytes + 4 * column, scales + scale, minima + scale, half};
  }
};

// A block of each of R rows.
template <int R>
struct Inputs {
  int quads[kQuads][R];  // four int8 each
  float scale[R];
  float total[R];  // the scale times the sum of the integers
  int sum[R];
};

// Reads numbers in single precision, or in half.
Wide ToFloats(const uint8_t* from, bool half) {
  if (!half) return *reinterpret_cast<const Wide*>(from);
#if defined(__AVX512VNNI__)
  return (Wide)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
  return (Wide)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (Wide)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from)));
#else
  Wide out;
  for (int i = 0; i < kWide; ++i) {
    const int bits = from[2 * i] | from[2 * i + 1] << 8, size = bits & 0x7fff;
    const int32_t normal = (size << 13) + (112 << 23);  // the bits of a float
    float value;
    std::memcpy(&value, &normal, sizeof value);
    if (size < 0x400) value = size * 0x1p-24f;  // it is subnormal
    out[i] = bits & 0x8000 ? -value : value;
  }
  return out;
#endif
}

// Adds to each lane the products of its four weights and the four inputs x.
template <int Bits>
WideInts Dot(WideInts sums, WideInts weights, int x) {
#if defined(__AVX512VNNI__)
  return (WideInts)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(x));
#elif defined(__AVXVNNI__)
  return (WideInts)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, _mm256_set1_epi32(x));
#elif defined(__AVX2__)
  __m256i a = (__m256i)weights, b = _mm256_set1_epi32(x);
  if (Bits == 8) {  // the instruction takes unsigned weights: it gets their sizes, and the inputs get their signs
    b = _mm256_sign_epi8(b, a);
    a = _mm256_abs_epi8(a);
  }
  return sums + (WideInts)_mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (WideInts)vdotq_s32((int32x4_t)sums, (int8x16_t)weights, vreinterpretq_s8_s32(vdupq_n_s32(x)));
#else
  for (int i = 0; i < kWide; ++i)
    for (int byte = 0; byte < 32; byte += 8) sums[i] += (int8_t)(weights[i] >> byte) * (int8_t)(x >> byte);
  return sums;
#endif
}

// Quantises a block of row r. If an input is not finite, the scale is NaN, and so is the whole row of the result.
template <int R>
void Quantise(const float* x, Inputs<R>& to, int r) {
  Vec high = Splat(0.0f), spoilt = Splat(0.0f);
  for (int i = 0; i < kBlock; i += kLanes) {
    Vec v = At(x + i), size = v < 0.0f ? -v : v;
    high = size > high ? size : high;
    spoilt += v * 0.0f;
  }
  float most = 0.0f, nan = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) {
    most = std::max(most, high[lane]);
    nan += spoilt[lane];
  }
  const bool some = most > 0.0f;
  const Vec inverse = Splat(some ? 127.0f / most : 0.0f), shift = Splat(0x1.8p23f);
  Ints sums = Splat(0);
  for (int i = 0; i < kBlock; i += kLanes) {
    Vec shifted = At(x + i) * inverse + shift;  // the lowest bits are now the number, rounded
    Ints rounded = (Ints)shifted - (Ints)shift;
    sums += rounded;
    Bytes bytes = __builtin_convertvector(rounded, Bytes);
    std::memcpy(&to.quads[i / 4][r], &bytes, 4);
    std::memcpy(&to.quads[i / 4 + 1][r], (const char*)&bytes + 4, 4);
  }
  int sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  to.scale[r] = (some ? most / 127.0f : 0.0f) + nan;
  to.total[r] = to.scale[r] * sum;
  to.sum[r] = sum;
}

// c [count, kWide] = a @ w, for kWide columns of a panel, of which w has the first block.
template <int R, int Bits, bool HasMinima>
void Columns(int blocks, const Inputs<R>* a, Weights<Bits, HasMinima> w, float* c, size_t ldc, int count) {
  constexpr int kStored = kQuads * Bits / 8;  // vectors that a block is stored in
  const WideInts low = SplatWide(0x0f0f0f0f), flip = SplatWide(kUnsigned ? 0x80808080 : 0);
  Wide out[R];
  for (int r = 0; r < R; ++r) out[r] = Wide{};
  for (int block = 0; block < blocks; ++block, ++a, w = w.at(1, 0)) {
    WideInts sums[R];
    for (int r = 0; r < R; ++r) sums[r] = SplatWide(-w.kZero * a->sum[r]);
    for (int q = 0; q < kStored; ++q) {
      const WideInts stored = *reinterpret_cast<const WideInts*>(w.values + q * 4 * kPanel);
      if (Bits == 8) {
        for (int r = 0; r < R; ++r) sums[r] = Dot<8>(sums[r], stored ^ flip, a->quads[q][r]);
      } else {
        const WideInts first = stored & low, second = (stored >> 4) & low;
        for (int r = 0; r < R; ++r) sums[r] = Dot<4>(sums[r], first, a->quads[q][r]);
        for (int r = 0; r < R; ++r) sums[r] = Dot<4>(sums[r], second, a->quads[q + kStored][r]);
      }
    }
    const Wide scale = ToFloats(w.scales, w.half);
    for (int r = 0; r < R; ++r) out[r] += scale * a->scale[r] * __builtin_convertvector(sums[r], Wide);
    if (HasMinima) {
      const Wide least = ToFloats(w.minima, w.half);
      for (int r = 0; r < R; ++r) out[r] += least * a->total[r];
    }
  }
  for (int r = 0; r < count; ++r) *reinterpret_cast<Wide*>(c + r * ldc) = out[r];
}

// Multiplies rows in tiles of R.
template <int R, typename W>
void Multiply(ffi::ThreadPool& threads, int rows, int blocks, int panels, const float* x, W w, float* out) {
  const int tiles = (rows + R - 1) / R, din = blocks * kBlock, dout = panels * kPanel;
  std::unique_ptr<Inputs<R>[]> inputs(new Inputs<R>[(size_t)tiles * blocks]);
  Parallel(threads, tiles, [&](int tile) {
    for (int r = 0; r < R; ++r)
      for (int block = 0; block < blocks; ++block) {
        const size_t row = std::min(tile * R + r, rows - 1);  // the last tile's rows are filled up with the last row
        Quantise(x + row * din + block * kBlock, inputs[(size_t)tile * blocks + block], r);
      }
  });
  const int units = std::min(panels, kShares * std::max<int>(threads.num_threads(), 1));
  constexpr int kGroup = kTogether / R;
  Parallel(threads, units, [&](int unit) {
    const int first = panels * unit / units, last = panels * (unit + 1) / units;
    for (int group = 0; group < tiles; group += kGroup)
      for (int panel = first; panel < last; ++panel)
        for (int tile = group; tile < std::min(group + kGroup, tiles); ++tile)
          for (int column = 0; column < kPanel; column += kWide)
            Columns(blocks, &inputs[(size_t)tile * blocks], w.at((size_t)panel * blocks, column),
                    out + (size_t)tile * R * dout + panel * kPanel + column, dout, std::min(R, rows - tile * R));
  });
}

template <typename W>
void Choose(ffi::ThreadPool& threads, int rows, int blocks, int panels, const float* x, W w, float* out) {
  if (!rows) return;
  const int tiles = (rows + kTile - 1) / kTile, height = (rows + tiles - 1) / tiles;  // tiles of about equal height
  if (height <= 1) return Multiply<1>(threads, rows, blocks, panels, x, w, out);
  if (height <= 2) return Multiply<2>(threads, rows, blocks, panels, x, w, out);
  if (height <= 4) return Multiply<4>(threads, rows, blocks, panels, x, w, out);
  if constexpr (kTile > 4) {
    if (height <= 8) return Multiply<8>(threads, rows, blocks, panels, x, w, out);
    return Multiply<kTile>(threads, rows, blocks, panels, x, w, out);
  }
}

// x [B, din], values [L, panels, blocks, bytes ..], scales and minima [L, panels, blocks, kPanel], of which minima may
// be empty, layer [1]: out [B, panels * kPanel]
ffi::Error LinearQuantised(ffi::ThreadPool threads, Floats x, ffi::AnyBuffer values, ffi::AnyBuffer scales,
                           ffi::AnyBuffer minima, Integers layer, Result out) {
  const int rows = (int)x.dimensions()[0];
  const int panels = (int)values.dimensions()[1], blocks = (int)values.dimensions()[2];
  const size_t first = (size_t)layer.typed_data()[0] * panels * blocks;
  auto run = [&](auto weights) {
    auto bytes = [](const ffi::AnyBuffer& buffer) { return (const uint8_t*)buffer.untyped_data(); };
    weights = {bytes(values), bytes(scales), bytes(minima), scales.element_type() == ffi::F16};
    Choose(threads, rows, blocks, panels, x.typed_data(), weights.at(first, 0), out->typed_data());
    return ffi::Error::Success();
  };
  if (values.element_type() == ffi::S8) return run(Weights<8, false>{});
  return minima.element_count() ? run(Weights<4, true>{}) : run(Weights<4, false>{});
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(icarus_linear_quantised, LinearQuantised,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Integers>()
                                  .Ret<Floats>());

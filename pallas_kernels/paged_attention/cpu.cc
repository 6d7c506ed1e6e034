// Paged attention on CPUs, called through XLA's foreign function interface: the whole op (api.py), for pages of float32,
// int8 and float8_e4m3fn without scales.
//
// A unit of work is one run and one KV head; XLA's own threads share the units. A unit walks the run's pages in blocks
// of tokens. For each block it copies K transposed and V as it is, both as float32, and computes scores and weighted
// sums as two small matrix products with an online softmax between them. Then each row's partial results are merged by
// their log-sum-exp.

#include <algorithm>
#include <climits>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu_kernels.h"

namespace {

constexpr int kBlock = 128;         // tokens of a block; a multiple of kPanel
constexpr float kNone = -1e30f;     // NEG in partial.py

struct Spec {
  float scale, soft_cap;    // soft_cap 0: none
  int window, page_stride;  // window 0: none
};

struct Runs {
  const int *rows, *positions, *pages, *start, *length;
  int num, num_rows, num_pages;  // runs in use; rows and pages of a run
};

struct Pool {
  const void* layer;  // [num_pages, K, page_size, 2H]
  int kv_heads, page_size, h, offset;
};

// exp(x) for x <= 0, to 2 units in the last place; 0 below -87. The method and the coefficients are those of expf in
// the Cephes library: x = n * log(2) + r, and a polynomial for exp(r).
Vec Exp(Vec x) {
  const Vec magic = Splat(12582912.0f);  // 1.5 * 2**23; adding it rounds to an integer
  const Vec low = Splat(-87.0f);
  Vec bounded = x < low ? low : x;
  Vec n = (bounded * Splat(1.44269504f) + magic) - magic;
  Vec r = bounded - n * Splat(0.693359375f) + n * Splat(2.12194440e-4f);
  Vec p = Splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + Splat(c);
  p = p * r * r + r + Splat(1.0f);
  Ints power = (__builtin_convertvector(n, Ints) + Splat(127)) << 23;
  return x < low ? Splat(0.0f) : p * reinterpret_cast<Vec&>(power);
}

struct Float8 {  // float8_e4m3fn
  unsigned char bits;
};

const std::vector<float> kFloat8Values = [] {
  std::vector<float> values(256);
  for (int i = 0; i < 256; ++i) {
    const int exponent = i >> 3 & 15, mantissa = i & 7;
    const float size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
    values[i] = (i & 127) == 127 ? NAN : i & 128 ? -size : size;
  }
  return values;
}();

float Value(float x) { return x; }
float Value(signed char x) { return x; }
float Value(Float8 x) { return kFloat8Values[x.bits]; }

// Memory that a thread keeps from one unit to the next.
struct Scratch {
  std::vector<float> queries, keys, values, scores;
};

// Computes the partial results of one run and KV head: acc [lanes, width], m [lanes] and l [lanes]. There are
// rows * group lanes, and width is H rounded up to whole panels. The pages hold values of type T.
template <typename T>
void Attend(const Spec& spec, const Pool& pool, const Runs& runs, int run, int head, const float* q, int num_rows,
            int group, int width, float* acc, float* m, float* l) {
  static thread_local Scratch scratch;
  const int h = pool.h, lanes = runs.num_rows * group;
  const int *rows = runs.rows + run * runs.num_rows, *positions = runs.positions + run * runs.num_rows;
  std::fill(acc, acc + lanes * width, 0.0f);
  std::fill(m, m + lanes, kNone);
  std::fill(l, l + lanes, 0.0f);
  int used = 0, first = INT_MAX, last = -1;  // places up to the last row; lowest and highest position
  for (int r = 0; r < runs.num_rows; ++r) {
    if (positions[r] < 0) continue;
    used = r + 1, first = std::min(first, positions[r]), last = std::max(last, positions[r]);
  }
  scratch.queries.resize(lanes * h);
  scratch.keys.resize(kBlock * h);
  scratch.values.resize(kBlock * width);
  scratch.scores.resize(lanes * kBlock);
  for (int r = 0; r < used; ++r) {
    const float* from = q + ((size_t)std::min(rows[r], num_rows - 1) * pool.kv_heads + head) * group * h;
    for (int i = 0; i < group * h; ++i) scratch.queries[r * group * h + i] = from[i] * spec.scale;
  }

  // None of these rows sees a token of the run from `length` on, or in its first `unseen` pages.
  const int start = runs.start[run], length = std::min(runs.length[run], last + 1 - start);
  const int stored = std::min(runs.num_pages, (length + spec.page_stride - 1) / spec.page_stride) * pool.page_size;
  const int window = spec.window > last ? 0 : spec.window;  // one that long hides nothing
  const int unseen = window && used ? std::max(0, first - window + 1 - start) / spec.page_stride : 0;
  int places[kBlock];  // KV positions of the block's tokens; INT_MAX where no row sees it
  bool seen[kBlock];   // whether any row sees the token
  for (int begin = unseen * pool.page_size; begin < stored; begin += kBlock) {
    const int tokens = std::min(kBlock, stored - begin), padded = (tokens + kPanel - 1) / kPanel * kPanel;
    int live = 0;
    for (int t = 0; t < padded; ++t) {
      const int page = (begin + t) / pool.page_size, cell = (begin + t) % pool.page_size;
      const int token = page * spec.page_stride + pool.offset + cell, place = start + token;
      seen[t] = t < tokens && token < length;
      if (seen[t] && window) {
        seen[t] = false;
        for (int r = 0; r < used && !seen[t]; ++r)
          seen[t] = positions[r] >= place && place > positions[r] - window;
      }
      places[t] = seen[t] ? place : INT_MAX;
      live += seen[t];
    }
    if (!live) continue;
    for (int t = 0; t < padded; ++t) {  // a token that no row sees may be NaN, so it becomes zeros
      float *key = &scratch.keys[(t / kPanel) * kPanel * h + t % kPanel], *value = &scratch.values[t * width];
      if (!seen[t]) {
        for (int d = 0; d < h; ++d) key[d * kPanel] = 0.0f;
        std::fill(value, value + width, 0.0f);
        continue;
      }
      const int page = runs.pages[(size_t)run * runs.num_pages + (begin + t) / pool.page_size];
      const T* from = (const T*)pool.layer + (((size_t)page * pool.kv_heads + head) * pool.page_size +
                                              (begin + t) % pool.page_size) * 2 * h;
      for (int d = 0; d < h; ++d) key[d * kPanel] = Value(from[d]);
      for (int d = 0; d < h; ++d) value[d] = Value(from[h + d]);
      std::fill(value + h, value + width, 0.0f);
    }
    float* scores = scratch.scores.data();
    for (int t = 0; t < padded; t += kPanel)
      Product(used * group, h, scratch.queries.data(), h, &scratch.keys[t * h], kPanel, scores + t, kBlock, false);
    for (int lane = 0; lane < used * group; ++lane) {
      float* s = scores + lane * kBlock;
      const int position = positions[lane / group];
      const Ints until = Splat(position), from = Splat(window ? position - window : INT_MIN);
      if (spec.soft_cap)
        for (int t = 0; t < padded; ++t) s[t] = spec.soft_cap * std::tanh(s[t] / spec.soft_cap);
      Vec highest = Splat(m[lane]);
      Ints any = Splat(0);
      for (int t = 0; t < padded; t += kLanes) {
        const Ints place = *reinterpret_cast<const Ints*>(places + t);
        const Ints mine = (place <= until) & (place > from);
        Vec x = mine ? At(s + t) : Splat(kNone);
        At(s + t) = x, any |= mine;
        highest = x > highest ? x : highest;
      }
      float high = m[lane];
      bool sees = false;
      for (int i = 0; i < kLanes; ++i) high = std::max(high, highest[i]), sees |= any[i] != 0;
      if (!sees) {
        std::fill(s, s + padded, 0.0f);
        continue;
      }
      const float old = std::exp(m[lane] - high);
      Vec sum = Splat(0.0f);
      for (int t = 0; t < padded; t += kLanes) sum += (At(s + t) = Exp(At(s + t) - Splat(high)));
      float total = 0.0f;
      for (int i = 0; i < kLanes; ++i) total += sum[i];
      l[lane] = l[lane] * old + total, m[lane] = high;
      if (old != 1.0f)
        for (int d = 0; d < width; ++d) acc[lane * width + d] *= old;
    }
    for (int d = 0; d < width; d += kPanel)
      Product(used * group, padded, scores, kBlock, &scratch.values[d], width, acc + d, width, true);
  }
}

Runs MakeRuns(Integers& rows, Integers& positions, Integers& pages, Integers& start, Integers& length, Integers& num) {
  return {rows.typed_data(),   positions.typed_data(), pages.typed_data(),
          start.typed_data(),  length.typed_data(),    num.typed_data()[0],
          (int)rows.dimensions()[1], (int)pages.dimensions()[1]};
}

ffi::Error PagedAttention(ffi::ThreadPool threads, float scale, float soft_cap, int page_stride, Floats q,
                          ffi::AnyBuffer kv_pages, Integers layer, Integers page_offset, Integers window,
                          Integers item_rows, Integers item_positions, Integers item_pages, Integers item_start, Integers item_length,
                          Integers num_items, Integers tile_rows, Integers tile_positions, Integers tile_pages,
                          Integers tile_start, Integers tile_length, Integers num_tiles, Integers parts,
                          Integers num_parts, Result out, Result lse) {
  const auto shape = kv_pages.dimensions();
  const int num_rows = (int)q.dimensions()[0], kv_heads = (int)shape[2], h = (int)shape[4] / 2;
  const int group = (int)q.dimensions()[1] / kv_heads, width = (h + kPanel - 1) / kPanel * kPanel;
  const size_t layer_size = shape[1] * shape[2] * shape[3] * shape[4];
  const Spec spec{scale, soft_cap, window.typed_data()[0], page_stride};
  const auto dtype = kv_pages.element_type();
  const auto attend = dtype == ffi::S8 ? Attend<signed char> : dtype == ffi::F32 ? Attend<float> : Attend<Float8>;
  const size_t layer_bytes = layer_size * (dtype == ffi::F32 ? sizeof(float) : 1);
  const Pool pool{(const char*)kv_pages.untyped_data() + layer.typed_data()[0] * layer_bytes, kv_heads, (int)shape[3],
                  h, page_offset.typed_data()[0]};
  // Tiles come first because they take longest.
  const Runs both[] = {MakeRuns(tile_rows, tile_positions, tile_pages, tile_start, tile_length, num_tiles),
                       MakeRuns(item_rows, item_positions, item_pages, item_start, item_length, num_items)};

  // Partial results: for each kind of run acc [X, K, lanes, width], then m [X, K, lanes], then l [X, K, lanes].
  size_t lanes[2], begin[2], size = 0;
  for (int kind = 0; kind < 2; ++kind) {
    begin[kind] = size, lanes[kind] = (size_t)both[kind].num_rows * group;
    size += (size_t)both[kind].num * kv_heads * lanes[kind] * (width + 2);
  }
  std::unique_ptr<float[]> partial(new float[size]);
  auto place = [&](int kind, size_t lane, float*& acc, float*& m, float*& l) {
    const size_t all = (size_t)both[kind].num * kv_heads * lanes[kind];
    float* base = partial.get() + begin[kind];
    acc = base + lane * width, m = base + all * width + lane, l = m + all;
  };
  Parallel(threads, (both[0].num + both[1].num) * kv_heads, [&](int unit) {
    const int kind = unit >= both[0].num * kv_heads, index = unit - kind * both[0].num * kv_heads;
    float *acc, *m, *l;
    place(kind, index * lanes[kind], acc, m, l);
    attend(spec, pool, both[kind], index / kv_heads, index % kv_heads, q.typed_data(), num_rows, group, width, acc, m,
           l);
  });

  const int columns = (int)parts.dimensions()[1], used = num_parts.typed_data()[0];
  const int first_tile = (int)item_rows.dimensions()[0] * both[1].num_rows;
  Parallel(threads, num_rows, [&](int row) {
    const int* mine = parts.typed_data() + (size_t)row * columns;
    for (int head = 0; head < kv_heads; ++head) {
      for (int g = 0; g < group; ++g) {
        const size_t lane = ((size_t)row * kv_heads + head) * group + g;
        float* to = out->typed_data() + lane * h;
        std::fill(to, to + h, 0.0f);
        float high = kNone, total = 0.0f;
        for (int c = 0; c < used; ++c) {
          if (mine[c] < 0) continue;
          const int kind = mine[c] < first_tile, at = kind ? mine[c] : mine[c] - first_tile;
          const int r = both[kind].num_rows;
          float *acc, *m, *l;
          place(kind, ((size_t)(at / r) * kv_heads + head) * lanes[kind] + (at % r) * group + g, acc, m, l);
          if (*l == 0.0f) continue;
          const float now = std::max(high, *m), before = std::exp(high - now), share = std::exp(*m - now);
          for (int d = 0; d < h; ++d) to[d] = to[d] * before + acc[d] * share;
          total = total * before + *l * share, high = now;
        }
        if (total > 0)
          for (int d = 0; d < h; ++d) to[d] /= total;
        lse->typed_data()[lane] = total > 0 ? high + std::log(total) : kNone;
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(icarus_paged_attention, PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int32_t>("page_stride")
                                  .Arg<Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());

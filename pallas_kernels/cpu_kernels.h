// What the CPU kernels have in common: vectors of eight floats, small matrix products, work on several threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// typedef: clang drops the attributes of a `using`
typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int Ints __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int kLanes = 8;           // of a Vec
constexpr int kPanel = 2 * kLanes;  // columns that a product makes at once
constexpr int kRows = 6;            // rows likewise: 12 sums, which 16 registers hold beside their inputs

Vec Splat(float x) { return Vec{x, x, x, x, x, x, x, x}; }
Ints Splat(int x) { return Ints{x, x, x, x, x, x, x, x}; }
Vec& At(float* p) { return *reinterpret_cast<Vec*>(p); }
const Vec& At(const float* p) { return *reinterpret_cast<const Vec*>(p); }

// c [R, kPanel] = (add ? c : 0) + a [R, k] @ b [k, kPanel]
template <int R>
void Tile(int k, const float* a, int lda, const float* b, int ldb, float* c, int ldc, bool add) {
  Vec sums[R][2];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 2; ++j) sums[r][j] = add ? At(c + r * ldc + j * kLanes) : Splat(0.0f);
  for (int p = 0; p < k; ++p) {
    Vec b0 = At(b + p * ldb), b1 = At(b + p * ldb + kLanes);
    for (int r = 0; r < R; ++r) {
      Vec x = Splat(a[r * lda + p]);
      sums[r][0] += x * b0;
      sums[r][1] += x * b1;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 2; ++j) At(c + r * ldc + j * kLanes) = sums[r][j];
}

// The same for any number of rows and one panel of columns.
void Product(int m, int k, const float* a, int lda, const float* b, int ldb, float* c, int ldc, bool add) {
  const int tiles = (m + kRows - 1) / kRows, rows = tiles ? (m + tiles - 1) / tiles : 0;  // all about as high
  for (int i = 0; i < m; i += rows, a += rows * lda, c += rows * ldc) {
    switch (std::min(rows, m - i)) {
      case 1: Tile<1>(k, a, lda, b, ldb, c, ldc, add); break;
      case 2: Tile<2>(k, a, lda, b, ldb, c, ldc, add); break;
      case 3: Tile<3>(k, a, lda, b, ldb, c, ldc, add); break;
      case 4: Tile<4>(k, a, lda, b, ldb, c, ldc, add); break;
      case 5: Tile<5>(k, a, lda, b, ldb, c, ldc, add); break;
      default: Tile<kRows>(k, a, lda, b, ldb, c, ldc, add);
    }
  }
}

// work(i) for i < count, on the calling thread and on those of the pool that come to it in time.
template <typename Work>
void Parallel(ffi::ThreadPool& pool, int count, const Work& work) {
  struct Shared {
    std::atomic<int> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  // `work` lives as long as there is something to do: who comes later finds no number left and does not touch it
  auto help = [shared, count, &work]() noexcept {  // an exception would leave the others with a `work` that is gone
    for (int i; (i = shared->next.fetch_add(1)) < count; shared->done.fetch_add(1)) work(i);
  };
  for (int i = std::min<int>(pool.num_threads(), count) - 1; i > 0; --i) pool.Schedule(decltype(help)(help));
  help();
  while (shared->done.load() < count) std::this_thread::yield();
}

using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;
using Result = ffi::ResultBuffer<ffi::F32>;

}  // namespace

// What the CPU kernels share: vectors of eight floats, small matrix products, and work on several threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// These are typedefs because clang drops the attributes of a `using`.
typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int Ints __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int kLanes = 8;           // lanes of a Vec
constexpr int kPanel = 2 * kLanes;  // columns that a product computes at once
constexpr int kRows = 6;            // rows, too; 12 sums and their inputs fit in 16 registers

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

// c [m, kPanel] = (add ? c : 0) + a [m, k] @ b [k, kPanel], for any number of rows m.
void Product(int m, int k, const float* a, int lda, const float* b, int ldb, float* c, int ldc, bool add) {
  const int tiles = (m + kRows - 1) / kRows, rows = tiles ? (m + tiles - 1) / tiles : 0;  // tiles of about equal height
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

// Calls work(i) once for each i < count, on the calling thread and on those threads of the pool that start in time.
// Returns when all calls are done.
template <typename Work>
void Parallel(ffi::ThreadPool& pool, int count, const Work& work) {
  struct Shared {
    std::atomic<int> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  // `work` may be gone when a thread starts late. That thread finds no number below `count` and does not touch `work`.
  // noexcept: an exception would end this function, and `work` with it, while other threads still use it.
  auto help = [shared, count, &work]() noexcept {
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

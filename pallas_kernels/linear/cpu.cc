// Rows times one layer of stacked weights, on CPUs: the whole op (api.py), for float32.
//
// XLA copies a layer out of the stack and packs it before each product, which costs more than the product itself if
// the rows are few. Here a thread takes some columns, copies them in blocks that its cache holds, as the product
// reads them, and fetches the next block from memory while it computes.

#include <vector>

#include "cpu_kernels.h"

namespace {

constexpr int kDepth = 64;     // of a block, along din
constexpr int kColumns = 512;  // at most
constexpr int kShares = 4;     // of the columns, at least, for each thread

struct Scratch {
  std::vector<float> block;
};

// out [rows, columns] = x [rows, din] @ w [din, columns], of arrays that are `ldw` columns wide.
void Columns(int rows, int din, int columns, const float* x, const float* w, int ldw, float* out) {
  static thread_local Scratch scratch;
  scratch.block.resize(kDepth * kColumns);
  float* block = scratch.block.data();
  const int panels = columns / kPanel;
  for (int p = 0; p < din; p += kDepth) {
    const int depth = std::min(kDepth, din - p), next = std::min(kDepth, din - p - depth);
    for (int i = 0; i < depth; ++i)
      for (int panel = 0; panel < panels; ++panel)
        for (int j = 0; j < kPanel; j += kLanes)
          At(block + (panel * depth + i) * kPanel + j) = At(w + (size_t)(p + i) * ldw + panel * kPanel + j);
    const int share = (next + panels - 1) / panels;  // rows of the next block that each panel fetches
    for (int panel = 0; panel < panels; ++panel) {
      for (int i = panel * share; i < std::min(next, (panel + 1) * share); ++i)
        for (int j = 0; j < columns; j += 16) __builtin_prefetch(w + (size_t)(p + depth + i) * ldw + j, 0, 2);
      Product(rows, depth, x + p, din, block + panel * depth * kPanel, kPanel, out + panel * kPanel, ldw, p > 0);
    }
  }
}

ffi::Error Linear(ffi::ThreadPool threads, Floats x, Floats w, Integers layer, Result out) {
  const int rows = (int)x.dimensions()[0], din = (int)x.dimensions()[1];
  const int dout = (int)(out->element_count() / std::max(rows, 1));
  const float* weights = w.typed_data() + (size_t)layer.typed_data()[0] * din * dout;
  // Columns in about equal shares of whole panels. More shares than threads: one that wakes up late does less.
  const int panels = dout / kPanel, most = kColumns / kPanel, workers = std::max<int>(threads.num_threads(), 1);
  const int units = std::min(panels, std::max(kShares * workers, (panels + most - 1) / most));
  Parallel(threads, units, [&](int unit) {
    const int first = panels * unit / units * kPanel, last = panels * (unit + 1) / units * kPanel;
    Columns(rows, din, last - first, x.typed_data(), weights + first, dout, out->typed_data() + first);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(icarus_linear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Ret<Floats>());

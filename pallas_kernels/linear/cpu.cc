// The product of rows and one layer of stacked weights, on CPUs: the whole op (api.py), for float32 and weights in
// panels.
//
// A thread takes some panels of columns and reads each from its beginning to its end. With up to kTogether rows it
// reads each panel once.

#include "cpu_kernels.h"

namespace {

constexpr int kShares = 4;      // the panels are cut into this many shares for each thread
constexpr int kTogether = 192;  // rows multiplied at once; a cache holds them while the panels are read
constexpr int kDepth = 2048;    // inputs summed at once; a cache holds this part of a panel for all rows

// x [B, din], w [L, dout / kPanel, din, kPanel], layer [1]: out [B, dout]
ffi::Error Linear(ffi::ThreadPool threads, Floats x, Floats w, Integers layer, Result out) {
  const int rows = (int)x.dimensions()[0], din = (int)x.dimensions()[1];
  const int panels = (int)w.dimensions()[1], dout = panels * kPanel;
  const size_t size = (size_t)din * kPanel;  // of one panel
  const float* weights = w.typed_data() + layer.typed_data()[0] * panels * size;
  // There are more shares than threads, so that a thread that wakes up late does less.
  const int units = std::min(panels, kShares * std::max<int>(threads.num_threads(), 1));
  Parallel(threads, units, [&](int unit) {
    const int first = panels * unit / units, last = panels * (unit + 1) / units;
    for (int row = 0; row < rows; row += kTogether)
      for (int panel = first; panel < last; ++panel)
        for (int d = 0; d < din; d += kDepth)
          Product(std::min(kTogether, rows - row), std::min(kDepth, din - d), x.typed_data() + (size_t)row * din + d,
                  din, weights + panel * size + (size_t)d * kPanel, kPanel,
                  out->typed_data() + (size_t)row * dout + panel * kPanel, dout, d > 0);
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

// Low-rank adapters chosen row by row, on CPUs: the whole op (api.py), for float32.
//
// A unit of work is some rows of one slot. They are copied next to each other, so that a unit reads the factors of its
// own adapter once, and no other factors.

#include <cstring>
#include <vector>

#include "cpu_kernels.h"

namespace {

constexpr int kTogether = 24;  // the most rows of a unit
constexpr int kRanks = 4;      // hidden values of a row that are computed at once

struct Buffers {
  std::vector<float> x, hidden, out;
};

// hidden [R, rank] = x [R, din] @ a [rank, din]^T
template <int R>
void Down(int rank, int din, const float* x, const float* a, float* hidden) {
  for (int first = 0; first < rank; first += kRanks) {
    const float* lanes[kRanks];  // rows of a; the last one again beyond the last
    for (int j = 0; j < kRanks; ++j) lanes[j] = a + (size_t)std::min(first + j, rank - 1) * din;
    Vec sums[R][kRanks];
    for (auto& of_row : sums)
      for (auto& sum : of_row) sum = Splat(0.0f);
    int d = 0;
    for (; d + kLanes <= din; d += kLanes) {
      for (int j = 0; j < kRanks; ++j) {
        const Vec lane = At(lanes[j] + d);
        for (int r = 0; r < R; ++r) sums[r][j] += At(x + r * din + d) * lane;
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < std::min(kRanks, rank - first); ++j) {
        float total = 0.0f;
        for (int i = 0; i < kLanes; ++i) total += sums[r][j][i];
        for (int i = d; i < din; ++i) total += x[r * din + i] * lanes[j][i];
        hidden[r * rank + first + j] = total;
      }
    }
  }
}

ffi::Error Lora(ffi::ThreadPool threads, Floats x, Floats a, Floats b, Integers layer, Integers slots, Integers active,
                Result out) {
  const int rows = (int)x.dimensions()[0], din = (int)x.dimensions()[1], dout = (int)b.dimensions()[3];
  const int num_slots = (int)a.dimensions()[1], rank = (int)a.dimensions()[2];
  const size_t first_adapter = (size_t)layer.typed_data()[0] * num_slots;
  float* to = out->typed_data();
  std::fill(to, to + (size_t)rows * dout, 0.0f);

  std::vector<std::vector<int>> units;  // each holds the indices of rows of one slot
  const int* of = slots.typed_data();
  for (size_t u = 0; u < active.element_count(); ++u) {
    const int slot = active.typed_data()[u];
    if (slot <= 0 || slot > num_slots) continue;
    std::vector<int> unit;
    for (int row = 0; row < rows; ++row) {
      if (of[row] != slot) continue;
      unit.push_back(row);
      if (unit.size() == kTogether) units.push_back(std::move(unit)), unit.clear();
    }
    if (!unit.empty()) units.push_back(std::move(unit));
  }

  Parallel(threads, (int)units.size(), [&](int index) {
    static thread_local Buffers buffers;
    const std::vector<int>& unit = units[index];
    const int m = (int)unit.size();
    buffers.x.resize(kTogether * din), buffers.hidden.resize(kTogether * rank), buffers.out.resize(kTogether * dout);
    float *from = buffers.x.data(), *hidden = buffers.hidden.data(), *made = buffers.out.data();
    for (int i = 0; i < m; ++i) std::memcpy(from + i * din, x.typed_data() + (size_t)unit[i] * din, din * sizeof(float));
    const size_t adapter = (first_adapter + of[unit[0]] - 1) * rank;
    const float *down = a.typed_data() + adapter * din, *up = b.typed_data() + adapter * dout;
    for (int i = 0; i < m; i += 2) {
      if (i + 1 < m) {
        Down<2>(rank, din, from + i * din, down, hidden + i * rank);
      } else {
        Down<1>(rank, din, from + i * din, down, hidden + i * rank);
      }
    }
    for (int d = 0; d < dout; d += kPanel) Product(m, rank, hidden, rank, up + d, dout, made + d, dout, false);
    for (int i = 0; i < m; ++i) std::memcpy(to + (size_t)unit[i] * dout, made + i * dout, dout * sizeof(float));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(icarus_lora, Lora,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Ret<Floats>());

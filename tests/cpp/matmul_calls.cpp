// Multiplies M rows with one quantised matrix a number of times: what benchmarks/instruction_counts.py counts.
//
//   matmul_calls <isa> <bits> <group> <N> <K> <M> <calls>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "dispatch.hpp"
#include "rows_buffer.hpp"
#include "thread_pool.hpp"

using namespace specfast;

int main(int argc, char** argv) {
  if (argc != 8) {
    std::fprintf(stderr, "usage: matmul_calls <isa> <bits> <group> <N> <K> <M> <calls>\n");
    return 2;
  }
  std::string why;
  const KernelTable* kernels = find_kernels(argv[1], &why);
  if (!kernels) {
    std::fprintf(stderr, "%s\n", why.c_str());
    return 1;
  }
  Matrix w;
  w.format = std::atoi(argv[2]) == 4 ? Format::q4 : Format::q8;
  w.scale_format = Format::bf16;
  w.group = std::atoi(argv[3]);
  w.N = std::atoi(argv[4]);
  w.K = std::atoi(argv[5]);
  const int M = std::atoi(argv[6]), calls = std::atoi(argv[7]);
  const std::vector<uint8_t> bytes(static_cast<size_t>(w.N) * w.row_bytes());
  w.weight = w.scales = w.biases = bytes.data();  // zeros: the instructions do not depend on the values

  RowsBuffer buffer(w.K);
  const Needs needs = needs_of({&w}, Precision::int8);
  buffer.reserve(needs);
  const Rows rows = buffer.view(M);
  prepare_rows(Team{}, *kernels, rows, needs);
  std::vector<float> scratch(matmul_scratch_floats(w.K)), y(static_cast<size_t>(M) * w.N);
  for (int i = 0; i < calls; i++)
    kernels->matmul_rows(w, rows, Activation::int8, 0, w.N, y.data(), w.N, {}, scratch.data());
  return 0;
}

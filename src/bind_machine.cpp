// What this build holds and what this machine can do: kernels, threads, read bandwidth, multiply-add rate.
#include <chrono>
#include <numeric>

#include "bindings.hpp"
#include "dispatch.hpp"
#include "thread_pool.hpp"

using namespace specfast;

namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

nb::dict build_info() {
  nb::dict info;
  nb::list compiled, supported, kernels;
  for (const IsaEntry& entry : compiled_isas()) {
    compiled.append(entry.table->isa);
    if (entry.supported) supported.append(entry.table->isa);
    for (int i = 0; i < entry.table->infos_count; i++) {
      nb::dict kernel;
      kernel["stem"] = entry.table->infos[i].stem;
      kernel["name"] = entry.table->infos[i].name;
      kernel["isa"] = entry.table->isa;
      kernel["needs"] = entry.table->features;
      kernels.append(kernel);
    }
  }
  std::string problem;
  const KernelTable* selected = find_kernels("", &problem);
  nb::list chosen;
  for (int i = 0; selected && i < selected->infos_count; i++) chosen.append(selected->infos[i].name);
  info["version"] = SPECFAST_VERSION;
  info["compiler"] = SPECFAST_COMPILER;
  info["isas_compiled"] = compiled;
  info["isas_supported"] = supported;
  info["isa"] = selected ? nb::object(nb::str(selected->isa)) : nb::object(nb::none());
  info["isa_problem"] = selected ? nb::object(nb::none()) : nb::object(nb::str(problem.c_str()));
  info["kernels"] = kernels;
  info["selected"] = chosen;
  info["threads"] = ThreadPool::instance().size();
  return info;
}

double peak_dot(const std::string& kind, const std::optional<std::string>& isa, double milliseconds) {
  const KernelTable& kernels = kernels_named(isa);
  const Precision precision = precision_named(kind);
  const Activation activation = precision == Precision::int8   ? Activation::int8
                                : precision == Precision::bf16 ? Activation::bf16
                                                               : Activation::f32;
  if (!(milliseconds > 0 && milliseconds <= 60000))
    throw ShapeError("milliseconds must be above 0 and at most 60000, not " + std::to_string(milliseconds));
  WithoutGil released;
  std::vector<double> rates(static_cast<size_t>(ThreadPool::instance().size()) + 256);
  ThreadPool::instance().run([&](const Team& team) {
    kernels.peak_dot(activation, 20000);
    team.barrier();
    const double start = seconds_now();
    double done = 0;
    while (seconds_now() - start < milliseconds * 1e-3)
      done += static_cast<double>(kernels.peak_dot(activation, 20000));
    rates[static_cast<size_t>(team.id)] = done / (seconds_now() - start);
  });
  return std::accumulate(rates.begin(), rates.end(), 0.0) * 1e-9;
}

double read_bandwidth(const Bytes& buffer, int passes) {
  const KernelTable& kernels = kernels_named(std::nullopt);
  const uint8_t* data = buffer.data();
  const size_t lines = buffer.nbytes() / 512;
  if (passes < 1 || passes > 10000) throw ShapeError("passes must be in 1 to 10000, not " + std::to_string(passes));
  if (lines == 0)
    throw ShapeError("the buffer of " + std::to_string(buffer.nbytes()) + " bytes is too small to measure");
  WithoutGil released;
  std::atomic<uint32_t> sink{0};
  const double start = seconds_now();
  for (int pass = 0; pass < passes; pass++) {
    ThreadPool::instance().run([&](const Team& team) {
      const size_t first = lines * static_cast<size_t>(team.id) / static_cast<size_t>(team.size);
      const size_t last = lines * static_cast<size_t>(team.id + 1) / static_cast<size_t>(team.size);
      sink.fetch_xor(kernels.read_bytes(data + first * 512, (last - first) * 512), std::memory_order_relaxed);
    });
  }
  return static_cast<double>(lines) * 512 * passes / (seconds_now() - start) * 1e-9;
}

}  // namespace

void bind_machine(nb::module_& m) {
  m.def("build_info", &build_info,
        "Version, compiled and supported instruction sets, kernels by name, the selected ones, threads. Where "
        "SPECFAST_ISA "
        "names no usable table, `isa` is None and `isa_problem` says why.");
  m.def(
      "set_num_threads",
      [](int threads) {
        if (threads < 1 || threads > 256)
          throw ShapeError("threads must be in 1 to 256, not " + std::to_string(threads));
        WithoutGil released;
        ThreadPool::instance().set_size(threads);
      },
      nb::arg("threads"),
      "The most threads of a native call, 1 to 256; results do not depend on it. Those that other programs keep off "
      "their cores\nare left out. More than usable_cpus() makes calls slow.");
  m.def("num_threads", [] { return ThreadPool::instance().size(); }, "Threads asked for: set, else one per core.");
  m.def(
      "start_threads", [] { return ThreadPool::instance().start(); }, nb::call_guard<WithoutGil>(),
      "Starts the threads if they are not there yet; how many there are, which is fewer than num_threads() where the "
      "system\nstarts no more. Calls run on those, with the same results.");
  m.def("usable_cpus", &usable_cpus, "Hardware threads this process may use: its affinity, cut by the cgroup's quota.");
  m.def("peak_dot", &peak_dot, nb::arg("kind"), nb::arg("isa") = nb::none(), nb::arg("milliseconds") = 50.0,
        "Multiply-adds per second, in GMAC/s over all threads, of the dot instruction of precision `kind`.");
  m.def("read_bandwidth", &read_bandwidth, nb::arg("buffer").noconvert(), nb::arg("passes") = 1,
        "GB/s over all threads of reading a uint8 array from end to end.");
}

// What a translated file, the runtime and the callers share.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {
constexpr unsigned max_buffers = 31;
constexpr unsigned simdgroup_width = 32;
constexpr unsigned max_threads = 1024;
constexpr std::size_t max_threadgroup_bytes = 32768;

struct Thread;  // execution.h
using Entry = void (*)(const Thread&, void** buffers);
struct Kernel {
  const char* name;
  Entry entry;
};
extern "C" const Kernel emulator_kernels[];  // in the translated file; ends with a null name

struct Launch {
  unsigned threadgroups[3], threadgroup_size[3];
  void* buffers[max_buffers];
  std::size_t buffer_bytes[max_buffers];
  std::uint64_t schedule;  // 0: every simdgroup in turn; others: a random order
};
struct Counters {
  std::uint64_t collectives, barriers, threadgroup_bytes;
  std::uint64_t read_bytes[max_buffers], unique_read_bytes[max_buffers], written_bytes[max_buffers];  // count mode only
};

// Returns 0, or 1 with a message.
extern "C" int emulator_run(const char* kernel, const Launch* launch, Counters* counters, char* message, std::size_t message_bytes);

// count.cpp: accesses made between two collectives of a simdgroup form one pass.
void count_begin_launch(const Launch& launch);
void count_begin_pass();
void count_begin_threadgroup();
void count_begin_lane(unsigned thread);
void count_end_launch(Counters& counters);
}  // namespace emulator

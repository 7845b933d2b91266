// Counts device-memory bytes. A file compiled for counting calls __tsan_read and __tsan_write at every load and store
// (the compiler's thread sanitizer puts them there, after optimisation); these are ours, not the sanitizer's.
//
// The n-th execution of one load instruction by the 32 lanes of a simdgroup is one access, as on a GPU: bytes that
// several lanes ask for in it are counted once. The same byte loaded by another instruction, a later execution of the
// same one, another simdgroup or another threadgroup is counted again, with one exception: what a lane has loaded among
// its last eight loads it still holds in a register. (Where the CPU's compiler must load again, because a store between
// might have changed the byte, Metal's knows that address spaces do not overlap.)
#include "runtime.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace emulator {
namespace {
struct Buffer {
  std::uintptr_t begin, end;
  unsigned index;
  std::vector<bool> seen;
};
std::vector<Buffer> buffers;
std::uint64_t read_bytes[max_buffers], unique_read_bytes[max_buffers], written_bytes[max_buffers];
std::uint64_t pass;
unsigned thread;  // its index in the threadgroup

// The last loads of every thread of the threadgroup.
struct Registers {
  static constexpr unsigned size = 8;
  struct Load {
    std::uintptr_t address;
    std::size_t bytes;
  };
  Load loads[max_threads][size];
  unsigned next[max_threads];
  bool hold(std::uintptr_t address, std::size_t bytes) {
    for (const Load& l : loads[thread])
      if (l.address <= address && address + bytes <= l.address + l.bytes) return true;
    loads[thread][next[thread]++ % size] = {address, bytes};
    return false;
  }
} registers;

std::size_t hash(std::uint64_t a, std::uint64_t b) {
  std::uint64_t h = (a * 0x9E3779B97F4A7C15ull) ^ (b + 0x7F4A7C15ull) * 0xC2B2AE3D27D4EB4Full;
  return static_cast<std::size_t>(h ^ h >> 29);
}

// How often each instruction ran in this lane and pass.
struct Executions {
  struct Entry {
    std::uintptr_t site;
    std::uint64_t pass;
    unsigned thread, times;
  };
  std::vector<Entry> entries = std::vector<Entry>(4096);
  unsigned next(std::uintptr_t site) {
    std::size_t at = hash(site, 0) % entries.size();
    while (entries[at].site && entries[at].site != site) at = (at + 1) % entries.size();
    Entry& e = entries[at];
    if (e.site != site || e.pass != pass || e.thread != thread) e = {site, pass, thread, 0};
    return e.times++;
  }
} executions;

// Which bytes of a 64-byte line one access has asked for.
struct Lines {
  struct Entry {
    std::uintptr_t site;
    std::uint64_t line, pass, bytes;
    unsigned execution;
  };
  std::vector<Entry> entries = std::vector<Entry>(1 << 12);
  std::uint64_t used_in_pass = 0, last_pass = 0;
  std::uint64_t add(std::uintptr_t site, unsigned execution, std::uint64_t line, std::uint64_t bytes) {
    if (last_pass != pass) last_pass = pass, used_in_pass = 0;
    if (used_in_pass * 2 > entries.size()) grow();
    Entry& e = find(site, execution, line);
    if (e.pass != pass) e = {site, line, pass, 0, execution}, used_in_pass++;
    const std::uint64_t fresh = bytes & ~e.bytes;
    e.bytes |= bytes;
    return fresh;
  }
  Entry& find(std::uintptr_t site, unsigned execution, std::uint64_t line) {
    std::size_t at = hash(site + execution * 0x100000001B3ull, line) & (entries.size() - 1);
    while (entries[at].pass == pass &&
           !(entries[at].site == site && entries[at].execution == execution && entries[at].line == line))
      at = (at + 1) & (entries.size() - 1);
    return entries[at];
  }
  void grow() {
    std::vector<Entry> old(entries.size() * 2);
    old.swap(entries);
    for (const Entry& e : old)
      if (e.pass == pass) find(e.site, e.execution, e.line) = e;
  }
} lines;

void access(std::uintptr_t address, std::size_t bytes, std::uintptr_t site, bool write) {
  for (Buffer& b : buffers) {
    if (address < b.begin || address >= b.end) continue;
    const unsigned execution = executions.next(site * 2 + write);
    if (!write && registers.hold(address, bytes)) return;
    for (std::size_t done = 0; done < bytes;) {
      const std::uintptr_t at = address + done;
      const std::size_t chunk = std::min(bytes - done, std::size_t{64} - at % 64);
      const std::uint64_t mask = (chunk == 64 ? ~0ull : (1ull << chunk) - 1) << at % 64;
      const unsigned fresh = __builtin_popcountll(lines.add(site * 2 + write, execution, at / 64, mask));
      (write ? written_bytes : read_bytes)[b.index] += fresh;
      if (!write)
        for (std::size_t i = at - b.begin; i < at - b.begin + chunk && i < b.seen.size(); i++)
          if (!b.seen[i]) b.seen[i] = true, unique_read_bytes[b.index]++;
      done += chunk;
    }
    return;
  }
}
}  // namespace

void count_begin_launch(const Launch& launch) {
  buffers.clear();
  for (unsigned i = 0; i < max_buffers; i++) {
    read_bytes[i] = unique_read_bytes[i] = written_bytes[i] = 0;
    const auto begin = reinterpret_cast<std::uintptr_t>(launch.buffers[i]);
    if (begin) buffers.push_back({begin, begin + launch.buffer_bytes[i], i, std::vector<bool>(launch.buffer_bytes[i])});
  }
}
void count_begin_pass() {
  pass++;
}
void count_begin_lane(unsigned index) {
  thread = index;
}
void count_begin_threadgroup() {
  registers = Registers{};
}
void count_end_launch(Counters& counters) {
  std::memcpy(counters.read_bytes, read_bytes, sizeof read_bytes);
  std::memcpy(counters.unique_read_bytes, unique_read_bytes, sizeof read_bytes);
  std::memcpy(counters.written_bytes, written_bytes, sizeof read_bytes);
  buffers.clear();
}

extern "C" {
#define EMULATOR_ACCESS(name, bytes, write)                                       \
  void name(void* address) {                                                      \
    access(reinterpret_cast<std::uintptr_t>(address), bytes,                      \
           reinterpret_cast<std::uintptr_t>(__builtin_return_address(0)), write); \
  }
#define EMULATOR_SIZE(bytes)                                 \
  EMULATOR_ACCESS(__tsan_read##bytes, bytes, false)          \
  EMULATOR_ACCESS(__tsan_write##bytes, bytes, true)          \
  EMULATOR_ACCESS(__tsan_volatile_read##bytes, bytes, false) \
  EMULATOR_ACCESS(__tsan_volatile_write##bytes, bytes, true)
EMULATOR_SIZE(1);
EMULATOR_SIZE(2);
EMULATOR_SIZE(4);
EMULATOR_SIZE(8);
EMULATOR_SIZE(16);
#define EMULATOR_UNALIGNED(bytes)                             \
  EMULATOR_ACCESS(__tsan_unaligned_read##bytes, bytes, false) \
  EMULATOR_ACCESS(__tsan_unaligned_write##bytes, bytes, true)
EMULATOR_UNALIGNED(2);
EMULATOR_UNALIGNED(4);
EMULATOR_UNALIGNED(8);
EMULATOR_UNALIGNED(16);
void __tsan_read_range(void* address, std::size_t bytes) {
  access(reinterpret_cast<std::uintptr_t>(address), bytes,
         reinterpret_cast<std::uintptr_t>(__builtin_return_address(0)), false);
}
void __tsan_write_range(void* address, std::size_t bytes) {
  access(reinterpret_cast<std::uintptr_t>(address), bytes,
         reinterpret_cast<std::uintptr_t>(__builtin_return_address(0)), true);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

// The compiler replaces every atomic operation by a call; one lane runs at a time, so a plain one will do.
#define EMULATOR_ATOMIC_CALL(name, T, after)                                                   \
  T name(volatile T* a, T x, int) {                                                            \
    const std::uintptr_t site = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0)); \
    access(reinterpret_cast<std::uintptr_t>(a), sizeof(T), site, false);                       \
    access(reinterpret_cast<std::uintptr_t>(a), sizeof(T), site, true);                        \
    const T old = *a;                                                                          \
    *a = after;                                                                                \
    return old;                                                                                \
  }
EMULATOR_ATOMIC_CALL(__tsan_atomic32_fetch_add, std::uint32_t, old + x);
EMULATOR_ATOMIC_CALL(__tsan_atomic32_fetch_sub, std::uint32_t, old - x);
EMULATOR_ATOMIC_CALL(__tsan_atomic32_fetch_or, std::uint32_t, old | x);
EMULATOR_ATOMIC_CALL(__tsan_atomic32_fetch_and, std::uint32_t, old& x);
EMULATOR_ATOMIC_CALL(__tsan_atomic32_fetch_xor, std::uint32_t, old ^ x);
EMULATOR_ATOMIC_CALL(__tsan_atomic32_exchange, std::uint32_t, x);
EMULATOR_ATOMIC_CALL(__tsan_atomic64_fetch_add, std::uint64_t, old + x);
EMULATOR_ATOMIC_CALL(__tsan_atomic64_exchange, std::uint64_t, x);
std::uint32_t __tsan_atomic32_load(const volatile std::uint32_t* a, int) {
  access(reinterpret_cast<std::uintptr_t>(a), 4, reinterpret_cast<std::uintptr_t>(__builtin_return_address(0)), false);
  return *a;
}
void __tsan_atomic32_store(volatile std::uint32_t* a, std::uint32_t x, int) {
  access(reinterpret_cast<std::uintptr_t>(a), 4, reinterpret_cast<std::uintptr_t>(__builtin_return_address(0)), true);
  *a = x;
}
int __tsan_atomic32_compare_exchange_strong(volatile std::uint32_t* a, std::uint32_t* expected, std::uint32_t x, int,
                                            int) {
  access(reinterpret_cast<std::uintptr_t>(a), 4, reinterpret_cast<std::uintptr_t>(__builtin_return_address(0)), false);
  if (*a != *expected) return *expected = *a, 0;
  *a = x;
  return 1;
}
}
}  // namespace emulator

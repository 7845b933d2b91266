// The process-wide thread pool.
#include "thread_pool.hpp"

#include <unistd.h>

#include <algorithm>
#include <exception>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#endif

namespace specfast {
namespace {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/// Waits until `value` is no longer `old`: some tens of microseconds of spinning, then the kernel's wait.
void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  constexpr int kSpins = 4000;
  for (int i = 0; i < kSpins; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause_cpu();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

#if defined(__linux__)
int read_int(const std::string& path) {
  std::ifstream file(path);
  int value = -1;
  file >> value;
  return file ? value : -1;
}

/// CPUs the cgroup's quota allows, rounded, at most `count`.
int within_quota(int count) {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (file >> quota >> period && quota != "max" && period > 0)
    count = static_cast<int>(std::min<double>(count, std::stod(quota) / period + 0.5));
  return std::max(1, count);
}
#endif

}  // namespace

int usable_cores() {
#if defined(__linux__)
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return std::max(1u, std::thread::hardware_concurrency());
  std::set<std::pair<int, int>> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    const int core = read_int(topology + "core_id");
    cores.insert(core < 0 ? std::pair{-1, cpu} : std::pair{read_int(topology + "physical_package_id"), core});
  }
  return within_quota(static_cast<int>(cores.size()));
#else
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#endif
}

int usable_cpus() {
#if defined(__linux__)
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return within_quota(CPU_COUNT(&allowed));
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

void Barrier::take_core(int id) noexcept {
#if defined(__linux__)
  const int core = sched_getcpu();
  cores_[static_cast<size_t>(id)].number.store(core, std::memory_order_relaxed);
  bool taken = false;
  for (int other = 0; other < id; other++)
    taken |= cores_[static_cast<size_t>(other)].number.load(std::memory_order_relaxed) == core;
  if (!taken) return;
  cpu_set_t allowed, free;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  free = allowed;
  for (const Core& other : cores_) {
    const int number = other.number.load(std::memory_order_relaxed);
    if (number >= 0) CPU_CLR(number, &free);
  }
  if (CPU_COUNT(&free) == 0) return;
  sched_setaffinity(0, sizeof free, &free);  // moves at once
  sched_setaffinity(0, sizeof allowed, &allowed);
  cores_[static_cast<size_t>(id)].number.store(sched_getcpu(), std::memory_order_relaxed);
#else
  (void)id;
#endif
}

void Barrier::wait(int id) noexcept {
  take_core(id);
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
    return;
  }
  wait_for_change(phase_, phase);
}

struct ThreadPool::Crew {
  /// Starts the threads, or as many of them as the system allows.
  explicit Crew(int threads) : asked(threads), barrier(threads) {
    workers.reserve(static_cast<size_t>(threads));
    try {
      for (int id = 1; id < threads; id++) workers.emplace_back([this, id] { work(id); });
    } catch (const std::exception&) {  // std::system_error, or std::bad_alloc: no room for one more
    }
    size = static_cast<int>(workers.size()) + 1;
    barrier.set_threads(size);
  }
  ~Crew() {
    stop = true;
    calls.fetch_add(1, std::memory_order_release);
    calls.notify_all();
    for (auto& worker : workers) worker.join();
  }
  void work(int id) {
    for (uint32_t seen = 0;;) {
      wait_for_change(calls, seen);
      seen++;
      if (stop) return;
      barrier.take_core(id);
      (*call)(Team{id, size, &barrier});
      barrier.wait(id);
    }
  }

  const int asked;
  int size = 1;  // workers read it only once they are called
  Barrier barrier;
  const Call* call = nullptr;
  bool stop = false;
  alignas(64) std::atomic<uint32_t> calls{0};
  std::vector<std::thread> workers;
};

ThreadPool& ThreadPool::instance() {
  static ThreadPool* pool = new ThreadPool;  // never destroyed: threads may outlive static destruction
  return *pool;
}

int ThreadPool::size() {
  if (wanted_ == 0) wanted_ = usable_cores();
  return wanted_;
}

void ThreadPool::set_size(int threads) {
  wanted_ = std::max(1, threads);
  was_set_ = true;
}

int ThreadPool::start() {
  run([](const Team&) {});
  return started_;
}

bool ThreadPool::size_was_set() {
  return was_set_;
}

ThreadPool::Crew& ThreadPool::crew() {
  const int wanted = size();
  const int pid = static_cast<int>(getpid());
  if (crew_ && crew_pid_ != pid) crew_ = nullptr;  // the parent's threads do not exist here
  if (crew_ && crew_->asked != wanted) {
    delete crew_;
    crew_ = nullptr;
  }
  if (!crew_) {
    crew_ = new Crew(wanted);
    crew_pid_ = pid;
    started_ = crew_->size;
  }
  return *crew_;
}

void ThreadPool::run_erased(bool alone, const Call& call) {
  std::unique_lock<std::mutex> lock(busy_, std::defer_lock);
  Crew* threads = !alone && lock.try_lock() ? &crew() : nullptr;
  if (!threads || threads->size == 1) {
    call.prepare(call.prepare_context, 1);
    call(Team{});
    return;
  }
  call.prepare(call.prepare_context, threads->size);
  threads->call = &call;
  threads->barrier.take_core(0);
  threads->calls.fetch_add(1, std::memory_order_release);
  threads->calls.notify_all();
  call(Team{0, threads->size, &threads->barrier});
  threads->barrier.wait(0);
}

}  // namespace specfast

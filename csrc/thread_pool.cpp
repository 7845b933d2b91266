// The process-wide thread pool.
#include "thread_pool.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
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

using Clock = std::chrono::steady_clock;

/// Some tens of microseconds.
constexpr int kSpins = 4000;

/// Waits until `value` is no longer `old`: spins, then waits in the kernel. Returns how long it waited there.
Clock::duration wait_for_change(const std::atomic<uint32_t>& value, uint32_t old, int spins = kSpins) {
  for (int i = 0; i < spins; i++) {
    if (value.load(std::memory_order_acquire) != old) return {};
    pause_cpu();
  }
  const Clock::time_point start = Clock::now();
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
  return Clock::now() - start;
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
  const int threads =
      threads_.load(std::memory_order_relaxed);  // before the others can go on, to a call of other threads
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
    return;
  }
  const Clock::duration waited = wait_for_change(phase_, phase);
  if (waited > std::chrono::milliseconds(1)) stalled_.fetch_add(waited.count(), std::memory_order_relaxed);
}

int Share::threads(Clock::time_point now) {
  trying_ = threads_ < most_ && now >= again_;
  return threads_ + (trying_ ? 1 : 0);
}

void Share::saw(int threads, Clock::duration took, Clock::duration stalled, Clock::time_point now) {
  if (took < std::chrono::milliseconds(1) || threads == 1) return;
  const bool kept_off = stalled > (threads - 1) * took / 4;
  if (trying_) {
    if (kept_off) {
      hold_ = std::min<Clock::duration>(2 * hold_, std::chrono::seconds(4));
      again_ = now + hold_;
    } else {
      threads_ = threads;
      in_a_row_ = 0;
    }
  } else if (!kept_off) {
    in_a_row_ = 0;
    if (threads == most_) hold_ = kFirstHold;
  } else if (++in_a_row_ == 3) {
    threads_ = threads - 1;
    in_a_row_ = 0;
    again_ = now + hold_;
  }
}

struct ThreadPool::Crew {
  /// Starts the threads, or as many of them as the system allows.
  explicit Crew(int threads) : asked(threads), barrier(threads), share(threads) {
    workers.reserve(static_cast<size_t>(threads));
    try {
      for (int id = 1; id < threads; id++) workers.emplace_back([this, id] { work(id); });
    } catch (const std::exception&) {  // std::system_error, or std::bad_alloc: no room for one more
    }
    size = static_cast<int>(workers.size()) + 1;
    share = Share(size);
  }
  ~Crew() {
    stop = true;
    begin(size);
    for (auto& worker : workers) worker.join();
  }
  /// Has the first `threads` threads make the call.
  void begin(int threads) {
    barrier.set_threads(threads);
    const uint32_t number = (calls.load(std::memory_order_relaxed) >> kThreadBits) + 1;
    calls.store(number << kThreadBits | static_cast<uint32_t>(threads), std::memory_order_release);
    calls.notify_all();
  }
  void work(int id) {
    bool is_in = true;
    for (uint32_t seen = 0;;) {
      wait_for_change(calls, seen, is_in ? kSpins : 0);
      seen = calls.load(std::memory_order_acquire);
      const int threads = static_cast<int>(seen & ((1U << kThreadBits) - 1));
      is_in = id < threads;
      if (!is_in) continue;  // the call may be over already, and nothing of it is looked at
      if (stop) return;
      barrier.take_core(id);
      (*call)(Team{id, threads, &barrier});
      barrier.wait(id);
    }
  }

  static constexpr int kThreadBits = 12;

  const int asked;
  int size = 1;
  Barrier barrier;
  Share share;
  const Call* call = nullptr;
  bool stop = false;
  alignas(64) std::atomic<uint32_t> calls{0};  // their number, and how many threads the last one has
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
  const Clock::time_point start = Clock::now();
  const int team = threads->share.threads(start);
  call.prepare(call.prepare_context, team);
  if (team == 1) {
    call(Team{});
    return;
  }
  threads->call = &call;
  threads->barrier.take_core(0);
  threads->begin(team);
  call(Team{0, team, &threads->barrier});
  threads->barrier.wait(0);
  const Clock::time_point end = Clock::now();
  threads->share.saw(team, end - start, threads->barrier.take_stalled(), end);
}

}  // namespace specfast

// One pool of threads per process: a call hands every thread the same function, with barriers in between.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace specfast {

/// Threads of one call meet here. Spins briefly, then sleeps, so that a busy machine is not made busier. On Linux a
/// thread that finds itself on the core of a thread with a lower id moves to one that none of them is on: the scheduler
/// may leave two on one core for a long time, and each wait then costs a time slice.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads), cores_(static_cast<size_t>(threads)) {}
  /// Fewer threads than it was made for meet here; before any of them waits.
  void set_threads(int threads) noexcept { threads_.store(threads, std::memory_order_relaxed); }
  void wait(int id) noexcept;
  /// How long threads have slept here, waits of over a millisecond only, since this was last asked.
  std::chrono::steady_clock::duration take_stalled() noexcept {
    return std::chrono::steady_clock::duration(stalled_.exchange(0, std::memory_order_relaxed));
  }
  /// Notes the core this thread runs on, and leaves it if it is taken.
  void take_core(int id) noexcept;

 private:
  std::atomic<int> threads_;
  std::atomic<std::chrono::steady_clock::rep> stalled_{0};
  struct alignas(64) Core {
    std::atomic<int> number{-1};
  };
  std::vector<Core> cores_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

/// How many threads a call gets. Where other programs keep a thread off its core the others wait for it at every
/// barrier, and fewer threads are faster: so there is one less after three calls in a row that stood still for a
/// quarter of their time, and one more is tried again after a quarter of a second, then less and less often.
class Share {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Share(int most) : most_(most), threads_(most) {}
  /// For a call that begins now.
  int threads(Clock::time_point now);
  /// What came of it. Calls of less than a millisecond say nothing.
  void saw(int threads, Clock::duration took, Clock::duration stalled, Clock::time_point now);

 private:
  static constexpr std::chrono::milliseconds kFirstHold{250};

  int most_, threads_;
  int in_a_row_ = 0;
  bool trying_ = false;
  Clock::duration hold_ = kFirstHold;
  Clock::time_point again_{};
};

/// What one thread of a call knows: who it is, how many there are, and where they meet.
struct Team {
  int id = 0;
  int size = 1;
  Barrier* meeting = nullptr;

  void barrier() const noexcept {
    if (size > 1) meeting->wait(id);
  }
  /// This thread's part [first, last) of n items, cut at multiples of `unit`.
  void part(int n, int unit, int* first, int* last) const noexcept {
    const int64_t units = (static_cast<int64_t>(n) + unit - 1) / unit;
    const int64_t a = units * id / size * unit, b = units * (id + 1) / size * unit;
    *first = static_cast<int>(a < n ? a : n);
    *last = static_cast<int>(b < n ? b : n);
  }
};

/// Runs functions on as many of its threads as get their cores (Share), with the same bits. A second caller at the same
/// time runs alone on its own thread (the results are the same bits); after a fork the child starts its own threads on
/// first use. Where the system refuses to start them all (limits on processes or memory), those that did start do the
/// work, again with the same bits.
class ThreadPool {
 public:
  static ThreadPool& instance();

  /// Threads asked for, the most that a call gets. Set by set_size, else the cores this process may use.
  int size();
  void set_size(int threads);

  /// Starts the threads if they are not there yet. Returns how many are, the caller's included: fewer than size() where
  /// the system started no more.
  int start();

  /// Whether set_size chose the number of threads.
  bool size_was_set();

  /// Calls prepare(threads) once, then work(team) on every thread, and returns when all are done. `work` must not
  /// throw. `alone` runs it on the calling thread only.
  template <class Prepare, class Work>
  void run(bool alone, Prepare&& prepare, Work&& work) {
    Call call{[](void* context, int threads) { (*static_cast<std::remove_reference_t<Prepare>*>(context))(threads); },
              [](void* context, const Team& team) { (*static_cast<std::remove_reference_t<Work>*>(context))(team); },
              const_cast<void*>(static_cast<const void*>(&prepare)),
              const_cast<void*>(static_cast<const void*>(&work))};
    run_erased(alone, call);
  }
  template <class Work>
  void run(Work&& work) {
    run(false, [](int) {}, work);
  }

 private:
  struct Crew;  // the threads, replaced as a whole
  struct Call {
    void (*prepare)(void*, int);
    void (*work)(void*, const Team&);
    void* prepare_context;
    void* work_context;

    void operator()(const Team& team) const { work(work_context, team); }
  };
  void run_erased(bool alone, const Call& call);
  Crew& crew();

  std::mutex busy_;
  Crew* crew_ = nullptr;
  int crew_pid_ = 0;
  std::atomic<int> wanted_{0};
  std::atomic<int> started_{1};
  std::atomic<bool> was_set_{false};
};

/// Physical cores this process may use: its affinity mask, one thread per core, cut by the cgroup's CPU quota.
int usable_cores();
/// The same counting every hardware thread: with more threads than this, each barrier costs a scheduler's time slice.
int usable_cpus();

}  // namespace specfast

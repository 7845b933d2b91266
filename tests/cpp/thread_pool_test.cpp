// How many threads calls get where other programs keep some off their cores; and calls of changing numbers of threads.
#include "thread_pool.hpp"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

using namespace specfast;
using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

namespace {

int failures = 0;

void expect(bool held, const char* what) {
  if (held) return;
  std::printf("FAILED %s\n", what);
  failures++;
}

/// A machine of `cores` cores of which `busy` have other work: calls on more threads than are free stand still for half
/// their time.
struct Machine {
  Share share;
  int cores, busy = 0;
  Clock::time_point now{};

  explicit Machine(int cores) : share(cores), cores(cores) {}
  int call(milliseconds took = milliseconds(10)) {
    const int threads = share.threads(now);
    const bool kept_off = threads > cores - busy;
    now += took;
    share.saw(threads, took, kept_off ? (threads - 1) * took / 2 : Clock::duration(0), now);
    return threads;
  }
  /// Calls of `seconds`, and how many of them had how many threads.
  std::vector<int> calls(double seconds) {
    std::vector<int> counted(static_cast<size_t>(cores) + 1);
    const Clock::time_point end =
        now + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    while (now < end) counted[static_cast<size_t>(call())]++;
    return counted;
  }
};

void test_share() {
  Machine quiet(4);
  expect(quiet.calls(2)[4] == 200, "on a quiet machine all calls have all threads");

  Machine machine(4);
  machine.busy = 2;
  const std::vector<int> first = machine.calls(20);
  expect(first[1] == 0 && first[4] <= 4, "threads go until the rest have their cores");
  expect(first[3] >= 6 && first[3] <= 14, "one more is tried again, less and less often");
  machine.busy = 0;
  machine.calls(10);
  expect(machine.calls(1)[4] == 100, "threads come back");

  Machine two(2);
  two.busy = 1;
  two.calls(1);
  expect(two.call() == 1, "one thread is left");
  two.busy = 2;
  expect(two.calls(20)[1] > 1900, "and stays where no core is free");

  Machine briefly(4);
  for (int i = 0; i < 100; i++) {
    briefly.busy = i % 3 == 0 ? 1 : 0;
    expect(briefly.call() == 4, "a thread that is kept off now and then stays");
  }

  Machine shorts(2);
  shorts.busy = 2;
  for (int i = 0; i < 100; i++) expect(shorts.call(milliseconds(0)) == 2, "short calls say nothing");
}

/// Sums on the pool beside busy threads: every part is computed once, whatever the number of threads.
void test_calls(double seconds) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> others;
  for (int i = 0; i < 2; i++)
    others.emplace_back([&stop] {
      while (!stop.load(std::memory_order_relaxed)) {
      }
    });
  ThreadPool::instance().set_size(4);
  constexpr int kParts = 64;
  std::vector<int> counted(kParts);
  std::vector<int> teams(8);
  const Clock::time_point end =
      Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  int calls = 0;
  while (Clock::now() < end) {
    int size = 0;
    ThreadPool::instance().run(
        false, [&size](int threads) { size = threads; },
        [&counted](const Team& team) {
          for (int region = 0; region < 8; region++) {
            int first, last;
            team.part(kParts, 1, &first, &last);
            for (int i = first; i < last; i++) {
              volatile int work = 0;
              for (int k = 0; k < 4000; k++) work = work + k;
              counted[static_cast<size_t>(i)]++;
            }
            team.barrier();
          }
        });
    teams[static_cast<size_t>(size < 8 ? size : 7)]++;
    calls++;
  }
  stop = true;
  for (std::thread& other : others) other.join();
  for (const int count : counted) expect(count == 8 * calls, "every part is computed once");
  std::printf("%d calls:", calls);
  for (size_t size = 1; size < teams.size(); size++) std::printf(" %d of %zu threads", teams[size], size);
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  test_share();
  test_calls(argc > 1 ? std::atof(argv[1]) : 1.0);
  return failures ? 1 : 0;
}

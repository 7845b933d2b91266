// Executes a translated kernel: one fiber per thread, one threadgroup at a time, simdgroups of 32.
//
// A simdgroup runs in passes. In a pass each lane runs from its last collective to its next; then all 32 must have
// stopped at the same one. Which simdgroup runs next, and the order of its lanes, come from the schedule.
#include "runtime.h"

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <vector>

// Under the address and thread sanitizers this file is not instrumented itself: it says where stacks are and what
// orders two lanes. build.py defines one of EMULATOR_{COUNT,ADDRESS,THREAD,UNDEFINED,MEMORY}, or none.
#ifdef EMULATOR_ADDRESS
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMULATOR_THREAD
#include <sanitizer/tsan_interface.h>
#endif
#if defined(EMULATOR_ADDRESS) || defined(EMULATOR_THREAD) || defined(EMULATOR_UNDEFINED) || defined(EMULATOR_MEMORY)
#define EMULATOR_SANITIZED 1
#endif

namespace emulator {
// As in execution.h, which cannot meet standard headers.
struct Thread {
  unsigned position_in_threadgroup[3], threadgroup[3], threadgroup_size[3], threadgroups[3];
  unsigned index, lane, simdgroup, simdgroups;
};

namespace {
#ifdef EMULATOR_THREAD
constexpr std::size_t stack_bytes = 64 << 10;
#else
constexpr std::size_t stack_bytes = 256 << 10;
#endif
constexpr unsigned slot_bytes = 64;

enum class Stop { none, simdgroup, threadgroup, returned };

struct Where {  // a lane's last collective
  Stop stop = Stop::none;
  const char *operation = "", *file = "";
  int line = 0;
  bool operator==(const Where& o) const {
    return stop == o.stop && line == o.line && !std::strcmp(operation, o.operation) && !std::strcmp(file, o.file);
  }
};

struct Fiber {
  void* stack_pointer;
  char* stack;
  void* sanitizer;  // a fiber of the thread sanitizer, or the address sanitizer's fake stack
  Thread thread;
  Where where;
};

struct Simdgroup {
  unsigned char slots[2][simdgroup_width + 1][slot_bytes];  // the collective before may still be read by a slower lane
  unsigned char order[simdgroup_width];
  unsigned at;        // index into order of the lane that runs
  unsigned exchange;  // which of slots is in use
  bool result_claimed;
  Stop stop;
};

struct Variable {
  int site;
  std::size_t bytes;
  void* address;
};

std::vector<Fiber> fibers;
std::vector<Simdgroup> simdgroups;
std::vector<Variable> variables;
std::vector<void*> retired;
std::vector<char*> stacks;
Fiber* current;
Fiber scheduler;
const void* scheduler_stack;
std::size_t scheduler_stack_bytes;
const Launch* launch;
Counters* counters;
Entry entry;
const char* kernel_name;
char* failure;
std::size_t failure_bytes;
bool failed;
std::uint64_t random_state;
std::size_t threadgroup_bytes;
char all_returned, threadgroup_order;  // addresses the thread sanitizer orders by

std::uint32_t next_random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<std::uint32_t>(random_state >> 11);
}

// Not memcpy: the thread sanitizer would see an access by the lane, and lanes do not race here.
void copy(unsigned char* to, const void* from, unsigned bytes) {
  const volatile unsigned char* source = static_cast<const volatile unsigned char*>(from);
  for (; bytes >= 4; bytes -= 4, to += 4, source += 4)
    *reinterpret_cast<volatile std::uint32_t*>(to) = *reinterpret_cast<const volatile std::uint32_t*>(source);
  for (; bytes; bytes--) *to++ = *source++;
}

// ---- fibers
extern "C" void emulator_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
void* first_frame(char* top, void (*start)()) {
  void** sp = reinterpret_cast<void**>(top - 64);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(start);
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
void* first_frame(char* top, void (*start)()) {
  void** sp = reinterpret_cast<void**>(top - 64 - 160);
  for (int i = 0; i < 20; i++) sp[i] = nullptr;
  sp[11] = reinterpret_cast<void*>(start);
  return sp;
}
#else
#error "fibers are written for x86-64 and aarch64"
#endif

void switch_to(Fiber& from, Fiber& to, bool from_is_done) {
#ifdef EMULATOR_THREAD
  __tsan_switch_to_fiber(to.sanitizer, 1);  // 1: a switch orders nothing
#endif
#ifdef EMULATOR_ADDRESS
  const bool to_scheduler = &to == &scheduler;
  __sanitizer_start_switch_fiber(from_is_done ? nullptr : &from.sanitizer, to_scheduler ? scheduler_stack : to.stack,
                                 to_scheduler ? scheduler_stack_bytes : stack_bytes);
#endif
  (void)from_is_done;
  current = &to;
  emulator_switch(&from.stack_pointer, to.stack_pointer);
#ifdef EMULATOR_ADDRESS
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

// The next lane of the pass, or the scheduler after the last one.
void leave(bool done) {
  Fiber& from = *current;
  Simdgroup& group = simdgroups[from.thread.simdgroup];
  if (failed || ++group.at == simdgroup_width) {
    switch_to(from, scheduler, done);
    return;
  }
  const unsigned lane = group.order[group.at];
#ifdef EMULATOR_COUNT
  count_begin_lane(from.thread.simdgroup * simdgroup_width + lane);
#endif
  switch_to(from, fibers[from.thread.simdgroup * simdgroup_width + lane], done);
}

void stop_at(Stop stop, const char* operation, const char* file, int line) {
  current->where = {stop, operation, file, line};
  leave(false);
}

void start() {
#ifdef EMULATOR_ADDRESS
  const void* stack;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (!scheduler_stack) scheduler_stack = stack, scheduler_stack_bytes = bytes;
#endif
  entry(current->thread, const_cast<void**>(launch->buffers));
#ifdef EMULATOR_THREAD
  __tsan_release(&all_returned);
#endif
  current->where = {Stop::returned, "return", "", 0};
  leave(true);
  std::abort();
}

void fail(const Thread& at, const char* format, ...) {
  failed = true;
  int used = std::snprintf(failure, failure_bytes, "kernel %s, threadgroup (%u, %u, %u), thread %u: ", kernel_name,
                           at.threadgroup[0], at.threadgroup[1], at.threadgroup[2], at.index);
  if (used < 0 || static_cast<std::size_t>(used) >= failure_bytes) return;
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(failure + used, failure_bytes - used, format, arguments);
  va_end(arguments);
}

void describe(const Where& where, char (&text)[512]) {
  if (where.stop == Stop::returned)
    std::snprintf(text, sizeof text, "has returned");
  else
    std::snprintf(text, sizeof text, "is at %s, %s:%d", where.operation, where.file, where.line);
}

void fail_divergent(const char* what, const Fiber& one, const Fiber& other) {
  char here[512], there[512];
  describe(one.where, here);
  describe(other.where, there);
  fail(one.thread, "%s: this thread %s, thread %u %s", what, here, other.thread.index, there);
}

// ---- scheduling
void run_pass(unsigned index) {
  Simdgroup& group = simdgroups[index];
  Fiber* lanes = &fibers[index * simdgroup_width];
  if (launch->schedule)
    for (unsigned i = simdgroup_width - 1; i; i--) std::swap(group.order[i], group.order[next_random() % (i + 1)]);
  group.at = 0;
  group.exchange ^= 1;
  group.result_claimed = false;
#ifdef EMULATOR_COUNT
  count_begin_pass();
  count_begin_lane(lanes[group.order[0]].thread.index);
#endif
  switch_to(scheduler, lanes[group.order[0]], false);
  if (failed) return;
  for (unsigned i = 1; i < simdgroup_width; i++)
    if (!(lanes[i].where == lanes[0].where)) return fail_divergent("divergent simdgroup", lanes[i], lanes[0]);
  group.stop = lanes[0].where.stop;
  if (group.stop == Stop::simdgroup) counters->collectives++;
}

void prepare_threadgroup(unsigned x, unsigned y, unsigned z) {
  const unsigned* size = launch->threadgroup_size;
  const unsigned threads = static_cast<unsigned>(fibers.size());
  for (unsigned i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    Thread& t = f.thread;
    t = Thread{{i % size[0], i / size[0] % size[1], i / size[0] / size[1]},
               {x, y, z},
               {size[0], size[1], size[2]},
               {launch->threadgroups[0], launch->threadgroups[1], launch->threadgroups[2]},
               i,
               i % simdgroup_width,
               i / simdgroup_width,
               threads / simdgroup_width};
    f.where = Where{};
    f.stack = stacks[i];
    f.sanitizer = nullptr;
#ifdef EMULATOR_THREAD
    f.sanitizer = __tsan_create_fiber(0);
#endif
    f.stack_pointer = first_frame(f.stack + stack_bytes, start);
  }
  for (Simdgroup& group : simdgroups) {
    for (unsigned i = 0; i < simdgroup_width; i++) group.order[i] = static_cast<unsigned char>(i);
    group.stop = Stop::none;
  }
}

void run_threadgroup(unsigned x, unsigned y, unsigned z) {
  prepare_threadgroup(x, y, z);
#ifdef EMULATOR_COUNT
  count_begin_threadgroup();
#endif
  const unsigned count = static_cast<unsigned>(simdgroups.size());
  unsigned ready = count;
  while (ready) {
    // Schedule 0 takes turns. A random schedule lets one simdgroup run ahead and the others follow at their own pace.
    const unsigned leader = launch->schedule ? next_random() % count : count;
    for (unsigned i = 0; i < count && !failed; i++) {
      Simdgroup& group = simdgroups[i];
      if (group.stop == Stop::threadgroup || group.stop == Stop::returned) continue;
      if (launch->schedule && i != leader && next_random() % 4) continue;
      run_pass(i);
      ready -= group.stop == Stop::threadgroup || group.stop == Stop::returned;
    }
    if (failed) return;
    if (ready) continue;
    for (unsigned i = 1; i < count; i++)
      if (!(fibers[i * simdgroup_width].where == fibers[0].where))
        return fail_divergent("divergent threadgroup", fibers[i * simdgroup_width], fibers[0]);
    if (simdgroups[0].stop == Stop::threadgroup) {
      counters->barriers++;
      ready = count;
      for (Simdgroup& group : simdgroups) group.stop = Stop::none;
    }
  }
}

void retire_threadgroup() {
#ifdef EMULATOR_THREAD
  for (Fiber& f : fibers) __tsan_destroy_fiber(f.sanitizer);
  for (Variable& v : variables) retired.push_back(v.address);  // free() counts as a write, unordered with the lanes'
#else
  for (Variable& v : variables) std::free(v.address);
#endif
  variables.clear();
  threadgroup_bytes = 0;
}

/// Memory of `count` stacks, in one mapping: a process has few of those and may hold many programs.
char* map_stacks(std::size_t count) {
  void* memory =
      mmap(nullptr, count * stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  return static_cast<char*>(memory);
}

void run_grid() {
  for (unsigned z = 0; z < launch->threadgroups[2] && !failed; z++)
    for (unsigned y = 0; y < launch->threadgroups[1] && !failed; y++)
      for (unsigned x = 0; x < launch->threadgroups[0] && !failed; x++) {
#ifdef EMULATOR_THREAD  // a stack used again by unordered lanes would look like a race
        for (std::size_t i = 0; i < fibers.size(); i++) munmap(stacks[i], stack_bytes), stacks[i] = map_stacks(1);
#endif
        run_threadgroup(x, y, z);
        retire_threadgroup();
      }
#ifdef EMULATOR_THREAD
  __tsan_acquire(&all_returned);
  for (void* p : retired) std::free(p);
  retired.clear();
#endif
}

#ifndef EMULATOR_SANITIZED
// A kernel that touches unmapped memory, or is misaligned for the CPU, ends the launch and not the process.
sigjmp_buf before_launch;
void on_fault(int signal, siginfo_t*, void*) {
  siglongjmp(before_launch, signal);
}
#endif
}  // namespace

extern "C" {
Thread* emulator_thread() {
  return &current->thread;
}

void emulator_threadgroup_barrier(int flags, const char* file, int line) {
#ifdef EMULATOR_THREAD
  if (flags) __tsan_release(&threadgroup_order);
#endif
  (void)flags;
  stop_at(Stop::threadgroup, "threadgroup_barrier", file, line);
#ifdef EMULATOR_THREAD
  if (flags) __tsan_acquire(&threadgroup_order);
#endif
}

void emulator_simdgroup_barrier(int flags, const char* file, int line) {
#ifdef EMULATOR_THREAD
  char* order = reinterpret_cast<char*>(&simdgroups[current->thread.simdgroup]);
  if (flags) __tsan_release(order);
#endif
  (void)flags;
  stop_at(Stop::simdgroup, "simdgroup_barrier", file, line);
#ifdef EMULATOR_THREAD
  if (flags) __tsan_acquire(order);
#endif
}

unsigned char* emulator_exchange(const void* value, unsigned bytes, const char* operation, const char* file, int line) {
  Simdgroup& group = simdgroups[current->thread.simdgroup];
  unsigned char(*slots)[slot_bytes] = group.slots[group.exchange];
  copy(slots[current->thread.lane], value, bytes);
  stop_at(Stop::simdgroup, operation, file, line);
  return slots[0];
}

bool emulator_claim_result() {
  Simdgroup& group = simdgroups[current->thread.simdgroup];
  const bool first = !group.result_claimed;
  group.result_claimed = true;
  return first;
}

void emulator_set_result(const void* value, unsigned bytes) {
  Simdgroup& group = simdgroups[current->thread.simdgroup];
  copy(group.slots[group.exchange ^ 1][simdgroup_width], value, bytes);
}

void* emulator_threadgroup_memory(int site, unsigned long bytes) {
  for (Variable& v : variables)
    if (v.site == site) {
#ifdef EMULATOR_THREAD
      __tsan_acquire(static_cast<char*>(v.address) - 8);
#endif
      return v.address;
    }
  void* address = nullptr;
  if (posix_memalign(&address, 64, bytes)) std::abort();
#ifndef EMULATOR_MEMORY  // what was never written differs between schedules, so that reading it shows
  for (unsigned long i = 0; i < bytes; i++)
    static_cast<volatile unsigned char*>(address)[i] = 0xCB ^ (launch->schedule * 29 & 0x3f);
#endif
  variables.push_back({site, bytes, address});
  threadgroup_bytes += (bytes + 15) & ~15ul;
  if (threadgroup_bytes > counters->threadgroup_bytes) counters->threadgroup_bytes = threadgroup_bytes;
  if (threadgroup_bytes > max_threadgroup_bytes) {
    fail(current->thread, "%zu bytes of threadgroup memory, the limit is %zu", threadgroup_bytes,
         max_threadgroup_bytes);
    leave(false);
  }
#ifdef EMULATOR_THREAD
  __tsan_release(static_cast<char*>(address) - 8);
#endif
  return address;
}

int emulator_run(const char* name, const Launch* to_launch, Counters* to_count, char* message,
                 std::size_t message_bytes) {
  const Kernel* kernel = emulator_kernels;
  while (kernel->name && std::strcmp(kernel->name, name)) kernel++;
  if (!kernel->name) {
    std::snprintf(message, message_bytes, "no kernel %s", name);
    return 1;
  }
  launch = to_launch;
  counters = to_count;
  *counters = Counters{};
  entry = kernel->entry;
  kernel_name = kernel->name;
  failure = message;
  failure_bytes = message_bytes;
  failed = false;
  scheduler_stack = nullptr;
  random_state = launch->schedule * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  const unsigned threads = launch->threadgroup_size[0] * launch->threadgroup_size[1] * launch->threadgroup_size[2];
  if (stacks.size() < threads) {
    const std::size_t missing = threads - stacks.size();
    char* memory = map_stacks(missing);
    for (std::size_t i = 0; i < missing; i++) stacks.push_back(memory + i * stack_bytes);
  }
  fibers.assign(threads, Fiber{});
  simdgroups.assign(threads / simdgroup_width, Simdgroup{});
  current = &scheduler;
#ifdef EMULATOR_THREAD
  scheduler.sanitizer = __tsan_get_current_fiber();
#endif
#ifdef EMULATOR_COUNT
  count_begin_launch(*launch);
#endif
#ifdef EMULATOR_SANITIZED
  run_grid();
#else
  static std::vector<char> signal_stack(64 << 10);
  stack_t alternate{}, old_alternate;
  alternate.ss_sp = signal_stack.data();
  alternate.ss_size = signal_stack.size();
  sigaltstack(&alternate, &old_alternate);
  struct sigaction action{}, old_segv, old_bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  if (sigsetjmp(before_launch, 1) == 0)
    run_grid();
  else
    fail(current->thread, "invalid memory access; mode=\"address\" or \"undefined\" names the line");
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&old_alternate, nullptr);
  if (failed) retire_threadgroup();
#endif
#ifdef EMULATOR_COUNT
  count_end_launch(*counters);
#endif
  return failed;
}
}
}  // namespace emulator

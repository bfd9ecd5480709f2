#include "engine/team.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#else
#include <condition_variable>
#include <mutex>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tokenswift {
namespace {

constexpr auto spin_time = std::chrono::microseconds(40);

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Sleeps while `word` holds `value`. May return early.
#ifdef __linux__
void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
std::mutex sleep_mutex;
std::condition_variable sleep_condition;

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  std::unique_lock<std::mutex> lock(sleep_mutex);
  if (word.load() == value) sleep_condition.wait_for(lock, std::chrono::milliseconds(10));
}

void wake_all(std::atomic<uint32_t>&) {
  std::lock_guard<std::mutex> lock(sleep_mutex);
  sleep_condition.notify_all();
}
#endif

// Returns true as soon as `ready` is true, and false when it was not for `spin_time`.
template <class F>
bool spin_until(const F& ready) {
  const auto end = std::chrono::steady_clock::now() + spin_time;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

}  // namespace

Team::Team(int threads) : runs_(threads) {
  try {
    threads_.reserve(std::max(0, threads - 1));
    for (int worker = 1; worker < threads; ++worker) threads_.emplace_back([this, worker] { serve(worker); });
  } catch (const std::system_error&) {  // a limit of the system
    const std::string had = std::to_string(threads_.size() + 1);
    dismiss();
    throw std::invalid_argument("threads: " + std::to_string(threads) + " is not allowed; the system gives " + had);
  } catch (...) {  // no memory for one: a thread that is begun must be joined
    dismiss();
    throw;
  }
}

Team::~Team() { dismiss(); }

void Team::dismiss() {
  stop_ = true;
  epoch_.fetch_add(1);
  wake_all(epoch_);
  for (std::thread& thread : threads_) thread.join();
}

void Team::run(int count, Call call, const void* context) {
  if (count < 2 || threads_.empty()) {
    for (int piece = 0; piece < count; ++piece) call(context, piece, 0);
  } else {
    share(count, call, context);
  }
}

void Team::share(int count, Call call, const void* context) {
  call_ = call;
  context_ = context;
  done_.store(0, std::memory_order_relaxed);
  for (uint64_t worker = 0, workers = runs_.size(); worker < workers; ++worker) {
    const uint64_t begin = count * worker / workers, end = count * (worker + 1) / workers;
    runs_[worker].ticket.store(end << 32 | begin, std::memory_order_release);
  }
  epoch_.fetch_add(1);
  if (sleepers_.load()) wake_all(epoch_);
  done_.fetch_add(take_pieces(0));
  wait_until_done(count);
}

void Team::wait_until_done(uint32_t count) {
  const auto done = [&] { return done_.load(std::memory_order_acquire) == count; };
  if (spin_until(done)) return;
  caller_sleeps_.store(1);
  for (uint32_t seen = done_.load(); seen != count; seen = done_.load()) sleep_while(done_, seen);
  caller_sleeps_.store(0);
}

int Team::take_pieces(int worker) {
  int taken = 0;
  for (int i = 0, workers = size(); i < workers; ++i) taken += take_pieces_of((worker + i) % workers, worker);
  return taken;
}

int Team::take_pieces_of(int owner, int worker) {
  std::atomic<uint64_t>& ticket = runs_[owner].ticket;
  for (int taken = 0;; ++taken) {
    const uint64_t claimed = ticket.fetch_add(1, std::memory_order_acq_rel);
    const uint32_t piece = uint32_t(claimed), end = uint32_t(claimed >> 32);
    if (piece >= end) return taken;
    call_(context_, int(piece), worker);
  }
}

void Team::serve(int worker) {
  const FlushDenormals flush;
  uint32_t seen = 0;
  while (!stop_) {
    if (!spin_until([&] { return epoch_.load(std::memory_order_acquire) != seen; })) {
      sleepers_.fetch_add(1);
      while (epoch_.load() == seen) sleep_while(epoch_, seen);
      sleepers_.fetch_sub(1);
    }
    seen = epoch_.load();
    const int taken = take_pieces(worker);
    if (taken) {
      done_.fetch_add(taken);
      if (caller_sleeps_.load()) wake_all(done_);
    }
  }
}

#if defined(__x86_64__)
FlushDenormals::FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(uint32_t(saved_) | 0x8040); }
FlushDenormals::~FlushDenormals() { _mm_setcsr(uint32_t(saved_)); }
#elif defined(__aarch64__)
FlushDenormals::FlushDenormals() {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" ::"r"(saved_ | uint64_t(1) << 24));
}
FlushDenormals::~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
FlushDenormals::FlushDenormals() : saved_(0) {}
FlushDenormals::~FlushDenormals() {}
#endif

}  // namespace tokenswift

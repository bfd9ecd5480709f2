// Persistent threads that share the pieces of a job.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace tokenswift {

// The caller works too, and waits only for pieces that a thread has begun. So a thread whose core was taken away holds
// up at most one piece, and one that wakes late finds nothing left to do. Waiting spins for some microseconds, then
// sleeps. Results never depend on which thread ran a piece, because a piece writes only its own part of the result.
class Team {
 public:
  // threads: workers, the caller included.
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return int(threads_.size()) + 1; }

  // The mutex to hold from the first to the last job of a pass, because several decoders may share a team.
  std::mutex& turn() { return turn_; }

  // Calls work(piece, worker) for every piece in [0, count). `worker` < size() names the scratch that a piece may use.
  // Each worker begins with a run of neighbouring pieces, whose data usually lie side by side, and then helps the
  // others.
  template <class F>
  void run(int count, const F& work) {
    run(
        count, [](const void* context, int piece, int worker) { (*static_cast<const F*>(context))(piece, worker); },
        &work);
  }

  // Does the same, by the caller alone where `cost` is not worth waking a thread. cost: operations in all, roughly.
  template <class F>
  void run(int count, size_t cost, const F& work) {
    if (cost >= worth_sharing) return run(count, work);
    for (int piece = 0; piece < count; ++piece) work(piece, 0);
  }

 private:
  static constexpr size_t worth_sharing = 20000;

  using Call = void (*)(const void* context, int piece, int worker);

  void run(int count, Call call, const void* context);
  void share(int count, Call call, const void* context);
  void dismiss();
  void serve(int worker);
  int take_pieces(int worker);
  int take_pieces_of(int owner, int worker);
  void wait_until_done(uint32_t count);

  // A worker's run of pieces: its end << 32 | the next piece. One addition claims a piece and tells whether one was
  // left.
  struct alignas(64) Run {
    std::atomic<uint64_t> ticket{0};
  };
  std::vector<Run> runs_;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> done_{0};
  std::atomic<uint32_t> caller_sleeps_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
  std::mutex turn_;
};

// Makes denormal results and operands of this thread zero while it lives, like those of every worker.
class FlushDenormals {
 public:
  FlushDenormals();
  ~FlushDenormals();

 private:
  uint64_t saved_;
};

}  // namespace tokenswift

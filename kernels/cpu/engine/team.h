// Persistent threads that share out the pieces of a job.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace tokenswift {

// The caller works too, and waits only for pieces that a thread has begun: a thread whose core was taken away holds
// up at most one piece, and one that wakes late finds nothing left to do. Waiting spins for some microseconds, then
// sleeps. Results never depend on who ran what, for a piece writes only what is its own.
class Team {
 public:
  // threads: workers, the caller included.
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return int(threads_.size()) + 1; }

  // Held by whoever runs jobs, from the first to the last of a pass: several decoders may share a team.
  std::mutex& turn() { return turn_; }

  // work(piece, worker) for every piece in [0, count); `worker` < size() names the scratch a piece may use. Each worker
  // begins with a run of neighbouring pieces, whose data lie side by side as a rule, and then helps the others.
  template <class F>
  void run(int count, const F& work) {
    run(
        count, [](const void* context, int piece, int worker) { (*static_cast<const F*>(context))(piece, worker); },
        &work);
  }

  // The same, by the caller alone where `cost` (operations in all, roughly) is not worth waking anybody.
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
  void serve(int worker);
  int take_pieces(int worker);
  int take_pieces_of(int owner, int worker);
  void wait_until_done(uint32_t count);

  // A worker's run of pieces, its end << 32 | the next one: one addition claims a piece and says whether there was one
  // to claim.
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

// While it lives, the thread's denormal results and operands are zero, as they are for every worker.
class FlushDenormals {
 public:
  FlushDenormals();
  ~FlushDenormals();

 private:
  uint64_t saved_;
};

}  // namespace tokenswift

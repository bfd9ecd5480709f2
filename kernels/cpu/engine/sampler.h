// The sampler, which makes a token of a row of logits, the same one as tokenswift_py/sampling/reference.py.
#pragma once

#include <cstdint>
#include <vector>

namespace tokenswift {

struct SamplerParams {
  double temperature = 0, top_p = 1, log_min_p = 0, penalty = 1, repetition_penalty = 1;
  double frequency_penalty = 0, presence_penalty = 0;
  bool has_min_p = false;
  int top_k = 0, penalty_window = 0, dry_length = 0, ngram = 0;
  int dry_window = 0;           // latest tokens in which DRY looks for repeats; 0 is all of them
  std::vector<int64_t> forced;  // start and stop of each span that the model did not write, ascending
  std::vector<std::vector<int32_t>> ban_words;
  std::vector<double> dry_powers;  // multiplier * base^k; empty where DRY is off
  std::vector<int32_t> dry_breakers, ban, eos, bias_tokens;
  std::vector<double> bias;
  uint64_t seed = 0;
  uint32_t stream = 0;
  int64_t first_end = 0;           // eos tokens are excluded before this position
  double highest = 0, lowest = 0;  // bounds of the noise
};

class Sampler {
 public:
  struct Scored {
    int32_t token;
    double score;
  };

  // Throws std::invalid_argument for token ids outside the vocabulary.
  Sampler(const SamplerParams& params, int vocab);

  int vocab() const { return vocab_; }

  // Returns up to `count` tokens for position `length` and their perturbed scores, the best first. The result is empty
  // where no finite logit is left. logits: [vocab], changed meanwhile and restored. history: [length]. Throws
  // std::invalid_argument for ids outside the vocabulary that a penalty meets.
  std::vector<Scored> rank(float* logits, const int32_t* history, int length, int count);

 private:
  // Restores the logits when it goes out of scope, be it by an exception.
  struct Restore {
    Sampler& sampler;
    float* logits;
    ~Restore();
  };

  void modify(float* logits, const int32_t* history, int length);
  double& modified(float* logits, int32_t token);
  void penalise_context(float* logits, const int32_t* history, int length, int window, double theta);
  void penalise_counts(float* logits, const int32_t* history, int length);
  void forget_counts();
  void ban_ngrams(float* logits, const int32_t* history, int length);
  void ban_words(float* logits, const int32_t* history, int length);
  void penalise_repeats(float* logits, const int32_t* history, int length);
  void collect(const float* logits, int count);
  double reached(int count);
  double deepest(double best, double divisor) const;
  double filter(int count);
  void perturb(double top, int position, int count);
  double nucleus_floor(double floor, double top);
  void require_in_vocabulary(int32_t token) const;
  bool breaks(int32_t token) const;

  SamplerParams params_;
  int vocab_;
  // The scores that differ from the logits, kept sparse. place_ says where a token's score is, and stamp_ the call that
  // put it there.
  std::vector<Scored> changes_;
  std::vector<float> originals_;
  std::vector<uint32_t> place_, stamp_;
  uint32_t call_ = 0;
  std::vector<int64_t> counts_;  // [vocab], all 0 between calls; empty where nothing is counted
  std::vector<int32_t> counted_;
  std::vector<float> block_top_;
  std::vector<Scored> scored_, kept_;
  std::vector<double> scratch_;
  std::vector<int64_t> mass_;
};

}  // namespace tokenswift

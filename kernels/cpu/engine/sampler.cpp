#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "engine/require.h"
#include "math/noise.h"

namespace tokenswift {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double negligible = -28.0;  // a token so far below the best has no mass, for e^-28 < 2^-40
constexpr double hopeless_slack = 1e-6;
constexpr double likely_depth = 3.0;  // tokens less than so far below the best are likely to be chosen
constexpr int longest_match = 64;
constexpr int block = 64;  // logits that are looked at together
constexpr float no_logit = -std::numeric_limits<float>::infinity();

double nth_largest(std::vector<double>& values, size_t n) {
  std::nth_element(values.begin(), values.begin() + (n - 1), values.end(), std::greater<double>());
  return values[n - 1];
}

// Returns the mass of the last token of the nucleus. Sorts only the largest tokens, and ever more of them until they
// hold the wanted mass.
int64_t nucleus_edge(std::vector<int64_t>& mass, double wanted) {
  int64_t sum = 0;
  size_t done = 0;
  for (size_t head = 256;; head *= 8) {
    const size_t end = std::min(head, mass.size());
    std::partial_sort(mass.begin() + done, mass.begin() + end, mass.end(), std::greater<int64_t>());
    for (; done < end; ++done) {
      sum += mass[done];
      if (double(sum) >= wanted || done + 1 == mass.size()) return mass[done];
    }
  }
}

// Returns the largest of `count` logits, and sets `bad` if one is NaN. Compares in lanes, because each step of a single
// chain would wait for the one before.
float largest(const float* logits, int count, bool& bad) {
  constexpr int lanes = 16;
  float top[lanes];
  std::fill_n(top, lanes, no_logit);
  int unordered = 0, i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int j = 0; j < lanes; ++j) {
      top[j] = logits[i + j] > top[j] ? logits[i + j] : top[j];
      unordered |= logits[i + j] != logits[i + j];
    }
  }
  for (; i < count; ++i) {
    top[0] = logits[i] > top[0] ? logits[i] : top[0];
    unordered |= logits[i] != logits[i];
  }
  bad |= unordered != 0;
  return *std::max_element(top, top + lanes);
}

// Returns a score that is lower by far more than rounding errors.
double slightly_below(double score) { return score - 1e-3 - 1e-6 * std::fabs(score); }

bool better(const Sampler::Scored& a, const Sampler::Scored& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

}  // namespace

Sampler::Sampler(const SamplerParams& params, int vocab)
    : params_(params), vocab_(vocab), place_(vocab), stamp_(vocab), block_top_((vocab + block - 1) / block) {
  for (const auto* tokens : {&params.dry_breakers, &params.ban, &params.eos, &params.bias_tokens}) {
    for (const int32_t token : *tokens) require_in_vocabulary(token);
  }
  for (const auto& word : params.ban_words) {
    require(!word.empty(), "a word has tokens");
    for (const int32_t token : word) require_in_vocabulary(token);
  }
  require(params.forced.size() % 2 == 0, "a span has a start and a stop");
  require(params.bias.size() == params.bias_tokens.size(), "as many biases as tokens");
  require(params.dry_powers.empty() || (int(params.dry_powers.size()) > longest_match && params.dry_length >= 1),
          "DRY needs its powers and a length");
  require(params.dry_window >= 0, "a window is not negative");
  if (params.penalty != 1 || params.repetition_penalty != 1 || params.frequency_penalty != 0 ||
      params.presence_penalty != 0)
    counts_.assign(vocab, 0);
  std::sort(params_.dry_breakers.begin(), params_.dry_breakers.end());
}

void Sampler::require_in_vocabulary(int32_t token) const {
  require(token >= 0 && token < vocab_, "token ", token, " is not in the vocabulary");
}

bool Sampler::breaks(int32_t token) const {
  return std::binary_search(params_.dry_breakers.begin(), params_.dry_breakers.end(), token);
}

std::vector<Sampler::Scored> Sampler::rank(float* logits, const int32_t* history, int length, int count) {
  scored_.clear();
  changes_.clear();
  originals_.clear();
  const Restore restore{*this, logits};
  modify(logits, history, length);
  collect(logits, count);
  if (scored_.empty()) return {};
  if (params_.temperature > 0) {
    perturb(filter(count), length, count);
  }
  const size_t wanted = std::min(scored_.size(), size_t(count));
  std::partial_sort(scored_.begin(), scored_.begin() + wanted, scored_.end(), better);
  return {scored_.begin(), scored_.begin() + wanted};
}

Sampler::Restore::~Restore() {
  for (size_t i = 0; i < sampler.changes_.size(); ++i) logits[sampler.changes_[i].token] = sampler.originals_[i];
}

// Returns the score of a token that may differ from its logit. The logit is overwritten, so that the scan of the logits
// passes over it.
double& Sampler::modified(float* logits, int32_t token) {
  require_in_vocabulary(token);
  if (stamp_[token] != call_) {
    stamp_[token] = call_;
    place_[token] = uint32_t(changes_.size());
    changes_.push_back({token, double(logits[token])});
    originals_.push_back(logits[token]);
    logits[token] = no_logit;
  }
  return changes_[place_[token]].score;
}

void Sampler::modify(float* logits, const int32_t* history, int length) {
  if (++call_ == 0) {  // the counter went round
    std::fill(stamp_.begin(), stamp_.end(), 0);
    call_ = 1;
  }
  if (params_.repetition_penalty != 1) penalise_context(logits, history, length, length, params_.repetition_penalty);
  if (params_.penalty != 1) penalise_context(logits, history, length, params_.penalty_window, params_.penalty);
  if (params_.frequency_penalty != 0 || params_.presence_penalty != 0) penalise_counts(logits, history, length);
  if (!params_.dry_powers.empty()) penalise_repeats(logits, history, length);
  for (size_t i = 0; i < params_.bias.size(); ++i) {
    double& score = modified(logits, params_.bias_tokens[i]);
    score = score + params_.bias[i];
  }
  for (const int32_t token : params_.ban) modified(logits, token) = -infinity;
  if (params_.ngram > 0) ban_ngrams(logits, history, length);
  if (!params_.ban_words.empty()) ban_words(logits, history, length);
  if (length < params_.first_end) {
    for (const int32_t token : params_.eos) modified(logits, token) = -infinity;
  }
}

void Sampler::penalise_context(float* logits, const int32_t* history, int length, int window, double theta) {
  forget_counts();  // a call that threw may have left some
  for (int i = std::max(0, length - window); i < length; ++i) {
    double& score = modified(logits, history[i]);
    if (counts_[history[i]]) continue;  // a token is penalised once, however often it stands there
    counts_[history[i]] = 1;
    counted_.push_back(history[i]);
    score = score > 0 ? score / theta : score * theta;
  }
  forget_counts();
}

// Penalises the tokens that the model wrote, which are those between the forced spans, by their counts.
void Sampler::penalise_counts(float* logits, const int32_t* history, int length) {
  forget_counts();  // a call that threw may have left some
  const auto count = [&](int64_t start, int64_t stop) {
    for (int64_t i = std::max<int64_t>(start, 0); i < std::min<int64_t>(stop, length); ++i) {
      modified(logits, history[i]);  // throws for a wrong id before it is counted
      if (counts_[history[i]]++ == 0) counted_.push_back(history[i]);
    }
  };
  int64_t start = 0;
  for (size_t i = 0; i < params_.forced.size(); i += 2) {
    count(start, params_.forced[i]);
    start = params_.forced[i + 1];
  }
  count(start, length);
  for (const int32_t token : counted_) {
    double& score = modified(logits, token);
    if (params_.frequency_penalty != 0) score = score - params_.frequency_penalty * double(counts_[token]);
    if (params_.presence_penalty != 0) score = score - params_.presence_penalty;
  }
  forget_counts();
}

void Sampler::forget_counts() {
  for (const int32_t token : counted_) counts_[token] = 0;
  counted_.clear();
}

// Bans each token that would repeat a sequence of `ngram` tokens: one that followed the text's last tokens before.
void Sampler::ban_ngrams(float* logits, const int32_t* history, int length) {
  const int before = params_.ngram - 1;
  if (length <= before) return;
  const int32_t* end = history + length - before;
  for (int i = 0; i + before < length; ++i) {
    if (std::equal(end, end + before, history + i)) modified(logits, history[i + before]) = -infinity;
  }
}

void Sampler::ban_words(float* logits, const int32_t* history, int length) {
  for (const auto& word : params_.ban_words) {
    const int before = int(word.size()) - 1;
    if (before <= length && std::equal(word.begin(), word.end() - 1, history + length - before)) {
      modified(logits, word.back()) = -infinity;
    }
  }
}

// Penalises the token that followed an earlier occurrence of the text's last tokens, by the length of its longest
// match.
void Sampler::penalise_repeats(float* logits, const int32_t* history, int length) {
  const int shortest = params_.dry_length, window = params_.dry_window;
  if (window > 0 && window < length) {
    history += length - window;
    length = window;
  }
  int limit = std::min(length, longest_match);
  for (int back = 0; back < limit; ++back) {
    if (breaks(history[length - 1 - back])) limit = back;
  }
  if (limit < shortest || length <= shortest) return;
  const int32_t last = history[length - 1];
  std::vector<std::pair<int32_t, int>> found;
  for (int end = shortest - 1; end < length - 1; ++end) {
    if (history[end] != last) continue;
    int matched = 1;
    while (matched < limit && matched <= end && history[end - matched] == history[length - 1 - matched]) ++matched;
    if (matched >= shortest && !breaks(history[end + 1])) found.emplace_back(history[end + 1], matched);
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
    return a.first < b.first || (a.first == b.first && a.second > b.second);
  });
  for (size_t i = 0; i < found.size(); ++i) {
    if (i && found[i].first == found[i - 1].first) continue;
    double& score = modified(logits, found[i].first);
    score = score - params_.dry_powers[found[i].second - shortest];
  }
}

// Collects the scores of all tokens that may survive. Looks at the fp32 logits first, which is cheap, and computes in
// double for those alone.
void Sampler::collect(const float* logits, int count) {
  bool bad = false;
  double best = -infinity;
  for (int i = 0; i < int(block_top_.size()); ++i) {
    block_top_[i] = largest(logits + i * block, std::min(block, vocab_ - i * block), bad);
    best = std::max(best, double(block_top_[i]));
  }
  for (size_t i = 0; i < changes_.size(); ++i) {
    bad |= !(originals_[i] < std::numeric_limits<float>::infinity());
    best = std::max(best, changes_[i].score);
  }
  if (bad || !std::isfinite(best)) return;
  const double divisor = params_.temperature > 0 ? params_.temperature : 1.0;
  double floor = std::max(deepest(reached(count), divisor), -std::numeric_limits<double>::max());
  if (params_.temperature > 0 && params_.has_min_p && params_.top_p == 1) {
    floor = std::max(floor, slightly_below(best + params_.log_min_p * divisor));
  }
  for (int i = 0; i < int(block_top_.size()); ++i) {
    if (!(double(block_top_[i]) >= floor)) continue;
    for (int token = i * block; token < std::min(vocab_, (i + 1) * block); ++token) {
      if (double(logits[token]) >= floor) scored_.push_back({token, double(logits[token]) / divisor});
    }
  }
  for (const Scored& change : changes_) {
    if (change.score >= floor) scored_.push_back({change.token, change.score / divisor});
  }
}

// Returns a score that at least `count` tokens reach: the count-th largest among the blocks' largest scores and the
// changed ones.
double Sampler::reached(int count) {
  scratch_.clear();
  for (const float top : block_top_) scratch_.push_back(double(top));
  for (const Scored& change : changes_) scratch_.push_back(change.score);
  return size_t(count) > scratch_.size() ? -infinity : nth_largest(scratch_, count);
}

// Returns a score, before the temperature, below which a token can neither be chosen nor count in a nucleus.
double Sampler::deepest(double best, double divisor) const {
  double depth = params_.temperature > 0 ? params_.highest - params_.lowest : 0.0;
  if (params_.top_p < 1) depth = std::max(depth, -negligible);
  return slightly_below(best - depth * divisor);
}

// Applies top-k, then top-p, then min-p, and drops tokens that the noise cannot lift among the first `count`. Tokens of
// equal scores stay or go together. Returns the best score.
double Sampler::filter(int count) {
  double top = -infinity;
  for (const Scored& s : scored_) top = std::max(top, s.score);
  scratch_.resize(scored_.size());
  const auto copy_scores = [&] {
    for (size_t i = 0; i < scored_.size(); ++i) scratch_[i] = scored_[i].score;
  };
  double floor = -infinity;
  if (params_.top_k > 0 && params_.top_k < vocab_ && size_t(params_.top_k) <= scored_.size()) {
    copy_scores();
    floor = nth_largest(scratch_, params_.top_k);
  }
  if (params_.top_p < 1) floor = std::max(floor, nucleus_floor(floor, top));
  if (params_.has_min_p) floor = std::max(floor, top + params_.log_min_p);
  double reach = top;
  if (count > 1) {
    copy_scores();
    reach = size_t(count) <= scored_.size() ? nth_largest(scratch_, count) : -infinity;
  }
  const double hopeless = reach - (params_.highest - params_.lowest) - hopeless_slack;
  const auto gone = [&](const Scored& s) { return !(s.score >= floor && s.score >= hopeless); };
  scored_.erase(std::remove_if(scored_.begin(), scored_.end(), gone), scored_.end());
  return top;
}

// Adds the noise, and keeps the tokens that may be among the first `count` with it, these among them. Tokens whose
// score is near the best come first. To get ahead of the best so far, a token far below needs a draw that hardly any
// has, and the others are spared the logarithms.
// top: the best score without it.
void Sampler::perturb(double top, int position, int count) {
  Draws draws(params_.seed, uint32_t(position), params_.stream);
  std::vector<double>& ahead = scratch_;  // a heap of the best `count` scores, the least of them in front
  ahead.clear();
  kept_.clear();
  const auto take = [&](const Scored& s, uint32_t draw) {
    kept_.push_back({s.token, s.score + gumbel(draw)});
    ahead.push_back(kept_.back().score);
    std::push_heap(ahead.begin(), ahead.end(), std::greater<double>());
    if (ahead.size() <= size_t(count)) return;
    std::pop_heap(ahead.begin(), ahead.end(), std::greater<double>());
    ahead.pop_back();
  };
  for (const Scored& s : scored_) {
    if (s.score >= top - likely_depth) take(s, draws(uint32_t(s.token)));
  }
  for (const Scored& s : scored_) {
    if (s.score >= top - likely_depth) continue;
    const uint32_t draw = draws(uint32_t(s.token));
    const double needed = ahead.size() < size_t(count) ? -infinity : ahead.front() - s.score;
    if (!(needed >= 0 && draw < least_draw(needed))) take(s, draw);
  }
  scored_.swap(kept_);
}

// Returns the least score of the nucleus. Probabilities relative to the best are summed as integers, so that the order
// of summation does not matter.
double Sampler::nucleus_floor(double floor, double top) {
  const double lowest = std::max(floor, top + negligible);
  scratch_.clear();
  mass_.clear();
  int64_t total = 0;
  for (const Scored& s : scored_) {
    if (!(s.score >= lowest)) continue;
    scratch_.push_back(s.score);
    mass_.push_back(int64_t(std::floor(exp_polynomial(s.score - top) * 0x1p40)));
    total += mass_.back();
  }
  std::vector<int64_t> sorted = mass_;
  const int64_t smallest = nucleus_edge(sorted, params_.top_p * double(total));
  double result = infinity;
  for (size_t i = 0; i < mass_.size(); ++i) {
    if (mass_[i] >= smallest) result = std::min(result, scratch_[i]);
  }
  return result;
}

}  // namespace tokenswift

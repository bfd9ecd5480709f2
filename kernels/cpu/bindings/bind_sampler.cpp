// The sampler at the Python boundary.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "bindings/bind.h"
#include "engine/require.h"
#include "engine/sampler.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenswift {
namespace {

using Tokens = std::vector<int32_t>;
using Logits = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using History = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void init_sampler(Sampler* self, int vocab, double temperature, int top_k, double top_p,
                  std::optional<double> log_min_p, double repetition_penalty, double penalty, int penalty_window,
                  double frequency_penalty, double presence_penalty, std::vector<int64_t> forced, int dry_length,
                  int dry_window, std::vector<double> dry_powers, Tokens dry_breakers, Tokens ban, int ngram,
                  std::vector<Tokens> ban_words, Tokens eos, int64_t first_end, Tokens bias_tokens,
                  std::vector<double> bias, uint64_t seed, uint32_t stream, double highest, double lowest) {
  require(vocab >= 1, "vocab must be positive");
  SamplerParams params;
  params.temperature = temperature;
  params.top_k = top_k;
  params.top_p = top_p;
  params.has_min_p = log_min_p.has_value();
  params.log_min_p = log_min_p.value_or(0);
  params.repetition_penalty = repetition_penalty;
  params.frequency_penalty = frequency_penalty;
  params.presence_penalty = presence_penalty;
  params.forced = std::move(forced);
  params.ngram = ngram;
  params.ban_words = std::move(ban_words);
  params.penalty = penalty;
  params.penalty_window = penalty_window;
  params.dry_length = dry_length;
  params.dry_window = dry_window;
  params.dry_powers = std::move(dry_powers);
  params.dry_breakers = std::move(dry_breakers);
  params.ban = std::move(ban);
  params.eos = std::move(eos);
  params.first_end = first_end;
  params.bias_tokens = std::move(bias_tokens);
  params.bias = std::move(bias);
  params.seed = seed;
  params.stream = stream;
  params.highest = highest;
  params.lowest = lowest;
  new (self) Sampler(params, vocab);
}

std::vector<std::pair<int32_t, double>> rank(Sampler& sampler, const Logits& logits, const History& history,
                                             int count) {
  require(logits.shape(0) == size_t(sampler.vocab()), "logits are [vocab]");
  require(history.shape(0) <= size_t(INT32_MAX), "the history is too long");
  require(count >= 1, "count must be at least 1");
  std::vector<std::pair<int32_t, double>> ranked;
  for (const auto& [token, score] : sampler.rank(logits.data(), history.data(), int(history.shape(0)), count)) {
    ranked.emplace_back(token, score);
  }
  return ranked;
}

}  // namespace

void bind_sampler(nb::module_& m) {
  nb::class_<Sampler>(m, "Sampler", "Chooses tokens as tokenswift_py/sampling/reference.py does.")
      .def("__init__", &init_sampler, "vocab"_a, "temperature"_a, "top_k"_a, "top_p"_a, "log_min_p"_a.none(),
           "repetition_penalty"_a, "penalty"_a, "penalty_window"_a, "frequency_penalty"_a, "presence_penalty"_a,
           "forced"_a, "dry_length"_a, "dry_window"_a, "dry_powers"_a, "dry_breakers"_a, "ban"_a, "ngram"_a,
           "ban_words"_a, "eos"_a, "first_end"_a, "bias_tokens"_a, "bias"_a, "seed"_a, "stream"_a, "highest"_a,
           "lowest"_a)
      .def("rank", &rank, "logits"_a.noconvert(), "history"_a.noconvert(), "count"_a,
           "Up to `count` (token, perturbed score), the best first; none where no finite logit is left.");
}

}  // namespace tokenswift

// The boundary to Python. Arrays come as numpy arrays, so that neither torch's headers nor its version matter here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "bindings/bind.h"
#include "engine/decoder.h"
#include "engine/require.h"
#include "engine/stored_blocks.h"
#include "math/quant.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenswift {
namespace {

// (positions of a block, shifts [blocks], trained distances)
using ShiftArrays = std::tuple<int, Ints, int>;
using LocalTables = std::tuple<Table, Table>;    // cos and sin of layers with their own RoPE base
using Taps = std::tuple<Ints, Array<float, 3>>;  // layers, and [rows, layers, hidden_size] of what enters them

// (positions [rows], full pages, view [layers, kv_heads, n] or None, tail [rows or 1, n])
using SegmentArrays = std::tuple<Ints, Ints, std::optional<Array<const int32_t, 3>>, Array<const int32_t, 2>>;

Element element(const std::string& dtype) {
  if (dtype == "bf16") return Element::bf16;
  if (dtype == "fp32") return Element::f32;
  throw std::invalid_argument("dtype '" + dtype + "' is not allowed; bf16 and fp32 are");
}

PageType page_type(const std::string& dtype) {
  if (dtype == "bf16") return PageType::bf16;
  if (dtype == "fp32") return PageType::f32;
  if (dtype == "int8") return PageType::int8;
  throw std::invalid_argument("dtype '" + dtype + "' is not allowed; bf16, fp32 and int8 are");
}

template <class A>
int size(const A& array, size_t axis = 0) {
  require(array.shape(axis) <= size_t(INT32_MAX), "an array is too long");
  return int(array.shape(axis));
}

const Kernels& kernels_of_environment() {
  const char* wanted = std::getenv("TOKENSWIFT_ISA");
  return choose_kernels(wanted ? wanted : "");
}

constexpr int most_blocks = 1 << 24;  // (layer, head) pairs of a page, so that no count of bytes overflows

void init_pool(Pool* self, int layers, int kv_heads, int head_dim, const std::string& dtype, int pages) {
  require(layers > 0 && kv_heads > 0 && pages > 0 && pages <= INT32_MAX / page_size, "a pool's sizes must be positive");
  require(kv_heads <= most_blocks / layers, "a page of ", layers, " layers and ", kv_heads, " heads is too large");
  require(head_dim > 0 && head_dim % vector_multiple == 0 && head_dim <= longest_head,
          "head_dim must be a multiple of 16 up to 512, not ", head_dim);
  new (self) Pool(layers, kv_heads, head_dim, page_type(dtype), pages);
}

void move_slots(Pool& pool, const Ints& source, const Ints& target) {
  require(source.shape(0) == target.shape(0), "as many targets as sources");
  pool.move(source.data(), target.data(), size(source));
}

nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> page_block(nb::handle_t<Pool> self, int layer, int head, int page) {
  const Pool& pool = nb::cast<const Pool&>(self);
  require(layer >= 0 && layer < pool.layers() && head >= 0 && head < pool.kv_heads() && pool.usable(page),
          "no such layer, head or page in use");
  return {pool.block(layer, head, page), {pool.block_bytes()}, self};
}

std::optional<nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>> page_copy(nb::handle_t<Pool> self, int layer, int head,
                                                                      int page) {
  const Pool& pool = nb::cast<const Pool&>(self);
  require(layer >= 0 && layer < pool.layers() && head >= 0 && head < pool.kv_heads() && pool.usable(page),
          "no such layer, head or page in use");
  char* copy = pool.copy_of(layer, head, page);
  if (!copy) return std::nullopt;
  return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(copy, {Pool::block_bytes(PageType::int8, pool.head_dim())}, self);
}

// A layer is (window, which RoPE tables, whether it is a mixture). Experts are (count, chosen, columns, whether shares
// sum to 1, columns of the shared one) or None.
using LayerArgument = std::tuple<int, int, bool>;
using ExpertsArgument = std::optional<std::tuple<int, int, int, bool, int>>;

void init_decoder(Decoder* self, int vocab, int hidden, int ffn, int heads, int kv_heads, int head_dim, float norm_eps,
                  bool tied, bool qk_norm, const std::vector<LayerArgument>& layers, const ExpertsArgument& experts,
                  bool post_norms, bool gelu, float embedding_scale, double score_scale, double attention_cap,
                  double logit_cap, const std::string& dtype, std::shared_ptr<Team> team) {
  Shape shape;
  shape.vocab = vocab;
  shape.hidden = hidden;
  shape.ffn = ffn;
  shape.layers = int(layers.size());
  shape.heads = heads;
  shape.kv_heads = kv_heads;
  shape.head_dim = head_dim;
  shape.norm_eps = norm_eps;
  shape.tied = tied;
  shape.qk_norm = qk_norm;
  shape.post_norms = post_norms;
  shape.gelu = gelu;
  shape.embedding_scale = embedding_scale;
  shape.score_scale = score_scale;
  shape.attention_cap = attention_cap;
  shape.logit_cap = logit_cap;
  for (const auto& [window, rope, mixture] : layers) {
    require(!mixture || experts, "a mixture needs experts");
    shape.windows.push_back(window);
    shape.ropes.push_back(rope);
    shape.mixtures.push_back(mixture);
  }
  if (experts) {
    std::tie(shape.experts, shape.chosen, shape.expert_ffn, shape.normalised_shares, shape.shared_ffn) = *experts;
  }
  require(team != nullptr, "a decoder needs a team");
  const Element weights = dtype == "q8" ? Element::q8 : element(dtype);
  new (self) Decoder(shape, weights, kernels_of_environment(), std::move(team));
}

void init_team(Team* self, int threads) {
  require(threads >= 1 && threads <= 1024, "threads must be between 1 and 1024");
  new (self) Team(threads);
}

template <class T>
std::string set_matrix(Decoder& decoder, const std::string& part, int layer, const Array<const T, 2>& data,
                       bool fewest_bits) {
  const MatrixSource source{sizeof(T) == 2 ? Element::bf16 : Element::f32, data.data(), size(data, 0), size(data, 1)};
  const nb::gil_scoped_release release;
  const Element packed = decoder.set_matrix(part, layer, source, fewest_bits);
  return in_blocks(packed) ? format_of(packed).name : packed == Element::bf16 ? "bf16" : "fp32";
}

Element element_in_blocks(const std::string& kind) {
  for (int i = 0; i < element_count; ++i) {
    if (in_blocks(Element(i)) && format_of(Element(i)).name == kind) return Element(i);
  }
  throw std::invalid_argument("there are no blocks of kind '" + kind + "'");
}

void set_blocks(Decoder& decoder, const std::string& part, int layer, const std::string& kind,
                const Array<const uint8_t, 2>& data) {
  const Element element = element_in_blocks(kind);
  const BlockFormat format = format_of(element);
  require(size(data, 1) % format.stored_bytes == 0, "rows of blocks must be whole");
  require(size(data, 1) / format.stored_bytes <= INT32_MAX / format.weights, "rows of blocks are too long");
  const MatrixSource source{element, data.data(), size(data, 0), size(data, 1) / format.stored_bytes * format.weights};
  const nb::gil_scoped_release release;
  decoder.set_matrix(part, layer, source);
}

void quantise(const Array<const float, 2>& weights, const Array<uint8_t, 2>& blocks) {
  const int rows = size(weights, 0), columns = size(weights, 1), count = columns / block_size;
  constexpr int bytes = format_of(Element::q8).stored_bytes;
  require(columns % block_size == 0, "rows must be whole blocks of 32");
  require(size(blocks, 0) == rows && blocks.shape(1) == size_t(count) * bytes,
          "blocks is [rows, blocks of a row * 34]");
  const nb::gil_scoped_release release;
  for (size_t i = 0; i < size_t(rows) * count; ++i) {
    quantise_weights(weights.data() + i * block_size, reinterpret_cast<char*>(blocks.data()) + i * bytes);
  }
}

void dequantise(const std::string& kind, const Array<const uint8_t, 2>& blocks, const Array<float, 2>& values) {
  const Element element = element_in_blocks(kind);
  const BlockFormat format = format_of(element);
  const size_t count = blocks.shape(1) / format.stored_bytes;
  require(blocks.shape(1) % format.stored_bytes == 0, "rows of blocks must be whole");
  require(values.shape(0) == blocks.shape(0) && values.shape(1) == count * format.weights,
          "values are [rows, weights of a row]");
  const nb::gil_scoped_release release;
  PlainBlock block;
  for (size_t i = 0; i < blocks.shape(0) * count; ++i) {
    read_stored(element, reinterpret_cast<const char*>(blocks.data()) + i * format.stored_bytes, &block);
    widen_block(element, block, values.data() + i * format.weights);
  }
}

void project(Decoder& decoder, const Table& hidden, const Array<float, 2>& logits) {
  const int rows = size(hidden, 0);
  require(size(hidden, 1) == decoder.shape().hidden, "hidden is [rows, hidden_size]");
  require(size(logits, 0) == rows && size(logits, 1) == decoder.shape().vocab, "logits is [rows, vocab_size]");
  const nb::gil_scoped_release release;
  decoder.project(hidden.data(), rows, logits.data());
}

SegmentInput segment_input(const SegmentArrays& arrays, int start, const Pool& pool) {
  const auto& [positions, pages, view, tail] = arrays;
  SegmentInput in;
  in.start = start;
  in.rows = size(positions);
  in.positions = positions.data();
  in.full = size(pages);
  in.pages = pages.data();
  if (view) {
    require(size(*view, 0) == pool.layers() && size(*view, 1) == pool.kv_heads(),
            "a view is [layers, kv_heads, pages]");
    in.view = view->data();
    in.view_pages = size(*view, 2);
  }
  in.tail = tail.data();
  in.tail_rows = size(tail, 0);
  in.tail_width = size(tail, 1);
  return in;
}

BlockShifts block_shifts(const ShiftArrays& arrays) {
  const auto& [block, shifts, trained] = arrays;
  require(block > 0 && block % page_size == 0, "a block of shifts is whole pages");
  require(size(shifts) > 0, "shifts of no block");
  return {shifts.data(), size(shifts), block / page_size, trained};
}

void forward(Decoder& decoder, Pool& pool, const Ints& tokens, const Ints& positions, const Ints& slots,
             const std::vector<SegmentArrays>& segments, const Ints& logit_rows, const Table& cos, const Table& sin,
             const std::optional<ShiftArrays>& shifts, const Array<float, 2>& hidden, const Array<float, 2>& residual,
             const Array<float, 2>& logits, const std::optional<Array<float, 4>>& mass,
             const std::optional<Array<float, 4>>& queries, bool int8_pages, const std::optional<LocalTables>& local,
             const std::vector<const Recall*>& memories, const std::optional<Table>& stream,
             const std::optional<Taps>& taps, const HeadRows* chosen) {
  const Shape& shape = decoder.shape();
  Pass pass;
  pass.int8_pages = int8_pages;
  pass.rows = size(tokens);
  require(size(positions) == pass.rows && size(slots) == pass.rows, "as many positions and slots as tokens");
  pass.tokens = tokens.data();
  pass.positions = positions.data();
  pass.slots = slots.data();
  require(memories.empty() || memories.size() == segments.size(), "a memory, or None, for each segment");
  int start = 0;
  for (const SegmentArrays& arrays : segments) {
    pass.segments.push_back(segment_input(arrays, start, pool));
    require(pass.segments.back().rows <= pass.rows - start, "segments must cover the rows in order");
    start += pass.segments.back().rows;
  }
  for (size_t i = 0; i < memories.size(); ++i) pass.segments[i].recall = memories[i];
  pass.logit_rows = logit_rows.data();
  pass.logit_count = size(logit_rows);
  pass.chosen = chosen;
  std::vector<const Table*> tables{&cos, &sin};
  if (local) tables.insert(tables.end(), {&std::get<0>(*local), &std::get<1>(*local)});
  for (const Table* table : tables) {
    require(size(*table, 0) == size(cos, 0) && size(*table, 1) == shape.head_dim / 2,
            "RoPE tables are [context, head_dim / 2]");
  }
  pass.context = size(cos, 0);
  pass.rope.cos = cos.data();
  pass.rope.sin = sin.data();
  if (shifts) pass.rope.shifts = block_shifts(*shifts);
  if (local) {
    pass.local.cos = std::get<0>(*local).data();
    pass.local.sin = std::get<1>(*local).data();
  }
  for (const Array<float, 2>* states : {&hidden, &residual}) {
    require(size(*states, 0) == pass.rows && size(*states, 1) == shape.hidden,
            "hidden and residual are [rows, hidden_size]");
  }
  require(size(logits, 0) == pass.logit_count && size(logits, 1) == shape.vocab, "logits is [logit_rows, vocab_size]");
  if (stream) {
    require(size(*stream, 0) == pass.rows && size(*stream, 1) == shape.hidden, "stream is [rows, hidden_size]");
    pass.stream = stream->data();
  }
  pass.hidden = hidden.data();
  pass.residual = residual.data();
  pass.logits = logits.data();
  if (mass) {
    require(size(*mass, 0) == shape.layers && size(*mass, 1) == pass.rows && size(*mass, 2) == shape.kv_heads,
            "mass is [layers, rows, kv_heads, pages]");
    pass.mass = mass->data();
    pass.mass_pages = size(*mass, 3);
  }
  if (queries) {
    require(size(*queries, 0) == pass.rows && size(*queries, 1) == shape.layers && size(*queries, 2) == shape.heads &&
                size(*queries, 3) == shape.head_dim,
            "queries is [rows, layers, heads, head_dim]");
    pass.queries = queries->data();
  }
  if (taps) {
    const auto& [layers, states] = *taps;
    require(size(states, 0) == pass.rows && size(states, 1) == size(layers) && size(states, 2) == shape.hidden,
            "taps is [rows, tapped layers, hidden_size]");
    for (int i = 0; i < size(layers); ++i) {
      const int layer = layers.data()[i];
      require(layer >= 0 && layer < shape.layers, "tapped layer ", layer, " of ", shape.layers);
      require(i == 0 || layers.data()[i - 1] < layer, "tapped layers ascend");
    }
    pass.tapped = layers.data();
    pass.tap_count = size(layers);
    pass.taps = states.data();
  }
  const nb::gil_scoped_release release;
  decoder.forward(pass, pool);
}

void close_pass(Decoder& decoder, const Table& stream, const Ints& logit_rows, const Array<float, 2>& hidden,
                const Array<float, 2>& residual, const Array<float, 2>& logits) {
  const Shape& shape = decoder.shape();
  Pass pass;
  pass.rows = size(stream, 0);
  for (const Array<float, 2>* states : {&hidden, &residual}) {
    require(size(*states, 0) == pass.rows && size(*states, 1) == shape.hidden,
            "hidden and residual are [rows, hidden_size]");
  }
  require(size(stream, 1) == shape.hidden, "stream is [rows, hidden_size]");
  pass.logit_rows = logit_rows.data();
  pass.logit_count = size(logit_rows);
  require(size(logits, 0) == pass.logit_count && size(logits, 1) == shape.vocab, "logits is [logit_rows, vocab_size]");
  pass.stream = stream.data();
  pass.hidden = hidden.data();
  pass.residual = residual.data();
  pass.logits = logits.data();
  const nb::gil_scoped_release release;
  decoder.close(pass);
}

void require_in_use(const Pool& pool, const Ints& pages) {
  for (int i = 0; i < size(pages); ++i) require(pool.usable(pages.data()[i]), "a page that is not in use");
}

void key_bounds(Decoder& decoder, const Pool& pool, const Ints& pages, const Array<float, 4>& low,
                const Array<float, 4>& high) {
  require_in_use(pool, pages);
  for (const auto* bounds : {&low, &high}) {
    require(size(*bounds, 0) == pool.layers() && size(*bounds, 1) == pool.kv_heads() &&
                size(*bounds, 2) == pool.pages() && size(*bounds, 3) == size(low, 3) && size(low, 3) <= pool.head_dim(),
            "bounds are [layers, kv_heads, pages of the pool, head_dim]");
  }
  const nb::gil_scoped_release release;
  decoder.key_bounds(pool, pages.data(), size(pages), size(low, 3), low.data(), high.data());
}

void key_scores(Decoder& decoder, const Pool& pool, const Ints& pages, const Array<const float, 3>& queries,
                const Array<float, 3>& out) {
  require_in_use(pool, pages);
  require(
      size(queries, 0) == pool.layers() && size(queries, 1) == pool.kv_heads() && size(queries, 2) == pool.head_dim(),
      "queries are [layers, kv_heads, padded head_dim]");
  require(size(out, 0) == pool.layers() && size(out, 1) == pool.kv_heads() && size(out, 2) == size(pages),
          "scores are [layers, kv_heads, pages]");
  require(pool.head_dim() <= longest_head, "head_dim must be at most 512");
  const nb::gil_scoped_release release;
  decoder.key_scores(pool, pages.data(), size(pages), queries.data(), out.data());
}

void page_keys(Decoder& decoder, const Pool& pool, int layer, const Ints& pages, const Array<float, 4>& out) {
  require_in_use(pool, pages);
  require(layer >= 0 && layer < pool.layers(), "no such layer");
  require(size(out, 0) == pool.kv_heads() && size(out, 1) == size(pages) && size(out, 2) == page_size &&
              size(out, 3) <= pool.head_dim(),
          "keys are [kv_heads, pages, page size, head_dim]");
  const nb::gil_scoped_release release;
  decoder.page_keys(pool, layer, pages.data(), size(pages), size(out, 3), out.data());
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "The CPU engine: packed weights, paged keys and values, one call a pass.";
  m.attr("PAGE_SIZE") = page_size;
  m.def("runnable_isas", &runnable_kernels, "emulated"_a = false,
        "Names of the ISA variants this machine can run, best first, or of those that emulate others.");
  m.def(
      "chosen_isa", [] { return std::string(kernels_of_environment().name); },
      "The variant that a new decoder will use; TOKENSWIFT_ISA overrides.");

  m.def("quantise", &quantise, "weights"_a.noconvert(), "blocks"_a.noconvert(),
        "Rows of weights as blocks of 8 bits, which `set_blocks` takes.");
  m.def("dequantise", &dequantise, "kind"_a, "blocks"_a.noconvert(), "values"_a.noconvert(),
        "Rows of the values of blocks, which are of a kind that `set_blocks` takes.");

  bind_sampler(m);
  bind_memory(m);
  bind_tiles(m);
  nb::class_<Pool>(m, "Pool", "Pages of 64 tokens of keys and values, all layers and heads together.")
      .def("__init__", &init_pool, "layers"_a, "kv_heads"_a, "head_dim"_a, "dtype"_a, "pages"_a)
      .def("reserve", &Pool::reserve, "page"_a, "Make a page usable; memory is taken as it is written.")
      .def("move", &move_slots, "source"_a.noconvert(), "target"_a.noconvert(),
           "Copy slots, as if all were read before any is written.")
      .def("block", &page_block, "layer"_a, "head"_a, "page"_a, "Raw bytes of one (layer, head) of a page, writable.")
      .def(
          "copy", &page_copy, "layer"_a, "head"_a, "page"_a,
          "Raw bytes of the int8 copy that passes with int8_pages read, until the next pass; None where there is none.")
      .def_prop_ro("page_bytes", &Pool::page_bytes);

  nb::class_<Team>(m, "Team", "Threads that several decoders may share; their passes take turns.")
      .def("__init__", &init_team, "threads"_a)
      .def_prop_ro("threads", &Team::size);

  nb::class_<HeadRows>(m, "HeadRows", "Some rows of an LM head, whose logits alone a pass computes.")
      .def_prop_rw("first", &HeadRows::first, &HeadRows::set_first, "How many of the head's first rows are in.")
      .def("put", &HeadRows::put, "place"_a, "row"_a, "Put a copy of a row into a place.")
      .def_prop_ro("nbytes", [](const HeadRows& rows) { return rows.copies().bytes(); });

  nb::class_<Decoder>(m, "Decoder", "Packed weights and everything a pass needs.")
      .def("__init__", &init_decoder, "vocab"_a, "hidden"_a, "ffn"_a, "heads"_a, "kv_heads"_a, "head_dim"_a,
           "norm_eps"_a, "tied"_a, "qk_norm"_a, "layers"_a, "experts"_a.none(), "post_norms"_a, "gelu"_a,
           "embedding_scale"_a, "score_scale"_a, "attention_cap"_a, "logit_cap"_a, "dtype"_a, "team"_a)
      .def("set_matrix", &set_matrix<uint16_t>, "part"_a, "layer"_a, "data"_a.noconvert(), "fewest_bits"_a = false,
           "Returns what the matrix is made of: with fewest_bits, blocks of 4 bits instead of 8 where those suffice.")
      .def("set_matrix", &set_matrix<float>, "part"_a, "layer"_a, "data"_a.noconvert(), "fewest_bits"_a = false)
      .def("set_blocks", &set_blocks, "part"_a, "layer"_a, "kind"_a, "data"_a.noconvert(),
           "Rows of whole blocks as GGUF stores them, of a kind of math/formats.h.")
      .def(
          "set_vector",
          [](Decoder& decoder, const std::string& part, int layer, const Array<const float, 1>& data) {
            decoder.set_vector(part, layer, data.data(), size(data));
          },
          "part"_a, "layer"_a, "data"_a.noconvert())
      .def("forward", &forward, "pool"_a, "tokens"_a.noconvert(), "positions"_a.noconvert(), "slots"_a.noconvert(),
           "segments"_a.noconvert(), "logit_rows"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(),
           "shifts"_a.noconvert().none(), "hidden"_a.noconvert(), "residual"_a.noconvert(), "logits"_a.noconvert(),
           "mass"_a.noconvert().none(), "queries"_a.noconvert().none(), "int8_pages"_a,
           "local"_a.noconvert().none() = nb::none(), "memories"_a = std::vector<const Recall*>(),
           "stream"_a.noconvert().none() = nb::none(), "taps"_a.noconvert().none() = nb::none(),
           "chosen"_a.none() = nb::none())
      .def("head_rows", &Decoder::head_rows, "room"_a, nb::keep_alive<0, 1>(),
           "A choice of the head's rows, with room for copies of so many. None is in yet.")
      .def("close", &close_pass, "stream"_a.noconvert(), "logit_rows"_a.noconvert(), "hidden"_a.noconvert(),
           "residual"_a.noconvert(), "logits"_a.noconvert(),
           "What follows the layers of a pass, from the residual stream that they left.")
      .def("project", &project, "hidden"_a.noconvert(), "logits"_a.noconvert(),
           "The LM head's logits of rows of `hidden` as forward returns it.")
      .def("key_bounds", &key_bounds, "pool"_a, "pages"_a.noconvert(), "low"_a.noconvert(), "high"_a.noconvert(),
           "Write the least and greatest keys of these pages at their numbers.")
      .def("key_scores", &key_scores, "pool"_a, "pages"_a.noconvert(), "queries"_a.noconvert(), "out"_a.noconvert(),
           "The largest product of a query with a key of each page.")
      .def("page_keys", &page_keys, "pool"_a, "layer"_a, "pages"_a.noconvert(), "out"_a.noconvert(),
           "Copy a layer's keys of these pages.")
      .def_prop_ro("isa", [](const Decoder& decoder) { return std::string(decoder.kernels().name); })
      .def_prop_ro("tile", [](const Decoder& decoder) { return decoder.kernels().tile; })
      .def_prop_ro("weight_bytes", &Decoder::weight_bytes)
      .def_prop_ro("multiplied_bytes", &Decoder::multiplied_bytes)
      .def_prop_ro("head_bytes", &Decoder::head_bytes);
}

}  // namespace tokenswift

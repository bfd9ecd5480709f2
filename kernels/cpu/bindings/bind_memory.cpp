// Memories of evicted pages at the Python boundary.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <stdexcept>
#include <tuple>

#include "bindings/bind.h"
#include "engine/decoder.h"
#include "engine/recall.h"
#include "engine/require.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenswift {
namespace {

Remembering kind_of(const std::string& kind) {
  if (kind == "linear") return Remembering::linear;
  if (kind == "performer") return Remembering::performer;
  if (kind == "infini") return Remembering::infini;
  if (kind == "infini_linear") return Remembering::infini_linear;
  throw std::invalid_argument("kind '" + kind + "' is not allowed; linear, performer, infini and infini_linear are");
}

void init_memory(Recall* self, const Decoder& decoder, const std::string& kind, const Ints& keeps,
                 const std::optional<Table>& table, const std::optional<Table>& shares) {
  const Shape& of = decoder.shape();
  RecallShape shape;
  shape.kind = kind_of(kind);
  shape.layers = of.layers;
  shape.heads = of.heads;
  shape.kv_heads = of.kv_heads;
  shape.head_dim = of.head_dim;
  shape.features = shape.padded();
  shape.keeps.assign(keeps.data(), keeps.data() + keeps.shape(0));
  if (table) {
    require(table->shape(0) == size_t(shape.padded()) && table->shape(1) <= size_t(INT32_MAX),
            "a table is [padded head_dim, features]");
    shape.features = int(table->shape(1));
    shape.table.assign(table->data(), table->data() + table->size());
  }
  if (shares) {
    require(shares->shape(0) == size_t(of.layers) && shares->shape(1) == size_t(of.heads),
            "shares are [layers, heads]");
    shape.shares.assign(shares->data(), shares->data() + shares->size());
  }
  new (self) Recall(decoder.kernels(), std::move(shape));
}

void fold(Recall& memory, Decoder& decoder, const Pool& pool, const Ints& numbers, const Ints& pages, const Table& cos,
          const Table& sin, const std::optional<std::tuple<Table, Table>>& local,
          const std::optional<Array<const float, 3>>& shifts) {
  const Shape& shape = decoder.shape();
  require(numbers.shape(0) == pages.shape(0) && pages.shape(0) <= size_t(pool.pages()), "as many numbers as pages");
  for (const Table* table : {&cos, &sin, local ? &std::get<0>(*local) : &cos, local ? &std::get<1>(*local) : &sin}) {
    require(table->shape(0) == cos.shape(0) && table->shape(1) == size_t(shape.head_dim / 2),
            "RoPE tables are [context, head_dim / 2]");
  }
  require(pool.layers() == shape.layers && pool.kv_heads() == shape.kv_heads &&
              pool.head_dim() == round_up(shape.head_dim, vector_multiple),
          "the pool is not of this model's shape");
  if (shifts) {
    require(shifts->shape(0) == size_t(shape.layers) && shifts->shape(1) == size_t(shape.kv_heads) &&
                shifts->shape(2) == pages.shape(0),
            "shifts are [layers, kv_heads, pages]");
  }
  RopeTables rope, of_local;
  rope.cos = cos.data();
  rope.sin = sin.data();
  if (local) {
    of_local.cos = std::get<0>(*local).data();
    of_local.sin = std::get<1>(*local).data();
  }
  const nb::gil_scoped_release release;
  decoder.fold(memory, pool, numbers.data(), pages.data(), int(pages.shape(0)), rope, of_local, int(cos.shape(0)),
               shifts ? shifts->data() : nullptr);
}

}  // namespace

void bind_memory(nb::module_& m) {
  nb::class_<Recall>(m, "Memory", "A state of fixed size that evicted pages are folded into.")
      .def("__init__", &init_memory, "decoder"_a, "kind"_a, "keeps"_a.noconvert(), "table"_a.noconvert().none(),
           "shares"_a.noconvert().none())
      .def("fold", &fold, "decoder"_a, "pool"_a, "numbers"_a.noconvert(), "pages"_a.noconvert(), "cos"_a.noconvert(),
           "sin"_a.noconvert(), "local"_a.noconvert().none(), "shifts"_a.noconvert().none(),
           "Take in pages that are about to be evicted, in order.")
      .def(
          "copy", [](const Recall& memory) { return Recall(memory); }, "A memory that goes on from the same state.")
      .def("clear", &Recall::clear, "Forget everything.")
      .def_prop_ro("nbytes", &Recall::bytes);
}

}  // namespace tokenswift

// Single products of tiles at the Python boundary, so that tests may ask whether both kinds of tiles have the same
// bits.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "bindings/bind.h"
#include "bindings/tile_dot.h"
#include "engine/require.h"
#include "tiles/emulated.h"
#include "isa/permission.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenswift {
namespace {

using Bytes = Array<const uint8_t, 2>;

TileDot kind_of(const std::string& kind) {
  if (kind == "bf16") return TileDot::bf16;
  if (kind == "signed_unsigned") return TileDot::signed_unsigned;
  if (kind == "unsigned_signed") return TileDot::unsigned_signed;
  throw std::invalid_argument("kind '" + kind + "' is not allowed; bf16, signed_unsigned and unsigned_signed are");
}

ComputeTileDot on_hardware() {
  std::string why = "this module is not made for x86-64";
#ifdef TOKENSWIFT_X86
  if (tiles_allowed(&why)) return hardware_tile_dot;
#endif
  throw std::invalid_argument("no tile registers here: " + why);
}

template <class T>
void one_dot(const std::string& kind, const Array<T, 2>& c, const Bytes& a, const Bytes& b, bool emulated) {
  const TileDot dot = kind_of(kind);
  require((dot == TileDot::bf16) == std::is_same_v<T, float>, "c is float32 with bf16, and int32 with bytes");
  require(c.shape(0) == 16 && c.shape(1) == 16, "c is [16, 16]");
  require(a.shape(0) == 16 && a.shape(1) == 64, "a is [16, 64] bytes");
  require(b.shape(0) == 16 && b.shape(1) == 64, "b is [16, 64] bytes");
  const ComputeTileDot compute = emulated ? tile_dot<Tiles> : on_hardware();
  compute(dot, c.data(), a.data(), b.data());
}

}  // namespace

void bind_tiles(nb::module_& m) {
  constexpr const char* text = "Add a product of two tiles to c, with the processor's tile registers or emulated ones.";
  m.def("tile_dot", &one_dot<float>, "kind"_a, "c"_a.noconvert(), "a"_a.noconvert(), "b"_a.noconvert(), "emulated"_a,
        text);
  m.def("tile_dot", &one_dot<int32_t>, "kind"_a, "c"_a.noconvert(), "a"_a.noconvert(), "b"_a.noconvert(), "emulated"_a,
        text);
  m.def("refused_tiles", &refused_tiles, "Why this processor's tile registers may not be used; empty where they may.");
}

}  // namespace tokenswift

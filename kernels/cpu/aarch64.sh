#!/bin/sh
# Builds the engine for aarch64 and runs its tests in qemu's user emulation, on Debian for x86-64.
#   kernels/cpu/aarch64.sh [pytest arguments]
# PYTHON names the interpreter whose pip installs (python3), AARCH64_DIR the folder for everything, 1.2 GB
# (build/aarch64). The emulated Python is Debian's, unpacked into that folder; nothing is installed on the machine.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${AARCH64_DIR:-$root/build/aarch64}
mkdir -p "$work"
work=$(cd "$work" && pwd)
sysroot=$work/sysroot
emulated=$work/python

missing=
need() { command -v "$1" >/dev/null || missing="$missing $2"; }
need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
need qemu-aarch64 qemu-user
need cmake cmake
need make make
if [ -n "$missing" ]; then
  echo "aarch64.sh: something is missing: apt-get install$missing" >&2
  exit 1
fi

# An apt of its own that knows no installed package, so that it fetches all that Python needs.
if [ ! -d "$sysroot" ]; then
  mkdir -p "$work/apt/lists/partial" "$work/apt/archives/partial"
  : >"$work/apt/status"
  cat >"$work/apt/apt.conf" <<EOF
APT::Architecture "arm64";
APT::Architectures "arm64";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Dir::State "$work/apt";
Dir::State::status "$work/apt/status";
Dir::Cache "$work/apt";
EOF
  export APT_CONFIG="$work/apt/apt.conf"
  apt-get -q update
  apt-get -q -y --download-only install python3 libpython3-dev libstdc++6 ||
    { echo "aarch64.sh: the package sources of this machine have no arm64; Debian's have" >&2; exit 1; }
  unset APT_CONFIG
  rm -rf "$sysroot.new"
  mkdir "$sysroot.new"
  for package in "$work"/apt/archives/*.deb; do dpkg-deb -x "$package" "$sysroot.new"; done
  mv "$sysroot.new" "$sysroot"
  rm -r "$work/apt"
fi

# Stands for the interpreter in everything below, child processes included. A Neoverse N1 has NEON and no SVE. Without
# bytecode on disk each start would compile torch again, for a minute.
cat >"$emulated" <<EOF
#!/bin/sh
exec qemu-aarch64 -cpu neoverse-n1 -L "$sysroot" -U PYTHONDONTWRITEBYTECODE \\
  -E "PYTHONHOME=$sysroot/usr" -E "PYTHONPATH=$work/site" -0 "$emulated" "$sysroot/usr/bin/python3" "\$@"
EOF
chmod +x "$emulated"

# PyPI's later torch for aarch64 is made for CUDA and does not load without 2 GB of its libraries.
if [ ! -d "$work/site" ]; then
  rm -rf "$work/site.new"
  grep -v '^torch==' "$root/constraints.txt" >"$work/constraints.txt"
  "${PYTHON:-python3}" -m pip --python "$emulated" install --quiet --no-compile --target "$work/site.new" \
    -c "$work/constraints.txt" torch==2.10.0 gguf hypothesis nanobind numpy psutil pytest scipy transformers
  mv "$work/site.new" "$work/site"
fi

# Of the emulated system only Python's headers: the C library and C++'s are the cross compiler's own.
python_include=$("$emulated" -c 'import sysconfig; print(sysconfig.get_path("include"))')
cmake -S "$root/kernels/cpu" -B "$work/build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS="-idirafter $sysroot/usr/include" \
  -DPython_EXECUTABLE="$emulated" -DPython_INCLUDE_DIR="$python_include"
cmake --build "$work/build" --parallel

# The inner products have to be NEON's fused ones, four at a time.
aarch64-linux-gnu-objdump -dr "$work/build/CMakeFiles/_native.dir/isa/generic.cpp.o" >"$work/generic.s"
count() { grep -cE "$1" "$work/generic.s" || true; }
vector=$(count '\sfmla\s+v[0-9]+\.4s') scalar=$(count '\sfn?m(add|sub)\s|fmaf')
echo "isa/generic.cpp: $vector fused multiply-adds of vectors, $scalar of single values"
[ "$vector" -gt "$scalar" ] || { echo "aarch64.sh: the compiler does not vectorise Isa::fma" >&2; exit 1; }

rm -rf "$work/checkout"
mkdir "$work/checkout"
for part in tokenswift_py kernels kvcache drafters experiments tests docs pyproject.toml; do cp -r "$root/$part" "$work/checkout/"; done
rm -f "$work"/checkout/kernels/cpu/_native*.so
cp "$work"/build/_native*.so "$work/checkout/kernels/cpu/"

# The tests skip an engine that does not load.
(cd "$work/checkout/kernels/cpu" && "$emulated" -c 'import _native; print("runs", _native.runnable_isas())')

# Emulated time tells nothing of a busy machine's.
cd "$work/checkout"
"$emulated" -m pytest tests/test_noise.py tests/test_native*.py -q -p no:cacheprovider \
  --deselect tests/test_native.py::test_a_busy_machine_does_not_stall_a_pass "$@"

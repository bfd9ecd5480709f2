#!/bin/sh
# Runs the native engine's tests against an engine built with sanitizers, in a copy of the checkout.
#   kernels/cpu/sanitize.sh address|thread [pytest arguments]
# PYTHON names the interpreter (python3), SANITIZE_DIR the folder for build and copy (build/sanitize). The tests run in
# a process a core (-n 0 among the arguments: in this one); the last line is the verdict.
set -eu
kind=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$(command -v "${PYTHON:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")  # not resolved: a venv's python is a link
work=${SANITIZE_DIR:-$root/build/sanitize}/$kind

cmake -S "$root/kernels/cpu" -B "$work/build" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTOKENSWIFT_SANITIZE="$kind" \
  -DPython_EXECUTABLE="$python"
cmake --build "$work/build" --parallel

rm -rf "$work/checkout"
mkdir -p "$work/checkout"
for part in tokenswift_py kernels kvcache drafters experiments tests docs pyproject.toml; do cp -r "$root/$part" "$work/checkout/"; done
rm -f "$work"/checkout/kernels/cpu/_native*.so
cp "$work"/build/_native*.so "$work/checkout/kernels/cpu/"

case $kind in
  address) runtime=libasan.so names="AddressSanitizer and UBSan" ;;
  thread) runtime=libtsan.so names=ThreadSanitizer ;;
esac
# An editable install's finder would hand out the checkout it was made from, with the engine that is not instrumented.
mkdir -p "$work/site"
cat > "$work/site/sitecustomize.py" <<'END'
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
END
export PYTHONPATH="$work/site:$work/checkout"

# The interpreter is not instrumented: the runtime has to be there before it, and its own leaks are not ours.
cd "$work/checkout"
sanitized() {
  LD_PRELOAD="$(${CXX:-c++} -print-file-name=$runtime) $(${CXX:-c++} -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1" \
    "$python" "$@"
}
sanitized -c "from tokenswift_py.kernels.cpu import _native as engine
assert engine.__file__.startswith('$work/checkout/'), engine.__file__"
# A finding ends the process, and with it what pytest has captured: file descriptors are left alone.
if sanitized -m pytest tests/test_native.py tests/test_native_bits.py tests/test_native_bounds.py \
  tests/test_native_sampling.py tests/test_page_copies.py tests/test_statistics.py tests/test_quantised.py \
  tests/test_gguf.py tests/test_families.py tests/test_tiles.py tests/test_native_int8.py tests/test_memories.py \
  tests/test_draft_vocabulary.py tests/test_soft_caps.py tests/test_self_extend.py -q -p no:cacheprovider --capture=sys -n auto "$@"
then
  echo "$names: nothing found"
else
  status=$?
  echo "$names: FAILED: a finding above, or a test (pytest: $status)"
  exit $status
fi

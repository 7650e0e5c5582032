#!/usr/bin/env bash
# Builds the speed peer, llama.cpp, for this machine: Release, native instructions, OpenMP, no GPU.
#
#   tools/peers.sh [DIR]     default DIR: build/peers; leaves DIR/bin/llama-bench, llama-perplexity and llama-quantize
#
# The source is what the PyPI package llama-cpp-python carries; its version is pinned so that
# measurements can be repeated. Needs cmake, a C++ compiler, python3 with pip; about 15 minutes on 2 cores.
set -euo pipefail

package=llama-cpp-python
version=0.3.36
dir=$(mkdir -p "${1:-build/peers}" && cd "${1:-build/peers}" && pwd)
source_dir=$dir/source

if [ ! -d "$source_dir" ]; then
  echo "peers: downloading $package $version (source, 77 MB) to $dir"
  if ! ls "$dir"/llama_cpp_python-$version.tar.gz >/dev/null 2>&1; then
    python3 -m pip download --quiet --no-deps --no-binary "$package" \
      --dest "$dir" "$package==$version"
  fi
  partial=$(mktemp -d "$dir/unpack.XXXXXX")
  tar -xzf "$dir/llama_cpp_python-$version.tar.gz" -C "$partial" --strip-components=1
  mv "$partial" "$source_dir"
fi

echo "peers: building llama.cpp in $dir"
cmake -S "$source_dir/vendor/llama.cpp" -B "$dir" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
  -DGGML_OPENMP=ON -DGGML_CUDA=OFF -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF \
  -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
  -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TOOLS=ON >"$dir/configure.log" 2>&1 ||
  { tail -n 20 "$dir/configure.log" >&2; exit 1; }
cmake --build "$dir" --target llama-bench llama-perplexity llama-quantize --parallel "$(nproc)"
echo "peers: $dir/bin/llama-bench $("$dir/bin/llama-bench" --help 2>/dev/null | head -n 1 || true)"

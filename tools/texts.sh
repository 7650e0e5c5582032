#!/usr/bin/env bash
# Gets six English texts to measure policies on, none of them one that the tests use.
#
#   tools/texts.sh [DIR]     default DIR: build/texts; leaves DIR/*.txt and DIR/README
#
# Each is UTF-8 without carriage returns, 48,000 bytes, which is 11,000 to 24,000 tokens of
# SmolLM2. They come out of Debian packages (apt-get download) and one of PyPI (pip), 15 MB in all;
# nothing is installed. A second run does nothing.
set -euo pipefail

fail() {
  echo "texts: error: $*" >&2
  exit 1
}

dir=$(mkdir -p "${1:-build/texts}" && cd "${1:-build/texts}" && pwd)
[ ! -e "$dir/README" ] || { echo "texts: $dir has them already"; exit 0; }

work=$(mktemp -d "$dir/.download.XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 755 "$work" # apt-get downloads as another user where it can
cd "$work"

# deb PACKAGE: its files appear below $work/PACKAGE.
deb() {
  echo "texts: downloading $1"
  apt-get -qq download "$1" 2>apt.log ||
    fail "apt-get could not download $1: $(tail -n 1 apt.log)"
  dpkg-deb -x "$1"_*.deb "$1"
}

# take NAME FILE START WHAT: NAME.txt is the first 48,000 bytes of FILE, in whole lines, from the
# first line that matches the regular expression START.
take() {
  local name=$1 file=$2 start=$3 what=$4
  tr -d '\r' <"$file" | LC_ALL=C awk -v start="$start" '
      $0 ~ start { found = 1 }
      found && (size += length($0) + 1) <= 48000' >"$name.txt"
  [ "$(wc -c <"$name.txt")" -gt 47000 ] || fail "$name: $file has too little from /$start/ on"
  iconv -f utf-8 -t utf-8 "$name.txt" >/dev/null || fail "$name: expected UTF-8"
  echo "$name.txt: $what" >>README
}

deb golang-github-pierrec-lz4-dev
deb jargon-text
deb perl-doc
deb libstb-dev
echo "texts: downloading argparse"
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
  argparse==1.4.0 || fail "pip could not download argparse"
python3 -m zipfile --extract argparse-*.whl argparse

books=golang-github-pierrec-lz4-dev/usr/share/gocode/src/github.com/pierrec/lz4/testdata
take sawyer "$books/Mark.Twain-Tom.Sawyer.txt" '^CHAPTER I$' \
  "prose, 1876: The Adventures of Tom Sawyer by Mark Twain; public domain"
take holmes "$books/pg1661.txt" '^ADVENTURE I[.]' \
  "prose, 1892: The Adventures of Sherlock Holmes by Arthur Conan Doyle; public domain"
gzip -dc jargon-text/usr/share/doc/jargon-text/jargon.txt.gz >jargon
take jargon jargon '^Chapter.*Hacker Slang' \
  "prose, 2003: the introduction of The Jargon File 4.4.7; public domain"
take perlretut perl-doc/usr/share/perl/5.*/pod/perlretut.pod '^This page provides' \
  "prose with code: perlretut, a tutorial by Mark Kvale; Perl's licence"
take argparse argparse/argparse.py '^import copy' \
  "Python: argparse 1.4.0 by Steven Bethard; Python's licence"
take stb libstb-dev/usr/include/stb/stb_image_write.h '^#ifdef STB_IMAGE_WRITE_IMPL' \
  "C: stb_image_write.h by Sean Barrett; public domain"

mv -- *.txt "$dir"
mv README "$dir"
echo "texts: $(wc -l <"$dir/README") texts in $dir"

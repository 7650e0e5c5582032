// Files that commands write: whole or not at all, however a run ends.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <string>
#include <vector>

#include "cli/output_file.h"
#include "device/error.h"
#include "tests/file_limit.h"
#include "tests/run_thaw.h"
#include "tests/tiny_cli.h"

namespace thaw {
namespace {

namespace fs = std::filesystem;

using testing::read_file;
using testing::run_thaw;
using testing::RunResult;
using testing::TemporaryDirectory;
using testing::TinyCli;
using testing::write_file;

void save(const fs::path& path, const std::string& text) {
  OutputFile file(path);
  file.write(text);
  file.finish();
}

bool has_unnamed_files(const fs::path& directory) {
  const int fd = ::open(directory.c_str(), O_WRONLY | O_TMPFILE | O_CLOEXEC, 0600);
  if (fd >= 0) ::close(fd);
  return fd >= 0;
}

TEST_CASE("output file: appears when it is finished, and then replaces what was there") {
  const TemporaryDirectory directory;
  const fs::path path = directory.path() / std::string(250, 'n');  // 255 is the most
  { OutputFile(path).write("never finished"); }
  CHECK(fs::is_empty(directory.path()));
  save(path, "old");
  {
    OutputFile file(path);
    file.write("new");
    CHECK(read_file(path) == "old");
    file.finish();
  }
  CHECK(read_file(path) == "new");
  CHECK(std::distance(fs::directory_iterator(directory.path()), {}) == 1);
}

TEST_CASE("output file: a link is written through, also to a file that is not there yet") {
  const TemporaryDirectory directory;
  const fs::path there = directory.path() / "there", link = directory.path() / "link";
  fs::create_directory(there);
  fs::create_symlink("there/file", directory.path() / "middle");
  fs::create_symlink(directory.path() / "middle", link);
  for (const std::string text : {"first", "second"}) {
    save(link, text);
    CHECK(fs::is_symlink(link));
    CHECK(read_file(there / "file") == text);
  }
  CHECK(std::distance(fs::directory_iterator(there), {}) == 1);
}

TEST_CASE("output file: what cannot be written is told at once, with the reason") {
  const TemporaryDirectory directory;
  const std::string base = directory.path().string();
  const auto error = [](const std::string& path) -> std::string {
    try {
      OutputFile file(path);
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  fs::create_symlink("loop", directory.path() / "loop");
  fs::create_symlink("no/file", directory.path() / "nowhere");
  for (const auto& [path, reason] :
       {std::pair{base + "/no/file", "cannot write: No such file or directory"},
        {base + "/nowhere", "cannot write: No such file or directory"},
        {base + "/loop", "cannot write: Too many levels of symbolic links"},
        {base + "/" + std::string(256, 'n'), "cannot write: File name too long"},
        {std::string("/dev/null/file"), "cannot write: Not a directory"},
        {std::string("/dev/full"), "expected a regular file or none to write, found another kind"},
        {base, "expected a regular file or none to write, found a directory"}}) {
    CHECK(error(path) == path + ": " + reason);
  }
  CHECK(error("") == "expected a file to write, found an empty path");
  const testing::FileLimit limit(10);
  CHECK_THROWS_WITH_AS(save(base + "/x", std::string(11, 'x')),
                       (base + "/x: cannot write: File too large").c_str(), Error);
  CHECK_FALSE(fs::exists(base + "/x"));
}

TEST_CASE("output file: a run that a signal ends leaves nothing") {
  const TemporaryDirectory directory;
  if (!has_unnamed_files(directory.path())) return;
  for (const int signal : {SIGTERM, SIGHUP, SIGKILL}) {
    CAPTURE(signal);
    const RunResult r =
        run_thaw({"generate", "-m", TinyCli::get().model(), "-p", "abc", "-n", "-1", "-c",
                  "16777216", "--ignore-eos", "--report", directory.path() / "map.html", "--trace",
                  directory.path() / "trace.json"},
                 {.interrupt_after = 20, .signal = signal});
    CHECK(r.exit_code == 128 + signal);
    CHECK(fs::is_empty(directory.path()));
  }
}

TEST_CASE("output file: two flags cannot name one file") {
  const TemporaryDirectory directory;
  const std::string x = directory.path() / "x.svg", dotted = directory.path() / "." / "x.svg";
  fs::create_symlink("x.svg", directory.path() / "link");
  const std::string m = TinyCli::get().model();
  const auto error = [&](const std::vector<std::string>& args) {
    const RunResult r = run_thaw(args);
    CHECK(r.exit_code == 2);
    CHECK(r.out.empty());
    return r.err;
  };
  for (const std::string& other : {x, dotted, (directory.path() / "link").string()}) {
    CAPTURE(other);
    CHECK(error({"generate", "-m", m, "-p", "a", "--report", x, "--trace", other})
              .starts_with("thaw: --report and --trace: expected two files, found "));
    CHECK(error({"perplexity", "-m", m, "-p", "abc", "--csv", other, "--plot", x})
              .starts_with("thaw: --csv and --plot: expected two files, found "));
  }
}

TEST_CASE("output file: it cannot be one that the command reads") {
  const TemporaryDirectory directory;
  const std::string m = directory.path() / "m.gguf", text = directory.path() / "a.txt";
  const std::string link = directory.path() / "link";
  fs::copy(TinyCli::get().model(), m);
  fs::create_symlink("m.gguf", link);
  write_file(text, "1 2 3");
  const auto fails = [&](const std::vector<std::string>& args, const std::string& flags) {
    const RunResult r = run_thaw(args);
    CAPTURE(r.err);
    CHECK(r.exit_code == 2);
    CHECK(r.err.starts_with("thaw: " + flags + ": expected two files, found "));
  };
  fails({"generate", "-m", m, "-p", "a", "--report", link}, "--model and --report");
  fails({"generate", "-m", link, "-f", text, "--trace", m}, "--model and --trace");
  fails({"generate", "-m", m, "-f", text, "--trace", text}, "--file and --trace");
  fails({"logits", "-m", m, "-f", text, "-o", text}, "--file and --output");
  fails({"logits", "-m", m, "--tokens", text, "-o", text}, "--tokens and --output");
  fails({"perplexity", "-m", m, "-f", text, "--csv", text}, "--file and --csv");
  fails({"needle", "-m", m, "-f", text, "--html", m}, "--model and --html");
  fails({"chat", "-m", m, "--session", text, "--history", text}, "--session and --history");
  CHECK(fs::file_size(m) == fs::file_size(TinyCli::get().model()));
  CHECK(read_file(text) == "1 2 3");
}

}  // namespace
}  // namespace thaw

#include "tests/run_thaw.h"

#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdlib>
#include <filesystem>

#include "device/error.h"

namespace thaw::testing {
namespace {

using Pipe = std::array<int, 2>;

Pipe make_pipe() {
  Pipe ends;
  require(::pipe2(ends.data(), O_CLOEXEC) == 0, "pipe2 failed");
  return ends;
}

// Becomes thaw, or exits with 127.
[[noreturn]] void become_thaw(const std::vector<std::string>& args) {
  const std::string binary = thaw_binary();
  std::vector<char*> argv = {const_cast<char*>(binary.c_str())};
  for (const std::string& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);
  ::execv(argv[0], argv.data());
  ::_exit(127);
}

// In the child.
void connect(const RunOptions& options, const Pipe& in, const Pipe& out, const Pipe& err) {
  std::signal(SIGINT, SIG_DFL);  // as in a terminal, whatever this process ignores
  std::signal(options.signal, SIG_DFL);
  std::signal(SIGPIPE, SIG_DFL);
  std::signal(SIGXFSZ, SIG_DFL);
  ::dup2(in[0], STDIN_FILENO);
  ::dup2(err[1], STDERR_FILENO);
  if (options.stdout_path.empty()) {
    ::dup2(out[1], STDOUT_FILENO);
  } else if (options.stdout_path == "closed") {
    ::close(STDOUT_FILENO);
  } else {
    ::dup2(::open(options.stdout_path.c_str(), O_WRONLY | O_CLOEXEC), STDOUT_FILENO);
  }
}

void send(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t n = ::write(fd, text.data(), text.size());
    if (n <= 0) break;  // thaw need not read it all
    text.remove_prefix(static_cast<std::size_t>(n));
  }
  ::close(fd);
}

// Appends what can be read now; false at the end.
bool receive(int fd, std::string& to) {
  char block[4096];
  const ssize_t n = ::read(fd, block, sizeof block);
  if (n > 0) to.append(block, static_cast<std::size_t>(n));
  return n > 0;
}

int exit_code_of(pid_t child) {
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

std::string thaw_binary() {
  if (const char* path = std::getenv("THAW_BIN")) return path;
  return std::filesystem::read_symlink("/proc/self/exe").parent_path() / "thaw";
}

RunResult run_thaw(const std::vector<std::string>& args, const RunOptions& options) {
  const Pipe in = make_pipe(), out = make_pipe(), err = make_pipe();
  const pid_t child = ::fork();
  require(child >= 0, "fork failed");
  if (child == 0) connect(options, in, out, err), become_thaw(args);
  for (int fd : {in[0], out[1], err[1]}) ::close(fd);
  const auto old = std::signal(SIGPIPE, SIG_IGN);
  send(in[1], options.input);
  std::signal(SIGPIPE, old);

  RunResult result;
  bool interrupted = options.interrupt_after < 0;
  std::array<pollfd, 2> open = {{{out[0], POLLIN, 0}, {err[0], POLLIN, 0}}};
  while (open[0].fd >= 0 || open[1].fd >= 0) {
    ::poll(open.data(), open.size(), -1);
    for (int i = 0; i < 2; ++i) {
      if (open[i].revents == 0) continue;
      if (!receive(open[i].fd, i == 0 ? result.out : result.err)) open[i].fd = -1;
      if (!interrupted && std::ssize(result.out) > options.interrupt_after) {
        ::kill(child, options.signal);
        interrupted = true;
      }
    }
  }
  ::close(out[0]), ::close(err[0]);
  result.exit_code = exit_code_of(child);
  return result;
}

RunResult run_thaw_in_terminal(const std::vector<std::string>& args,
                               const std::vector<Keys>& steps) {
  constexpr int kMinute = 60'000;
  int terminal = -1;
  const pid_t child = ::forkpty(&terminal, nullptr, nullptr, nullptr);
  require(child >= 0, "forkpty failed");
  if (child == 0) {
    ::setenv("TERM", "xterm", 1);
    std::signal(SIGINT, SIG_DFL);
    become_thaw(args);
  }
  RunResult result;
  std::size_t seen = 0;
  pollfd shown = {terminal, POLLIN, 0};
  const auto more = [&] {
    if (::poll(&shown, 1, kMinute) == 0) ::kill(child, SIGKILL);
    return receive(terminal, result.out);
  };
  for (const Keys& step : steps) {
    std::size_t at;
    while ((at = result.out.find(step.shown, seen)) == std::string::npos && more()) {
    }
    if (at == std::string::npos) break;
    seen = at + step.shown.size();
    step.first();
    const winsize window = {24, step.columns, 0, 0};
    require(step.columns == 0 || ::ioctl(terminal, TIOCSWINSZ, &window) == 0, "cannot resize");
    require(::write(terminal, step.keys.data(), step.keys.size()) == std::ssize(step.keys),
            "cannot type into the terminal");
  }
  while (more()) {
  }
  ::close(terminal);
  result.exit_code = exit_code_of(child);
  return result;
}

}  // namespace thaw::testing

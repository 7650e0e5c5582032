#include "cli/terminal.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <iostream>

#include "device/error.h"

namespace thaw {
namespace {

std::atomic<bool> interrupted = false;
static_assert(std::atomic<bool>::is_always_lock_free);  // so a signal handler may set it

int interrupt_event = -1;  // can be read once it is set, in whichever thread the handler ran
std::atomic<int> end_signal = 0, presses = 0, deadly_press = 0;
std::atomic<bool> suspends = false, resized = false;

void on_signal(int signal) {
  constexpr std::string_view kWarning = "\n(stopping soon; Ctrl-C again ends at once, unsaved)\n";
  const int reason = errno;
  interrupted = true;
  if (signal != SIGINT) {
    end_signal = signal;
  } else if (const int n = ++presses, deadly = deadly_press; n == deadly) {
    std::signal(SIGINT, SIG_DFL);
    std::raise(SIGINT);  // when this returns
  } else if (n > 1 && n + 1 == deadly) {
    static_cast<void>(!::write(STDERR_FILENO, kWarning.data(), kWarning.size()));
  }
  ::eventfd_write(interrupt_event, 1);
  errno = reason;
}

void handle(int signal, int flags) {
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART | flags;
  ::sigaction(signal, &action, nullptr);
}

void on_edit_signal(int signal) {
  const int reason = errno;
  (signal == SIGTSTP ? suspends : resized) = true;
  ::eventfd_write(interrupt_event, 1);
  errno = reason;
}

struct sigaction before_edit[2] = {};
constexpr int kEditSignals[] = {SIGTSTP, SIGWINCH};

}  // namespace

void prepare_standard_streams() {
  for (int fd = 0; fd <= 2; ++fd) {
    if (::fcntl(fd, F_GETFD) != -1) continue;
    // Reading from 0 ends at once; writing to 1 and 2 fails, as it should.
    if (::open("/dev/null", O_RDONLY) != fd) fail("/dev/null: cannot open: ", std::strerror(errno));
  }
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
}

void write_stdout(std::string_view text) {
  while (!text.empty()) {
    const ssize_t n = ::write(STDOUT_FILENO, text.data(), text.size());
    if (n >= 0) {
      text.remove_prefix(static_cast<std::size_t>(n));
    } else if (errno == EAGAIN) {  // somebody who shares it does not wait for it
      pollfd room = {STDOUT_FILENO, POLLOUT, 0};
      ::poll(&room, 1, -1);
    } else if (errno != EINTR) {
      fail("standard output: cannot write: ", std::strerror(errno));
    }
  }
}

void write_stdout_after(const std::function<void()>& write_files, std::string_view text) {
  try {
    write_files();
  } catch (const Error&) {
    write_stdout(text);
    throw;
  }
  write_stdout(text);
}

bool stdin_is_terminal() { return ::isatty(STDIN_FILENO) == 1; }
bool stdout_is_terminal() { return ::isatty(STDOUT_FILENO) == 1; }
bool stderr_is_terminal() { return ::isatty(STDERR_FILENO) == 1; }

const std::atomic<bool>& catch_interrupt(int deadly) {
  if (interrupt_event < 0) interrupt_event = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  require(interrupt_event >= 0, "Ctrl-C cannot be caught: ", std::strerror(errno));
  presses = 0, deadly_press = deadly;
  eventfd_t earlier = 0;
  ::eventfd_read(interrupt_event, &earlier);
  interrupted = end_signal != 0;
  handle(SIGINT, 0);
  return interrupted;
}

void catch_end() {
  catch_interrupt();
  for (const int signal : {SIGHUP, SIGQUIT, SIGTERM}) {
    struct sigaction now {};
    ::sigaction(signal, nullptr, &now);
    if (now.sa_handler != SIG_IGN) handle(signal, SA_RESETHAND);
  }
}

int ended_by() { return end_signal; }

Ready wait_for_stdin() {
  pollfd waits[] = {{STDIN_FILENO, POLLIN, 0}, {interrupt_event, POLLIN, 0}};
  while (!interrupted && ::poll(waits, 2, -1) < 0)
    if (errno != EINTR) fail("standard input: cannot wait: ", std::strerror(errno));
  if (interrupted) return Ready::kInterrupted;
  if (waits[1].revents == 0) return Ready::kInput;
  eventfd_t came = 0;
  ::eventfd_read(interrupt_event, &came);
  return interrupted ? Ready::kInterrupted : Ready::kSignal;
}

EditSignals::EditSignals() {
  for (int i = 0; i < 2; ++i) {
    ::sigaction(kEditSignals[i], nullptr, &before_edit[i]);
    struct sigaction action {};
    action.sa_handler = on_edit_signal;
    action.sa_flags = SA_RESTART;
    if (kEditSignals[i] != SIGTSTP || before_edit[i].sa_handler != SIG_IGN)
      ::sigaction(kEditSignals[i], &action, nullptr);
  }
}

EditSignals::~EditSignals() {
  for (int i = 0; i < 2; ++i) ::sigaction(kEditSignals[i], &before_edit[i], nullptr);
  if (suspends.exchange(false)) std::raise(SIGTSTP);  // it came too late for the editor
}

int EditSignals::take() {
  return suspends.exchange(false) ? SIGTSTP : resized.exchange(false) ? SIGWINCH : 0;
}

void EditSignals::suspend() {
  struct sigaction editing {};
  ::sigaction(SIGTSTP, &before_edit[0], &editing);
  std::raise(SIGTSTP);
  ::sigaction(SIGTSTP, &editing, nullptr);
}

Progress::Progress(bool quiet) : enabled_(!quiet && stderr_is_terminal()) {}

void Progress::show(const std::string& line) {
  if (!enabled_) return;
  std::cerr << "\r\x1b[K" << line << std::flush;
  shown_ = true;
}

void Progress::clear() {
  if (shown_) std::cerr << "\r\x1b[K" << std::flush;
  shown_ = false;
}

}  // namespace thaw

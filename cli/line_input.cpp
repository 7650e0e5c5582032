#include "cli/line_input.h"

#include <histedit.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <clocale>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <cwchar>
#include <fstream>
#include <iostream>
#include <utility>

#include "cli/input.h"
#include "cli/terminal.h"
#include "device/error.h"

namespace thaw {
namespace {

constexpr int kMaxHistory = 1000;  // lines

// What a terminal sends around what is pasted, once it is asked to ("bracketed paste").
constexpr std::string_view kAskForPastes = "\x1b[?2004h", kNoMorePastes = "\x1b[?2004l";
constexpr std::string_view kPasteBegins = "\x1b[200~", kPasteEnds = "\x1b[201~";
constexpr int kKeyTime = 50;  // milliseconds between bytes of one key
constexpr std::string_view kClearLine = "\r\x1b[J";
constexpr wchar_t kRedraw = L'\x1e';  // Ctrl-^

bool understands_pastes() {
  const char* term = std::getenv("TERM");
  return term && *term != '\0' && std::string_view(term) != "dumb";
}

// libedit would write over any other file.
void require_history(const std::filesystem::path& path) {
  constexpr std::string_view kBegins = "_HiStOrY_V2_";
  std::error_code none;
  const auto status = std::filesystem::status(path, none);
  if (path.empty() || !std::filesystem::exists(status)) return;
  std::string found(kBegins.size(), '\0');
  if (std::filesystem::is_regular_file(status)) {
    std::ifstream file(path, std::ios::binary);
    file.read(found.data(), std::ssize(found));
    found.resize(static_cast<std::size_t>(file.gcount()));
    if (found.empty() || found == kBegins) return;
  }
  fail("--history: ", path.string(), ": expected a history, which begins with ", kBegins,
       ", or no file, found another");
}

// Whether standard input has more within kKeyTime.
bool comes_soon() {
  pollfd input = {STDIN_FILENO, POLLIN, 0};
  int n;
  while ((n = ::poll(&input, 1, kKeyTime)) < 0 && errno == EINTR) {
  }
  return n > 0;
}

// UTF-8 is edited by characters, also where the locale is plain C.
void use_utf8() {
  if (!std::setlocale(LC_CTYPE, "") || MB_CUR_MAX == 1) std::setlocale(LC_CTYPE, "C.UTF-8");
}

}  // namespace

std::filesystem::path default_history() {
  const auto from = [](const char* variable) {
    const char* value = std::getenv(variable);
    return std::filesystem::path(value && *value == '/' ? value : "");
  };
  const std::filesystem::path state = from("XDG_STATE_HOME"), home = from("HOME");
  if (!state.empty()) return state / "thaw" / "chat_history";
  return home.empty() ? home : home / ".local" / "state" / "thaw" / "chat_history";
}

// libedit, which takes its bytes from the LineInput, so that Ctrl-C ends a line. Errors that are
// thrown there pass through its frames, which have what unwinding needs.
class LineInput::Editor {
 public:
  Editor(LineInput& input, const std::filesystem::path& file)
      : input_(input),
        file_(file.string()),
        asks_for_pastes_(understands_pastes()),
        history_(::history_init()),
        editor_((use_utf8(), ::el_init("thaw", stdin, stderr, stderr))) {
    require(history_ && editor_, "libedit: cannot edit lines of this terminal");
    ::el_set(editor_, EL_CLIENTDATA, this);
    ::el_set(editor_, EL_PROMPT, &Editor::prompt);
    ::el_set(editor_, EL_GETCFN, &Editor::next_character);
    ::el_set(editor_, EL_HIST, ::history, history_);
    ::el_set(editor_, EL_EDITOR, "emacs");
    ::el_set(editor_, EL_BIND, "^R", "em-inc-search-prev", nullptr);
    ::el_set(editor_, EL_BIND, "^W", "ed-delete-prev-word", nullptr);
    ::el_source(editor_, nullptr);
    ::el_set(editor_, EL_BIND, "^^", "ed-redisplay", nullptr);  // kRedraw
    HistEvent event;
    ::history(history_, &event, H_SETSIZE, kMaxHistory);
    ::history(history_, &event, H_SETUNIQUE, 1);
    if (!file_.empty()) ::history(history_, &event, H_LOAD, file_.c_str());
  }

  ~Editor() {
    HistEvent event;
    if (!file_.empty()) {
      std::error_code none;
      std::filesystem::create_directories(std::filesystem::path(file_).parent_path(), none);
      ::history(history_, &event, H_SAVE, file_.c_str());
    }
    ::el_end(editor_);
    ::history_end(history_);
  }
  Editor(const Editor&) = delete;
  Editor& operator=(const Editor&) = delete;

  State read(const char* prompt, std::string& line) {
    const EditSignals signals;
    ::el_resize(editor_);  // the window may have changed since
    prompt_ = prompt;
    if (asks_for_pastes_) std::cerr << kAskForPastes << std::flush;
    ::el_set(editor_, EL_PREP_TERM, 1);  // before the prompt says that keys are waited for
    int n_bytes = 0;
    const char* text = ::el_gets(editor_, &n_bytes);
    if (asks_for_pastes_) std::cerr << kNoMorePastes << std::flush;
    if (text && n_bytes > 0) {
      line.assign(text, static_cast<std::size_t>(n_bytes));
      if (line.back() == '\n') line.pop_back();
      HistEvent event;
      if (!line.empty()) ::history(history_, &event, H_ENTER, line.c_str());
      return State::kLine;
    }
    std::cerr << "\n" << std::flush;  // below the line that was begun
    return input_.interrupted_ ? State::kInterrupted : State::kEnd;
  }

 private:
  static Editor& of(EditLine* editor) {
    void* data = nullptr;
    ::el_get(editor, EL_CLIENTDATA, &data);
    return *static_cast<Editor*>(data);
  }

  static char* prompt(EditLine* editor) { return const_cast<char*>(of(editor).prompt_); }

  // Shows the line again when the window changed or the program slept meanwhile.
  void wait_for_key() {
    while (input_.used_ == input_.held_.size()) {
      if (const int signal = EditSignals::take()) {
        if (signal == SIGTSTP) sleep();
        std::cerr << kClearLine << std::flush;
        ::el_resize(editor_);
        ::el_set(editor_, EL_REFRESH);
      } else if (wait_for_stdin() != Ready::kSignal) {
        return;
      }
    }
  }

  void sleep() {
    if (asks_for_pastes_) std::cerr << kNoMorePastes << std::flush;
    ::el_set(editor_, EL_PREP_TERM, 0);
    EditSignals::suspend();
    ::el_set(editor_, EL_PREP_TERM, 1);
    if (asks_for_pastes_) std::cerr << kAskForPastes << std::flush;
  }

  // Inserts what is pasted at once, without control characters other than ends of lines and tabs.
  // False at the end, or when interrupted.
  bool paste() {
    std::string text;
    while (!text.ends_with(kPasteEnds)) {
      const std::optional<char> byte = input_.next_byte();
      if (!byte) return false;
      text += *byte == '\r' ? '\n' : *byte;
      require(text.size() <= kMaxInput, "standard input: expected at most ", kMaxInput,
              " bytes to be pasted, found more");
    }
    text.resize(text.size() - kPasteEnds.size());
    std::erase_if(text, [](char c) {
      return static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t';
    });
    ::el_insertstr(editor_, text.c_str());
    return true;
  }

  // 1 with a character of UTF-8, 0 at the end, -1 when interrupted. A byte that begins none stands
  // for U+FFFD.
  static int next_character(EditLine* editor, wchar_t* character) {
    LineInput& input = of(editor).input_;
    of(editor).wait_for_key();
    if (input.takes(kPasteBegins)) {
      *character = kRedraw;
      return of(editor).paste() ? 1 : input.interrupted_ ? -1 : 0;
    }
    std::mbstate_t state{};
    bool is_inside = false;
    for (;;) {
      const std::optional<char> byte = input.next_byte();
      if (!byte) return input.interrupted_ ? -1 : 0;
      const std::size_t n = std::mbrtowc(character, &*byte, 1, &state);
      if (n == static_cast<std::size_t>(-2)) {
        is_inside = true;
        continue;
      }
      if (n == static_cast<std::size_t>(-1)) {
        *character = L'\xFFFD';
        if (is_inside) --input.used_;  // it may begin the next
      }
      return 1;
    }
  }

  LineInput& input_;
  std::string file_;
  const char* prompt_ = "";
  const bool asks_for_pastes_;
  ::History* history_;
  EditLine* editor_;
};

LineInput::LineInput(const std::filesystem::path& history) {
  if (!stdin_is_terminal() || !stderr_is_terminal()) return;
  require_history(history);
  editor_ = std::make_unique<Editor>(*this, history);
}

LineInput::~LineInput() = default;

bool LineInput::fill() {
  Ready ready;
  while ((ready = wait_for_stdin()) == Ready::kSignal) {
  }
  if ((interrupted_ = ready == Ready::kInterrupted)) return false;
  held_.erase(0, std::exchange(used_, 0));
  const std::size_t had = held_.size();
  held_.resize(had + (1 << 16));
  const ssize_t n = ::read(STDIN_FILENO, held_.data() + had, held_.size() - had);
  const int reason = errno;
  held_.resize(had + (n > 0 ? static_cast<std::size_t>(n) : 0));
  if (n < 0 && reason != EINTR) fail("standard input: cannot read: ", std::strerror(reason));
  return n != 0;
}

std::optional<char> LineInput::next_byte() {
  while (used_ == held_.size())
    if (!fill()) return {};
  return held_[used_++];
}

// Where a part of it is all that there is, the rest is on its way, or it was another key.
bool LineInput::takes(std::string_view marker) {
  const auto rest = [&] { return std::string_view(held_).substr(used_); };
  while (rest().size() < marker.size() && marker.starts_with(rest()))
    if ((!rest().empty() && !comes_soon()) || !fill()) return false;
  if (!rest().starts_with(marker)) return false;
  used_ += marker.size();
  return true;
}

LineInput::State LineInput::read_plain(std::string& line) {
  line.clear();
  while (const std::optional<char> byte = next_byte()) {
    if (*byte == '\n') return State::kLine;
    line += *byte;
    require(line.size() <= kMaxInput, "standard input: expected lines of at most ", kMaxInput,
            " bytes, found a longer one");
  }
  if (interrupted_) return State::kInterrupted;
  return line.empty() ? State::kEnd : State::kLine;
}

LineInput::State LineInput::read(const char* prompt, std::string& line) {
  interrupted_ = false;
  const State state = editor_ ? editor_->read(prompt, line) : read_plain(line);
  if (line.ends_with('\r')) line.pop_back();
  return state;
}

}  // namespace thaw

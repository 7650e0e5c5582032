// The command table: parse, dispatch, print the error that ends the program.
#include <iostream>
#include <new>
#include <set>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/flags.h"
#include "cli/terminal.h"
#include "device/error.h"
#include "device/mapped_file.h"
#include "model/backend.h"

namespace thaw {
namespace {

constexpr const char* kVersion = "0.1.0";

std::string help() {
  std::string out =
      "Usage: thaw COMMAND [flags]\n\n"
      "Runs LLaMA-architecture models from .gguf files and Hugging Face "
      "directories.\n\nCommands:\n";
  for (const Command& command : kCommands) {
    const std::string name = command.name;
    out += "  " + name + std::string(12 - name.size(), ' ') + command.summary + "\n";
  }
  return out +
         "\n  thaw help COMMAND  what a command does and takes\n"
         "  thaw --version     the version and what this build can do\n\n"
         "Text goes to standard output, everything else to standard error.\n"
         "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.\n\n"
         "Example:\n"
         "  thaw generate -m model.gguf -p \"Once upon a time\" -n 100\n";
}

std::string version() {
#if defined(__AVX512F__)
  const char* instructions = "AVX-512";
#elif defined(__AVX2__)
  const char* instructions = "AVX2";
#else
  const char* instructions = "baseline";
#endif
  return join("thaw ", kVersion, "\nbackends: cpu (built for ", instructions, ")",
              has_cuda() ? ", cuda" : "", "\n");
}

const Command& find_command(const std::string& name) {
  std::vector<std::string> names = {"help", "--help", "--version"};
  for (const Command& command : kCommands) {
    if (name == command.name) return command;
    names.emplace_back(command.name);
  }
  const std::set<std::string> elsewhere = {"run", "gen", "complete"};
  const std::string guess = elsewhere.contains(name) ? "generate" : closest(name, names);
  throw UsageError(join("unknown command ", name.empty() ? "\"\"" : printable(name),
                        guess.empty() ? "" : " (did you mean " + guess + "?)"));
}

int run(const Args& args) {
  const std::string first = args.empty() ? "" : args[0];
  if (args.empty()) return std::cerr << help(), 2;
  if (first == "--version" || first == "-V" || first == "version")
    return write_stdout(version()), 0;
  if (first == "--help" || first == "-h" || (first == "help" && args.size() == 1)) {
    return write_stdout(help()), 0;
  }
  if (first == "help") {
    const Command& command = find_command(args[1]);
    if (args.size() > 2) throw UsageError("unexpected argument \"" + printable(args[2]) + "\"");
    return command.run({"--help"});
  }
  return find_command(first).run(Args(args.begin() + 1, args.end()));
}

// "see 'thaw generate --help'", for the command that was meant if there is one.
std::string hint(const Args& args) {
  for (const Command& command : kCommands) {
    if (!args.empty() && args[0] == command.name)
      return join("see 'thaw ", command.name, " --help'");
  }
  return "see 'thaw help'";
}

}  // namespace
}  // namespace thaw

int main(int argc, char** argv) {
  const thaw::Args args(argv + (argc > 0), argv + argc);
  try {
    thaw::prepare_standard_streams();
    thaw::report_lost_files();
    return thaw::run(args);
  } catch (const thaw::UsageError& error) {
    std::cerr << "thaw: " << thaw::one_line(error.what()) << "; " << thaw::hint(args) << "\n";
    return 2;
  } catch (const std::bad_alloc&) {
    std::cerr << "thaw: out of memory\n";
  } catch (const std::exception& error) {
    std::cerr << "thaw: " << thaw::one_line(error.what()) << "\n";
  }
  return 1;
}

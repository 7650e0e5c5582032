#include "cli/heat.h"

#include <string_view>

#include "device/error.h"

namespace thaw {
namespace {

struct Shade {
  double from;  // this share hot, or more
  int background, foreground;
  const char* label;
};

// From ice to ember.
constexpr Shade kShades[] = {
    {0.00, 18, 153, " < 3 % "},  {0.03, 25, 255, " < 10 % "}, {0.10, 31, 255, " < 30 % "},
    {0.30, 223, 16, " < 60 % "}, {0.60, 215, 16, " < 90 % "}, {0.90, 202, 16, " >= 90 % "},
};

constexpr std::string_view kReset = "\x1b[0m";

std::string colours(const Shade& shade) {
  return join("\x1b[48;5;", shade.background, ";38;5;", shade.foreground, "m");
}

const Shade& shade_of(double hot) {
  const Shade* shade = kShades;
  for (const Shade& s : kShades) {
    if (hot >= s.from) shade = &s;
  }
  return *shade;
}

}  // namespace

std::string heat_text(std::span<const std::string> texts, std::span<const double> hot) {
  std::string out = "heat     share of its steps that a token was hot: ";
  for (const Shade& shade : kShades) out += colours(shade) + shade.label;
  out += kReset;
  out += '\n';
  const Shade* current = nullptr;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    const Shade* const shade = &shade_of(hot[i]);
    for (const char c : texts[i]) {
      if (c == '\n') {  // a background must not run on to the edge
        out += kReset;
        current = nullptr;
      } else if (current != shade) {
        out += colours(*shade);
        current = shade;
      }
      out += c;
    }
  }
  out += kReset;
  out += '\n';
  return out;
}

}  // namespace thaw

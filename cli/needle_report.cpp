#include "cli/needle_report.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "cli/format.h"
#include "device/error.h"

namespace thaw {
namespace {

// One question's answers by context and depth.
struct Grid {
  std::set<int> contexts;
  std::set<double> depths;
  std::map<std::pair<int, double>, const NeedleAnswer*> cells;
};

Grid make_grid(const NeedleRun& run, int question) {
  Grid grid;
  for (const NeedleAnswer& answer : run.answers) {
    if (answer.question != question) continue;
    grid.contexts.insert(answer.context);
    grid.depths.insert(answer.key.depth);
    grid.cells[{answer.context, answer.key.depth}] = &answer;
  }
  return grid;
}

struct Rgb {
  int r, g, b;
};
// Red for nothing right, over yellow, to green for all.
Rgb heat(double share) {
  const auto mix = [](int from, int to, double at) {
    return static_cast<int>(std::lround(from + (to - from) * at));
  };
  if (share < 0.5) return {229, mix(83, 200, share * 2), mix(75, 80, share * 2)};
  return {mix(229, 76, share * 2 - 1), mix(200, 175, share * 2 - 1), 80};
}

double ratio(double part, double whole) { return whole > 0 ? part / whole : 0; }

std::string percent(double share) { return fixed(100 * share, 0); }

std::string pad(const std::string& text, std::size_t width) {
  return std::string(width - std::min(width, text.size()), ' ') + text;
}

std::string summary(const NeedleRun& run) {
  const NeedleScore s = score(run);
  return join(s.right, " of ", count(std::ssize(run.answers), "answer"), " right, ",
              percent(s.share), " % of the digits; resident ", percent(run.resident()),
              " % of f16, ", percent(run.attended()), " % attended exactly, ",
              fixed(run.recalls(), 1), " recalls a layer and step",
              run.checks > 0 ? join(", ", count(run.checks, "check")) : "",
              run.alarms > 0 ? join(", ", count(run.alarms, "recovery alarm")) : "");
}

// "thaw answers 14 of the 15 that full answers", for every run but full's; nothing without one.
std::vector<std::string> verdicts(const std::vector<NeedleRun>& runs) {
  std::vector<std::string> lines;
  const NeedleRun* full = find_full(runs);
  for (const NeedleRun& run : runs) {
    if (!full || &run == full) continue;
    const NeedleAgreement a = agreement(run, *full);
    lines.push_back(a.both == a.reference
                        ? join(run.policy, " answers everything that full answers: ", a.both)
                        : join(run.policy, " answers ", a.both, " of the ", a.reference,
                               " that full answers, and all where full's tokens led by more than ",
                               fixed(a.lead, 3), " nats"));
  }
  return lines;
}

void add_text_grid(std::string& out, const Grid& grid, const std::string& title, bool colour) {
  constexpr std::size_t kWidth = 7;
  out += title + std::string(12 - std::min<std::size_t>(title.size(), 11), ' ');
  for (double depth : grid.depths) out += pad(percent(depth) + " %", kWidth);
  out += "\n";
  for (int context : grid.contexts) {
    out += pad(std::to_string(context), 11) + " ";
    for (double depth : grid.depths) {
      const auto cell = grid.cells.find({context, depth});
      if (cell == grid.cells.end()) {
        out += pad("-", kWidth);
        continue;
      }
      const double share = cell->second->share;
      const std::string text = pad(percent(share), kWidth);
      const Rgb c = heat(share);
      out += colour ? join("\x1b[30;48;2;", c.r, ";", c.g, ";", c.b, "m", text, "\x1b[0m") : text;
    }
    out += "\n";
  }
}

std::string html_text(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string html_cell(const NeedleAnswer* answer) {
  if (!answer) return "<td></td>";
  const Rgb c = heat(answer->share);
  return join("<td style=\"background:rgb(", c.r, ",", c.g, ",", c.b, ")\" title=\"",
              html_text(join("key ", answer->key.digits, ", answer ", answer->text)), "\">",
              percent(answer->share), "</td>");
}

void add_html_grid(std::string& out, const Grid& grid, const std::string& title) {
  out += "<h2>" + html_text(title) + "</h2>\n<div class=\"wide\"><table><tr><th>tokens</th>";
  for (double depth : grid.depths) out += "<th>" + percent(depth) + " %</th>";
  out += "</tr>\n";
  for (int context : grid.contexts) {
    out += join("<tr><th>", context, "</th>");
    for (double depth : grid.depths) {
      const auto cell = grid.cells.find({context, depth});
      out += html_cell(cell == grid.cells.end() ? nullptr : cell->second);
    }
    out += "</tr>\n";
  }
  out += "</table></div>\n";
}

void add_html_answers(std::string& out, const std::vector<NeedleRun>& runs) {
  out +=
      "<h2>Every answer</h2>\n<div class=\"wide\"><table class=\"list\"><tr><th>policy</th>"
      "<th>tokens</th><th>depth</th><th>question</th><th>key</th><th>answer</th></tr>\n";
  for (const NeedleRun& run : runs) {
    for (const NeedleAnswer& a : run.answers) {
      out += join("<tr><td>", html_text(run.policy), "</td><td>", a.context, "</td><td>",
                  percent(a.key.depth), " %</td><td>", a.question, "</td><td>",
                  html_text(a.key.owner), " ", a.key.digits, "</td><td class=\"",
                  a.right() ? "right" : "wrong", "\">", html_text(a.text), "</td></tr>\n");
    }
  }
  out += "</table></div>\n";
}

std::string title_of(const NeedleRun& run, int question) {
  return question == 1 ? run.policy : run.policy + ", 2nd";
}

// One line; bytes that are not UTF-8 become U+FFFD, as JSON's writer has it.
std::string valid_utf8(const std::string& text) {
  const std::string quoted = json_line(text);
  return nlohmann::json::parse(quoted).get<std::string>();
}

}  // namespace

double NeedleRun::resident() const {
  return ratio(static_cast<double>(usage.resident), static_cast<double>(f16_bytes));
}
double NeedleRun::attended() const { return ratio(counters.attended, counters.visible); }
double NeedleRun::recalls() const {
  return ratio(counters.recalled, static_cast<double>(counters.steps) * n_layers);
}

NeedleScore score(const NeedleRun& run) {
  NeedleScore s;
  for (const NeedleAnswer& answer : run.answers) {
    s.right += answer.right();
    s.share += answer.share / static_cast<double>(run.answers.size());
  }
  return s;
}

const NeedleRun* find_full(const std::vector<NeedleRun>& runs) {
  const auto full = std::find_if(runs.begin(), runs.end(),
                                 [](const NeedleRun& run) { return run.policy == "full"; });
  return full == runs.end() ? nullptr : &*full;
}

NeedleAgreement agreement(const NeedleRun& run, const NeedleRun& reference) {
  NeedleAgreement a;
  for (std::size_t i = 0; i < reference.answers.size(); ++i) {
    if (!reference.answers[i].right()) continue;
    ++a.reference;
    a.both += run.answers[i].right();
    if (run.answers[i].right()) continue;
    double lead = reference.answers[i].least_lead;
    if (reference.answers[i].question == 2)
      lead = std::min(lead, reference.answers[i - 1].least_lead);
    a.lead = std::max(a.lead, lead);
  }
  return a;
}

std::string needle_text_report(const std::vector<NeedleRun>& runs, bool colour) {
  std::string out;
  for (const NeedleRun& run : runs) {
    for (int question : {1, 2}) {
      const Grid grid = make_grid(run, question);
      if (!grid.cells.empty()) add_text_grid(out, grid, title_of(run, question), colour);
    }
    out += summary(run) + "\n\n";
  }
  for (const std::string& line : verdicts(runs)) out += line + "\n";
  return out;
}

std::string needle_page(const std::vector<NeedleRun>& runs, const std::string& settings) {
  std::string out =
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<title>Needles in a haystack</title>\n<style>\n"
      "body{font:16px/1.5 system-ui,sans-serif;margin:1.5rem auto;max-width:60rem;padding:0 1rem;"
      "color:#222;background:#fff}\n"
      "h1{font-size:1.4rem}h2{font-size:1.1rem;margin:1.5rem 0 .4rem}\n"
      ".wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}\n"
      "th,td{padding:.35rem .7rem;text-align:right;border:1px solid #fff}\n"
      "th{font-weight:600;color:#555}\n"
      ".list td,.list th{text-align:left;border-bottom:1px solid #ddd;font-size:.85rem}\n"
      ".right{color:#1b6e2f}.wrong{color:#b3261e}\n</style></head><body>\n"
      "<h1>Needles in a haystack</h1>\n";
  out += "<p>" + html_text(settings) +
         "</p>\n<p>Rows: tokens of context. Columns: where the key stands. Cells: percentage of "
         "the key's digits that the answer has at their place.</p>\n";
  for (const std::string& line : verdicts(runs)) out += "<p><b>" + html_text(line) + "</b></p>\n";
  for (const NeedleRun& run : runs) {
    for (int question : {1, 2}) {
      const Grid grid = make_grid(run, question);
      if (!grid.cells.empty()) add_html_grid(out, grid, title_of(run, question));
    }
    out += "<p>" + html_text(summary(run)) + "</p>\n";
  }
  add_html_answers(out, runs);
  return valid_utf8(out + "</body></html>\n");
}

}  // namespace thaw

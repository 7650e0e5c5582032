#include "cli/table.h"

#include <algorithm>

#include "device/error.h"

namespace thaw {
namespace {

// Characters of UTF-8: all bytes but those that continue one.
std::size_t width(const std::string& text) {
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  }));
}

}  // namespace

std::string markdown_table(const TableRow& header, const std::vector<TableRow>& rows,
                           std::size_t n_left) {
  std::vector<std::size_t> widths;
  for (std::size_t i = 0; i < header.size(); ++i) {
    widths.push_back(std::max<std::size_t>(width(header[i]), 3));
    for (const TableRow& row : rows) widths[i] = std::max(widths[i], width(row[i]));
  }
  std::string out;
  const auto add = [&](const TableRow& row) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string space(widths[i] - width(row[i]), ' ');
      out += join("| ", i < n_left ? row[i] + space : space + row[i], " ");
    }
    out += "|\n";
  };
  add(header);
  for (std::size_t i = 0; i < header.size(); ++i)
    out += join("|", std::string(widths[i] + 1, '-'), i < n_left ? "-" : ":");
  out += "|\n";
  for (const TableRow& row : rows) add(row);
  return out;
}

}  // namespace thaw

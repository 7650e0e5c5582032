// Tables for people: markdown whose columns line up in a terminal.
#pragma once

#include <string>
#include <vector>

namespace thaw {

using TableRow = std::vector<std::string>;  // cells; UTF-8

// The first `n_left` columns hold words and begin at the left; the others hold numbers.
std::string markdown_table(const TableRow& header, const std::vector<TableRow>& rows,
                           std::size_t n_left);

}  // namespace thaw

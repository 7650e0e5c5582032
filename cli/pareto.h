// A scatter plot of what points cost against how far they are off, and the frontier among them.
#pragma once

#include <string>
#include <vector>

namespace thaw {

struct ParetoPoint {
  double x = 0, y = 0;  // less is better; finite. y <= 0 is drawn on the lower edge
  std::string label;
  std::string group;  // points of a group have one colour
};

struct ParetoPlot {
  std::string title, x_title, y_title;
  std::vector<ParetoPoint> points;  // at least one
};

// Points that no other point beats in one of x and y without losing in the other, by rising x.
std::vector<std::size_t> frontier(const std::vector<ParetoPoint>& points);

// An SVG picture, 700 units wide, y on a logarithmic scale. Each point stands beside its label
// where all labels have room, and otherwise beside a number that a list below explains.
std::string pareto_svg(const ParetoPlot& plot);

// Text as SVG and HTML may contain it.
std::string escape_markup(const std::string& text);

}  // namespace thaw

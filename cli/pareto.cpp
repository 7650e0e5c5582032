#include "cli/pareto.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>

#include "cli/format.h"
#include "device/error.h"

namespace thaw {
namespace {

constexpr double kWidth = 700, kHeight = 470;
constexpr double kLeft = 72, kRight = 684, kTop = 64, kBottom = 416;  // of the plotting area
constexpr double kLetter = 6.7, kLine = 16;  // width and height of a letter of 12 units
constexpr double kRadius = 5;

// Okabe and Ito's colours, told apart by colour-blind readers too.
constexpr std::array kColours = {"#0072b2", "#d55e00", "#009e73",
                                 "#cc79a7", "#e69f00", "#56b4e9"};

struct Box {
  double x, y, width, height;
  bool meets(const Box& b) const {
    return x < b.x + b.width && b.x < x + width && y < b.y + b.height && b.y < y + height;
  }
};

struct Spot {
  double x, y;
};

// 1, 2 or 5 times a power of ten, so that at most `most` steps cover `range`.
double nice_step(double range, int most) {
  const double least = range / most;
  const double power = std::pow(10.0, std::floor(std::log10(least)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= least) return factor * power;
  }
  return 10 * power;
}

std::string number(double value) {  // three digits of it: "20", "0.125", "1e-05"
  std::ostringstream out;
  out << std::setprecision(3) << value;
  return std::move(out).str();
}

// Where values stand on the picture.
class Axes {
 public:
  explicit Axes(const std::vector<ParetoPoint>& points) {
    const auto [low, high] = std::minmax_element(
        points.begin(), points.end(), [](const auto& a, const auto& b) { return a.x < b.x; });
    x_step_ = nice_step(std::max(high->x - low->x, 1.0), 8);
    x_low_ = std::max(0.0, std::floor(low->x / x_step_ - 0.3) * x_step_);
    x_high_ = std::ceil(high->x / x_step_ + 0.3) * x_step_;
    double least = INFINITY, most = 0;
    for (const ParetoPoint& p : points) {
      if (p.y <= 0) continue;
      least = std::min(least, p.y), most = std::max(most, p.y);
    }
    if (most == 0) least = most = 1;
    y_low_ = std::floor(std::log10(least) - 0.05);
    y_high_ = std::ceil(std::log10(most) + 0.05);
  }

  double x(double value) const {
    return kLeft + (value - x_low_) / (x_high_ - x_low_) * (kRight - kLeft);
  }
  double y(double value) const {
    const double log = value > 0 ? std::max(std::log10(value), y_low_) : y_low_;
    return kBottom - (log - y_low_) / (y_high_ - y_low_) * (kBottom - kTop);
  }

  std::string svg() const {
    std::string out;
    for (double v = x_low_; v <= x_high_ + x_step_ / 2; v += x_step_) {
      out += line(x(v), kTop, x(v), kBottom);
      out += join("<text class='t' x='", x(v), "' y='", kBottom + 18, "' text-anchor='middle'>",
                  number(v), "</text>\n");
    }
    for (double decade = y_low_; decade <= y_high_; ++decade) {
      const double value = std::pow(10.0, decade), at = y(value);
      out += line(kLeft, at, kRight, at);
      out += join("<text class='t' x='", kLeft - 8, "' y='", at + 4, "' text-anchor='end'>",
                  number(value), "</text>\n");
      for (int i = 2; i < 10 && decade < y_high_; ++i)
        out += line(kLeft - 4, y(i * value), kLeft, y(i * value));
    }
    return out;
  }

 private:
  static std::string line(double x1, double y1, double x2, double y2) {
    return join("<line class='grid' x1='", x1, "' y1='", y1, "' x2='", x2, "' y2='", y2, "'/>\n");
  }

  double x_low_, x_high_, x_step_, y_low_, y_high_;  // y: exponents of ten
};

// Beside each spot the first free place for its label, or nothing when one has none. A label's spot
// is the middle of its text.
std::optional<std::vector<Spot>> place(const std::vector<Spot>& spots,
                                       const std::vector<std::string>& labels) {
  std::vector<Box> taken;
  for (const Spot& s : spots)
    taken.push_back({s.x - kRadius, s.y - kRadius, 2 * kRadius, 2 * kRadius});
  std::vector<Spot> result;
  for (std::size_t i = 0; i < spots.size(); ++i) {
    const double width = static_cast<double>(labels[i].size()) * kLetter;
    const double side = width / 2 + kRadius + 4, up = kLine / 2 + kRadius;
    std::optional<Spot> found;
    for (const auto& [dx, dy] : {Spot{1, 0}, {-1, 0}, {0, -1}, {0, 1}, {1, -1.4}, {-1, -1.4},
                                 {1, 1.4}, {-1, 1.4}}) {
      const Spot middle{spots[i].x + dx * side, spots[i].y + dy * up};
      const Box box{middle.x - width / 2, middle.y - kLine / 2, width, kLine};
      const bool inside = box.x >= kLeft && box.x + width <= kRight && box.y >= kTop &&
                          box.y + kLine <= kBottom;
      if (!inside || std::any_of(taken.begin(), taken.end(),
                                 [&](const Box& other) { return box.meets(other); }))
        continue;
      taken.push_back(box);
      found = middle;
      break;
    }
    if (!found) return {};
    result.push_back(*found);
  }
  return result;
}

// The distinct groups, in order of appearance.
std::vector<std::string> groups_of(const std::vector<ParetoPoint>& points) {
  std::vector<std::string> groups;
  for (const ParetoPoint& p : points) {
    if (std::find(groups.begin(), groups.end(), p.group) == groups.end()) groups.push_back(p.group);
  }
  return groups;
}

const char* colour(const std::vector<std::string>& groups, const std::string& group) {
  const auto at = std::find(groups.begin(), groups.end(), group) - groups.begin();
  return kColours[static_cast<std::size_t>(at) % kColours.size()];
}

std::string circle(const Spot& at, const char* fill, const std::string& hover) {
  return join("<circle cx='", at.x, "' cy='", at.y, "' r='", kRadius, "' fill='", fill, "'><title>",
              escape_markup(hover), "</title></circle>\n");
}

std::string text(double x, double y, const char* anchor, const std::string& words) {
  return join("<text x='", x, "' y='", y, "' text-anchor='", anchor, "'>", escape_markup(words),
              "</text>\n");
}

std::string describe(const ParetoPoint& p) {
  return join(p.label, ": ", number(p.x), " %, ", number(p.y));
}

}  // namespace

std::vector<std::size_t> frontier(const std::vector<ParetoPoint>& points) {
  std::vector<std::size_t> order(points.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return std::tie(points[a].x, points[a].y, a) < std::tie(points[b].x, points[b].y, b);
  });
  std::vector<std::size_t> best;
  for (const std::size_t i : order) {
    if (best.empty() || points[i].y < points[best.back()].y) best.push_back(i);
  }
  return best;
}

std::string pareto_svg(const ParetoPlot& plot) {
  const std::vector<ParetoPoint>& points = plot.points;
  const Axes axes(points);
  std::vector<Spot> spots;
  std::vector<std::string> labels, numbers;
  for (const ParetoPoint& p : points) {
    spots.push_back({axes.x(p.x), axes.y(p.y)});
    labels.push_back(p.label);
    numbers.push_back(std::to_string(numbers.size() + 1));
  }
  std::optional<std::vector<Spot>> places = place(spots, labels);
  const bool listed = !places;
  if (listed) places = place(spots, labels = numbers);

  const std::vector<std::string> groups = groups_of(points);
  std::string body = axes.svg();
  body += join("<polyline class='frontier' points='");
  for (const std::size_t i : frontier(points)) body += join(spots[i].x, ",", spots[i].y, " ");
  body += "'/>\n";
  for (std::size_t i = 0; i < points.size(); ++i)
    body += circle(spots[i], colour(groups, points[i].group), describe(points[i]));
  for (std::size_t i = 0; i < points.size(); ++i) {
    const Spot at = places ? (*places)[i] : spots[i];
    body += text(at.x, at.y + 4, "middle", labels[i]);
  }
  body += join("<text class='title' x='", kLeft, "' y='22'>", escape_markup(plot.title),
               "</text>\n");
  body += text((kLeft + kRight) / 2, kHeight - 16, "middle", plot.x_title);
  body += join("<text text-anchor='middle' transform='translate(16 ", (kTop + kBottom) / 2,
               ") rotate(-90)'>", escape_markup(plot.y_title), "</text>\n");

  double at = kLeft;
  for (const std::string& group : groups) {
    if (groups.size() < 2) break;
    body += circle({at + kRadius, 44}, colour(groups, group), group);
    body += text(at + 3 * kRadius, 48, "start", group);
    at += 3 * kRadius + static_cast<double>(group.size()) * kLetter + 20;
  }
  double height = kHeight + (listed ? 8 : 0);
  for (std::size_t i = 0; listed && i < points.size(); ++i, height += kLine)
    body += text(kLeft, height + 4, "start", join(numbers[i], "  ", describe(points[i])));

  return join("<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 ", kWidth, " ", height + 8,
              "' width='", kWidth, "' height='", height + 8, "' role='img'>\n",
              "<style>text { font: 12px sans-serif; fill: #222; paint-order: stroke; stroke: #fff; "
              "stroke-width: 3px } .title { font-size: 15px } .grid { stroke: #ddd } .frontier { "
              "fill: none; stroke: #777; stroke-width: 1.5; stroke-dasharray: 5 3 }</style>\n",
              "<rect width='100%' height='100%' fill='#fff'/>\n", body, "</svg>\n");
}

std::string escape_markup(const std::string& text) {
  std::string out;
  for (const char c : one_line(text)) {
    const std::string plain(1, c);
    out += c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;"
         : c == '\'' ? "&#39;" : c == '"' ? "&quot;" : plain;
  }
  return out;
}

}  // namespace thaw

// thaw perplexity under KV policies: figures, tables, csv and the plot.
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <limits>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/output_file.h"
#include "cli/pareto.h"
#include "cli/perplexity.h"
#include "cli/policy_figures.h"
#include "cli/sweep.h"
#include "cli/terminal.h"

namespace thaw {
namespace {

struct Points {
  Sweep sweep;
  std::vector<CommonOptions> options;
  std::vector<PolicyFigures> figures;
};

DecodeWindows window_sizes(const PerplexityOptions& o, const Model& model,
                           const Tokenizer& tokenizer, const Input& input, int n_tokens) {
  DecodeWindows w;
  if (tokenizer.spec().add_bos && tokenizer.bos() >= 0) w.bos = tokenizer.bos();
  const int n_bos = w.bos >= 0;
  const int most = context_tokens(o.common, model.config);
  w.context = std::min(most, n_tokens - 1 + n_bos);
  w.prefill = o.prefill.value_or(w.context / 2);
  w.most = o.windows.value_or(std::numeric_limits<int>::max());
  if (w.prefill >= most) {
    throw UsageError(join("--prefill: expected less than the ", most, " tokens of a window, found ",
                          w.prefill));
  }
  require(w.prefill < w.context, input.source, ": expected at least ",
          count(w.prefill + 2 - n_bos, "token"), " with --prefill ", w.prefill, ", found ",
          n_tokens);
  const int decoded = w.context - w.prefill;
  w.stride = o.stride.value_or(std::max(1, decoded));
  if (w.stride < decoded) {
    throw UsageError(join("--stride: expected at least the ", decoded,
                          " tokens that a window decodes, found ", w.stride));
  }
  if (!o.prefill && !o.common.quiet) {
    std::cerr << "prefill  " << count(w.prefill, "token") << ", half of a window, and then "
              << decoded << " one by one; --prefill changes that\n";
  }
  return w;
}

std::string ending(const std::string& path) { return std::filesystem::path(path).extension(); }

// The point's own values, then its figures.
std::vector<nlohmann::ordered_json> rows_of(const Points& points) {
  std::vector<nlohmann::ordered_json> rows;
  for (std::size_t i = 0; i < points.figures.size(); ++i) {
    nlohmann::ordered_json row = nlohmann::ordered_json::object();
    for (std::size_t axis = 0; axis < points.sweep.names.size(); ++axis) {
      std::string key = points.sweep.names[axis];
      std::replace(key.begin(), key.end(), '-', '_');
      row[key] = points.sweep.points[i][axis];
    }
    row.update(to_json(points.figures[i]));
    rows.push_back(std::move(row));
  }
  return rows;
}

std::string plot(const Points& points, const DecodeWindows& w, const Input& input) {
  ParetoPlot plot{join(std::filesystem::path(input.source).filename().string(), ", ", w.prefill,
                       " + ", w.context - w.prefill, " tokens"),
                  "resident KV bytes, % of f16", "KL(full || policy), nats a token", {}};
  for (std::size_t i = 0; i < points.sweep.names.size(); ++i)
    plot.title += (i == 0 ? "; points: " : ", ") + points.sweep.names[i];
  for (std::size_t i = 0; i < points.figures.size(); ++i) {
    const PolicyFigures& f = points.figures[i];
    std::string label;
    for (const std::string& value : points.sweep.points[i])
      label += (label.empty() ? "" : " ") + value;
    const std::string group = f.policy + (f.kv_type == "f16" ? "" : " " + f.kv_type);
    plot.points.push_back({100 * f.resident, f.kl.mean, label.empty() ? group : label, group});
  }
  return pareto_svg(plot);
}

std::string html_page(const std::string& svg, const std::vector<nlohmann::ordered_json>& rows) {
  std::string head, body;
  for (const auto& [key, value] : rows.front().items())
    head += join("<th>", escape_markup(key), "</th>");
  for (const nlohmann::ordered_json& row : rows) {
    body += "<tr>";
    for (const auto& [key, value] : row.items()) {
      std::ostringstream text;
      if (value.is_string()) {
        text << escape_markup(value.get<std::string>());
      } else {
        text << std::setprecision(6) << value.get<double>();
      }
      body += join("<td>", text.str(), "</td>");
    }
    body += "</tr>\n";
  }
  return join("<!doctype html>\n<html lang='en'><meta charset='utf-8'>\n"
              "<meta name='viewport' content='width=device-width'>\n<title>KV policies</title>\n"
              "<style>body { font: 13px sans-serif; margin: 16px } svg { max-width: 100%; height: "
              "auto } div { overflow-x: auto } table { border-collapse: collapse } th, td { "
              "padding: 3px 8px; border-bottom: 1px solid #ddd; text-align: right; white-space: "
              "nowrap }"
              "</style>\n", svg, "<div><table>\n<tr>", head, "</tr>\n", body,
              "</table></div>\n</html>\n");
}

std::string report(const PerplexityOptions& o, const Points& points, const DecodeWindows& w,
                   double seconds) {
  const nlohmann::ordered_json sizes = {{"context_tokens", w.context},
                                        {"prefill_tokens", w.prefill},
                                        {"stride_tokens", w.stride},
                                        {"seconds", seconds}};
  const PolicyFigures& first = points.figures.front();
  const bool single = points.sweep.names.empty();
  if (o.common.json) {
    nlohmann::ordered_json document = single ? to_json(first) : nlohmann::ordered_json::object();
    document.update(sizes);
    if (single) {
      document["layers"] = layers_json(first);
    } else {
      document["results"] = rows_of(points);
    }
    return json_line(document);
  }
  const std::string tokens = join(
      first.tokens, " decoded one by one in ", count(first.windows, "window"), " of ", w.context,
      ", each after a prefill of ", w.prefill, "\n");
  if (single) return join(to_text(first), "tokens      ", tokens);
  TableRow header = points.sweep.names;
  for (const std::string& cell : figures_header()) header.push_back(cell);
  std::vector<TableRow> rows = points.sweep.points;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (const std::string& cell : figures_row(points.figures[i])) rows[i].push_back(cell);
  }
  return join(markdown_table(header, rows, points.sweep.names.size()), "\n", tokens);
}

void write(std::optional<OutputFile>& file, const std::string& text) {
  file->write(text);
  file->finish();
}

}  // namespace

int run_policies(const PerplexityOptions& o, const Model& model, const Tokenizer& tokenizer,
                 const Input& input, const std::vector<TokenId>& ids) {
  const DecodeWindows windows =
      window_sizes(o, model, tokenizer, input, static_cast<int>(ids.size()));
  const auto n_windows = decode_windows(windows, static_cast<int>(ids.size())).size();
  Points points{parse_sweep(o.sweeps), {}, {}};
  for (std::size_t i = 0; i < points.sweep.points.size(); ++i)
    points.options.push_back(at_point(o.common, points.sweep, i));
  Transformer transformer(model, make_backend(o.common, model));
  std::vector<std::unique_ptr<KvStore>> stores;
  for (const CommonOptions& options : points.options)
    stores.push_back(
        make_kv_store(transformer.backend(), options.kv, model.config, windows.context));
  KvFlags everything;
  everything.policy = "full";
  const std::unique_ptr<KvStore> full =
      o.no_full ? nullptr
                : make_kv_store(transformer.backend(), everything, model.config, windows.context);
  std::optional<OutputFile> csv, picture;
  if (o.csv) csv.emplace(*o.csv);
  if (o.plot) picture.emplace(*o.plot);

  const std::atomic<bool>& interrupted = catch_interrupt();
  Progress progress(o.common.quiet);
  const auto start = std::chrono::steady_clock::now();
  const Comparison comparison = compare_policies(
      transformer, stores, full.get(), ids, windows, [&](int window, int decoded) {
        progress.show(join("window ", window + 1, " of ", n_windows, ", token ", decoded, " of ",
                           windows.context - windows.prefill, ", ",
                           count(static_cast<std::int64_t>(stores.size()), "store")));
        return !interrupted;
      });
  progress.clear();
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (comparison.interrupted) {
    std::cerr << "interrupted after " << count(comparison.windows, "window") << "\n";
    return kInterruptedExit;
  }
  for (std::size_t i = 0; i < stores.size(); ++i) {
    for (const double nll : comparison.policies[i].nll) {
      const float value = static_cast<float>(nll);
      require_finite({&value, 1}, model);
    }
    points.figures.push_back(
        figures_of(comparison, i, points.options[i], model.config.n_layers));
  }
  write_stdout_after(
      [&] {
        if (csv) write(csv, to_csv(rows_of(points)));
        if (!picture) return;
        const std::string svg = plot(points, windows, input);
        write(picture, ending(*o.plot) == ".html" ? html_page(svg, rows_of(points)) : svg);
      },
      report(o, points, windows, seconds));
  if (!o.common.quiet) std::cerr << "took     " << fixed(seconds, 1) << " s\n";
  return 0;
}

}  // namespace thaw

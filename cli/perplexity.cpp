// thaw perplexity: how well a model predicts a text.
#include "cli/perplexity.h"

#include <algorithm>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/format.h"
#include "cli/output_file.h"
#include "cli/statistics.h"
#include "cli/sweep.h"
#include "cli/terminal.h"
#include "cli/tokenizer_source.h"
#include "model/divergence.h"
#include "model/generate.h"

namespace thaw {
namespace {

constexpr int kDefaultWindow = 2048;
constexpr int kBatch = 128;  // rows whose logits are in memory at once

// Whether the flags of policies make sense together, and every value of the sweep.
void check_sweep(const PerplexityOptions& o) {
  const Sweep sweep = parse_sweep(o.sweeps);
  std::vector<KvFlags> variants;
  for (std::size_t i = 0; i < sweep.points.size(); ++i)
    variants.push_back(at_point(o.common, sweep, i).kv);
  check_kv(variants);
  if (!o.plot) return;
  if (o.no_full) throw UsageError("--plot: expected the comparison with full, found --no-full");
  if (!o.plot->ends_with(".svg") && !o.plot->ends_with(".html"))
    throw UsageError(join("--plot: expected FILE.svg or FILE.html, found ", printable(*o.plot)));
}

bool parse(const Args& args, PerplexityOptions& o) {
  Flags flags(
      "perplexity", "-m MODEL [-p TEXT | -f FILE | -] [flags]",
      "Prints exp of the mean negative log-likelihood (NLL) of a text's tokens, each predicted "
      "from those before it. A text longer than the context is read in windows of -c tokens "
      "that begin --stride tokens apart; each token counts once, in the first window that holds "
      "it. Where the model wants a begin-of-text token, each window starts with it; elsewhere "
      "the first token of the text has nothing to be predicted from and does not count. "
      "\u00b1 is one standard error, tokens taken as independent. "
      "Under another --policy than full, or another --kv-type than f16, the first --prefill "
      "tokens of a window run in batches, the rest one by one, and only the tokens that those "
      "predict count. Beside it runs the same with --policy full and f16: ratio is that of the "
      "perplexities, KL the divergence of the predictions from those of full.");
  flags.section("Model and text");
  add_model_flag(flags, o.common, "a .gguf file or a Hugging Face directory");
  add_input_flags(flags, o.input, "the text");
  flags.toggle(o.special, "--special",
               "read control tokens such as <|im_start|> in the text as such");
  flags.section("How it is computed");
  flags.integer(o.stride, "--stride",
                "tokens from one window to the next; by default half the context, or beside full "
                "those that a window decodes. "
                "A window's first tokens have the least to go by, so less is better and slower",
                1, 1 << 24);
  flags.integer(o.prefill, "--prefill",
                "run the first N tokens of a window in batches and the rest one at "
                "a time, as generation does; by default all in batches, or beside full half of "
                "the window",
                0, 1 << 24);
  flags.integer(o.windows, "--windows", "windows to read, at most; by default all", 1, 1 << 24);
  flags.section("Policies");
  flags.toggle(o.no_full, "--no-full", "leave out the comparison with --policy full and f16");
  flags.texts(o.sweeps, "--sweep", "NAME=V,V,...",
              "run once for each value of the flag --NAME, any of the KV store's (--policy, "
              "--kv-type, --epsilon and so on); repeated: for each combination. All run side by "
              "side, each with a KV store in memory");
  flags.output(o.csv, "--csv", "FILE", "write every figure, a line for each combination");
  flags.output(o.plot, "--plot", "FILE",
               "draw KL against resident bytes, with the frontier: a .svg picture, or a .html page "
               "that has the figures, too");
  o.common.kv.freezes_at_once = true;
  add_kv_flags(flags, o.common,
               join("tokens in a window, at least 2; by default the model's context, "
                    "at most ",
                    kDefaultWindow));
  add_run_flags(flags, o.common);
  add_output_flags(flags, o.common);
  flags.examples(
      "  thaw perplexity -m model.gguf -f book.txt\n"
      "  thaw perplexity -m model.gguf -f book.txt -c 512 --stride 256 --json\n"
      "  thaw perplexity -m model.gguf -f book.txt -c 2048 --prefill 1024 --policy thaw\n"
      "  thaw perplexity -m model.gguf -f book.txt --policy thaw --sweep epsilon=1e-3,3e-3 "
      "--sweep ghost=k3v2,k2v2 --csv sweep.csv --plot sweep.svg\n");
  if (!flags.parse(args)) return false;
  check_common(o.common);
  check_sweep(o);
  return true;
}

struct Score {
  std::vector<double> nll;  // of each token that counts
  int windows = 0;
  bool interrupted = false;
};

// Where windows begin and how much text each holds, in tokens.
struct Windows {
  int bos = 0;  // tokens that stand before the text of each window: 0 or 1
  int length = 0;
  int stride = 0;
};

Windows plan_windows(const PerplexityOptions& o, const Tokenizer& tokenizer, int context) {
  Windows w;
  w.bos = tokenizer.spec().add_bos && tokenizer.bos() >= 0 ? 1 : 0;
  if (context < 2) throw UsageError(join("--context: expected at least 2 here, found ", context));
  w.length = context - w.bos;
  w.stride = o.stride.value_or(std::max(1, w.length / 2));
  if (w.stride > w.length - 1 + w.bos) {
    throw UsageError(join("--stride: expected at most ", w.length - 1 + w.bos,
                          " with a context of ", context, ", found ", w.stride));
  }
  return w;
}

Score score(const PerplexityOptions& o, const Model& model, const Tokenizer& tokenizer,
            const std::vector<TokenId>& ids, const Windows& w) {
  const int n_tokens = static_cast<int>(ids.size());
  Transformer transformer(model, make_backend(o.common, model), kBatch);
  const auto kv = make_kv_store(transformer.backend(), o.common.kv, model.config,
                                std::min(w.length, n_tokens) + w.bos);
  const std::atomic<bool>& interrupted = catch_interrupt();
  Progress progress(o.common.quiet);
  Score result;
  const int most = o.windows.value_or(n_tokens);
  int done = 1 - w.bos;  // tokens before this one count already, or cannot
  for (int begin = 0; done < n_tokens && !interrupted && result.windows < most;
       begin += w.stride, ++result.windows) {
    const int end = std::min(begin + w.length, n_tokens);
    std::vector<TokenId> window(ids.begin() + begin,
                                ids.begin() + end - 1);  // the last predicts nothing
    if (w.bos) window.insert(window.begin(), tokenizer.bos());
    kv->clear();
    const int first = done - begin + w.bos - 1;  // the row that predicts token `done`
    teacher_force(transformer, *kv, window, {o.prefill.value_or(-1), first},
                  [&](int row, std::span<const float> logits) {
                    const std::size_t vocab = model.config.vocab_size;
                    const int n_rows = static_cast<int>(logits.size() / vocab);
                    const std::size_t at = result.nll.size();
                    result.nll.resize(at + n_rows);
                    const TokenId* targets = ids.data() + begin - w.bos + row + 1;
                    transformer.pool().run(n_rows, [&](std::int64_t i, int) {
                      result.nll[at + i] =
                          negative_log_likelihood(logits.subspan(i * vocab, vocab), targets[i]);
                    });
                    progress.show(join("token ", done + result.nll.size() - at, " of ", n_tokens));
                    return !interrupted;
                  });
    done = end;
  }
  result.interrupted = interrupted;
  return result;
}

std::string report(const PerplexityOptions& o, const Score& score, const Windows& w,
                   double seconds) {
  const Mean nll = mean_of(score.nll), perplexity = exp_of(nll);
  if (!o.common.json) {
    return join("perplexity  ", fixed(perplexity.mean, 4), " \u00b1 ", fixed(perplexity.se, 4),
                "\nNLL         ", fixed(nll.mean, 5), " \u00b1 ", fixed(nll.se, 5),
                " nats a token\ntokens      ", score.nll.size(), " in ", score.windows,
                score.windows == 1
                    ? " window\n"
                    : join(" windows of ", w.length + w.bos, ", stride ", w.stride, "\n"));
  }
  return json_line({{"perplexity", perplexity.mean},
                    {"perplexity_se", perplexity.se},
                    {"nll_nats", nll.mean},
                    {"nll_se_nats", nll.se},
                    {"tokens", score.nll.size()},
                    {"windows", score.windows},
                    {"context_tokens", w.length + w.bos},
                    {"stride_tokens", w.stride},
                    {"kv_type", o.common.kv.type_name},
                    {"policy", o.common.kv.policy},
                    {"seconds", seconds}});
}

}  // namespace

bool PerplexityOptions::compares() const {
  return common.kv.policy != "full" || common.kv.type_name != "f16" || !sweeps.empty() || csv ||
         plot;
}

int run_perplexity(const Args& args) {
  PerplexityOptions o;
  if (!parse(args, o)) return 0;
  const Model model = load_model(*o.common.model);
  const Tokenizer tokenizer = load_tokenizer(model);
  if (!o.common.context) o.common.context = std::min(model.config.context_length, kDefaultWindow);
  const Input input = read_input(o.input, "a text");
  const std::vector<TokenId> ids = encode_input(tokenizer, input, {.parse_special = o.special});
  if (o.compares()) return run_policies(o, model, tokenizer, input, ids);
  const Windows windows = plan_windows(o, tokenizer, context_tokens(o.common, model.config));
  const int least = 2 - windows.bos;
  require(static_cast<int>(ids.size()) >= least, input.source, ": expected at least ",
          count(least, "token"), ", found ", ids.size());

  const auto start = std::chrono::steady_clock::now();
  const Score result = score(o, model, tokenizer, ids, windows);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (result.interrupted) {
    std::cerr << "interrupted after " << result.nll.size() << " tokens\n";
    return kInterruptedExit;
  }
  for (double nll : result.nll) {
    const float value = static_cast<float>(nll);
    require_finite({&value, 1}, model);
  }
  write_stdout(report(o, result, windows, seconds));
  if (!o.common.quiet) {
    std::cerr << "took     " << fixed(seconds, 1) << " s, "
              << fixed(static_cast<double>(result.nll.size()) / seconds, 1) << " tok/s\n";
  }
  return 0;
}

}  // namespace thaw

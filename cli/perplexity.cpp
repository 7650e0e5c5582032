// thaw perplexity: how well a model predicts a text.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <iostream>

#include "cli/commands.h"
#include "cli/format.h"
#include "cli/input.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "cli/tokenizer_source.h"
#include "model/generate.h"

namespace thaw {
namespace {

constexpr int kDefaultWindow = 2048;
constexpr int kBatch = 128;  // rows whose logits are in memory at once

struct Options {
  CommonOptions common;
  InputOptions input;
  bool special = false;
  std::optional<int> stride;
  std::optional<int> prefill;
};

bool parse(const Args& args, Options& o) {
  Flags flags(
      "perplexity", "-m MODEL [-p TEXT | -f FILE | -] [flags]",
      "Prints exp of the mean negative log-likelihood (NLL) of a text's tokens, each predicted "
      "from those before it. A text longer than the context is read in windows of -c tokens "
      "that begin --stride tokens apart; each token counts once, in the first window that holds "
      "it. Where the model wants a begin-of-text token, each window starts with it; elsewhere "
      "the first token of the text has nothing to be predicted from and does not count. "
      "\u00b1 is one standard error, tokens taken as independent.");
  flags.section("Model and text");
  add_model_flag(flags, o.common, "a .gguf file or a Hugging Face directory");
  add_input_flags(flags, o.input, "the text");
  flags.toggle(o.special, "--special",
               "read control tokens such as <|im_start|> in the text as such");
  flags.section("How it is computed");
  flags.integer(o.stride, "--stride",
                "tokens from one window to the next; by default half the context. "
                "A window's first tokens have the least to go by, so less is better and slower",
                1, 1 << 24);
  flags.integer(o.prefill, "--prefill",
                "run the first N tokens of a window in batches and the rest one at "
                "a time, as generation does; by default all in batches",
                0, 1 << 24);
  add_kv_flags(flags, o.common,
               join("tokens in a window, at least 2; by default the model's context, "
                    "at most ",
                    kDefaultWindow));
  add_run_flags(flags, o.common);
  add_output_flags(flags, o.common);
  flags.examples(
      "  thaw perplexity -m model.gguf -f book.txt\n"
      "  thaw perplexity -m model.gguf -f book.txt -c 512 --stride 256 --kv-type f32 --json\n");
  if (!flags.parse(args)) return false;
  check_common(o.common);
  return true;
}

// -log softmax(logits)[target], in nats.
double negative_log_likelihood(std::span<const float> logits, TokenId target) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float logit : logits) sum += std::exp(logit - largest);
  return std::log(sum) + largest - logits[target];
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

Windows plan_windows(const Options& o, const Tokenizer& tokenizer, int context) {
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

Score score(const Options& o, const Model& model, const Tokenizer& tokenizer,
            const std::vector<TokenId>& ids, const Windows& w) {
  const int n_tokens = static_cast<int>(ids.size());
  const auto kv = make_kv_store(o.common.kv, model.config, std::min(w.length, n_tokens) + w.bos);
  Transformer transformer(model, o.common.threads, kBatch);
  const std::atomic<bool>& interrupted = catch_interrupt();
  Progress progress(o.common.quiet);
  Score result;
  int done = 1 - w.bos;  // tokens before this one count already, or cannot
  for (int begin = 0; done < n_tokens && !interrupted; begin += w.stride, ++result.windows) {
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
#pragma omp parallel for num_threads(o.common.threads)
                    for (int i = 0; i < n_rows; ++i) {
                      result.nll[at + i] =
                          negative_log_likelihood(logits.subspan(i * vocab, vocab), targets[i]);
                    }
                    progress.show(join("token ", done + result.nll.size() - at, " of ", n_tokens));
                    return !interrupted;
                  });
    done = end;
  }
  result.interrupted = interrupted;
  return result;
}

struct Summary {
  double nll = 0;     // mean, nats a token
  double nll_se = 0;  // sd / sqrt(n)
  double perplexity = 0;
  double perplexity_se = 0;  // to first order
};

Summary summarize(const std::vector<double>& nll) {
  const auto n = static_cast<double>(nll.size());
  Summary s;
  for (double x : nll) s.nll += x / n;
  for (double x : nll) s.nll_se += (x - s.nll) * (x - s.nll);
  s.nll_se = n > 1 ? std::sqrt(s.nll_se / (n - 1) / n) : 0;
  s.perplexity = std::exp(s.nll);
  s.perplexity_se = s.perplexity * s.nll_se;
  return s;
}

std::string report(const Options& o, const Score& score, const Windows& w, double seconds) {
  const Summary s = summarize(score.nll);
  if (!o.common.json) {
    return join("perplexity  ", fixed(s.perplexity, 4), " \u00b1 ", fixed(s.perplexity_se, 4),
                "\nNLL         ", fixed(s.nll, 5), " \u00b1 ", fixed(s.nll_se, 5),
                " nats a token\ntokens      ", score.nll.size(), " in ", score.windows,
                score.windows == 1
                    ? " window\n"
                    : join(" windows of ", w.length + w.bos, ", stride ", w.stride, "\n"));
  }
  return json_line({{"perplexity", s.perplexity},
                    {"perplexity_se", s.perplexity_se},
                    {"nll_nats", s.nll},
                    {"nll_se_nats", s.nll_se},
                    {"tokens", score.nll.size()},
                    {"windows", score.windows},
                    {"context_tokens", w.length + w.bos},
                    {"stride_tokens", w.stride},
                    {"kv_type", o.common.kv.type_name},
                    {"policy", o.common.kv.policy},
                    {"seconds", seconds}});
}

}  // namespace

int run_perplexity(const Args& args) {
  Options o;
  if (!parse(args, o)) return 0;
  const Model model = load_model(*o.common.model);
  const Tokenizer tokenizer = load_tokenizer(model);
  if (!o.common.context) o.common.context = std::min(model.config.context_length, kDefaultWindow);
  const Windows windows = plan_windows(o, tokenizer, context_tokens(o.common, model.config));
  const Input input = read_input(o.input, "a text");
  const std::vector<TokenId> ids = encode_input(tokenizer, input, {.parse_special = o.special});
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

#!/usr/bin/env python3
"""What sentencepiece and Hugging Face `tokenizers` make of seeded strings with a small vocabulary that
sentencepiece trains as LLaMA 2's was: golden data of character BPE.

    tools/golden_sentencepiece.py               # writes tests/golden/sentencepiece.json
    tools/golden_sentencepiece.py --count 20000 -o /tmp/more.json   # THAW_SENTENCEPIECE_GOLDEN of the tests

The file holds the vocabulary (pieces, scores, GGUF's types), the steps of three tokenizer.json that
published models have, and of each string
    model          the ids that sentencepiece gives
    prepend        those of tokenizers with LLaMA 2's and TinyLlama's normalizer; control tokens are read
    first, split   those with Metaspace, as Mistral 0.3 has it, and splitting at spaces
and the tokens of conversations by chat templates that write what published ones do (Zephyr's with
<s> before it, as its tokenizer puts it there).
Needs sentencepiece and transformers; `make test` runs without them.
"""
import argparse
import io
import json
import pathlib
import random

import sentencepiece
import tokenizers
import transformers
from golden_tokenizer import CODE, KINDS, LANGUAGES
from tokenizers import decoders, models, normalizers, pre_tokenizers

MARK = "\u2581"
CONTROL = ["<s>", "</s>", "<unk>"]


def train():
    """LLaMA 2's settings, but for the size."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LANGUAGES * 3 + [line.strip() for line in CODE]), model_writer=out, vocab_size=1200,
        model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        add_dummy_prefix=True, remove_extra_whitespaces=False, character_coverage=0.98,
        allow_whitespace_only_pieces=True, minloglevel=2)  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def gguf_type(model, i):
    """Of the GGUF specification, tokenizer.ggml.token_type."""
    return 2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1


def merges(model, vocabulary):
    """As transformers makes them of a model: all ways to cut a piece, by the score of the whole."""
    found = []
    for piece, i in vocabulary.items():
        if model.is_byte(i) or model.is_control(i) or model.is_unknown(i):
            continue
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        cuts = [cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
        cuts.sort(key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
        found += [(model.get_score(i), cut) for cut in cuts]
    found.sort(key=lambda each: -each[0])
    return [cut for _, cut in found]


def fast(vocabulary, ranked, **steps):
    bpe = models.BPE(vocabulary, ranked, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    for name, step in steps.items():
        setattr(tokenizer, name, step)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in CONTROL])
    return tokenizer


KINDS = KINDS | {
    "control": lambda r: "".join(r.choice(CONTROL + [" ", "hi", " you", "\n", "<s"]) for _ in range(r.randint(1, 6))),
    "marks": lambda r: "".join(r.choice([MARK, " ", "a", "the", "é", "<0x41>"]) for _ in range(r.randint(1, 8))),
}


# {name: (tokenizer, template)}; the vocabulary of "marks" has [INST] and [/INST] as control tokens.
TEMPLATES = {
    "llama2": ("prepend", """\
{% set start = 1 if messages[0].role == 'system' else 0 %}{% for m in messages[start:] %}\
{% set text = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' + m.content if start and loop.first else m.content %}\
{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' if m.role == 'user' else ' ' + text.strip() + ' ' + eos_token }}\
{% endfor %}"""),
    "mistral": ("prepend", """\
{{ bos_token }}{% for m in messages %}\
{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}{% endfor %}"""),
    "marks": ("marks", """\
{{ bos_token }}{% for m in messages %}\
{{ '[INST] ' + m.content + '[/INST]' if m.role == 'user' else ' ' + m.content.strip() + eos_token }}{% endfor %}"""),
    "zephyr": ("prepend", """\
{{ bos_token }}{% for m in messages %}
{{ ('<|user|>\\n' if m.role == 'user' else '<|' + m.role + '|>\\n') + m.content + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}{% endfor %}"""),
}  # fmt: skip
TALK = [{"role": "user", "content": "What is a glacier?"}, {"role": "assistant", "content": "Ice that flows."},
        {"role": "user", "content": " And\na fox? "}]  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}


def conversations(variants):
    for name, (variant, template) in TEMPLATES.items():
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=variants[variant], bos_token="<s>", eos_token="</s>", unk_token="<unk>")  # fmt: skip
        for messages in [TALK[:1], TALK] + [[SYSTEM] + TALK] * (name in ("llama2", "zephyr")):
            ids = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, return_dict=False)  # fmt: skip
            yield {"format": name, "template": template, "messages": messages, "ids": ids}


def strings(seed, count):
    r, seen = random.Random(seed), {""}
    yield ""
    while len(seen) < count:
        text = KINDS[r.choice(list(KINDS))](r)
        if text not in seen and "\0" not in text:
            seen.add(text)
            yield text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="how many strings")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", default="tests/golden/sentencepiece.json")
    args = parser.parse_args()
    model = train()
    n = model.get_piece_size()
    vocabulary = {model.id_to_piece(i): i for i in range(n)}
    ranked = merges(model, vocabulary)
    replace = normalizers.Replace(" ", MARK)
    variants = {
        "prepend": fast(vocabulary, ranked, normalizer=normalizers.Sequence([normalizers.Prepend(MARK), replace])),
        "first": fast(vocabulary, ranked, pre_tokenizer=pre_tokenizers.Metaspace(MARK, "first", split=False)),
        "split": fast(vocabulary, ranked, pre_tokenizer=pre_tokenizers.Metaspace(MARK, "always", split=True)),
    }
    variants["marks"] = fast(vocabulary, ranked, pre_tokenizer=pre_tokenizers.Metaspace(MARK, "first", split=False))
    variants["marks"].add_special_tokens(["[INST]", "[/INST]"])
    chats = list(conversations(variants))
    del variants["marks"]
    cases = []
    for text in strings(args.seed, args.count):
        case = {"text": text, "model": model.encode(text)}
        cases.append(case | {name: tokenizer.encode(text).ids for name, tokenizer in variants.items()})
    steps = {}
    for name, tokenizer in variants.items():
        document = json.loads(tokenizer.to_str())
        steps[name] = {key: document[key] for key in ("normalizer", "pre_tokenizer", "decoder")}
    golden = {
        "pieces": list(vocabulary),
        "scores": [model.get_score(i) for i in range(n)],
        "types": [gguf_type(model, i) for i in range(n)],
        "merges": [" ".join(cut) for cut in ranked],
        "steps": steps,
        "chats": chats,
        "cases": cases,
    }
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":")).replace('{"text"', '\n{"text"').replace('{"format"', '\n{"format"')
    pathlib.Path(args.output).write_text(text + "\n")
    print(f"{len(cases)} strings, {len(text.encode())} bytes")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What Hugging Face `tokenizers` and tiktoken make of seeded strings: the golden data of the tokenizer.

    tools/golden_tokenizer.py                        # writes tests/golden/tokenizer.jsonl, the small one
    tools/golden_tokenizer.py --count 20000 --check build/thaw-tests

Each line of the file is one string with
    smollm2, llama3   its token ids; control tokens in the text are read as text
    ..._parsed        the same with control tokens read as such, where the string has some
    qwen2, gpt-2      the lengths in bytes of the pieces that these pre-tokenizers cut
SmolLM2's tokenizer is put together from the GGUF file's vocabulary with the pre-tokenizer that its
tokenizer.json has; LLaMA-3's is tiktoken with the regex of llama_models/llama3/tokenizer.py. --check
runs the test binary on the strings, and on SmolLM2's tokenizer as tokenizers writes it to JSON.

Needs tokenizers, tiktoken and gguf; `make test` runs without them.
"""

import argparse
import base64
import json
import os
import pathlib
import random
import subprocess
import tempfile

import gguf
import tiktoken
import tokenizers
from tokenizers import pre_tokenizers

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

LANGUAGES = """\
The quick brown fox jumps over the lazy dog, and it didn't stop until nightfall.
Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Straße, Fußgänger, ÄÖÜ.
Portez ce vieux whisky au juge blond qui fume; l'été, c'est déjà fini, n'est-ce pas ?
El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío. ¿Qué? ¡Añoraba!
Příliš žluťoučký kůň úpěl ďábelské ódy. Pchnąć w tę łódź jeża lub ośm skrzyń fig.
Съешь же ещё этих мягких французских булок, да выпей чаю. Объём, подъезд, ёлка.
Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Τάχιστη αλώπηξ βαφής ψημένη γη.
דג סקרן שט בים מאוכזב ולפתע מצא חברה. שָׁלוֹם עֲלֵיכֶם
نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر. السَّلَامُ عَلَيْكُمْ ١٢٣٤
یہ ایک مثال ہے۔ این یک متن فارسی است؛ می‌خواهم بنویسم ۱۲۳۴
ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश। १२३४५ क्षत्रिय
আমি বাংলায় গান গাই। தமிழ் எழுத்து அழகு. తెలుగు లిపి. ಕನ್ನಡ. മലയാളം. ગુજરાતી. ਪੰਜਾਬੀ. ଓଡ଼ିଆ. සිංහල
เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓ ພາສາລາວ မြန်မာစာ ភាសាខ្មែរ
人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。一二三四
すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。カタカナ ﾊﾝｶｸ １２３
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 한글
Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.
ყველა ადამიანი იბადება თავისუფალი. Բոլոր մարդիկ ծնվում են ազատ. ሁሉም ሰው ነጻ ሆኖ ይወለዳል
ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ ᐃᓄᒃᑎᑐᑦ ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ བོད་སྐད་ ꦧꦱꦗꦮ 𐌲𐌿𐍄𐌹𐍃𐌺 𒀀𒁀 𓀀𓁐 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𞤀𞤁𞤂
Ⅳ ⅷ ½ ¾ ² ³ ① ㊿ ㉈ 〇 ༳ ൵ ௲ ፼ 𐄇 𒐀 𝍠 ٠٩ ०९ ０９
""".splitlines()

CODE = r'''
def f(x):
    """Doc."""
    return {k: v for k, v in x.items() if v != None}  # comment
#include <vector>
int main(int argc, char** argv) {
	std::vector<int> v{1, 2, 3};
	for (auto& i : v) i <<= 2;
	return v[0]->x ? 0x1F : 1e-10;
}
SELECT * FROM t WHERE a >= 10 AND b LIKE '%x_y%' ORDER BY c DESC;
<div class="a b" id='c'>&nbsp;&amp;</div>
const re = /^[a-z0-9_-]{3,16}$/i; let s = `t ${re}`; // ok?
for i in $(seq 1 10); do echo "$i" | sed -e 's/\(.*\)/[\1]/'; done
{"key": [1, 2.5, null, true], "nested": {"a": "\u00e9\n"}}
\begin{equation} e^{i\pi} + 1 = 0 \end{equation} \frac{a}{b}
https://example.com/a/b?c=d&e=f#g user@example.org C:\Users\x\file.txt ../../etc
fn main() -> Result<(), Box<dyn Error>> { let x: &'static str = r#"a"#; Ok(()) }
'''.strip().splitlines(keepends=True)

EMOJI = ["😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "🇺🇸🇯🇵", "❤️‍🔥", "1️⃣", "☺️", "👩🏿‍🚀", "🫠", "🧑‍🤝‍🧑", "©️", "™", "\U000e0067\U000e007f"]
MARKS = ["e\u0301", "a\u0308\u0304", "Z\u0351\u036b\u0343", "\u0928\u093f", "\u1100\u1161\u11a8", "o\u20dd", "\u0e01\u0e33", "\ufe0f", "i\u0307"]
SPACES = [" ", "  ", "\t", "\n", "\r", "\r\n", "\u00a0", "\u0085", "\u1680", "\u180e", "\u2003", "\u2009", "\u200a", "\u200b", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\ufeff", "\v", "\f", "\x1c", "\x1f"]
CONTRACTED = ["don't", "DON'T", "we've", "WE'VE", "I'm", "I'M", "he'll", "HE'LL", "she'd", "it's", "IT'S", "they're", "THEY'RE", "it'\u017f", "'\u017ft", "we\u2019re", "'S", "'Re", "'vE", "o'clock", "''s", "' s", "'\u212a", "l'L"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_7|>", "<repo_name>", "<file_sep>", "<|im_start", "im_end|>", "<|", "|>"]
PUNCTUATION = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + ["…", "—", "“", "”", "«", "。", "、", "！", "¿", "→", "≠", "€", "•", "■"]


def random_text(r, points):
    def point():
        while True:
            c = r.choice([r.randrange(0x80), r.randrange(0x800), r.randrange(0x10000), r.randrange(0x110000)])
            if not 0xD800 <= c < 0xE000:
                return chr(c)

    return "".join(point() for _ in range(points))


def slice_of(r, lines):
    line = r.choice(lines)
    begin = r.randrange(len(line))
    return line[begin : begin + r.randint(1, 60)]


def word(r):
    return "".join(r.choice("abcdefghijklmnopqrstuvwxyzABCXYZ") for _ in range(r.randint(1, 12)))


def digits(r):
    return "".join(r.choice(r.choice(["0123456789", "٠١٢٣٤", "०१२३४", "０１２３"])) for _ in range(r.randint(1, 20)))


KINDS = {
    "language": lambda r: slice_of(r, LANGUAGES),
    "mixed": lambda r: "".join(slice_of(r, LANGUAGES)[:8] for _ in range(r.randint(2, 8))),
    "code": lambda r: "".join(r.choice(CODE) for _ in range(r.randint(1, 3))),
    "emoji": lambda r: "".join(r.choice(EMOJI + [" ", "a", ", "]) for _ in range(r.randint(1, 10))),
    "marks": lambda r: "".join(r.choice(MARKS + [" ", "x"]) for _ in range(r.randint(1, 12))),
    "digits": lambda r: "".join(r.choice([digits(r), " ", ".", ",", "x", word(r)]) for _ in range(r.randint(1, 6))),
    "spaces": lambda r: "".join(r.choice(SPACES) * r.choice([1, 1, 2, 3, 9]) for _ in range(r.randint(1, 6))),
    "spaced": lambda r: "".join(word(r) + r.choice(SPACES) * r.randint(1, 4) for _ in range(r.randint(1, 6))),
    "contractions": lambda r: r.choice(["", " ", "  "]).join(r.choice(CONTRACTED) for _ in range(r.randint(1, 6))),
    "punctuation": lambda r: "".join(r.choice(PUNCTUATION + ["\n", " ", "a", "1"]) for _ in range(r.randint(1, 15))),
    "special": lambda r: "".join(r.choice(SPECIAL + [" ", "hi", "\n"]) for _ in range(r.randint(1, 6))),
    "unicode": lambda r: random_text(r, r.randint(1, 24)),
    "bytes": lambda r: "".join(chr(r.randrange(256)) for _ in range(r.randint(1, 40))),
    "repeat": lambda r: r.choice(["a", "ab", "the ", "  ", "\n", "=", "é", "哈", "😀", "0"]) * r.randint(2, 60),
    "words": lambda r: " ".join(word(r) for _ in range(r.randint(1, 10))),
}


def strings(seed, count):
    r = random.Random(seed)
    seen = {""}
    yield "special", ""
    while len(seen) < count:
        kind = r.choice(list(KINDS))
        text = KINDS[kind](r)
        if text not in seen:
            seen.add(text)
            yield kind, text


def smollm2(path):
    fields = gguf.GGUFReader(path).fields
    field = lambda name: fields["tokenizer.ggml." + name].contents()
    tokens = field("tokens")
    assert field("pre") == "smollm"
    bpe = tokenizers.models.BPE(
        {token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in field("merges")]
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, field("token_type")) if kind == 3]
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer


def llama3(path):
    lines = [line.split() for line in pathlib.Path(path).read_bytes().splitlines() if line]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
               "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id",
               "python_tag", "image"]  # fmt: skip
    special += [f"reserved_special_token_{2 + i}" for i in range(256 - len(special))]
    ids = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(special)}
    return tiktoken.Encoding("llama3", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens=ids)


def pieces(pre_tokenizer, text):
    return [len(text[begin:end].encode()) for _, (begin, end) in pre_tokenizer.pre_tokenize_str(text)]


def records(args):
    hf, tik = smollm2(args.gguf), llama3(args.tiktoken)
    qwen2 = pre_tokenizers.Split(tokenizers.Regex(QWEN2), "isolated")
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    for kind, text in strings(args.seed, args.count):
        hf.encode_special_tokens = True
        record = {"text": text, "smollm2": hf.encode(text).ids}
        record["llama3"] = tik.encode(text, disallowed_special=())
        if kind == "special":
            hf.encode_special_tokens = False
            record["smollm2_parsed"] = hf.encode(text).ids
            record["llama3_parsed"] = tik.encode(text, allowed_special="all")
        record["qwen2"] = pieces(qwen2, text)
        record["gpt-2"] = pieces(gpt2, text)
        yield record


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", default="weights/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--tiktoken", default="weights/llama3-tokenizer.model")
    parser.add_argument("--count", type=int, default=1200, help="how many strings")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", default="tests/golden/tokenizer.jsonl")
    parser.add_argument("--check", metavar="THAW_TESTS", help="write nothing; run this test binary on the strings")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        output = pathlib.Path(temporary, "tokenizer.jsonl") if args.check else pathlib.Path(args.output)
        with output.open("w") as file:
            for record in records(args):
                json.dump(record, file, ensure_ascii=False, separators=(",", ":"))
                file.write("\n")
        print(f"{args.count} strings, {output.stat().st_size} bytes")
        if args.check:
            hf_json = pathlib.Path(temporary, "tokenizer.json")
            smollm2(args.gguf).save(str(hf_json))
            environment = {"THAW_TOKENIZER_GOLDEN": str(output), "THAW_TOKENIZER_JSON": str(hf_json)}
            command = [args.check, "--test-case=golden tokens*", "--success=false"]
            raise SystemExit(subprocess.run(command, env={**os.environ, **environment}).returncode)


if __name__ == "__main__":
    main()

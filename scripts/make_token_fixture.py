#!/usr/bin/env python3
"""Record the token ids that llama.cpp gives, for tests/export/test_gguf_tokenizer.py.

Usage: scripts/make_token_fixture.py MODEL.gguf [OUTPUT]

MODEL is SmolLM2-135M-Instruct.Q4_1.gguf, which scripts/install fetches; OUTPUT is by default
tests/data/llama_cpp_tokens.json.gz. Needs the packages gguf and llama-cpp-python, whose
installation compiles llama.cpp. Python 3.11 with llama-cpp-python 0.3.36 made the stored file and
makes the same bytes again.

The texts run through the model's own vocabulary, cut into words in its own way and in every
other way that the exporter knows (llama.cpp lets `tokenizer.ggml.pre` be overridden), and through
a SentencePiece vocabulary made of the model's first tokens.

But for a few on purpose, no text holds a code point that Unicode 14 leaves unassigned: llama.cpp
and the `tokenizers` library carry tables of different ages. With the vocabulary of Llama 3, letters
and digits that are new in Unicode 16 get other ids from llama.cpp (U+1C89 before ".m", U+10D40).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import llama_cpp

OUTPUT = Path(__file__).parents[1] / "tests" / "data" / "llama_cpp_tokens.json.gz"
WORD_CUTS = ("llama-bpe", "gpt-2", "qwen2", "default")
SHORT_LIST = 1000  # texts of every case but the model's own
PIECES = 3000  # tokens of the SentencePiece vocabulary

SCRIPTS = {
    "Latin": "Größe, déjà-vu, łódź, İstanbul, naïve façade, Þórr ﬁnd ǅ",
    "Greek": "Η γρήγορη αλεπού πηδά πάνω από τον τεμπέλη σκύλο. Ἐν ἀρχῇ",
    "Cyrillic": "Съешь ещё этих мягких французских булок, да выпей чаю. Їжак ґава",
    "Armenian": "Բոլոր մարդիկ ծնվում են ազատ ու հավասար",
    "Georgian": "ყველა ადამიანი იბადება თავისუფალი",
    "Hebrew": "כל בני אדם נולדו בני חורין, שָׁלוֹם",
    "Arabic": "يولد جميع الناس أحراراً ١٢٣٤ متساوين؟ پژوهش",
    "Devanagari": "सभी मनुष्य जन्म से स्वतंत्र हैं। १२३ क्षेत्र",
    "Bengali": "সমস্ত মানুষ স্বাধীনভাবে জন্মগ্রহণ করে ৪৫",
    "Tamil": "மனிதர்கள் அனைவரும் சுதந்திரமாகவே பிறக்கின்றனர்",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระ ๑๒๓ ๆ",
    "Ethiopic": "የሰው ልጅ ሁሉ ሲወለድ ነጻ ነው። ፲፪",
    "Han": "人人生而自由,在尊严和权利上一律平等。二〇二四年 〇一二 𠀀𠮷",
    "Kana": "すべての人間は、生まれながらにして自由です。カタカナ ﾊﾝｶｸ ー々",
    "Hangul": "모든 인간은 태어날 때부터 자유로우며 ㄱㄴ 각",
    "Khmer": "មនុស្សទាំងអស់កើតមកមានសេរីភាព ៥៦",
    "Tibetan": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ ༡༢",
    "Cherokee": "ᏂᎦᏓ ᎠᏂᏴᏫ ᏂᎨᎫᏓᎸᎾ ꭰꭱ",
}
EMOJI = (
    "😀 👍🏽 👨\u200d👩\u200d👧 🏳️\u200d🌈 🇬🇧🇫🇷 1️⃣ #️⃣ ❤️ ☃︎"
    " 🏴\U000e0067\U000e0062\U000e007f 🫠 🧑🏿\u200d🚀 ©️ ™ ⌚ 🀄 🃏"
)
PUNCTUATION = (
    ". , ; : ! ? ... …… -- — – ' '' ''' \" “” ‘’ «» `` ``` ~ ^^ @ # $ % & * + = == === != <= >= "
    "-> => <- :: :// /* */ // \\ \\\\ | || && () [] {} <> </> /> ¿ ¡ § ¶ † ‡ • ‰ € £ ¥ ₿ ° ± × ÷ "
    "≠ ≤ ∞ ∑ √ → ↔ ■ ★ ✓ ⁂ 。 、 「」 ！ ？ ・ ． ‥ ٪ ؛ । ॥ ׀ ܀ ‽ ⸘ ﷽ \ufe0f \u200d \u200b \u2060 "
    "\ufeff \xad"
)
CONTRACTIONS = (
    "don't I'm you're we've she'd they'll it's DON'T I'M YOU'RE WE'VE SHE'D THEY'LL IT'S 's 't 'S "
    "'re' ''s o'clock 'tis rock'n'roll l'été d’accord it’s 's's's 'ſ 1's"
)
NUMBERS = (
    "0 7 42 123 1234 99999 1000000 3.14159 1,234,567.89 -1 +5 1e-9 0xFF 0b1010 12:30:59 2024-02-29 "
    "192.168.0.1 v1.2.3 #42 50% $9.99 1st ½ ² Ⅷ ① ٣٤ १२ 二〇 １２ 1️⃣2 9a a9 9_9"
)
BEFORE_NUMBERS = (
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    " \n",
    "\n ",
    "\t",
    "\r\n",
    "x ",
    "(",
    "\u3000",
)
SPACES = [" ", "\n", "\t", "\r", "\r\n", "\v", "\f", "\x85", "\xa0", "\u1680", "\u2003", "\u2009"]
SPACES += ["\u2028", "\u2029", "\u202f", "\u205f", "\u3000"]
CODE = [
    "def f(x: int = 0) -> list[int]:\n    return [x ** 2 for x in range(10) if x % 3 != 0]\n",
    "class A(B):\n\tdef __init__(self, *args, **kw):\n\t\tsuper().__init__(*args, **kw)\n\n\n",
    "for (int i = 0; i < n; ++i) {\n    a[i] = b[i] + 1.0e-5f;  // add\n}\n",
    '#include <stdio.h>\r\nint main(void) {\r\n  printf("%d\\n", 42);\r\n  return 0;\r\n}\r\n',
    "fn main() -> Result<(), Box<dyn Error>> { let v: Vec<u8> = vec![0; 16]; Ok(()) }",
    '{"a": [1, 2.5, null, true], "b": {"c": "\\u00e9\\n"}, "d": ""}',
    "<!DOCTYPE html>\n<div class=\"a b\" id='c'>&nbsp;<br/>text</div>\n<!-- note -->",
    "SELECT COUNT(*) FROM t WHERE x >= 10 AND y IN ('a', 'b') ORDER BY z DESC LIMIT 5;",
    "for f in *.txt; do echo \"${f%.txt}\" | sed -e 's/a/b/g' >> out.log 2>&1; done",
    "| a | b |\n|---|:-:|\n| 1 | `x` |\n\n- item\n  * **bold** _it_\n\n1. one\n2. two\n",
    "\\begin{equation}\n  E = mc^2 \\quad \\forall x \\in \\mathbb{R}\n\\end{equation}",
    "@@ -1,7 +1,7 @@\n-    old = 1\n+    new = 2\n \n",
    "diff = (a-b)/c\n\n\n\n    # four blank lines, four spaces\n        x\n",
    "https://example.org/a/b?q=1&r=%20#frag user@example.org C:\\dir\\file.txt /usr/bin",
]
SPECIAL_CONTEXTS = (
    "{0}", " {0} ", "a{0}b", "{0}{0}", "{0}\n1 2", "x {0}  3", "{0}system\nHello 12{0}\n", "<{0}>",
)  # fmt: skip
BROKEN_SPECIAL = [
    "<|im_start", "im_end|>", "<|im_start|", "< |im_end|>", "<|IM_END|>", "<|im_start|><|im_en",
    "<|<|im_end|>|>", "<|endoftext|", "<0x0A>", "</s>", "<s>", "<unk>", "<|eot_id|>", "<tool>",
]  # fmt: skip
UNASSIGNED = ["a\u0378b", " \U0001fbff ", "1\u05ff2", "\ufffe\uffff", "\U0010ffff x", "\ue000 9"]
LONG = [
    "a" * 5000, " " * 3000, "\n" * 2000, "ab " * 1500, "1234567890" * 200, "=-" * 800, "é" * 1000,
    "the quick brown fox jumps over the lazy dog " * 100, "\t\n " * 500, "人" * 800, "😀" * 300,
]  # fmt: skip


def make_texts(special_tokens: list[str]) -> list[str]:
    """The texts, each once, in an order that doesn't follow their kind."""
    rng = random.Random(20240229)
    texts = [*_marks(), *_words(), *UNASSIGNED, *BROKEN_SPECIAL]
    texts += [c.format(token) for token in special_tokens for c in SPECIAL_CONTEXTS]
    pieces = [*texts, *CODE, *special_tokens]
    texts += ["".join(rng.choices(pieces, k=rng.randrange(2, 6))) for _ in range(500)]
    texts += [_random_unicode(rng) for _ in range(500)]
    texts += LONG
    rng.shuffle(texts)
    return list(dict.fromkeys(["", *texts]))


def _marks() -> Iterator[str]:
    for number in NUMBERS.split(" "):
        yield from (f"{before}{number}" for before in BEFORE_NUMBERS)
        yield f"on {number}, then\n{number} and  {number}."
    for mark in PUNCTUATION.split(" "):
        yield from (
            mark,
            f"a{mark}b",
            f" {mark} ",
            f"{mark}\n\n",
            f"1{mark}2",
            f"{mark * 2} {mark}",
        )
    for emoji in EMOJI.split(" "):
        yield from (emoji, f"a{emoji} b", f"{emoji}{emoji}1", f" {emoji}\n{emoji}")
    for space in SPACES:
        for count in (1, 2, 3, 4, 7, 8, 16, 33):
            run = space * count
            yield from (run, f"a{run}b", f"{run}1", f".{run}")
        yield from (f"x{space}{other}y {other}{space}" for other in SPACES)


def _words() -> Iterator[str]:
    for word in CONTRACTIONS.split(" "):
        yield from (word, f" {word} {word}", f"\n{word}\n")
    for text in (*SCRIPTS.values(), *CODE):
        yield from (text, f" {text}", f"7 {text} 8\n9", *text.split(" "), *text.splitlines())
    for code in (*range(0x20), *range(0x7F, 0xA0)):  # SmolLM2 has no tokens for some of their bytes
        yield f"!{chr(code)}!a{chr(code)}b {chr(code)} 1"


def _random_unicode(rng: random.Random) -> str:
    """Neighbours in the code space, so that a text is mostly of one script."""
    characters: list[str] = []
    length = rng.randrange(1, 24)
    while len(characters) < length:
        start = rng.choice((rng.randrange(0x3000), rng.randrange(0x20000)))
        run = (chr(start + rng.randrange(48)) for _ in range(rng.randrange(1, 8)))
        characters += [c for c in run if unicodedata.category(c) not in {"Cn", "Cs"}]
        characters += rng.choices(["", " ", "\n", "1", "a", "'"])
    return "".join(characters)


def record(path: Path, texts: list[str], overrides: Mapping[str, object]) -> dict[str, object]:
    """The ids of every text, with special tokens taken as such and as plain text."""
    model = llama_cpp.Llama(
        str(path), vocab_only=True, verbose=False, kv_overrides=dict(overrides) or None
    )
    is_end = llama_cpp.llama_vocab_is_eog
    parsed, plain = (
        [model.tokenize(text.encode(), add_bos=True, special=special) for text in texts]
        for special in (True, False)
    )
    return {
        "metadata": overrides,
        "end_ids": [i for i in range(model.n_vocab()) if is_end(model._model.vocab, i)],
        "parsed": parsed,
        "plain": [None if a == b else b for a, b in zip(parsed, plain, strict=True)],  # None: same
    }


def make_sentencepiece(tokens: list[str]) -> dict[str, object]:
    """Metadata of a SentencePiece vocabulary: the model's first tokens, the earlier the better."""
    spelling = {chr(c): chr(c) for c in range(0x21, 0x7F)} | {"Ġ": "▁", "Ċ": "\n", "ĉ": "\t"}
    pieces = ["".join(map(spelling.__getitem__, t)) for t in tokens if set(t) <= spelling.keys()]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<tool>"]
    runs = ["▁" * n for n in (2, 3, 4, 5, 8, 16)]  # the hard case: all ways to join look alike
    pieces = list(dict.fromkeys([*runs, *pieces[:PIECES], *"éèüαβγджשम人の가😀▁"]))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": special + pieces,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [4] + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * len(special) + [-float(i) for i in range(len(pieces))],
    }


def write_gguf(path: Path, metadata: dict[str, object]) -> None:
    """A model file that holds only a vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_string(key, str(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def main(model: Path, output: Path) -> None:
    """Write the fixture."""
    fields = gguf.GGUFReader(model).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    controls = [t for t, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    texts = make_texts(controls)
    cases = {fields["tokenizer.ggml.pre"].contents(): record(model, texts, {})}
    for name in WORD_CUTS:
        overrides = {"tokenizer.ggml.pre": name, "tokenizer.ggml.add_bos_token": True}
        cases[name] = record(model, texts[:SHORT_LIST], overrides)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vocabulary.gguf"
        metadata = make_sentencepiece([t for t in tokens if t not in controls])
        write_gguf(path, metadata)
        cases["sentencepiece"] = record(path, texts[:SHORT_LIST], {}) | {"metadata": metadata}
    fixture = {
        "llama_cpp_python": llama_cpp.__version__,
        "model": model.name,
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "texts": texts,
        "cases": cases,
    }
    encoded = json.dumps(fixture, ensure_ascii=False, separators=(",", ":")).encode()
    output.parent.mkdir(exist_ok=True)
    output.write_bytes(gzip.compress(encoded, 9, mtime=0))
    print(f"{output}: {len(texts)} texts, {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else OUTPUT)

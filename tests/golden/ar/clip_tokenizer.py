"""Cases for clip-tokenizer, from transformers' CLIPTokenizer: python tests/golden/ar/clip_tokenizer.py

Each folder holds vocab.json, merges.txt and the settings in one of the forms in which they are published; ids.json has
the ids of every text with its start and end.
"""
import json

from common import GOLDEN, case
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = """d o|do g</w>|c a|ca t</w>|! !</w>|. .|.. .</w>|Ã ¥|Ã¥ ¼|s k|sk s</w>|1 2|t h|th e</w>|' s</w>|i n</w>|Ġ a</w>"""
TEXTS = [
    "", " ", "a sks dog", "A  DOG's\tcat\n", "dog!", "dog !! cat!!!", "don't they're I'll we'd", "12 dogs, 3.14 cats...",
    "<|endoftext|>dog", "<|ENDOFTEXT|> dog", "x<|startoftext|>y", "<s*> [V] {a} \\ / @ #",
    "Ångström café cafe\u0301 Straße ΣΊΣΥΦΟΣ", "犬と猫 dog犬", "🐶 dog 👩‍👩‍👧", "a\u00a0b\u2003c\u200bd", "ﬁancé ½ ² Ⅷ",
    "'S 'T 'tis O'Neil 's", "snake_case-and--dashes", "\u0000\u0007 bell", "İstanbul", "a" * 90,
]


def byte_symbols():
    """The characters that stand for the 256 bytes, in CLIP's order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + n) for n in range(len(others))]


def make(name, files):
    folder = case("clip-tokenizer", name)
    symbols = byte_symbols()
    merges = [tuple(line.split(" ")) for line in MERGES.split("|")]
    merges = [pair for pair in merges if all(part in symbols or len(part) > 1 for part in pair)]
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges] + [START, END]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [pair for pair in merges if all(part in vocab for part in pair)]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=1) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = {text: tokenizer(text)["input_ids"] for text in TEXTS}
    (folder / "ids.json").write_text(json.dumps(ids, ensure_ascii=False, indent=0) + "\n")


def token(content, normalized):
    return dict(content=content, lstrip=False, normalized=normalized, rstrip=False, single_word=False)


names = dict(bos_token=START, eos_token=END, unk_token=END)
make("plain", {})
make("padded-with-an-exclamation-mark", {
    "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", **names, "pad_token": "!"},
    "special_tokens_map.json": {**names, "pad_token": "!"},
})
make("tokens-in-the-lowercased-text", {
    "tokenizer_config.json": {
        "tokenizer_class": "CLIPTokenizer", **names, "pad_token": END,
        "added_tokens_decoder": {
            str(number): token(content, True) | {"special": True}
            for content, number in json.loads((GOLDEN / "clip-tokenizer/plain/vocab.json").read_text()).items()
            if content in (START, END)
        },
    },
    "special_tokens_map.json": {"bos_token": token(START, True), "eos_token": token(END, True),
                                "unk_token": token(END, True), "pad_token": END},
})

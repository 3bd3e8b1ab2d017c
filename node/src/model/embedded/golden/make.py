"""Makes the reference data that the embedded engine is tested against, by other implementations.

    make.py Q8_0.gguf MINILM_FOLDER OUT_FOLDER

Tokens, chat prompts, logits and greedy continuations come from llama.cpp (llama-cpp-python), on the
very file that the engine runs; how likely a text is as well; embeddings from a forward pass written here in numpy, with the
pooling that sentence-transformers documents. Needs llama-cpp-python, numpy, tokenizers and jinja2.
"""

import json
import pathlib
import random
import struct
import sys

import jinja2
import llama_cpp
import numpy as np
import tokenizers

TEXTS = [
    "", " ", "  ", "\n", "\n\n", "\t", " \n ", "a", "Hello", "Hello world", "Hello, world!",
    " leading", "trailing ", "two  spaces", "three   spaces here", "tabs\t\tand\tmore",
    "line\nbreaks\r\nof\rall kinds\n\n\nend", "it's we've I'll you'd he's they're I'm don't",
    "IT'S WE'VE I'LL", "1", "12", "123", "1234567890", "3.14159", "1,000,000", "0x1F", "1e-9",
    "a1b2c3", "x=1;y=2", "2024-11-28T22:11:59Z", "192.168.0.1", "+49 (0) 30 1234-5678",
    "def f(x):\n    return x ** 2\n", "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i];\n}",
    "fn main() { println!(\"{:?}\", vec![1, 2, 3]); }", "<html><body class=\"x\">&amp;</body></html>",
    "SELECT * FROM t WHERE a >= 10 AND b <> 'x';", "{\"key\": [1, 2.5, null, true]}",
    "https://example.org/path?a=1&b=%20#frag", "user@example.org", "C:\\Windows\\System32",
    "/usr/local/bin", "$HOME ${VAR} $(cmd)", "#include <stdio.h>", "// comment", "/* block */",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~", "...", "---", "***bold*** _it_ `code`", "# Title\n\n- item\n",
    "naïve café résumé", "Ärger über Öl und Straße", "El niño comió piñas", "Łódź żółć", "İstanbul ığüşöç",
    "Привет, мир!", "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم", "هَٰذَا نَصّ مُشَكَّل", "नमस्ते दुनिया",
    "สวัสดีชาวโลก", "你好，世界！", "日本語のテキスト", "カタカナとひらがな", "한국어 텍스트", "𠮷野家", "Việt Nam",
    "😀", "😀😃😄", "👨‍👩‍👧‍👦 family", "🇩🇪🇫🇷", "👍🏽 ok", "a😀b", " 😀 ", "♥ ★ ☂ ✓", "∑∫√∞≠≤≥", "α→β ⇒ γ",
    "½ ¼ ² ³ ¹ ₂", "Ⅷ ⅷ ①②③", "٠١٢٣٤٥٦٧٨٩", "०१२३", "ﬁ ﬂ ﬃ", "ＦＵＬＬ　ｗｉｄｔｈ", "e\u0301 a\u0308", "\u00a0nbsp\u00a0",
    "\u2003em\u2003space", "zero\u200bwidth", "\ufeffbom", "\u202eright to left", "\u00ad soft",
    "\x00", "\x01\x02\x03", "\x7f", "\x1b[31mred\x1b[0m", "\u0085next", "\u2028line\u2029para", "\ufffd",
    "\u0300", "\ue000 private", "\U0010ffff", "a\u0000b", "'", "''", "'s", " 's", "x's's", "’s it’s",
    "\"quoted\"", "“curly” ‘quotes’", "—em–en-hyphen", "…", "100%", "50°C", "€5 £6 ¥7 ₿8", "#1 @you",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "a<|im_end|>b", "<|im_end", "<|", "|>",
    "<|im_start|>user\nhi<|im_end|>\n", "<repo_name>", "<file_sep>x", "<jupyter_code>", "<empty_output>",
    "The quick brown fox jumps over the lazy dog.", "the the the the", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "abcabcabcabc", "CamelCaseIdentifier", "snake_case_identifier", "SCREAMING_CASE", "kebab-case",
    "antidisestablishmentarianism", "Donaudampfschifffahrtsgesellschaft", "pneumonoultramicroscopic",
    "supercalifragilistic", "zzxxyyqq", "   indented\n      more\n\tand tab\n", "end with newline\n",
    "\n\nstart", "a\n b\n  c\n   d", " \t \t ", "word " * 20, "x" * 100, " " * 50, "\n" * 20, "é" * 30,
    "1" * 50, "!?" * 20, "ab " * 40,
]

CHATS = [
    [("user", "What is the capital of France?")],
    [("user", "Write one sentence about the sea.")],
    [("system", "You are terse."), ("user", "Name three colours.")],
    [("user", "Count from 1 to 10.")],
    [("user", "Hi!"), ("assistant", "Hello! How can I help?"), ("user", "What is 2 + 2?")],
    [("user", "Explain gravity to a child.")],
    [("user", "def add(a, b):\n    return a + b\n\nWhat does this do?")],
    [("user", "Übersetze 'good morning' ins Deutsche.")],
    [("system", "You are a poet."), ("user", "A haiku about rain, please.")],
    [("user", "List the planets of the solar system.")],
    [("user", "Why is the sky blue? Answer in two sentences.")],
    [("user", "Summarise: " + "The lease ends when its holder stops paying. " * 12)],
]

SENTENCES = [
    "A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.",
    "A cheetah is running behind its prey.", "Ein Satz auf Deutsch.", "日本語の文です。",
    "The lease ends at noon.", "x", "", " ", "UPPER lower MiXeD", "café naïve résumé", "😀 emoji",
    "1234567890", "def f(x): return x", "What is the capital of France?", "Paris is the capital.",
    "word " * 100, "A long text about many things. " * 60, "supercalifragilisticexpialidocious!",
    "[CLS] [SEP] [MASK]", "tabs\tand\nnewlines",
]


# The beginning of Alice's Adventures in Wonderland (Lewis Carroll, 1865), and some plain words.
PROSE = [
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing "
    "to do: once or twice she had peeped into the book her sister was reading, but it had no pictures or "
    "conversations in it, \"and what is the use of a book,\" thought Alice \"without pictures or "
    "conversations?\" So she was considering in her own mind (as well as she could, for the hot day made "
    "her feel very sleepy and stupid), whether the pleasure of making a daisy-chain would be worth the "
    "trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran "
    "close by her.",
    "A lease is a promise about time: the one who grants it keeps a machine free until it ends, and the "
    "one who holds it pays for every second. When the two cannot hear each other any more, both wait "
    "until it has ended by its own clock, and neither is harmed. A market of such promises needs no "
    "centre. Each node says what it offers and at which price; each buyer compares, and asks the one "
    "that suits it best.\n\n1. Offers are signed.\n2. Prices are integers.\n3. Receipts bind both sides.",
]


def rand_texts(n):
    """Texts of random pieces of all kinds, the same each time."""
    dice = random.Random(7)
    pieces = ["the ", "lease", " node", "\n", "  ", "\t", "42", "7", ".", ", ", "'s", "é", "日", "😀",
              "Ж", "ש", "\u0301", "_", "{", "}", "==", " \n", "\r\n", "€", "𝒳", "ing", "A", "Zq", "0"]
    return ["".join(dice.choice(pieces) for _ in range(dice.randint(2, 24))) for _ in range(n)]


def tokens(llama):
    out = []
    for text in TEXTS + rand_texts(80):
        plain = llama.tokenize(text.encode(), add_bos=False, special=False)
        special = llama.tokenize(text.encode(), add_bos=False, special=True)
        out.append({"text": text, "plain": plain, "special": special})
    return out


def logits(llama):
    return np.array(np.ctypeslib.as_array(llama._ctx.get_logits_ith(-1), shape=(llama.n_vocab(),)))


def chats(llama):
    source = llama.metadata["tokenizer.chat_template"]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(source)
    out = []
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        text = template.render(messages=messages, add_generation_prompt=True)
        prompt = llama.tokenize(text.encode(), add_bos=False, special=True)
        llama.reset()
        llama.eval(prompt)
        row = logits(llama)
        top = [int(i) for i in np.argsort(-row, kind="stable")[:20]]
        case = {"messages": messages, "prompt": prompt,
                "top": [[i, round(float(row[i]), 4)] for i in top], "greedy": [], "margins": []}
        for _ in range(32):
            best, second = np.partition(row, -2)[-2:][::-1]
            token = int(np.argmax(row))
            case["greedy"].append(token)
            case["margins"].append(round(float(best - second), 4))
            if token == llama.token_eos():
                break
            llama.eval([token])
            row = logits(llama)
        out.append(case)
    return out


def likelihood(llama):
    out = []
    for text in PROSE:
        tokens = llama.tokenize(text.encode(), add_bos=False, special=False)
        llama.reset()
        loss = 0.0
        for token, after in zip(tokens, tokens[1:]):
            llama.eval([token])
            row = logits(llama).astype("f8")
            most = row.max()
            loss -= row[after] - most - np.log(np.exp(row - most).sum())
        out.append({"tokens": tokens, "loss": round(loss / (len(tokens) - 1), 5)})
    return out


def read_safetensors(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    out = {}
    for name, entry in json.loads(data[8:8 + length]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            start, end = (8 + length + at for at in entry["data_offsets"])
            out[name] = np.frombuffer(data[start:end], "<f4").reshape(entry["shape"]).astype("f8")
    return out


def erf(x):
    # Abramowitz and Stegun 7.1.26 is too coarse; this is the complementary one of Numerical Recipes,
    # good to 1.2e-7.
    z = np.abs(x)
    t = 1 / (1 + 0.5 * z)
    p = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398,
         1.48851587, -0.82215223, 0.17087277]
    s = np.zeros_like(t)
    for c in reversed(p):
        s = s * t + c
    r = t * np.exp(-z * z + s)
    return np.where(x >= 0, 1 - r, r - 1)


def embeddings(folder):
    w = read_safetensors(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    longest = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(longest)
    tokenizer.no_padding()

    def norm(x, name):
        mean = x.mean(-1, keepdims=True)
        x = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    out = []
    for text in SENTENCES:
        ids = tokenizer.encode(text).ids
        n = len(ids)
        x = w["embeddings.word_embeddings.weight"][ids]
        x = x + w["embeddings.position_embeddings.weight"][:n]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        x = norm(x, "embeddings.LayerNorm")
        for layer in range(config["num_hidden_layers"]):
            name = f"encoder.layer.{layer}."
            split = lambda part: linear(x, name + "attention.self." + part).reshape(n, heads, -1).transpose(1, 0, 2)
            q, k, v = split("query"), split("key"), split("value")
            s = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
            s = np.exp(s - s.max(-1, keepdims=True))
            a = (s / s.sum(-1, keepdims=True)) @ v
            a = a.transpose(1, 0, 2).reshape(n, -1)
            x = norm(x + linear(a, name + "attention.output.dense"), name + "attention.output.LayerNorm")
            h = linear(x, name + "intermediate.dense")
            h = h * 0.5 * (1 + erf(h / np.sqrt(2)))
            x = norm(x + linear(h, name + "output.dense"), name + "output.LayerNorm")
        mean = x.mean(0)
        mean = mean / np.linalg.norm(mean)
        out.append({"text": text, "ids": ids, "vector": [round(float(v), 5) for v in mean]})
    return out


def main():
    model, folder, out = (pathlib.Path(arg) for arg in sys.argv[1:4])
    llama = llama_cpp.Llama(str(model), n_ctx=2048, n_threads=2, verbose=False)
    all = {"tokens": tokens(llama), "chats": chats(llama), "likelihood": likelihood(llama),
           "embeddings": embeddings(folder)}
    for name, data in all.items():
        lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in data)
        (out / f"{name}.json").write_text(f"[\n{lines}\n]\n")
        print(name, len(data))


main()

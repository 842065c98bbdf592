"""What falls back when a vocabulary keeps fewer tokens, chosen by a language alone: one table.

    python benchmarks/vocabulary.py MODEL RECORDINGS [LANGUAGE]

Counted on what the original writes for the recordings, which has no part in choosing the tokens.
"""

import sys
from pathlib import Path

from packlight.audio import read_audio
from packlight.data import read_dataset
from packlight.evaluate import spread
from packlight.loading import load
from packlight.vocabulary import choose, read_vocabulary
from packlight.vocabulary_rewrite import rewrite
from packlight.vocabulary_usage import fallback, measure_usage

SIZES = (8192, 12288, 16384, 20480, 24576)
RECORDINGS = 50


def main(name: str, recordings: Path, language: str = "en") -> None:
    """Print the table for one model."""
    model = load(name)
    rows = model.module.config.vocab_size
    decode, family = model.decoder(), model.family
    texts = [
        decode(family.answer(model.module, read_audio(s.path), model.settings, None, "transcribe"))
        for s in spread(read_dataset(recordings), RECORDINGS)
    ]
    known, usage = read_vocabulary(model.tokenizer, rows), measure_usage(model.tokenizer, rows, languages=[language])
    print(f"{rows} tokens; {sum(len(t.split()) for t in texts)} words of {len(texts)} recordings")
    print("| tokens kept | expected tokens kept | words that fall back | more tokens |\n|---:|---:|---:|---:|")
    for size in SIZES:
        kept = choose(known, usage, size=size)
        made = rewrite(model.tokenizer, kept.ids, rows)
        lost = fallback(model.tokenizer, made.tokenizer_json, made.old_to_new, texts)
        print(f"| {size} | {kept.covered:.1%} | {lost.word_share:.1%} | +{lost.more_tokens:.1%} |")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:4])

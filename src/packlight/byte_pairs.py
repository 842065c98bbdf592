"""A byte-pair tokenizer in few bytes, and token ids to text without a tokenizer library. No torch.

Byte-pair merges (Sennrich et al. 2016, arXiv 1508.07909) are learned one after the other, each making one new token, so
where tokens are numbered as they were learned the list of tokens tells the merges: a token is merged from the two parts
that the merges before it leave. What only writes text needs no merges at all. Whisper's tokenizer takes 200 KB so
instead of 590, and writing text takes 4 MB of memory instead of 32.
"""

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

_MOST = 1000  # numbers for each token, where they have gaps
_LIST = '"vocab":['


def without_merges(text: str) -> str:
    """A tokenizer.json whose tokens are a list and whose merges are left out, where `with_merges` brings both back.

    Args:
        text: of a tokenizer.json.

    Returns:
        JSON; the text itself where its tokens don't tell its merges, or where it is no byte-pair tokenizer.
    """
    known = json.loads(text)
    model = known.get("model", {})
    vocabulary = model.get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocabulary, dict):
        return text
    pieces = sorted(vocabulary, key=lambda piece: int(vocabulary[piece]))
    given = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
    if [vocabulary[p] for p in pieces] != list(range(len(pieces))) or merges_of(pieces) != given:
        return text
    short = {**model, "vocab": pieces}
    del short["merges"]
    return json.dumps({**known, "model": short}, ensure_ascii=False, separators=(",", ":"))


def with_merges(text: str) -> str:
    """The tokenizer.json that `without_merges` shortened; any other text is given back as it is.

    Raises:
        ValueError: no JSON, or not of this kind.
    """
    known = json.loads(text)
    model = known.get("model") if isinstance(known, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), list) or model.get("type") != "BPE":
        return text
    pieces = _pieces(model)
    model = {**model, "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges_of(pieces)}
    return json.dumps({**known, "model": model}, ensure_ascii=False)


def merges_of(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """The merges that made these tokens, in their order; a token that no merge of two others makes has none.

    Args:
        pieces: tokens in the order in which they were learned, the characters before what is made of them.
    """
    rank = {piece: i for i, piece in enumerate(pieces)}
    found = []
    for i, piece in enumerate(pieces):
        parts = list(piece)
        while len(parts) > 2:
            best, at = min((rank.get(parts[k] + parts[k + 1], i), k) for k in range(len(parts) - 1))
            if best >= i:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2 and all(p in rank for p in parts):
            found.append((parts[0], parts[1]))
    return found


def speller(text: str) -> Callable[[Sequence[int]], str] | None:
    """What turns token ids into text, special tokens left out, as `tokenizers` does for byte-level tokens.

    Args:
        text: of a tokenizer.json, maybe without merges.

    Returns:
        the function; None for a tokenizer of another kind.

    Raises:
        ValueError: no JSON, or damaged.
    """
    text, listed = _apart(text)
    known = json.loads(text)
    if not isinstance(known, dict) or (known.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    model = known.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return None
    try:
        added = {int(a["id"]): None if a["special"] else str(a["content"]) for a in known.get("added_tokens", [])}
    except (KeyError, TypeError) as error:
        raise ValueError(f"an added token without {error}") from None
    pairs = enumerate(listed) if listed is not None else sorted(_by_id(model).items())
    letters = byte_letters()

    def spelled(piece: str | None) -> bytes:
        if piece is None:
            return b""
        return bytes(letters[c] for c in piece) if all(c in letters for c in piece) else piece.encode()

    # All in one text: 50,000 of their own take 10 MB.
    whole, ends = bytearray(), array("q", [0])

    def tell(token: int, piece: str | None) -> None:
        if token > _MOST * (len(ends) + len(added)):
            raise ValueError("its tokens have numbers far beyond their count")
        for number in range(len(ends) - 1, token + 1):  # numbers that are no token's give nothing
            whole.extend(spelled(added.get(number, piece if number == token else None)))
            ends.append(len(whole))

    for token, piece in pairs:
        tell(token, piece)
    for token in sorted(added):
        tell(token, None)
    count = len(ends) - 1

    def text_of(ids: Sequence[int]) -> str:
        known = (int(i) for i in ids if 0 <= int(i) < count)
        return b"".join(whole[ends[i] : ends[i + 1]] for i in known).decode("utf-8", errors="replace")

    return text_of


def _apart(text: str) -> tuple[str, Iterator[str] | None]:
    """A tokenizer.json without its list of tokens, and they one by one; the text and None where it is not as we write it.

    50,000 texts at once leave 3 MB that Python does not give back.
    """
    begin = text.find(_LIST)
    if begin < 0:
        return text, None
    begin += len(_LIST)
    starts, end = array("q"), begin
    while text[end : end + 1] == '"':
        starts.append(end + 1)
        end = scanstring(text, end + 1)[1]
        end += text[end : end + 1] == ","
    if text[end : end + 1] != "]":
        return text, None  # no list of texts, or damaged: said where it is read as a whole
    return text[:begin] + text[end:], (scanstring(text, start)[0] for start in starts)


def _pieces(model: dict[str, Any]) -> list[str]:
    """The tokens of a model that lists them, in the order of their ids. Raises ValueError."""
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, list) or not all(isinstance(piece, str) for piece in vocabulary):
        raise ValueError("its tokens are no texts")
    return vocabulary


def _by_id(model: dict[str, Any]) -> dict[int, str]:
    """Id -> token, whether they are listed or numbered, with gaps or without. Raises ValueError."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        return {int(i): piece for piece, i in vocabulary.items()}
    return dict(enumerate(_pieces(model)))


def byte_letters() -> dict[str, int]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others for those from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(0x100 + i): b for i, b in enumerate(rest)}}

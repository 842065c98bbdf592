"""What decoding must know of a Whisper model, as the bundle's manifest holds it, checked key by key."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from packlight.context import AudioContext
from packlight.errors import BundleError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decoding must know of a model.

    Text tokens come before `eos`, and timestamps are the last ids, 20 ms apart: so in every Whisper.

    Args:
        mel_bins: rows of the spectrogram, 80 or 128.
        frames: columns of the spectrogram, 10 ms each.
        layers: blocks of the decoder.
        heads: heads of the decoder's attention to its past; of every layer, where they differ.
        head_size: width of one head.
        start: id of the token that starts every prompt.
        eos: id of the token that ends the text.
        no_timestamps: id of the token that asks for text alone, or None.
        timestamp_begin: id of the timestamp 0.00, or None when the model has no timestamps.
        language_ids: ids by language code, such as 'en'; empty for a model of English only.
        task_ids: ids of 'transcribe' and 'translate'; empty for a model of English only.
        suppress: ids never produced.
        begin_suppress: ids not produced as the first token.
        max_tokens: positions of the decoder, prompt included.
        max_initial_timestamp_index: the highest first timestamp, in steps of 20 ms.
        language: the language of the audio unless the call names one; None means detect it.
        task: the task unless the call names one.
        context: how much padding the encoder sees, its inputs then being as long as the audio; None for all of it.
    """

    mel_bins: int
    frames: int = 3000
    layers: int
    heads: int | tuple[int, ...]
    head_size: int
    start: int
    eos: int
    no_timestamps: int | None
    timestamp_begin: int | None
    language_ids: dict[str, int]
    task_ids: dict[str, int]
    suppress: tuple[int, ...]
    begin_suppress: tuple[int, ...]
    max_tokens: int
    max_initial_timestamp_index: int = 50
    language: str | None = None
    task: str = "transcribe"
    context: AudioContext | None = None

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        lists = {"suppress": list(self.suppress), "begin_suppress": list(self.begin_suppress)}
        heads = self.heads if isinstance(self.heads, int) else list(self.heads)
        return asdict(self) | lists | {"heads": heads}

    def heads_of(self, layer: int) -> int:
        """Heads of one layer's attention to its past."""
        return self.heads if isinstance(self.heads, int) else self.heads[layer]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Read what `to_dict` wrote. Raises BundleError naming the unknown, missing or wrong keys."""
        if not isinstance(values, dict):
            raise BundleError("The Whisper settings are no JSON object. Write the bundle again.")
        known = set(cls.__dataclass_fields__)
        values = {"context": None, **values}  # bundles written before there was such a thing have no word of it
        for what, keys in (("unknown", set(values) - known), ("missing", known - set(values))):
            if keys:
                raise BundleError(
                    f"The Whisper settings have {what} keys: {', '.join(sorted(map(str, keys)))}. "
                    f"Write the bundle again with this version of packlight, or update packlight."
                )
        for names, holds, kind in _KINDS:
            for name in names:
                if not holds(values[name]):
                    raise BundleError(f"The Whisper settings: {name!r} must be {kind}. Write the bundle again.")
        if not isinstance(values["heads"], int) and len(values["heads"]) != values["layers"]:
            raise BundleError("The Whisper settings: 'heads' must have one number per layer. Write the bundle again.")
        made = {name: tuple(values[name]) for name in ("suppress", "begin_suppress")}
        made |= {} if isinstance(values["heads"], int) else {"heads": tuple(values["heads"])}
        context = None if values["context"] is None else AudioContext(**values["context"])
        return cls(**(values | made | {"context": context}))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_count(value: Any) -> bool:
    return _is_id(value) and value > 0


def _is_counts(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_count, value))


def _is_context(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"near", "middle", "far"} and all(map(_is_count, value.values()))


def _is_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_id, value))


def _is_ids_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and _is_id(v) for k, v in value.items())


_KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("mel_bins", "frames", "layers", "head_size", "max_tokens"),
        _is_count,
        "a whole number above 0",
    ),
    (("heads",), lambda v: _is_count(v) or _is_counts(v), "a whole number above 0, or a list of them"),
    (("start", "eos", "max_initial_timestamp_index"), _is_id, "a whole number, 0 or above"),
    (("no_timestamps", "timestamp_begin"), lambda v: v is None or _is_id(v), "null or a token id"),
    (("language_ids", "task_ids"), _is_ids_by_name, "an object of token ids by name"),
    (("suppress", "begin_suppress"), _is_ids, "a list of token ids"),
    (("language",), lambda v: v is None or isinstance(v, str), "null or a language code"),
    (("task",), lambda v: isinstance(v, str), "the name of a task"),
    (("context",), lambda v: v is None or _is_context(v), "null or an object with near, middle and far above 0"),
)

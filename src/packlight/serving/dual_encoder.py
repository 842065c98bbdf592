"""Dual encoders on the device: pictures or sounds and texts to vectors of length 1, whose products say how they match.

Needs numpy, Pillow, tokenizers and the runtime. Scores are cosines; times `scale`, their softmax over classes is what
the original gives as probabilities (Radford et al. 2021, arXiv 2103.00020).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from packlight.errors import BundleError, DataError
from packlight.images import ImageSettings, pixels
from packlight.patches import PatchSettings, patches
from packlight.retrieval import class_vectors
from packlight.sounds import SoundSettings, features
from packlight.texts import TextSettings

Array = np.ndarray[Any, np.dtype[Any]]
Part = Callable[[dict[str, Any]], Mapping[str, Any]]
_MOST = 1_000_000  # characters of a text; what is beyond `max_tokens` is cut anyway


@dataclass(frozen=True)
class Settings:
    """All that serving must know of a model.

    Args:
        content: how a picture or sound becomes the input of its tower.
        text: how a text becomes token ids; None where the classes are frozen.
        scale: what multiplies the cosine before a softmax.
        labels: the frozen classes; none where there is a text tower.
    """

    content: ImageSettings | PatchSettings | SoundSettings
    text: TextSettings | None
    scale: float
    labels: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """'audio' or 'image'."""
        return "audio" if isinstance(self.content, SoundSettings) else "image"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what the first tower takes."""
        if isinstance(self.content, PatchSettings):
            return ("pixel_values", "positions")
        return ("input_features",) if self.kind == "audio" else ("pixel_values",)

    def feed(self, content: Array) -> dict[str, Array]:
        """The first tower's input for a picture uint8 [height, width, 3], or a sound float32 [samples]."""
        if isinstance(self.content, SoundSettings):
            return {"input_features": features(content, self.content)}
        if isinstance(self.content, PatchSettings):
            return patches(content, self.content)
        return {"pixel_values": pixels(content, self.content)}

    @classmethod
    def from_dict(cls, values: Any) -> "Settings":
        """Read a manifest's 'serving'. Raises BundleError for what is missing or wrong."""
        if not isinstance(values, dict) or "scale" not in values or ("image" in values) == ("audio" in values):
            raise BundleError("The dual encoder's settings lack image or audio, or scale. Write the bundle again.")
        labels, text = values.get("labels", []), values.get("text")
        if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels) or bool(labels) == bool(text):
            raise BundleError("The dual encoder's settings must have either text or a list of labels. Write it again.")
        scale = values["scale"]
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
            raise BundleError("The dual encoder's settings: 'scale' must be a number. Write the bundle again.")
        content: ImageSettings | PatchSettings | SoundSettings
        if "audio" in values:
            content = SoundSettings.from_dict(values["audio"])
        elif isinstance(values["image"], dict) and "patch" in values["image"]:
            content = PatchSettings.from_dict(values["image"])
        else:
            content = ImageSettings.from_dict(values["image"])
        return cls(content, TextSettings.from_dict(text) if text else None, float(scale), tuple(labels))


@dataclass(frozen=True)
class Encoder:
    """The towers of an open bundle.

    Args:
        content: the graph of the tower for pictures or sounds.
        settings: see there.
        text: the graph of the text tower; None where the classes are frozen.
        ids: text -> token ids; None likewise.
        classes: [labels, d] the vectors of frozen classes, else None.
    """

    content: Part
    settings: Settings
    text: Part | None = None
    ids: Callable[[str], list[int]] | None = None
    classes: Array | None = None

    def embed_content(self, content: Array) -> Array:
        """The vector [d] of a picture uint8 [height, width, 3], or of a sound float32 [samples]."""
        return self._vector(self.content(self.settings.feed(content)), f"{self.settings.kind}_vector")

    def embed_text(self, text: str) -> Array:
        """The vector [d] of a text. What is too long for the model is cut. Raises DataError without a text tower."""
        if self.text is None or self.ids is None:
            raise DataError(f"This bundle has no text tower: its classes are {', '.join(self.settings.labels)}.")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise DataError("The text holds bytes that are no UTF-8. Write it in UTF-8.")
        ids = np.array([self.ids(text[:_MOST])], dtype=np.int64)
        if not ids.size:
            raise DataError("The text is empty and this model's tokenizer makes no token of it. Write a word.")
        return self._vector(self.text({"input_ids": ids}), "text_vector")

    def embed_classes(self, labels: Sequence[str], templates: Sequence[str]) -> Array:
        """A vector per label [labels, d]: the mean over the templates, with the label in place of {}."""
        return class_vectors([np.stack([self.embed_text(t.replace("{}", x)) for t in templates]) for x in labels])

    def scores(self, content: Array) -> Array:
        """The cosines [labels] of a picture or sound and the frozen classes."""
        assert self.classes is not None
        found: Array = self.classes @ self.embed_content(content)
        return found

    def _vector(self, found: Mapping[str, Any], name: str) -> Array:
        vector: Array = found[name].numpy()[0]
        if not np.isfinite(vector).all():
            raise DataError("The model gave a vector that is no number for this input.")
        return vector


def embed(encoder: Encoder, content: Array, texts: Sequence[str]) -> list[list[float]]:
    """The vectors of a picture or sound and of its texts, as the original's `answer` gives them."""
    return [v.tolist() for v in (encoder.embed_content(content), *map(encoder.embed_text, texts))]

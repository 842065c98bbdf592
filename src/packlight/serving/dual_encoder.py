"""Dual encoders on the device: pictures and texts to vectors of length 1, whose products say how well they match.

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
from packlight.retrieval import class_vectors
from packlight.texts import TextSettings

Array = np.ndarray[Any, np.dtype[Any]]
Part = Callable[[dict[str, Any]], Mapping[str, Any]]
_MOST = 1_000_000  # characters of a text; what is beyond `max_tokens` is cut anyway


@dataclass(frozen=True)
class Settings:
    """All that serving must know of a model.

    Args:
        image: how a picture becomes the input of its tower.
        text: how a text becomes token ids.
        scale: what multiplies the cosine before a softmax.
    """

    image: ImageSettings
    text: TextSettings
    scale: float

    @classmethod
    def from_dict(cls, values: Any) -> "Settings":
        """Read a manifest's 'serving'. Raises BundleError for what is missing or wrong."""
        if not isinstance(values, dict) or not {"image", "text", "scale"} <= set(values):
            raise BundleError("The dual encoder's settings lack image, text or scale. Write the bundle again.")
        scale = values["scale"]
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
            raise BundleError("The dual encoder's settings: 'scale' must be a number. Write the bundle again.")
        return cls(ImageSettings.from_dict(values["image"]), TextSettings.from_dict(values["text"]), float(scale))


@dataclass(frozen=True)
class Encoder:
    """The two towers of an open bundle.

    Args:
        image: the graph of the picture tower.
        text: the graph of the text tower.
        ids: text -> token ids.
        settings: see there.
    """

    image: Part
    text: Part
    ids: Callable[[str], list[int]]
    settings: Settings

    def embed_image(self, picture: Array) -> Array:
        """The vector [d] of a picture uint8 [height, width, 3]."""
        return self._vector(self.image({"pixel_values": pixels(picture, self.settings.image)}), "image_vector")

    def embed_text(self, text: str) -> Array:
        """The vector [d] of a text. What is too long for the model is cut."""
        ids = np.array([self.ids(text[:_MOST])], dtype=np.int64)
        if not ids.size:
            raise DataError("The text is empty and this model's tokenizer makes no token of it. Write a word.")
        return self._vector(self.text({"input_ids": ids}), "text_vector")

    def embed_classes(self, labels: Sequence[str], templates: Sequence[str]) -> Array:
        """A vector per label [labels, d]: the mean over the templates, with the label in place of {}."""
        return class_vectors([np.stack([self.embed_text(t.replace("{}", x)) for t in templates]) for x in labels])

    def _vector(self, found: Mapping[str, Any], name: str) -> Array:
        vector: Array = found[name].numpy()[0]
        if not np.isfinite(vector).all():
            raise DataError("The model gave a vector that is no number for this input.")
        return vector


def embed(encoder: Encoder, picture: Array, texts: Sequence[str]) -> list[list[float]]:
    """The vectors of a picture and of its texts, as the original's `answer` gives them."""
    return [v.tolist() for v in (encoder.embed_image(picture), *map(encoder.embed_text, texts))]

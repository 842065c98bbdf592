"""Whisper as it is exported: an encoder that returns cross keys and values once, a decoder that takes them in."""

from typing import Any

import torch
from torch import Tensor, nn

from packlight.context import AudioContext
from packlight.families import Graph


def context_of(module: nn.Module) -> AudioContext | None:
    """How much padding the encoder sees; None for all of it."""
    values = getattr(module.config, "audio_context", None)
    return None if values is None else AudioContext(**values)


def hear(encoder: nn.Module, features: Tensor, positions: Tensor, sizes: Tensor) -> Tensor:
    """The encoder on a part of its window.

    Args:
        encoder: of a Whisper model.
        features: log-mel [1, mel bins, 2 * L], the first ones of the window. The last positions are given the silence
            at the end of these, which is as good as any.
        positions: [L] in the window, for the table of positions.
        sizes: [L], what attention adds for the number of positions that each stands for.

    Returns:
        [1, L, width]
    """
    made = nn.functional.gelu(encoder.conv2(nn.functional.gelu(encoder.conv1(features))))
    states = made.permute(0, 2, 1) + encoder.embed_positions(positions)
    bias = sizes[None, None, None]  # one number per key
    for layer in encoder.layers:
        states = layer(states, bias)
    return encoder.layer_norm(states)


class _Encoder(nn.Module):
    """Features to the cross keys and values of every decoder layer."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.encoder, self.layers = module.model.encoder, module.model.decoder.layers

    def forward(self, input_features: Tensor, *places: Tensor) -> tuple[Tensor, ...]:
        states = (
            hear(self.encoder, input_features, *places) if places else self.encoder(input_features).last_hidden_state
        )
        outputs = []
        for layer in self.layers:
            attention = layer.encoder_attn
            for projection in (attention.k_proj, attention.v_proj):
                heads = projection(states).view(1, -1, attention.num_heads, attention.head_dim)
                outputs.append(heads.transpose(1, 2))
        return tuple(outputs)


class _Decoder(nn.Module):
    """Tokens and caches to the logits of the last token and the grown caches."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.decoder, self.head = module.model.decoder, module.proj_out

    def forward(self, input_ids: Tensor, past: tuple[Tensor, ...], cross: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        from transformers import DynamicCache, EncoderDecoderCache

        own, fixed = DynamicCache(), DynamicCache()
        for i in range(len(past) // 2):
            own.update(past[2 * i], past[2 * i + 1], i)
            fixed.update(cross[2 * i], cross[2 * i + 1], i)
        cache = EncoderDecoderCache(own, fixed)
        for i in range(len(past) // 2):
            cache.is_updated[i] = True
        # The keys and values are cached: the decoder only asks whether there are encoder states.
        hidden = self.decoder(
            input_ids=input_ids, encoder_hidden_states=cross[0][:, 0], past_key_values=cache, use_cache=True
        ).last_hidden_state
        logits = self.head(hidden[:, -1])
        return (logits, *[t for layer in own.layers for t in (layer.keys, layer.values)])


class _FlatDecoder(nn.Module):
    """`_Decoder` with its caches as separate inputs, which is how a runtime takes them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = _Decoder(module)

    def forward(self, input_ids: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        half = len(caches) // 2
        return self.inner(input_ids, caches[:half], caches[half:])


def _cache(attention: Any, length: int) -> Tensor:
    """An example of an attention's keys or values: pruned ones have heads of their own number."""
    return torch.zeros(1, attention.num_heads, length, attention.head_dim)


def graphs(module: nn.Module) -> tuple[Graph, ...]:
    """The encoder and the decoder as they are exported."""
    config = module.config
    layers = module.model.decoder.layers
    pairs = [f"{kind}_{i}" for i in range(len(layers)) for kind in ("key", "value")]
    past, cross, present = ([f"{prefix}_{pair}" for pair in pairs] for prefix in ("past", "cross", "present"))
    whole = context_of(module) is None
    length = config.max_source_positions if whole else config.max_source_positions // 2
    mel = torch.zeros(1, config.num_mel_bins, 2 * length)
    places = () if whole else (torch.arange(length), torch.zeros(length))
    audio = {} if whole else {"input_features": {2: "frames"}, "positions": {0: "heard"}, "sizes": {0: "heard"}}
    sizes = ((3, "self_attn"), (config.max_source_positions, "encoder_attn"))
    caches = [_cache(getattr(layer, name), n) for n, name in sizes for layer in layers for _ in ("key", "value")]
    dynamic = {"input_ids": {1: "tokens"}, **{name: {2: "past"} for name in past}}
    dynamic |= {} if whole else {name: {2: "heard"} for name in cross}
    return (
        Graph(
            "encoder",
            _Encoder(module),
            (mel, *places),
            ("input_features", *(("positions", "sizes") if places else ())),
            tuple(cross),
            audio,
        ),
        Graph(
            "decoder",
            _FlatDecoder(module),
            (torch.ones(1, 2, dtype=torch.long), *caches),
            ("input_ids", *past, *cross),
            ("logits", *present),
            dynamic,
        ),
    )

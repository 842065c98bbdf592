"""Whisper as it is exported: an encoder that returns cross keys and values once, a decoder that takes them in."""

import torch
from torch import Tensor, nn

from packlight.families import Graph


class _Encoder(nn.Module):
    """Features to the cross keys and values of every decoder layer."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.encoder, self.layers = module.model.encoder, module.model.decoder.layers

    def forward(self, input_features: Tensor) -> tuple[Tensor, ...]:
        states = self.encoder(input_features).last_hidden_state
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


def graphs(module: nn.Module) -> tuple[Graph, ...]:
    """The encoder and the decoder as they are exported."""
    config = module.config
    count = config.decoder_layers
    heads = config.decoder_attention_heads
    shape = (1, heads, config.max_source_positions, config.d_model // heads)
    pairs = [f"{kind}_{i}" for i in range(count) for kind in ("key", "value")]
    past, cross, present = ([f"{prefix}_{pair}" for pair in pairs] for prefix in ("past", "cross", "present"))
    mel = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
    caches = [torch.zeros(1, heads, 3, shape[3]) for _ in past] + [torch.zeros(shape) for _ in cross]
    dynamic = {"input_ids": {1: "tokens"}, **{name: {2: "past"} for name in past}}
    return (
        Graph("encoder", _Encoder(module), (mel,), ("input_features",), tuple(cross), {}),
        Graph(
            "decoder",
            _FlatDecoder(module),
            (torch.ones(1, 2, dtype=torch.long), *caches),
            ("input_ids", *past, *cross),
            ("logits", *present),
            dynamic,
        ),
    )

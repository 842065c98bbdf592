"""Whisper: speech to text. Every checkpoint from tiny to large-v3-turbo, English-only or multilingual.

Radford et al. 2022, arXiv 2212.04356. The encoder sees 30 s of log-mel frames; the decoder's table of tokens is also
its head. Cross keys and values depend on the audio only, so the exported encoder returns them once and the exported
decoder takes them in.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from packlight.audio import RATE, open_audio
from packlight.context import AudioContext, places, spoken_positions
from packlight.errors import DataError
from packlight.families import Batch, Family, Part, Tower, attention_at
from packlight.families.whisper_augment import vary
from packlight.families.whisper_graphs import context_of, graphs, hear
from packlight.families.whisper_reading import equip, processing, read

# Running ------------------------------------------------------------------------------------------------------------


def features(module: nn.Module, audio: np.ndarray, whole: bool = False) -> Tensor:
    """Log-mel features as the original pipeline makes them.

    Args:
        module: its config says how many mel bins.
        audio: float32 [n] at 16 kHz.
        whole: keep audio beyond 30 s instead of cutting it.

    Returns:
        [1, mel bins, frames]; 3000 frames unless `whole`.
    """
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=module.config.num_mel_bins)
    if whole and len(audio) > 30 * RATE:
        made = extractor(audio, sampling_rate=RATE, return_tensors="pt", truncation=False, padding="longest")
    else:
        made = extractor(audio, sampling_rate=RATE, return_tensors="pt")
    return made["input_features"]


def prompt(settings: dict[str, Any], language: str | None, task: str) -> list[int]:
    """The tokens that open a transcript without timestamps. Raises DataError for an unknown language or task."""
    ids = [settings["decoder_start_token_id"]]
    if settings["is_multilingual"]:
        for name, table in ((language or "en", settings["lang_to_id"]), (task, settings["task_to_id"])):
            if name not in table:
                raise DataError(f"This model does not know {name!r}. It knows: {', '.join(sorted(table))}.")
            ids.append(table[name])
    elif (language or "en") not in ("en", "english") or task != "transcribe":
        raise DataError(f"This model only transcribes English; {language or task!r} was asked for.")
    return [*ids, settings["no_timestamps_token_id"]]


@torch.inference_mode()
def answer(
    module: nn.Module,
    audio: np.ndarray,
    settings: dict[str, Any],
    language: str | None = None,
    task: str = "transcribe",
) -> list[int]:
    """The original's own words for one recording: greedy `generate` of transformers, without special tokens."""
    x = features(module, audio, whole=True)
    options: dict[str, Any] = {"num_beams": 1, "do_sample": False}
    if settings["is_multilingual"]:
        options.update(language=language, task=task)
    if x.shape[-1] > 3000:
        options["return_timestamps"] = True
    ids = module.generate(x, attention_mask=torch.ones(1, x.shape[-1], dtype=torch.long), **options)[0].tolist()
    return [i for i in ids if i < settings["eos_token_id"]]


def detect_language(module: nn.Module, audio: np.ndarray, settings: dict[str, Any]) -> str | None:
    """The language the model hears in the first 30 s; None for English-only models."""
    if not settings["is_multilingual"]:
        return None
    table = settings["lang_to_id"]
    with torch.inference_mode():
        start = torch.tensor([[settings["decoder_start_token_id"]]])
        logits = module(input_features=features(module, audio), decoder_input_ids=start).logits[0, -1]
    return max(table, key=lambda code: float(logits[table[code]]))


def prepare(
    module: nn.Module,
    audio: np.ndarray,
    words: Sequence[int],
    opening: Sequence[int],
    settings: dict[str, Any],
) -> Batch:
    """A batch of one for teacher-forced passes.

    Args:
        module: the model.
        audio: float32 [n] at 16 kHz; what lies beyond 30 s is cut.
        words: token ids of the transcript.
        opening: what `prompt` gives.
        settings: generation settings.

    Returns:
        'input_features' [1, mel, 3000], 'spoken' []: positions of the encoder that hold audio, 'decoder_input_ids'
        [1, t], 'first' []: position whose logits predict the first word, 'audio' [n]: what was heard of it.
    """
    room = module.config.max_target_positions - len(opening)
    ids = [*opening, *list(words)[:room]]
    return {
        "input_features": features(module, audio),
        "spoken": torch.tensor(spoken_positions(len(audio), module.config.max_source_positions)),
        "decoder_input_ids": torch.tensor([ids]),
        "first": torch.tensor(len(opening) - 1),
        "audio": torch.from_numpy(audio[: 30 * RATE]),
    }


def words_of(module: nn.Module, batch: Batch, settings: dict[str, Any]) -> Tensor:
    """The transcript of a batch and the end of the text: what `run`'s logits should predict."""
    ids = batch["decoder_input_ids"][0]
    whole = len(ids) < module.config.max_target_positions  # else the transcript may have been cut
    end = torch.tensor([settings["eos_token_id"] if whole else -100], device=ids.device)
    return torch.cat([ids[int(batch["first"]) + 1 :], end])


def augment(module: nn.Module, batches: Sequence[Batch], which: int, seed: int, settings: dict[str, Any]) -> Batch:
    """A variant of a recording, or of it and the next, with the module's own words for it."""
    batch, other = batches[which], batches[(which + seed) % len(batches)]
    device = next(module.parameters()).device
    audio = vary(batch["audio"].numpy(), other["audio"].numpy(), 1_000_003 * seed + which)
    opening = batch["decoder_input_ids"][0, : int(batch["first"]) + 1].tolist()
    tables = (settings["lang_to_id"], settings["task_to_id"])
    asked = [next((name for name, i in table.items() if i in opening), None) for table in tables]
    module.to("cpu")  # where features are made
    try:
        words = answer(module, audio, settings, asked[0], asked[1] or "transcribe")
        return prepare(module, audio, words, opening, settings)
    finally:
        module.to(device)


def encode(module: nn.Module, batch: Batch) -> Batch:
    """The batch with the encoder's output in it, so that passes through the decoder alone are cheap."""
    return {**batch, "states": _states(module, batch)}


def _states(module: nn.Module, batch: Batch) -> Tensor:
    if context_of(module) is None:
        return module.model.encoder(batch["input_features"]).last_hidden_state
    batch = inputs(module, batch)
    return hear(module.model.encoder, batch["input_features"], batch["positions"], batch["sizes"])


def inputs(module: nn.Module, batch: Batch) -> Batch:
    """The batch with what the encoder's graph takes: of a short context, only the features and positions that stay."""
    context = context_of(module)
    if context is None:
        return batch
    window = module.config.max_source_positions
    device = batch["input_features"].device
    positions, sizes = (torch.from_numpy(a).to(device) for a in places(int(batch["spoken"]), window, context))
    features = batch["input_features"][..., : 2 * len(positions)]
    return {**batch, "input_features": features, "positions": positions, "sizes": sizes}


def shorten_(module: nn.Module, context: AudioContext) -> None:
    """Let the encoder see the spoken positions and few of the silence after them, from now on."""
    module.config.audio_context = asdict(context)


def run(module: nn.Module, batch: Batch) -> Tensor:
    """Logits [words + 1, vocabulary] at the positions that predict words and the end of the text."""
    states = batch.get("states")
    if states is None:
        states = _states(module, batch)
    hidden = module.model.decoder(
        input_ids=batch["decoder_input_ids"], encoder_hidden_states=states, use_cache=False
    ).last_hidden_state
    return module.proj_out(hidden[0, int(batch["first"]) :])


def serving(module: nn.Module, settings: dict[str, Any], language: str | None, task: str) -> dict[str, Any]:
    """What `packlight.serving.whisper.Settings` reads, for the manifest."""
    config = module.config
    attentions = [layer.self_attn for layer in module.model.decoder.layers]
    heads = [attention.num_heads for attention in attentions]
    return {
        "mel_bins": config.num_mel_bins,
        "frames": 2 * config.max_source_positions,
        "layers": len(attentions),
        "heads": heads if len(set(heads)) > 1 else heads[0],
        "head_size": attentions[0].head_dim,
        "start": settings["decoder_start_token_id"],
        "eos": settings["eos_token_id"],
        "no_timestamps": settings["no_timestamps_token_id"],
        "timestamp_begin": settings["no_timestamps_token_id"] + 1,
        "language_ids": settings["lang_to_id"],
        "task_ids": settings["task_to_id"],
        "suppress": sorted(settings["suppress_tokens"]),
        "begin_suppress": sorted(settings["begin_suppress_tokens"]),
        "max_tokens": config.max_target_positions,
        "max_initial_timestamp_index": settings["max_initial_timestamp_index"],
        "language": language,
        "task": task,
        "context": getattr(config, "audio_context", None),
    }


def multiply_adds(module: nn.Module, path: str, tokens: int = 25) -> int:
    """Multiply-adds of one layer for 30 s of audio and 25 tokens of text; attention products are not a layer's."""
    config, layer = module.config, module.get_submodule(path)
    frames = config.max_source_positions
    if isinstance(layer, nn.Embedding):
        return 0
    size = layer.weight.numel()
    if path.endswith("conv1"):
        return size * 2 * frames
    audio_side = ".encoder." in path or "encoder_attn.k_proj" in path or "encoder_attn.v_proj" in path
    return size * (frames if audio_side else tokens)


FAMILY = Family(
    name="whisper",
    architectures=("WhisperForConditionalGeneration",),
    modalities=("audio", "text"),
    task="speech-to-text",
    towers=(
        Tower(
            "encoder",
            "audio",
            "model.encoder.layers",
            attentions=(attention_at("self_attn"),),
            feed_forward=("fc1", "fc2"),
            count_key="encoder_layers",
            hidden_key="encoder_ffn_dim",
        ),
        Tower(
            "decoder",
            "text",
            "model.decoder.layers",
            stepwise=True,
            attentions=(attention_at("self_attn"), attention_at("encoder_attn")),
            feed_forward=("fc1", "fc2"),
            count_key="decoder_layers",
            hidden_key="decoder_ffn_dim",
        ),
    ),
    parts=(
        Part("encoder convolutions", ("model.encoder.conv*",), "encoder"),
        Part("encoder attention", ("model.encoder.layers.*.self_attn.*",), "encoder"),
        Part("encoder feed-forward", ("model.encoder.layers.*.fc?",), "encoder"),
        Part("decoder self-attention", ("model.decoder.layers.*.self_attn.*",), "decoder"),
        Part("decoder cross-attention", ("model.decoder.layers.*.encoder_attn.*",), "decoder"),
        Part("decoder feed-forward", ("model.decoder.layers.*.fc?",), "decoder"),
        Part("vocabulary table and head", ("model.decoder.embed_tokens", "proj_out"), "decoder"),
        Part("positions", ("model.*.embed_positions",), "encoder"),
    ),
    tied=(("model.decoder.embed_tokens", "proj_out"),),
    read=read,
    prompt=prompt,
    detect_language=detect_language,
    answer=answer,
    prepare=prepare,
    encode=encode,
    run=run,
    graphs=graphs,
    serving=serving,
    multiply_adds=multiply_adds,
    unit="30 s of audio and 25 tokens of text",
    reads="decoder_input_ids",
    window=30.0,
    usage="speech.wav",
    notes=("The interval resamples utterances; speakers recur, so the true uncertainty is somewhat larger.",),
    open_input=open_audio,
    inputs=inputs,
    shorten=shorten_,
    equip=equip,
    processing=processing,
    words=words_of,
    augment=augment,
)


def tiny(seed: int = 0, **changes: Any) -> nn.Module:
    """A random model with the structure of Whisper and 0.2 M parameters, for tests and the support table."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    values = {
        "vocab_size": 200, "num_mel_bins": 80, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
        "max_source_positions": 1500, "max_target_positions": 64, "decoder_start_token_id": 1, "eos_token_id": 150,
        "pad_token_id": 150, "bos_token_id": 150, "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    return WhisperForConditionalGeneration(WhisperConfig(**{**values, **changes})).eval()

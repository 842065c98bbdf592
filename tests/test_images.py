"""Pictures reach the tower as the original's processor gives them, whatever file they come from."""

import numpy as np
import pytest
from PIL import Image

from packlight.errors import BundleError, DataError, ModelError
from packlight.images import ImageSettings, pixels, read_image

SHAPES = [(40, 60), (61, 33), (1, 1), (7, 300), (224, 224)]


def noise(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["clip", "siglip", "align", "small crop"])
def test_pixels_are_those_of_the_processor_within_a_ten_thousandth(shape, kind):
    pytest.importorskip("transformers")
    from transformers import CLIPImageProcessorPil, EfficientNetImageProcessorPil, SiglipImageProcessorPil

    from packlight.families.dual_processing import image_settings

    made = {
        "clip": lambda: CLIPImageProcessorPil(),
        "siglip": lambda: SiglipImageProcessorPil(size={"height": 96, "width": 80}),
        "align": lambda: EfficientNetImageProcessorPil(
            do_center_crop=True, rescale_factor=1 / 127.5, rescale_offset=True
        ),
        "small crop": lambda: CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 31, "width": 40}),
    }[kind]()

    def process(picture):
        return made(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"].float()

    process.original = made
    settings = image_settings(process, "here")
    theirs, ours = process(noise(*shape)).numpy(), pixels(noise(*shape), settings)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    assert np.abs(theirs - ours).max() < 1e-4
    assert ImageSettings.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize(("off", "refused"), [(5e-5, False), (5e-4, True)])
def test_a_processor_is_refused_where_it_differs_by_more_than_the_page_says(off, refused):
    pytest.importorskip("transformers")
    from transformers import CLIPImageProcessorPil

    from packlight.families.dual_processing import image_settings

    made = CLIPImageProcessorPil()

    def process(picture):
        found = made(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"].float()
        return found + off * bool(picture.std())  # a picture of one colour, which the settings are made from, is exact

    process.original = made
    if refused:
        with pytest.raises(ModelError, match="its pixels differ"):
            image_settings(process, "here")
    else:
        image_settings(process, "here")


def test_a_strip_is_cut_before_it_is_scaled():
    settings = ImageSettings(32, 32, 32, (1, 1), True, 3, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    strip = np.full((2, 100_000, 3), 7, np.uint8)
    assert (pixels(strip, settings) == 7).all()


def save(path, image, **how):
    image.save(path, **how)
    return read_image(path)


def test_every_mode_becomes_rgb(tmp_path):
    grey = Image.fromarray(np.full((5, 6), 90, np.uint8))
    assert (save(tmp_path / "l.png", grey) == 90).all()
    deep = Image.fromarray(np.full((5, 6), 257 * 90, np.uint16))
    assert (save(tmp_path / "16.png", deep) == 90).all()
    clear = Image.new("RGBA", (6, 5), (10, 20, 30, 0))
    assert (save(tmp_path / "a.png", clear) == 255).all()
    inks = Image.new("CMYK", (6, 5), (0, 0, 0, 0))
    assert (save(tmp_path / "c.jpg", inks) > 250).all()
    frames = [Image.new("RGB", (6, 5), c) for c in ((200, 0, 0), (0, 200, 0))]
    moving = save(tmp_path / "m.gif", frames[0], save_all=True, append_images=frames[1:])
    assert moving.shape == (5, 6, 3) and moving[..., 0].min() > 190


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    assert save(tmp_path / "t.jpg", image, exif=exif).shape == (6, 4, 3)


def test_what_is_no_picture_gets_one_sentence(tmp_path):
    Image.fromarray(noise(50, 50)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    for name, content in (("cut.jpg", data[: len(data) // 2]), ("text.png", b"hello"), ("empty.gif", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match="no picture"):
        read_image(tmp_path / "none.png")


def test_a_picture_of_hundreds_of_megapixels_is_refused(tmp_path):
    Image.new("1", (20_000, 15_000)).save(tmp_path / "huge.png")
    with pytest.raises(DataError, match="pixels"):
        read_image(tmp_path / "huge.png")


@pytest.mark.parametrize(
    "change",
    [
        {"height": 0},
        {"scaled": [1, 2, 3]},
        {"gain": [1, 2]},
        {"resample": 9},
        {"crop": 1},
        {"x": 1},
        {"gain": [1, 2, float("nan")]},
    ],
)
def test_settings_of_a_damaged_bundle_are_refused(change):
    good = ImageSettings(32, 32, 32, (1, 1), True, 3, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)).to_dict()
    with pytest.raises(BundleError):
        ImageSettings.from_dict({**good, **change})

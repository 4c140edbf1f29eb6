"""Reading images of every kind, and opening all of a set. Needs no detectron2."""

import os
import warnings

import numpy as np
import pytest
from PIL import Image

from dn_detr.data.images import ImageError, open_images, read_image, size_error

RAMP = np.linspace(0, 255, 30 * 40).astype(np.uint8).reshape(30, 40)


def colours():
    return np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)


@pytest.mark.fault(46)
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *(("RGB", ".png"), ("RGB", ".jpg"), ("RGB", ".webp"), ("RGBA", ".png"), ("P", ".gif")),
        *(("1", ".png"), ("L", ".png"), ("L", ".jpg"), ("LA", ".png"), ("P", ".png")),
        *(("CMYK", ".jpg"), ("CMYK", ".tif"), ("YCbCr", ".jpg")),
    ],
)
def test_modes_become_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"image{suffix}"
    stored = Image.fromarray(colours()).convert(mode)
    stored.save(path)
    pixels, orientation = read_image(str(path))
    assert pixels.shape == (30, 40, 3) and pixels.dtype == np.uint8 and orientation == 1
    assert pixels.flags.writeable
    with Image.open(path) as image:
        assert (pixels == np.asarray(image.convert("RGB"))).all()
    if suffix == ".png" and mode in ("RGB", "RGBA"):
        assert (pixels == colours()).all()


@pytest.mark.fault(46)
def test_transparency_is_left_out_without_a_warning(tmp_path):
    palette = Image.fromarray(colours()).quantize(20)
    palette.save(tmp_path / "p.png", transparency=bytes(range(20)))
    Image.fromarray(RAMP).save(tmp_path / "l.png", transparency=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels, _ = read_image(str(tmp_path / "p.png"))
        gray, _ = read_image(str(tmp_path / "l.png"))
    assert (pixels == np.asarray(palette.convert("RGB"))).all()
    assert (gray == RAMP[..., None]).all()


@pytest.mark.fault(46)
@pytest.mark.parametrize("name", ["16.png", "16.tif", "big_endian.tif", "32.tif", "16.pgm"])
def test_sixteen_bits_are_scaled_not_cut(tmp_path, name):
    values = RAMP.astype(np.uint16) * 257  # what a program makes of 8 bits in 16
    path = tmp_path / name
    if name == "16.pgm":
        path.write_bytes(b"P5 40 30 65535\n" + values.astype(">u2").tobytes())
    else:
        types = {"32.tif": np.int32, "big_endian.tif": ">u2"}
        Image.fromarray(values.astype(types.get(name, np.uint16))).save(path)
    assert (read_image(str(path))[0] == RAMP[..., None]).all()


def test_dark_sixteen_bits_stay_dark(tmp_path):
    """The rule is the same for all images of a set, not stretched to each one's own range."""
    Image.fromarray(np.full((2, 2), 2570, np.uint16)).save(tmp_path / "dark.png")
    assert (read_image(str(tmp_path / "dark.png"))[0] == 10).all()


@pytest.mark.fault(46)
@pytest.mark.parametrize(
    ("values", "text"),
    [
        (np.full((2, 2), 0.5, np.float32), "floating-point numbers"),
        (np.full((2, 2), 70_000, np.int32), "integers of 70000 to 70000"),
        (np.full((2, 2), -1, np.int32), "integers of -1 to -1"),
    ],
)
def test_numbers_without_a_range_are_refused(tmp_path, values, text):
    Image.fromarray(values).save(tmp_path / "image.tif")
    with pytest.raises(ImageError, match=f"{text}.*save it with 8 or 16 bits"):
        read_image(str(tmp_path / "image.tif"))


@pytest.mark.fault(45)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_all_kinds(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    upright = {1: lambda a: a, 3: lambda a: a[::-1, ::-1], 6: lambda a: np.rot90(a, -1)}
    for name, values in (("8.png", RAMP), ("16.png", RAMP.astype(np.uint16) * 257)):
        Image.fromarray(values).save(tmp_path / name, exif=exif)
        pixels, found = read_image(str(tmp_path / name))
        assert found == orientation
        assert pixels.shape[:2] == ((30, 40) if orientation < 5 else (40, 30))
        if orientation in upright:
            assert (pixels[..., 0] == upright[orientation](RAMP)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_of_a_sound_image_is_passed_over(tmp_path):
    Image.fromarray(colours()).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_image(str(tmp_path / "a.jpg"))[0].shape == (30, 40, 3)


def broken_files(folder):
    """Unreadable files, with what is to be said of each."""
    Image.fromarray(colours()).save(folder / "good.jpg", quality=95)
    content = (folder / "good.jpg").read_bytes()
    files = {
        "empty.jpg": (b"", "the file is empty (0 bytes)"),
        "text.jpg": (b"<html>not found", "it is not an image (it begins with b'<html>not found')"),
        "truncated.jpg": (content[: len(content) // 2], "image file is truncated"),
        "header.jpg": (content[:30], "Truncated File Read"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: text for name, (_, text) in files.items()}


@pytest.mark.fault(44)
def test_what_cannot_be_read_says_why(tmp_path, monkeypatch):
    for name, text in broken_files(tmp_path).items():
        with pytest.raises(ImageError) as error:
            read_image(str(tmp_path / name))
        assert text in str(error.value), name
    for path, text in ((tmp_path / "none.jpg", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ImageError, match=text):
            read_image(str(path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="decompression bomb.*MAX_IMAGE_PIXELS"):
        read_image(str(tmp_path / "good.jpg"))


@pytest.mark.fault(45)
def test_a_difference_names_both_sizes_and_exif():
    assert size_error((40, 30), (40, 30), 6) is None
    assert size_error((40, 30), (30, 40), 6) == (
        "40x30 (width x height, after its EXIF orientation 6), but the annotation file says 30x40"
    )
    assert "no EXIF rotation" in size_error((40, 30), (30, 40), 1)


@pytest.mark.fault(44)
@pytest.mark.fault(45)
@pytest.mark.parametrize("workers", [0, 2])
def test_all_images_are_opened(tmp_path, workers, capsys):
    texts = broken_files(tmp_path)
    names = [*texts, "good.jpg", "good.jpg"]
    entries = [
        {"id": i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names)
    ]
    entries[-1]["height"] = 31
    unreadable, resized = open_images(entries, str(tmp_path), workers)
    assert len(unreadable.culprits) == 4 and unreadable.level == resized.level == "error"
    for i, (name, text) in enumerate(texts.items()):
        assert unreadable.culprits[i].startswith(f"{name} (id {i}): ") and text in str(unreadable)
    (difference,) = resized.culprits
    assert difference.startswith("good.jpg (id 5) is 40x30 (") and "says 40x31" in difference
    bar = capsys.readouterr().err
    assert "opening images" in bar and "6/6" in bar


def test_huge_images_are_mentioned(tmp_path, monkeypatch):
    Image.fromarray(colours()).save(tmp_path / "a.png")
    entry = {"id": 1, "file_name": "a.png", "width": 40, "height": 30}
    assert open_images([entry], str(tmp_path)) == []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    (finding,) = open_images([entry], str(tmp_path))
    assert finding.level == "warning" and "a.png (id 1): Image size (1200 pixels)" in str(finding)


def test_longest_names(tmp_path):
    folder = tmp_path
    while len(str(folder)) < 3500:
        folder = folder / ("d" * 200)
    folder.mkdir(parents=True)
    path = folder / ("ü" * 125 + ".png")  # 254 bytes
    assert len(os.fsencode(path.name)) == 254
    Image.fromarray(colours()).save(path)
    assert (read_image(str(path))[0] == colours()).all()

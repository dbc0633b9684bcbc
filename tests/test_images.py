"""Pictures: how they are loaded, quantized, measured and written; against naive loops and Pillow."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import qvis
from qvis.errors import BadArgumentError, OutputError, QvisError
from qvis.images.figures import Original, Similarity, histogram, psnr
from qvis.images.layers import load_layers
from qvis.images.loading import load_picture, load_pictures
from qvis.images.palettes import learn
from qvis.images.png import encode_png
from qvis.images.quantizing import luminance, quantize
from qvis.images.report import ImageReport
from qvis.images.sample import draw_sample
from qvis.images.settings import CHANNELS, LEVELS, RANGES, ROUNDING, Settings, depths
from qvis.images.shrinking import shrink
from qvis.quantization.grids import Scheme


def photo(height: int = 24, width: int = 31, channels: int = 3, dtype: str = "uint8") -> np.ndarray[Any, Any]:
    random = np.random.default_rng(3)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / (5 + c)) * np.cos(y / 7) * 0.4 + 0.5 for c in range(channels)], axis=-1)
    top = np.iinfo(dtype).max
    return np.clip(np.rint((waves + random.normal(size=waves.shape) * 0.03) * top), 0, top).astype(dtype)


def loaded(image: Any, **options: Any) -> Any:
    return load_picture(image, "it", **options)


def refusal(image: Any) -> str:
    with pytest.raises(QvisError) as caught:
        load_picture(image, "it", named=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- quantizing


def test_even_steps_are_those_of_the_grids_of_weights() -> None:
    samples = photo()
    for bits in (8, 4, 3, 1):
        fitted = Scheme("offset", bits, "tensor").fit(samples.reshape(1, -1).astype(np.float64))
        found = quantize(samples, bits)
        assert np.array_equal(found.samples.reshape(1, -1), np.rint(fitted.rounded()))
        assert found.bytes == fitted.bytes
        fitted = Scheme("offset", bits, "channel").fit(samples.reshape(-1, 3).T.astype(np.float64))
        found = quantize(samples, bits, Settings(range="channel"))
        assert np.array_equal(found.samples.reshape(-1, 3).T, np.rint(fitted.rounded()))
        assert found.bytes == fitted.bytes


def test_a_range_for_each_tile_covers_that_tile_of_one_channel() -> None:
    samples = photo(20, 17)
    found = quantize(samples, 2, Settings(range="tile"), tile=(8, 6)).samples
    for top in range(0, 20, 6):
        for left in range(0, 17, 8):
            for c in range(3):
                tile = samples[top : top + 6, left : left + 8, c]
                fitted = Scheme("offset", 2, "tensor").fit(tile.reshape(1, -1).astype(np.float64))
                expected = np.rint(fitted.rounded()).reshape(tile.shape)
                assert np.array_equal(found[top : top + 6, left : left + 8, c], expected)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_as_many_bits_as_the_picture_has_lose_nothing(dtype: str) -> None:
    samples = photo(dtype=dtype)
    for range_ in RANGES:
        found = quantize(samples, 8 * samples.dtype.itemsize, Settings(range=range_))
        assert np.array_equal(found.samples, samples)
        assert found.samples.dtype == samples.dtype


def test_luminance_is_rounded_to_the_nearest_whole_number() -> None:
    samples = photo()
    exact = samples @ np.array([0.299, 0.587, 0.114])
    assert np.abs(luminance(samples)[..., 0] - exact).max() <= 0.5 + 1e-9
    assert quantize(samples, 3, Settings(channels="luminance")).samples.shape == (24, 31, 1)


def test_dithering_is_floyd_and_steinbergs_and_keeps_the_mean() -> None:
    samples = photo(14, 19, 1)
    values = samples[..., 0].astype(float)
    low, step = values.min(), (values.max() - values.min()) / 3
    expected = np.zeros_like(values)
    carried = np.zeros((15, 21))
    for y in range(14):
        for x in range(19):
            wanted = min(255.0, max(0.0, values[y, x] + carried[y, x + 1]))
            expected[y, x] = round(min(3, max(0, round((wanted - low) / step))) * step + low)
            error = wanted - expected[y, x]
            for down, across, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                carried[y + down, x + 1 + across] += error * share / 16
    found = quantize(samples, 2, Settings(rounding="dithered")).samples[..., 0]
    assert np.array_equal(found, expected)
    assert abs(found.mean() - samples.mean()) < 3
    nearest = quantize(samples, 2).samples[..., 0]
    assert np.square(nearest - values).mean() < np.square(found - values).mean()


def test_a_palette_holds_the_colours_of_a_picture_that_has_few() -> None:
    random = np.random.default_rng(0)
    colours = random.integers(0, 256, size=(13, 3))
    samples = colours[random.integers(0, 13, size=(20, 20))].astype(np.uint8)
    assert np.array_equal(learn(samples, 16), np.unique(colours, axis=0))
    assert np.array_equal(quantize(samples, 4, Settings(levels="palette")).samples, samples)


def test_a_palette_takes_each_pixel_to_its_nearest_colour_and_beats_even_steps() -> None:
    samples = photo()
    for bits in (1, 2, 4, 6):
        palette = learn(samples, 2**bits)
        assert len(palette) <= 2**bits
        pixels = samples.reshape(-1, 3).astype(float)
        distances = np.square(pixels[:, None] - palette).sum(axis=2)
        found = quantize(samples, bits, Settings(levels="palette"))
        assert np.array_equal(found.samples.reshape(-1, 3), palette[distances.argmin(axis=1)])
        assert found.bits_per_pixel == bits
        assert found.bytes == -(-(24 * 31 * bits + palette.size * 8) // 8)
    grey = photo(channels=1)
    even, learned = (quantize(grey, 2, Settings(levels=one)).samples.astype(float) for one in LEVELS)
    assert np.square(learned - grey).mean() < np.square(even - grey).mean()


def test_settings_that_do_not_exist_or_go_together_are_refused() -> None:
    with pytest.raises(BadArgumentError, match=r"rounding: got 'up', expected one of 'nearest', 'dithered'"):
        Settings(rounding="up")
    with pytest.raises(BadArgumentError, match="leave range='picture'"):
        Settings(levels="palette", range="tile")
    assert depths(8) == (8, 6, 4, 3, 2, 1)
    assert depths(16) == (16, 8, 6, 4, 3, 2, 1)
    assert depths(16, "palette") == (8, 6, 4, 3, 2, 1)


# ---------------------------------------------------------------------------------------------- figures


def naive_ssim(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], top: float) -> float:
    at = np.arange(-5, 6)
    window = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = (one[y : y + 11, x : x + 11].astype(float) for one in (a, b))
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq, cov = ((window * one).sum() for one in ((p - mp) ** 2, (q - mq) ** 2, (p - mp) * (q - mq)))
            c1, c2 = (0.01 * top) ** 2, (0.03 * top) ** 2
            found.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_ssim_and_psnr_are_those_of_their_definitions(dtype: str) -> None:
    samples = photo(17, 15, 1, dtype)
    changed = quantize(samples, 2).samples
    top = float(np.iinfo(dtype).max)
    assert Similarity(samples[..., 0], top).to(changed[..., 0]) == pytest.approx(
        naive_ssim(samples[..., 0], changed[..., 0], top), rel=1e-6
    )
    error = np.mean((samples.astype(float) - changed) ** 2)
    assert psnr(samples, changed) == pytest.approx(10 * np.log10(top**2 / error))


def test_a_picture_that_lost_nothing_has_infinite_psnr_and_an_ssim_of_1() -> None:
    found = Original(photo()).measure(quantize(photo(), 8), 8)
    assert found.psnr == float("inf")
    assert found.ssim == pytest.approx(1)
    assert Original(photo(5, 5)).figures.ssim != Original(photo(5, 5)).figures.ssim  # NaN


def test_figures_count_colours_bytes_and_the_file() -> None:
    samples = photo()
    quantized = quantize(samples, 3)
    found = Original(samples).measure(quantized, 3)
    assert found.colours == len({tuple(pixel) for pixel in quantized.samples.reshape(-1, 3).tolist()})
    assert found.png_bytes == len(encode_png(quantized.samples))
    assert found.ratio == samples.nbytes / found.png_bytes
    assert (found.levels, found.bits_per_pixel) == (8, 9)
    assert [sum(counts) for counts in histogram(samples)] == [24 * 31] * 3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("colours", [1, 2, 3, 4, 7, 16, 17, 200, 256, 5000])
def test_pillow_reads_the_png_files_that_are_written(channels: int, colours: int) -> None:
    random = np.random.default_rng(colours)
    table = random.integers(0, 256, size=(colours, channels)).astype(np.uint8)
    samples = table[random.integers(0, colours, size=(37, 29))]
    read = np.asarray(Image.open(io.BytesIO(encode_png(samples))).convert("RGB"))
    assert np.array_equal(read, np.broadcast_to(samples, read.shape))


def test_pillow_reads_a_grey_png_of_16_bits() -> None:
    samples = photo(9, 11, 1, "uint16")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(samples)))), samples[..., 0])


# ---------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_a_file_is_read_as_pillow_reads_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"photo.{kind.lower()}"
    Image.fromarray(photo()).save(path, **({"lossless": True} if kind == "WEBP" else {}))
    picture = loaded(path, named=False)
    assert picture.name == path.name
    assert np.array_equal(picture.samples, photo())
    assert picture.notes == ()


def test_a_jpeg_a_grey_picture_and_an_image_in_memory_are_read(tmp_path: Path) -> None:
    Image.fromarray(photo()).save(tmp_path / "a.jpg")
    assert np.array_equal(loaded(str(tmp_path / "a.jpg")).samples, np.asarray(Image.open(tmp_path / "a.jpg")))
    assert loaded(Image.fromarray(photo(channels=1)[..., 0])).samples.shape == (24, 31, 1)
    assert np.array_equal(loaded(Image.fromarray(photo())).samples, photo())
    assert loaded(Image.fromarray(photo()).convert("1")).samples.max() == 255
    assert loaded(Image.fromarray(photo()).convert("CMYK")).samples.shape == (24, 31, 3)


def test_a_grey_png_of_16_bits_keeps_them(tmp_path: Path) -> None:
    samples = photo(9, 11, 1, "uint16")
    (tmp_path / "deep.png").write_bytes(encode_png(samples))
    assert np.array_equal(loaded(tmp_path / "deep.png").samples, samples)


def test_a_colour_png_of_16_bits_says_that_8_are_read(tmp_path: Path) -> None:
    (tmp_path / "deep.png").write_bytes(encode_png(photo(dtype="uint16")))
    picture = loaded(tmp_path / "deep.png")
    assert picture.samples.dtype == np.uint8
    assert picture.notes == ("read with 8 of its 16 bits, as Pillow reads colours",)


def test_photos_are_turned_as_their_exif_data_say(tmp_path: Path) -> None:
    image = Image.fromarray(photo())
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    picture = loaded(tmp_path / "turned.png")
    assert np.array_equal(picture.samples, np.rot90(photo(), k=-1))
    assert picture.notes == ("turned as its EXIF data say",)


def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((6, 5), shade, dtype=np.uint8)) for shade in (10, 100, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    picture = loaded(tmp_path / "a.gif")
    assert set(picture.samples.ravel()) == {10}
    assert picture.notes == ("the first of 3 frames",)


@pytest.mark.parametrize("channels", [2, 4])
def test_what_is_transparent_is_laid_on_white(channels: int) -> None:
    samples = photo(channels=channels)
    samples[:4, ..., -1] = 0
    samples[4:8, ..., -1] = 255
    picture = loaded(samples)
    assert (picture.samples[:4] == 255).all()
    assert np.array_equal(picture.samples[4:8], samples[4:8, ..., :-1])
    share = samples[..., -1:] / 255
    assert np.abs(picture.samples - (samples[..., :-1] * share + 255 * (1 - share))).max() <= 0.5 + 1e-9
    assert picture.notes == ("laid on white where it is transparent",)


def test_a_palette_with_a_transparent_colour_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) % 3).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "p.png", transparency=1)
    picture = loaded(tmp_path / "p.png")
    assert picture.samples[0, :3].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]


def test_floats_become_16_bits_and_that_is_said() -> None:
    picture = loaded(np.array([[0.0, 0.5, 1.0]]))
    assert picture.samples.ravel().tolist() == [0, 32768, 65535]
    assert "floats from 0 (black) to 1 (white)" in picture.notes[0]
    assert loaded(np.array([[True, False]])).samples.ravel().tolist() == [255, 0]
    assert loaded(np.array([[1, 515]], dtype=">u2")).samples.ravel().tolist() == [1, 515]


def test_large_pictures_are_resized_by_the_means_of_areas_and_that_is_said() -> None:
    samples = photo(60, 90)
    picture = loaded(samples, longest=30)
    assert np.array_equal(picture.samples, np.rint(samples.reshape(20, 3, 30, 3, 3).mean(axis=(1, 3))))
    assert picture.given == (90, 60)
    assert picture.notes == ("resized from 90 × 60 to 30 × 20 for the page",)
    uneven = shrink(photo(23, 47, 1), 20)
    assert uneven.shape == (10, 20, 1)
    assert uneven.mean() == pytest.approx(photo(23, 47, 1).mean(), abs=0.5)
    assert shrink(samples, 90) is samples


def test_arrays_that_are_no_pictures_are_refused_with_the_way_out() -> None:
    assert "numpy.moveaxis(image, 0, -1)" in refusal(np.zeros((3, 20, 20), dtype=np.uint8))
    assert "shape (4,)" in refusal(np.zeros(4, dtype=np.uint8))
    assert "shape (0, 5)" in refusal(np.zeros((0, 5), dtype=np.uint8))
    assert "shape (2, 2, 7)" in refusal(np.zeros((2, 2, 7), dtype=np.uint8))
    assert "NaN" in refusal(np.array([[0.5, np.nan]]))
    assert "infinite" in refusal(np.array([[0.5, np.inf]]))
    assert "got floats from 0 to 255, expected 0 (black) to 1 (white)" in refusal(np.array([[0.0, 255.0]]))
    assert "got int64 from -3 to 4" in refusal(np.array([[-3, 4]], dtype=np.int64))
    assert "type object" in refusal(object())
    assert "complex128" in refusal(np.zeros((2, 2), dtype=complex))


def test_files_that_are_no_pictures_are_refused_each_with_its_reason(tmp_path: Path) -> None:
    Image.fromarray(photo(200, 300)).save(tmp_path / "whole.jpg")
    contents = {
        "empty.png": b"",
        "text.png": b"not a picture",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "cut.jpg": (tmp_path / "whole.jpg").read_bytes()[:3000],
        "cut.png": encode_png(photo(100, 100))[:2000],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert "is empty (0 bytes)" in refusal(tmp_path / "empty.png")
    assert "is not a picture that can be read" in refusal(tmp_path / "text.png")
    assert "is not a picture that can be read" in refusal(tmp_path / "drawing.svg")
    assert "is damaged or cut short" in refusal(tmp_path / "cut.jpg")
    assert "is damaged or cut short" in refusal(tmp_path / "cut.png")
    assert "No such file" in refusal(tmp_path / "missing.png")
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    assert "is too large to be decoded" in refusal(tmp_path / "bomb.png")


def test_lists_of_pictures_have_names_and_limits() -> None:
    pictures = load_pictures([photo(), photo(channels=1)], names=["colour", "grey"])
    assert [one.name for one in pictures] == ["colour", "grey"]
    assert [one.name for one in load_pictures([photo(), photo()])] == ["picture 1", "picture 2"]
    with pytest.raises(BadArgumentError, match="got 1 names for 2 pictures"):
        load_pictures([photo(), photo()], names=["one"])
    with pytest.raises(BadArgumentError, match="got 0 pictures"):
        load_pictures([])
    with pytest.raises(BadArgumentError, match="longest: got 5"):
        load_pictures(photo(), longest=5)


def test_without_pillow_a_file_names_the_extra_and_arrays_and_the_sample_need_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(photo()))
    script = (
        "import sys; sys.modules['PIL'] = None; sys.modules['torch'] = None\n"
        "import qvis, numpy as np\n"
        "qvis.visualize_image_quantization(np.zeros((20, 20), np.uint8), 'out')\n"
        "qvis.visualize_image_quantization(None, 'out', longest=40)\n"
        "try: qvis.visualize_image_quantization('a.png', 'out')\n"
        "except qvis.BadArgumentError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "'a.png' cannot be read without Pillow; pip install 'qvis[images]'" in done.stdout


# ---------------------------------------------------------------------------------------------- sample, layers, report


def test_the_sample_is_the_same_each_time_and_has_what_bits_are_lost_on() -> None:
    sample = draw_sample()
    assert np.array_equal(sample, draw_sample())
    assert sample.shape == (600, 960, 3)
    assert Original(sample).figures.colours > 20_000


def test_layers_are_drawn_so_that_a_column_is_an_output_channel() -> None:
    ordinary, unequal = load_layers()
    assert (ordinary.name, unequal.name) == ("head.conv", "blocks.0.depthwise")
    assert ordinary.picture.samples.shape == (48, 96, 1)
    assert unequal.picture.tile == (1, 9)
    assert [cost.bits for cost in unequal.costs["tensor"]] == [8, 6, 4, 3, 2, 1]


def test_a_report_holds_figures_and_writes_the_page(tmp_path: Path) -> None:
    report = qvis.visualize_image_quantization([photo(), photo(channels=1, dtype="uint16")], tmp_path, name=["a", "b"])
    assert report.path == tmp_path / "image_quantization.html"
    assert report.paths == {"html": report.path}
    assert [len(figures) for figures in report.figures] == [7, 8]
    told = report.to_dict()
    assert told["pictures"][0]["quantized"][0]["psnr"] is None
    assert told["pictures"][1]["depth"] == 16
    assert "“a”" in report.verdict
    assert "4 bits" in report.to_text()
    assert 'title="qvis report"' in report._repr_html_()
    before = report.path.read_bytes()
    qvis.visualize_image_quantization([photo(), photo(channels=1, dtype="uint16")], tmp_path, name=["a", "b"])
    assert report.path.read_bytes() == before


def test_the_page_takes_less_than_2_MB_beside_its_pictures(tmp_path: Path) -> None:
    report = qvis.visualize_image_quantization(np.zeros((30, 30), dtype=np.uint8), tmp_path)
    assert report.path is not None
    assert report.path.stat().st_size < 400_000


def test_saved_pictures_are_those_of_the_page_and_as_large_as_it_says(tmp_path: Path) -> None:
    report = qvis.visualize_image_quantization(
        [photo(), photo()], tmp_path, name=["../a b.png", "a b"], save_images=True, levels="palette"
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:3] == ["a_b_1_bit.png", "a_b_2_1_bit.png", "a_b_2_2_bits.png"]
    assert len(list(tmp_path.iterdir())) == 13
    for (bits, samples), figures in zip(report.quantized(0), report.figures[0][1:], strict=True):
        path = report.paths[f"a_b_{bits}_bit{'s' * (bits > 1)}"]
        assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), samples)
        assert path.stat().st_size == figures.png_bytes
    qvis.visualize_image_quantization([photo(), photo()], tmp_path, name=["a b", "a b"], save_images=True)


def test_what_cannot_be_written_is_said_and_what_others_wrote_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file or lies below one"):
        qvis.visualize_image_quantization(photo(), tmp_path / "file")
    Image.fromarray(photo()).save(tmp_path / "a_4_bits.png")
    mine = (tmp_path / "a_4_bits.png").read_bytes()
    with pytest.raises(OutputError, match="was not written by qvis"):
        qvis.visualize_image_quantization(photo(), tmp_path, name="a", save_images=True)
    assert (tmp_path / "a_4_bits.png").read_bytes() == mine
    assert not (tmp_path / "image_quantization.html").exists()
    with pytest.raises(BadArgumentError, match="no page was written"):
        ImageReport(load_pictures(photo())).open()


def test_the_words_of_the_command_line_are_those_of_the_settings() -> None:
    from qvis.cli import image

    for words, enum in (
        (CHANNELS, image.Channels),
        (LEVELS, image.Levels),
        (ROUNDING, image.Rounding),
        (RANGES, image.Range),
    ):
        assert [one.value for one in enum] == list(words)


def test_the_command_prints_figures_and_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qvis.cli import main

    (tmp_path / "a.png").write_bytes(encode_png(photo()))
    assert main(["image", str(tmp_path / "a.png"), "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("a.png: 31 × 24 pixels, 3 channels of 8 bits\n")
    assert out.rstrip().endswith("image_quantization.html")
    (tmp_path / "b.png").write_bytes(b"")
    assert main(["image", str(tmp_path / "b.png"), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is empty (0 bytes)" in error

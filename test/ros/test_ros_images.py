"""Image messages against images made by hand: every encoding, padding, byte order, damage, fuzz."""

from __future__ import annotations

import array
import importlib.util
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from stac_ros import image_library as libraries
from stac_ros.images import (
    COLOUR_ENCODINGS,
    DEPTH_ENCODINGS,
    ImageError,
    decode_colour,
    decode_depth,
    encode_image,
    wastes_bits,
)

HEIGHT, WIDTH = 8, 12
SMOOTH = np.stack(  # RGB; neighbours differ little, so that interpolating formats can be judged
    [
        np.add.outer(a * np.arange(HEIGHT), b * np.arange(WIDTH)) + c
        for a, b, c in ((2, 3, 120), (1, -4, 90), (-3, 2, 60))
    ],
    axis=-1,
).astype(np.uint8)
GREY = SMOOTH[:, :, 0]


HAS_CV_BRIDGE = importlib.util.find_spec("cv_bridge") is not None
LIBRARIES = ["_rosbags_image", "_cv_bridge"] if HAS_CV_BRIDGE else ["_rosbags_image"]


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch):
    """Each library that is installed does the work once."""
    arguments = ("left out",) if request.param == "_rosbags_image" else ()
    found = getattr(libraries, request.param)(*arguments)
    monkeypatch.setattr("stac_ros.images.image_library", lambda: found)


@pytest.mark.skipif(not HAS_CV_BRIDGE, reason="cv_bridge is part of a ROS installation, no wheel carries it")
def test_a_ros_installation_uses_cv_bridge():
    assert libraries.image_library().name == "cv_bridge"


def message(pixels: np.ndarray, encoding: str, padding: int = 0, big_endian: bool = False) -> Image:
    if big_endian != (sys.byteorder == "big"):
        pixels = pixels.byteswap()
    rows = np.ascontiguousarray(pixels).reshape(len(pixels), -1).view(np.uint8)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    found = Image(height=pixels.shape[0], width=pixels.shape[1], encoding=encoding, step=rows.shape[1])
    found.is_bigendian, found.data = int(big_endian), array.array("B", rows.tobytes())
    return found


def mosaic(pattern: str) -> np.ndarray:
    """What a sensor with this filter pattern sees of `SMOOTH`, row by row from the top left."""
    raw = np.zeros((HEIGHT, WIDTH), np.uint8)
    for place, colour in enumerate(pattern):
        row, column = divmod(place, 2)
        raw[row::2, column::2] = SMOOTH[row::2, column::2, "rgb".index(colour)]
    return raw


def yuv(order: str) -> np.ndarray:
    """4:2:2 of `SMOOTH`, studio swing (BT.601); a pair of pixels shares its colour."""
    r, g, b = SMOOTH.astype(float).transpose(2, 0, 1)
    y = 16 + 0.257 * r + 0.504 * g + 0.098 * b
    u = 128 - 0.148 * r - 0.291 * g + 0.439 * b
    v = 128 + 0.439 * r - 0.368 * g - 0.071 * b
    colour = np.where(np.arange(WIDTH) % 2 == 0, np.repeat(u[:, ::2], 2, 1), np.repeat(v[:, ::2], 2, 1))
    return np.stack([y, colour] if order == "yuyv" else [colour, y], axis=-1).round().astype(np.uint8)


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    return np.dstack([pixels, np.full((HEIGHT, WIDTH), 200, np.uint8)])


BGR = SMOOTH[:, :, ::-1]
GREY_RGB = np.repeat(GREY[:, :, None], 3, axis=2)
# encoding: pixels, image expected, largest difference allowed
IMAGES = {
    "rgb8": (SMOOTH, SMOOTH, 0),
    "bgr8": (BGR, SMOOTH, 0),
    "rgba8": (with_alpha(SMOOTH), SMOOTH, 0),
    "bgra8": (with_alpha(BGR), SMOOTH, 0),
    "mono8": (GREY, GREY_RGB, 0),
    "mono16": (GREY.astype(np.uint16) * 257, GREY_RGB, 1),
    "8UC1": (GREY, GREY_RGB, 0),
    "8UC3": (BGR, SMOOTH, 0),
    "8UC4": (with_alpha(BGR), SMOOTH, 0),
    "yuv422": (yuv("uyvy"), SMOOTH, 6),
    "uyvy": (yuv("uyvy"), SMOOTH, 6),
    "yuv422_yuy2": (yuv("yuyv"), SMOOTH, 6),
    "yuyv": (yuv("yuyv"), SMOOTH, 6),
    "bayer_rggb8": (mosaic("rggb"), SMOOTH, 5),
    "bayer_bggr8": (mosaic("bggr"), SMOOTH, 5),
    "bayer_gbrg8": (mosaic("gbrg"), SMOOTH, 5),
    "bayer_grbg8": (mosaic("grbg"), SMOOTH, 5),
}


def test_every_encoding_has_a_case():
    assert set(IMAGES) == set(COLOUR_ENCODINGS)


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("encoding", IMAGES)
def test_colours_come_out_right(library, encoding, padding):
    pixels, expected, tolerance = IMAGES[encoding]
    found = decode_colour(message(pixels, encoding, padding))
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    inside = slice(1, -1) if "bayer" in encoding else slice(None)  # the rim has too few neighbours
    difference = np.abs(found.astype(int) - expected)[inside, inside]
    assert difference.max() <= tolerance


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("big_endian", [False, True])
def test_numbers_of_several_bytes_follow_the_byte_order(library, big_endian, padding):
    mono = message(GREY.astype(np.uint16) * 257, "mono16", padding, big_endian)
    assert np.abs(decode_colour(mono).astype(int) - GREY_RGB).max() <= 1
    millimetres = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 600 + 1
    assert np.allclose(decode_depth(message(millimetres, "16UC1", padding, big_endian)), millimetres / 1000)
    metres = millimetres.astype(np.float32) / 777
    assert np.array_equal(decode_depth(message(metres, "32FC1", 2 * padding, big_endian)), metres)


def test_the_last_row_may_lack_its_padding(library):
    image = message(SMOOTH, "rgb8", padding=4)
    image.data = image.data[:-4]
    assert np.array_equal(decode_colour(image), SMOOTH)


def test_depth_without_measurement_is_nan(library):
    metres = np.array([[1.5, 0, -1], [np.nan, np.inf, -np.inf]], np.float32)
    expected = np.array([[1.5, np.nan, np.nan], [np.nan] * 3], np.float32)
    assert np.array_equal(decode_depth(message(metres, "32FC1")), expected, equal_nan=True)
    millimetres = np.array([[1500, 0]], np.uint16)
    found = decode_depth(message(millimetres, "16UC1"))
    assert np.array_equal(found, np.array([[1.5, np.nan]], np.float32), equal_nan=True)


def test_what_is_encoded_is_decoded(library):
    header = Header(frame_id="camera")
    depth = np.linspace(0.5, 4, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    assert encode_image(depth, "32FC1", header).header is header
    assert np.array_equal(decode_depth(encode_image(depth, "32FC1", header)), depth)
    assert np.array_equal(decode_colour(encode_image(SMOOTH, "rgb8", header)), SMOOTH)
    assert np.array_equal(decode_colour(encode_image(BGR[:, :, ::-1], "rgb8", header)), SMOOTH)
    assert np.array_equal(decode_colour(encode_image(GREY, "mono8", header)), GREY_RGB)
    with pytest.raises(ValueError, match=r"'rgb8' needs uint8 \[8, 12, 3\], got uint8 \[8, 12\]"):
        encode_image(GREY, "rgb8", header)


@pytest.mark.parametrize("kind", [".jpg", ".png"])
def test_compressed_images_decode(kind):
    image = CompressedImage(format=f"bgr8; {kind[1:]} compressed bgr8")
    image.data = array.array("B", cv2.imencode(kind, BGR)[1].tobytes())
    found = decode_colour(image)
    assert np.abs(found.astype(int) - SMOOTH).max() <= (0 if kind == ".png" else 8)
    image.data = array.array(
        "B", cv2.imencode(kind, GREY)[1].tobytes() + bytes(64)
    )  # grey, padded by a driver
    assert np.abs(decode_colour(image).astype(int) - GREY_RGB).max() <= (0 if kind == ".png" else 8)


@pytest.mark.parametrize("trailer", [bytes(64), b"\xaa\x55\x12", b"\xff" * 8, b"\xd9\r\n--boundary\r\n"])
@pytest.mark.parametrize("kind", ["JPEG", "WITH_THUMBNAIL", "PNG"])
def test_bytes_after_the_end_of_a_compressed_image_are_no_fault(kind, trailer):
    data = globals()[kind]
    assert np.array_equal(decode_colour(compressed(data + trailer)), decode_colour(compressed(data)))


@pytest.mark.parametrize(("most", "few"), [(1023, True), (4095, True), (4400, False), (65535, False)])
@pytest.mark.parametrize("kind", ["mono16", "png"])
def test_sixteen_bits_of_which_few_are_used_are_noticed(library, most, few, kind):
    values = np.linspace(0, most, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    if kind == "mono16":
        image = message(values, "mono16")
    else:
        image = compressed(cv2.imencode(".png", values)[1].tobytes(), "mono16; png compressed")
    assert wastes_bits(image, decode_colour(image)) == few


def test_a_dark_image_of_eight_bits_wastes_none(library):
    for image in (message(GREY * 0, "mono8"), compressed(cv2.imencode(".png", GREY * 0)[1].tobytes())):
        assert not wastes_bits(image, decode_colour(image))


def changed(**changes) -> Image:
    image = message(SMOOTH, "rgb8")
    for name, value in changes.items():
        setattr(image, name, value)
    return image


def compressed(data: bytes, format: str = "jpeg") -> CompressedImage:
    return CompressedImage(format=format, data=array.array("B", data))


JPEG = cv2.imencode(".jpg", BGR)[1].tobytes()
WITH_THUMBNAIL = JPEG[:2] + b"\xff\xe1" + (2 + len(JPEG)).to_bytes(2, "big") + JPEG + JPEG[2:]
PNG = cv2.imencode(".png", BGR)[1].tobytes()
REFUSED = {
    "unknown encoding": (changed(encoding="rgb9"), "encoding", "'rgb9' is not supported: publish one"),
    "no encoding": (changed(encoding=""), "encoding", "'' is not supported"),
    "depth as colour": (changed(encoding="32FC1"), "encoding", "is depth, not colour: remap"),
    "no height": (changed(height=0), "size", "12×0 pixels is empty"),
    "no width": (changed(width=0), "size", "0×8 pixels is empty"),
    "no data": (changed(data=array.array("B")), "truncated", "buffer of 0 bytes .* needs 288"),
    "cut data": (changed(data=array.array("B", bytes(287))), "truncated", "buffer of 287 bytes"),
    "short step": (changed(step=35), "size", "step of 35 bytes, 12×8 'rgb8' has rows of 36"),
    "encoding too small": (changed(encoding="mono16", step=23), "size", "rows of 24"),
    "odd 4:2:2": (message(yuv("yuyv")[:, :7], "yuyv"), "size", "7×8 'yuyv' .* odd width, .*: set an even"),
    "compressed depth": (compressed(PNG, "16UC1; compressedDepth png"), "encoding", "is depth, not colour"),
    "cut jpeg": (compressed(JPEG[:-40]), "truncated", "is truncated"),
    "cut jpeg with a thumbnail": (compressed(WITH_THUMBNAIL[:-40]), "decode", "is damaged"),
    "cut png": (compressed(PNG[:-40], "png"), "truncated", "is truncated"),
    "empty": (compressed(b""), "encoding", "neither JPEG nor PNG"),
    "another kind": (compressed(b"GIF89a" + bytes(40), "gif"), "encoding", "neither JPEG nor PNG"),
    "damaged jpeg": (compressed(JPEG[:2] + bytes(range(60, 160)) + JPEG[-2:]), "decode", "is damaged"),
    "damaged png": (compressed(PNG[:30] + PNG[-12:], "png"), "decode", "damaged|cannot be decoded"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_images_are_refused_with_cause_and_cure(library, case):
    image, cause, text = REFUSED[case]
    with pytest.raises(ImageError, match=text) as refusal:
        decode_colour(image)
    assert refusal.value.cause == cause


def test_colour_is_refused_as_depth():
    with pytest.raises(ImageError, match="'rgb8' is not supported: publish one of 16UC1, 32FC1"):
        decode_depth(message(SMOOTH, "rgb8"))


sizes = st.one_of(st.integers(0, 40), st.sampled_from([2**31 - 1, 2**32 - 1]))


@settings(max_examples=300, deadline=None)
@given(
    encoding=st.one_of(st.sampled_from(COLOUR_ENCODINGS + DEPTH_ENCODINGS), st.text(max_size=8)),
    height=sizes, width=sizes, step=sizes, is_bigendian=st.integers(0, 255), data=st.binary(max_size=4096),
)  # fmt: skip
def test_any_message_is_an_image_or_a_refusal(encoding, height, width, step, is_bigendian, data):
    image = Image(height=height, width=width, step=step, is_bigendian=is_bigendian)
    image.encoding, image.data = encoding, array.array("B", data)
    for decode, shape, dtype in (
        (decode_colour, (height, width, 3), np.uint8),
        (decode_depth, (height, width), np.float32),
    ):
        try:
            found = decode(image)
        except ImageError:
            continue
        assert found.shape == shape and found.dtype == dtype


@settings(max_examples=150, deadline=None)
@given(start=st.sampled_from([b"", JPEG[:2], PNG[:8], JPEG[:200], PNG[:60]]), middle=st.binary(max_size=300),
       end=st.sampled_from([b"", JPEG[-2:], PNG[-12:]]), format=st.text(max_size=12))  # fmt: skip
def test_any_compressed_message_is_an_image_or_a_refusal(start, middle, end, format):
    try:
        found = decode_colour(compressed(start + middle + end, format))
    except ImageError:
        return
    assert found.ndim == 3 and found.dtype == np.uint8


def test_an_unusable_cv_bridge_gives_way(monkeypatch, tmp_path, caplog):
    """What an installation for another numpy looks like: it is there, and raises on import or on use."""
    (tmp_path / "cv_bridge.py").write_text("raise AttributeError('_ARRAY_API not found')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cv_bridge", raising=False)
    libraries.image_library.cache_clear()
    try:
        assert libraries.image_library().name == "rosbags.image (cv_bridge unusable)"
        assert "_ARRAY_API" in caplog.text
    finally:
        libraries.image_library.cache_clear()

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from crisp_attention.errors import DataError
from crisp_attention.experiment.data import images
from crisp_attention.experiment.data.dataset import load
from crisp_attention.experiment.specification.sections import DataSpec


def encoded(pixels, suffix="png"):
    """An image file's content."""
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(stream, format={"jpg": "jpeg"}.get(suffix, suffix))
    return stream.getvalue()


def stripes(number, upright):
    """A small image whose class is the direction of its stripes; no two are alike."""
    pixels = np.full((12, 12), 40 + number, dtype=np.uint8)
    pixels[:, ::3] = 200
    return encoded(pixels if upright else pixels.T)


@pytest.fixture
def folder(tmp_path):
    """24 training and 10 evaluation images in two classes."""
    for split, count in (("train", 24), ("test", 10)):
        for number in range(count):
            place = tmp_path / split / ("across", "upright")[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:03}.png").write_bytes(stripes(number + 100 * (split == "test"), number % 2 == 1))
    return tmp_path


def test_digits_are_all_there_and_decode_to_their_pixels():
    from sklearn.datasets import load_digits

    found = load_digits()
    contents, labels = images.digits()
    assert labels == [str(label) for label in found.target]
    for content, pixels in zip(contents[:50], found.images, strict=False):
        grey = np.asarray(images.decode(content, channels=1))
        assert grey.shape == (8, 8)
        assert np.array_equal(grey, np.rint(pixels / 16 * 255))
    assert np.asarray(images.decode(contents[0], channels=3)).shape == (8, 8, 3)


def test_digits_are_a_data_set_of_ten_classes_with_a_split_that_never_leaks():
    dataset = load(DataSpec(source="digits", train_examples=300))
    assert dataset.classes == tuple("0123456789")
    assert (len(dataset.train), dataset.train.texts, dataset.train.kind) == (300, (), "image")
    assert not set(dataset.train.images) & set(dataset.test.images)
    whole = load(DataSpec(source="digits"))
    assert len(whole.train) + len(whole.test) == 1797
    assert set(dataset.train.images) < set(whole.train.images)
    assert dataset.test.images == whole.test.images


def test_a_folder_of_images_has_its_own_splits(folder):
    dataset = load(DataSpec(source=str(folder)))
    assert dataset.classes == ("across", "upright")
    assert (len(dataset.train), len(dataset.test)) == (24, 10)
    assert dataset.train.images[0] == (folder / "train" / "across" / "000.png").read_bytes()
    assert dataset.train.labels.tolist() == [0] * 12 + [1] * 12
    assert dataset.notes == ()
    assert dataset.name == folder.name


def test_a_folder_without_an_evaluation_split_is_divided(folder):
    (folder / "test").rename(folder / "other")
    dataset = load(DataSpec(source=str(folder), test_share=0.4))
    assert len(dataset.train) + len(dataset.test) == 24
    assert not set(dataset.train.images) & set(dataset.test.images)


def test_an_image_in_both_splits_is_told_and_other_files_are_left_out(folder):
    (folder / "test" / "across" / "copy.png").write_bytes((folder / "train" / "across" / "000.png").read_bytes())
    (folder / "train" / "across" / "notes.txt").write_text("not an image", encoding="utf-8")
    assert load(DataSpec(source=str(folder))).notes == (
        "1 files of train were left out: no images by their suffix.",
        "1 images occur in both of the source's own splits; they were left in.",
    )


def test_any_changed_pixel_or_order_changes_the_fingerprint(folder):
    before = load(DataSpec(source=str(folder))).fingerprint
    assert load(DataSpec(source=str(folder))).fingerprint == before
    first, second = (folder / "train" / "across" / f"{number:03}.png" for number in (0, 2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    swapped = load(DataSpec(source=str(folder))).fingerprint
    second.write_bytes(stripes(77, upright=False))
    assert len({before, swapped, load(DataSpec(source=str(folder))).fingerprint}) == 3


@pytest.mark.parametrize("content", [b"", b"not an image", stripes(1, upright=True)[:40]])
def test_a_file_that_is_no_image_is_named(folder, content):
    (folder / "train" / "across" / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png is no image that Pillow can read"):
        load(DataSpec(source=str(folder)))


def test_deep_colours_are_refused_rather_than_cut_off():
    stream = io.BytesIO()
    Image.new("I;16", (4, 4)).save(stream, format="png")
    with pytest.raises(DataError, match=r"scan\.png has more than 8 bits a colour \(mode I;16\)"):
        images.require_image(stream.getvalue(), "scan.png")


def test_a_folder_without_classes_is_told_what_it_needs(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "000.png").write_bytes(stripes(0, upright=True))
    with pytest.raises(DataError, match="needs a subfolder for each class; it has none"):
        load(DataSpec(source=str(tmp_path)))


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jpg", "png", "ppm", "webp"])
def test_every_kind_of_file_decodes_to_the_colours_asked_for(suffix):
    pixels = np.zeros((6, 5, 3))
    pixels[..., 0] = 255
    content = encoded(pixels, suffix)
    images.require_image(content, "x")
    red = np.asarray(images.decode(content, channels=3))
    assert red.shape == (6, 5, 3)
    assert red[..., 0].min() > 245
    assert red[..., 1:].max() < 10
    assert np.asarray(images.decode(content, channels=1)).shape == (6, 5)


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_and_indexed_images_decode_too(channels):
    for mode in ("RGBA", "P", "LA", "1"):
        stream = io.BytesIO()
        Image.new(mode, (4, 4)).save(stream, format="png")
        shape = np.asarray(images.decode(stream.getvalue(), channels)).shape
        assert shape == ((4, 4) if channels == 1 else (4, 4, 3))


def test_the_images_of_a_hub_data_set(monkeypatch):
    import datasets

    def table(count, start=0):
        numbers = range(start, start + count)
        rows = {
            "img": [{"bytes": stripes(number, number % 2 == 1), "path": None} for number in numbers],
            "label": [number % 2 for number in numbers],
        }
        return datasets.Dataset.from_dict(
            rows, features=datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        )

    splits = datasets.DatasetDict({"train": table(20), "test": table(6, start=100)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: splits)
    dataset = load(DataSpec(source="org/pictures"))
    assert dataset.train.images == tuple(stripes(number, number % 2 == 1) for number in range(20))
    assert dataset.train.labels.tolist() == [0, 1] * 10
    assert (len(dataset.test), dataset.classes, dataset.notes) == (6, ("0", "1"), ())
    hidden = splits["test"].map(lambda row: {"label": -1 if row["label"] else 0})
    datasets.DatasetDict(train=splits["train"], dev=hidden)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names: datasets.DatasetDict(train=splits["train"], dev=hidden)
    )
    with pytest.raises(DataError, match="evaluation split of 3 examples has one class only"):
        load(DataSpec(source="org/pictures"))


def images_of_the_hub(monkeypatch, *files):
    """A hub data set of ten images of stripes and those given."""
    import datasets

    contents = [*(stripes(number, number % 2 == 1) for number in range(10)), *files]
    rows = {"img": [{"bytes": content, "path": None} for content in contents], "label": [0, 1] * 5 + [0] * len(files)}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    found = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: found)


def test_images_of_the_hub_that_would_be_cut_off_or_fail_later_are_refused(monkeypatch):
    deep = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(deep, format="png")
    images_of_the_hub(monkeypatch, deep.getvalue())
    with pytest.raises(DataError, match="org/pictures/train, image 11 has more than 8 bits a colour"):
        load(DataSpec(source="org/pictures"))
    images_of_the_hub(monkeypatch, b"none")
    with pytest.raises(DataError, match="org/pictures/train, image 11 is no image that Pillow can read"):
        load(DataSpec(source="org/pictures"))


def test_a_jpeg_that_ends_too_soon_is_named(folder):
    noise = np.random.default_rng(0).integers(0, 255, size=(64, 64, 3))
    whole = encoded(noise, "jpg")
    file = folder / "train" / "across" / "cut.jpg"
    file.write_bytes(whole)
    assert len(load(DataSpec(source=str(folder))).train) == 25
    file.write_bytes(whole[: int(0.93 * len(whole))])
    with pytest.raises(DataError, match=r"cut\.jpg is no image that Pillow can read"):
        load(DataSpec(source=str(folder)))


def test_images_that_lie_too_deep_are_told_and_hidden_ones_count_for_nothing(folder):
    for place in ("train/across/batch-1", "train/.ipynb_checkpoints", "train/across/.ipynb_checkpoints"):
        (folder / place).mkdir()
        (folder / place / "one.png").write_bytes(stripes(77, True))
    (folder / "train" / "across" / ".DS_Store").write_bytes(b"")
    found = load(DataSpec(source=str(folder)))
    assert (len(found.train), found.classes) == (24, ("across", "upright"))
    assert found.notes == ("1 files of train were left out: they lie deeper than CLASS/FILE.",)


@pytest.mark.parametrize("name", ["val", "validation", "dev"])
def test_the_evaluation_split_is_found_by_its_usual_names(folder, name):
    (folder / "test").rename(folder / name)
    found = load(DataSpec(source=str(folder)))
    assert (len(found.train), len(found.test), found.notes) == (24, 10, ())


def test_images_without_classes_are_none_to_evaluate_on_where_there_are_others(folder):
    (folder / "test").rename(folder / "val")
    (folder / "test").mkdir()
    (folder / "test" / "one.png").write_bytes(stripes(77, True))
    found = load(DataSpec(source=str(folder)))
    assert (len(found.test), found.notes) == (10, ("Folder test was left alone: val is evaluated on.",))


def test_a_split_that_is_left_alone_is_told(folder):
    shutil.copytree(folder / "test", folder / "val")
    found = load(DataSpec(source=str(folder)))
    assert len(found.test) == 10
    assert "Folder val was left alone: test is evaluated on." in found.notes

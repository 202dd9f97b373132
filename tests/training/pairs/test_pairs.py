"""Each source gives the same pairs in portions of any size, lists what it cannot use, and names what it cannot read."""

from __future__ import annotations

import io
import json
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny_models import drawn_image
from training.errors import InvalidTraining
from training.pairs import Pair, PairSource, PortionPlace, Unusable, open_pairs
from training.pairs.decoding import decode_image, map_ahead

TEXTS = ["a red star", "一颗红色的星星", "نجمة حمراء", "🔴⭐ on a table", "  with spaces \n", "six", "seven"]


def encoded(index: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    drawn_image(index).save(file, form)
    return file.getvalue()


def usable(source: PairSource, portion: PortionPlace) -> list[Pair]:
    return [pair for _, pair in source.read(portion) if isinstance(pair, Pair)]


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def as_webdataset(folder: Path) -> str:
    """Two tars; captions as .txt, one only in .json, as img2dataset writes them."""
    for tar, indices in (("00000.tar", range(4)), ("00001.tar", range(4, 7))):
        members = []
        for index in indices:
            members.append((f"{index:09d}.jpg", encoded(index)))
            members.append((f"{index:09d}.json", json.dumps({"caption": TEXTS[index], "status": "success"}).encode()))
            if index != 2:
                members.append((f"{index:09d}.txt", TEXTS[index].encode()))
        write_tar(folder / tar, members)
    return f"webdataset:{folder}/*.tar"


def as_json_lines(folder: Path) -> str:
    lines = []
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.png").write_bytes(encoded(index))
        lines.append(json.dumps({"image": f"{index}.png", "text": text}, ensure_ascii=index % 2 == 0))
    (folder / "pairs.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return f"jsonl:{folder}/pairs.jsonl"


def as_saved_dataset(folder: Path) -> str:
    from datasets import Dataset, DatasetDict, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "caption": Value("string"), "other": Value("int64")})
    rows = {
        "image": [{"bytes": encoded(index), "path": None} for index in range(7)],
        "caption": TEXTS,
        "other": list(range(7)),
    }
    DatasetDict([("train", Dataset.from_dict(rows, features=features))]).save_to_disk(str(folder / "saved"))
    return f"huggingface:{folder}/saved?split=train"


def as_parquet(folder: Path) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    for name, rows in (("train-00000-of-00002", range(5)), ("train-00001-of-00002", range(5, 7))):
        table = pa.table(
            {"picture": [{"bytes": encoded(row), "path": "x"} for row in rows], "text": [TEXTS[row] for row in rows]}
        )
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=2)
    return f"huggingface:{folder}?image=picture&split=train"


@pytest.mark.parametrize("written", [as_webdataset, as_json_lines, as_saved_dataset, as_parquet])
def test_every_format_gives_the_same_pairs_in_portions_of_any_size(written, tmp_path):
    source = open_pairs(written(tmp_path))
    for size in (1, 2, 3, 100):
        portions = json.loads(json.dumps(source.portions(size)))
        assert max(portion["count"] for portion in portions) <= size
        assert sum(portion["count"] for portion in portions) == 7
        backwards = [list(open_pairs(source.describe()["spec"]).read(portion)) for portion in reversed(portions)]
        found = [one for part in reversed(backwards) for one in part]
        assert [index for index, _ in found] == list(range(7))
        for index, pair in found:
            assert isinstance(pair, Pair)
            assert pair.text == TEXTS[index].strip()
            assert pair.image.mode == "RGB"
            assert pair.image.tobytes() == drawn_image(index).tobytes()
    assert len({pair.reference for _, pair in found}) == 7


@pytest.mark.parametrize("written", [as_webdataset, as_json_lines, as_saved_dataset, as_parquet])
def test_pictures_are_found_again_by_reference(written, tmp_path):
    source = open_pairs(written(tmp_path))
    pairs = [pair for portion in source.portions(3) for _, pair in source.read(portion)]
    wanted = [pairs[5].reference, pairs[1].reference, pairs[5].reference, "not there"]
    found = list(open_pairs(source.describe()["spec"]).images(wanted))
    assert sorted(reference for reference, _ in found) == sorted({pairs[1].reference, pairs[5].reference})
    for reference, image in found:
        (index,) = [index for index, pair in enumerate(pairs) if pair.reference == reference]
        assert image.tobytes() == drawn_image(index).tobytes()


def test_the_miniature_s_pairs_follow_from_their_seeds_alone():
    source = open_pairs("miniature:dev:10:5")
    whole = usable(source, source.portions(100)[0])
    third = usable(open_pairs("miniature:dev:10:5"), source.portions(4)[2])
    assert [pair.reference for pair in third] == [f"scene:{seed}" for seed in (2_000_013, 2_000_014)]
    assert [(pair.text, pair.image.tobytes()) for pair in third] == [
        (pair.text, pair.image.tobytes()) for pair in whole[8:]
    ]
    ((reference, image),) = source.images(["scene:2000014", "scene:1"])
    assert (reference, image.tobytes()) == (whole[9].reference, whole[9].image.tobytes())


def test_what_cannot_be_used_is_listed_with_a_reason_that_never_varies(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    thin = io.BytesIO()
    Image.new("1", (1, 201)).save(thin, "PNG")
    contents = {
        "good.png": encoded(0), "text.png": b"no image at all", "cut.png": encoded(0)[:150],
        "bomb.png": bomb.getvalue(), "empty.png": b"", "thin.png": thin.getvalue(),
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    rows = [("good.png", text) for text in ("fine", " ", None, 7, "\ud800 alone")]
    names = ["text.png", "cut.png", "bomb.png", "empty.png", "thin.png", "program.eps", "gone.png", ".", "x" * 300]
    rows += [(name, "fine") for name in names]
    lines = "".join(json.dumps({"image": image, "text": text}) + "\n" for image, text in rows)
    (tmp_path / "pairs.jsonl").write_text(lines)
    source = open_pairs(f"jsonl:{tmp_path}/pairs.jsonl")
    found = [pair for portion in source.portions(4) for _, pair in source.read(portion)]
    assert isinstance(found[0], Pair)
    assert [pair.reason for pair in found if isinstance(pair, Unusable)] == [
        "empty caption", "no caption", "caption is not text", "caption is not valid Unicode", "not an image",
        "broken image", "too many pixels (12000 x 12000)", "not an image", "too long and narrow (1 x 201)",
        "not an image", "missing file", "missing file", "missing file",
    ]  # fmt: skip


def test_a_tar_lists_pairs_with_a_file_missing(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [("1.txt", b"no picture"), ("2.jpg", encoded(2)), ("3.jpg", encoded(3)), ("3.txt", b"\xff\xfe"),
         ("4.json", b"[" * 9999), ("4.png", encoded(4)), ("5.JPG", encoded(5)), ("5.txt", b"fine")],
    )  # fmt: skip
    source = open_pairs(f"webdataset:{tmp_path}/a.tar")
    found = [pair for portion in source.portions(100) for _, pair in source.read(portion)]
    reasons = [pair.reason if isinstance(pair, Unusable) else None for pair in found]
    assert reasons == ["no image", "no caption", "caption is not text", "caption is not text", None]
    assert found[0].reference == "a.tar//1"


def cut_at(file: Path, end: int) -> None:
    file.write_bytes(file.read_bytes()[:end])


def test_a_tar_that_is_cut_off_is_named(tmp_path):
    spec = as_webdataset(tmp_path)
    with tarfile.open(tmp_path / "00001.tar") as tar:
        last = tar.getmembers()[-1]
    whole = (tmp_path / "00001.tar").read_bytes()
    boundaries = [700, last.offset, last.offset + 100, last.offset_data + 3, last.offset_data + 512]
    for end in [*boundaries, last.offset_data]:
        (tmp_path / "00001.tar").write_bytes(whole[:end])
        with pytest.raises(InvalidTraining, match=r"00001\.tar"):
            open_pairs(spec).portions(2)
    (tmp_path / "00001.tar").write_bytes(whole[: last.offset] + b"x" * 512 + whole[last.offset + 512 :])
    with pytest.raises(InvalidTraining, match=r"00001\.tar"):
        open_pairs(spec).portions(2)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("webdataset:{0}/*.tar", r"webdataset:.*no file matches"),
        ("jsonl:{0}/none.jsonl", r"none\.jsonl cannot be read"),
        ("jsonl:{0}/empty.jsonl", r"empty\.jsonl: the file has no pairs"),
        ("huggingface:{0}", "neither a saved dataset nor Parquet"),
        ("huggingface:{0}?colour=red", "unknown option 'colour'"),
        ("miniature:nowhere:5", "no range 'nowhere'"),
        ("miniature:dev:0", "at least one"),
        ("miniature:dev:five", "RANGE:COUNT"),
        ("miniature:demo:1:100000", "at most 100000"),
        ("parquet:{0}", "none of webdataset:"),
        ("/data/pairs.jsonl", "none of webdataset:"),
    ],
)
def test_no_pairs_at_all_is_refused_by_name(spec, named, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InvalidTraining, match=named):
        open_pairs(spec.format(tmp_path)).portions(8)


def test_a_malformed_line_is_named_before_any_work(tmp_path):
    file = tmp_path / "pairs.jsonl"
    good = '{"image": "a.png", "text": "fine"}\n'
    for bad in (
        '{"image": "a.png", "text": ',
        '{"text": "fine"}',
        '["a.png", "fine"]',
        '{"image": 3, "text": ""}',
        "[" * 9999,
    ):
        file.write_text(f"{good}\n{bad}\n{good}")
        with pytest.raises(InvalidTraining, match=r"pairs\.jsonl, line 3"):
            open_pairs(f"jsonl:{file}").portions(8)


def test_a_column_that_is_not_there_is_named(tmp_path):
    as_parquet(tmp_path)
    with pytest.raises(InvalidTraining, match=r"no column 'image' among picture, text; name it with \?image="):
        open_pairs(f"huggingface:{tmp_path}").portions(8)
    saved = as_saved_dataset(tmp_path).split("?")[0]
    with pytest.raises(InvalidTraining, match=r"no column 'label'"):
        open_pairs(f"{saved}?text=label").portions(8)
    with pytest.raises(InvalidTraining, match="one of the splits train"):
        open_pairs(f"{saved}?split=test").portions(8)


def test_a_changed_source_describes_itself_otherwise(tmp_path):
    spec = as_json_lines(tmp_path)
    before = open_pairs(spec).describe()
    file = tmp_path / "pairs.jsonl"
    file.write_text(file.read_text().replace("red star", "blue star"))
    assert open_pairs(spec).describe() != before
    assert open_pairs(spec).describe() == open_pairs(spec).describe()


@pytest.mark.parametrize("written", [as_webdataset, as_json_lines, as_saved_dataset, as_parquet])
def test_a_moved_source_differs_by_its_place_alone(written, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    written(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    spec = written(Path())
    before = open_pairs(spec).describe()
    assert str(tmp_path) in before.pop("spec")
    (tmp_path / "there").rename(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    after = open_pairs(spec).describe()
    assert "here" in after.pop("spec")
    assert after == before


def test_other_pairs_in_files_of_the_same_size_are_described_otherwise(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    described, sizes = [], []
    for name in ("a", "b"):
        write_tar(tmp_path / "pairs.tar", [(f"{name}.jpg", encoded(1)), (f"{name}.txt", b"fine")])
        table = pa.table({"image": [{"bytes": encoded(1), "path": None}], "text": [name]})
        parquet.write_table(table, tmp_path / "pairs.parquet")
        described.append(
            [open_pairs(spec).describe() for spec in (f"webdataset:{tmp_path}/*.tar", f"huggingface:{tmp_path}")]
        )
        sizes.append([file.stat().st_size for file in sorted(tmp_path.iterdir())])
    assert sizes[0] == sizes[1]
    assert all(before != after for before, after in zip(*described, strict=True))


def test_mapping_ahead_keeps_the_order_and_passes_errors_on():
    assert list(map_ahead(lambda x: 2 * x, range(50), threads=3, ahead=7)) == list(range(0, 100, 2))
    seen = []
    with pytest.raises(ZeroDivisionError):
        seen.extend(map_ahead(lambda x: 1 // (x - 5), range(50), threads=3, ahead=2))
    with pytest.raises(ZeroDivisionError):
        list(map_ahead(str, (1 // (x - 5) for x in range(50)), threads=3, ahead=2))


def test_mapping_ahead_keeps_no_more_items_than_threads():
    class Item:
        there = most = 0

        def __init__(self) -> None:
            Item.there += 1
            Item.most = max(Item.most, Item.there)

        def __del__(self) -> None:
            Item.there -= 1

    done = map_ahead(lambda _: time.sleep(0.001), (Item() for _ in range(60)), threads=2, ahead=20)
    next(done)
    time.sleep(0.1)
    assert Item.most <= 4
    assert len(list(done)) == 59
    assert (Item.there, Item.most <= 4) == (0, True)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError(24, "Too many open files"), MemoryError()])
def test_a_picture_that_cannot_be_read_now_is_not_skipped_for_good(error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    spec = as_json_lines(tmp_path)
    monkeypatch.setattr(Image, "open", fail)
    source = open_pairs(spec)
    with pytest.raises(InvalidTraining, match=r"0\.png (cannot be read: (Input|Too many)|does not fit)"):
        list(source.read(source.portions(7)[0]))


def test_names_that_are_not_unicode_are_listed_in_a_form_that_can_be_written(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name, content in (("caf\xe9.jpg", encoded(1)), ("caf\xe9.txt", b"fine")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "pairs.jsonl").write_text('{"image": "\\ud800.jpg", "text": "fine"}\n')
    for spec, escaped in (
        (f"webdataset:{tmp_path}/a.tar", r"a.tar//caf\udce9"),
        (f"jsonl:{tmp_path}/pairs.jsonl", r"\ud800.jpg"),
    ):
        source = open_pairs(spec)
        ((_, pair),) = source.read(source.portions(7)[0])
        assert pair == Unusable(reference=escaped, reason="the picture's name is not valid Unicode")


def test_an_image_in_any_mode_becomes_rgb():
    for mode in ("1", "L", "P", "RGBA", "CMYK", "I;16"):
        file = io.BytesIO()
        Image.new(mode, (5, 4)).save(file, "TIFF")
        image = decode_image(file.getvalue())
        assert isinstance(image, Image.Image)
        assert (image.mode, image.size) == ("RGB", (5, 4))

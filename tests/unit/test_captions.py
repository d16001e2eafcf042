"""Finding videos and their captions in the layouts people have."""

import json
import os
import unicodedata
from pathlib import Path

import pytest

from wanlora.data.captions import find
from wanlora.errors import ManifestError, NoCaptionError


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def prompts(found):
    return {source.path.name: source.prompts for source in found.sources}


def test_sidecars_and_activities_from_folders(tmp_path):
    make(tmp_path, "walk/a.mp4", "clap/b.MOV", "clap/.hidden.mp4", "clap/notes.pdf")
    (tmp_path / "walk/a.txt").write_text("\ufeff a person walks\n", encoding="utf-8")
    (tmp_path / "clap/b.txt").write_text("a person claps")
    found = find([tmp_path], None)
    assert prompts(found) == {"b.MOV": ("a person claps",), "a.mp4": ("a person walks",)}
    assert [source.activity for source in found.sources] == ["clap", "walk"]
    assert found.failures == []


def test_a_video_without_a_caption_is_listed(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "c.txt").write_text("  \n")
    (tmp_path / "b.txt").write_bytes("größer".encode("latin-1"))
    found = find([tmp_path], None)
    assert "b.txt" in found.failures[0].message
    assert "Windows-1252" in found.failures[0].message
    assert "as UTF-8" in found.failures[0].message
    assert [(f.code, f.path) for f in found.failures] == [
        ("no_caption", str(tmp_path / "b.mp4")),
        ("no_caption", str(tmp_path / "c.mp4")),
    ]


def test_a_table_whose_caption_column_is_unknown_is_refused_with_the_names_that_are_read(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "metadata.csv").write_text("file_name,description\na.mp4,one\nb.mp4,two\n")
    for captions in (None, tmp_path / "metadata.csv"):
        with pytest.raises(
            NoCaptionError,
            match=r":2: .*file_name, description.*prompt, caption, text",
        ):
            find([tmp_path], captions)
    (tmp_path / "a.txt").write_text("one")  # a column may be missing if a .txt has the caption
    found = find([tmp_path], None)
    assert prompts(found) == {"a.mp4": ("one",)}
    assert "csv:3: no column" in found.failures[0].message


TABLES = {
    "metadata.jsonl": '{"file_name": "sub/a.mp4", "text": "one, two"}\n{"file_name": "b.mp4", '
    '"text": "three", "label": 7}\n',
    "metadata.csv": 'video,prompt,label\nsub/a.mp4,"one, two",\nb.mp4,three,7\n',
    "list.json": json.dumps(
        [
            {"path": "sub/a.mp4", "cap": ["one, two"]},
            {"path": "b.mp4", "caption": "three", "class": "7"},
        ]
    ),
    "object.json": json.dumps(
        {"sub/a.mp4": "one, two", "b.mp4": {"caption": "three", "activity": "7"}}
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_table_layout_says_the_same(tmp_path, name):
    make(tmp_path, "sub/a.mp4", "b.mp4")
    (tmp_path / name).write_text(TABLES[name])
    found = find([tmp_path], None if name.startswith("metadata") else tmp_path / name)
    assert prompts(found) == {"a.mp4": ("one, two",), "b.mp4": ("three",)}
    assert {s.path.name: s.activity for s in found.sources} == {"a.mp4": "sub", "b.mp4": "7"}


LAYOUTS = {
    "musubi": {"list.jsonl": '{"video_path": "sub/a.mp4", "caption": "one"}\n'
               '{"video_path": "b.mp4", "caption": "two"}\n'},
    "hugging face": {"metadata.jsonl": '{"file_name": "sub/a.mp4", "text": "one"}\n'
                     '{"file_name": "b.mp4", "text": "two"}\n'},
    "diffsynth": {"metadata.csv": "video,prompt\nsub/a.mp4,one\nb.mp4,two\n"},
    "finetrainers lists": {"videos.txt": "sub/a.mp4\nb.mp4\n", "prompt.txt": "one\ntwo\n"},
    "finetrainers csv": {"dataset.csv": "caption,video_file\none,sub/a.mp4\ntwo,b.mp4\n"},
    "diffusion-pipe": {"sub/captions.json": '{"a.mp4": ["one"]}', "b.txt": "two"},
    "fastvideo": {"videos2caption.json": '[{"path": "sub/a.mp4", "cap": ["one"]},'
                  ' {"path": "b.mp4", "cap": ["two"]}]'},
    "sidecars": {"sub/a.txt": "one", "b.txt": "two"},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layouts_of_other_trainers_are_read_as_they_are(tmp_path, name):
    make(tmp_path, "sub/a.mp4", "b.mp4")
    for file, text in LAYOUTS[name].items():
        (tmp_path / file).write_text(text)
    found = find([tmp_path], tmp_path / "list.jsonl" if name == "musubi" else None)
    assert prompts(found) == {"a.mp4": ("one",), "b.mp4": ("two",)}
    assert found.failures == []


def test_fastvideo_rows_leave_out_the_folder_of_the_videos(tmp_path):
    make(tmp_path, "videos/a.mp4")
    (tmp_path / "videos2caption.json").write_text('[{"path": "a.mp4", "cap": ["one", "two"]}]')
    assert prompts(find([tmp_path], None)) == {"a.mp4": ("one", "two")}


def test_lists_of_different_lengths_are_refused(tmp_path):
    make(tmp_path, "a.mp4")
    (tmp_path / "videos.txt").write_text("a.mp4\n")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    with pytest.raises(ManifestError, match=r"videos\.txt .* 1 .*prompts\.txt .* 2"):
        find([tmp_path], None)


def test_a_list_of_videos_without_captions_is_not_a_table(tmp_path):
    make(tmp_path, "a.mp4")
    (tmp_path / "videos.txt").write_text("a.mp4\n")
    (tmp_path / "a.txt").write_text("x")
    assert prompts(find([tmp_path], None)) == {"a.mp4": ("x",)}
    with pytest.raises(ManifestError, match=r"no prompts\.txt or"):
        find([tmp_path], tmp_path / "videos.txt")


def test_a_column_may_name_the_side_of_the_split(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    table = tmp_path / "metadata.csv"
    table.write_text("path,text,split\na.mp4,x,Validation\nb.mp4,x,train\nc.mp4,x,\n")
    assert [s.split for s in find([tmp_path], None).sources] == ["val", "train", None]
    table.write_text("path,text,split\na.mp4,x,later\n")
    with pytest.raises(ManifestError, match="csv:2: split 'later'"):
        find([tmp_path], None)


def test_images_beside_videos_count_when_a_row_or_a_txt_of_their_own_is_about_them(tmp_path):
    make(tmp_path, "stills/a.jpg", "stills/b.PNG", "films/c.mp4", "films/c.jpg", "films/d.webp")
    for name in ("stills/a", "stills/b", "films/c"):
        (tmp_path / f"{name}.txt").write_text(name)
    found = find([tmp_path], None)
    assert set(prompts(found)) == {"a.jpg", "b.PNG", "c.mp4"}
    assert (found.images_unused, found.failures) == (2, [])
    (tmp_path / "films/d.txt").write_text("a still")
    assert "d.webp" in prompts(find([tmp_path], None))
    (tmp_path / "films/d.txt").unlink()
    (tmp_path / "films/metadata.csv").write_text("image,text\nd.webp,a still\n")
    assert "d.webp" in prompts(find([tmp_path], None))


def test_among_images_alone_one_without_a_caption_is_listed(tmp_path):
    make(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "a.txt").write_text("x")
    found = find([tmp_path], None)
    assert [(f.code, f.path) for f in found.failures] == [("no_caption", str(tmp_path / "b.jpg"))]


def test_table_paths_may_be_relative_to_the_table_or_to_a_given_folder(tmp_path):
    make(tmp_path / "raw", "a.mp4", "b.mp4")
    table = tmp_path / "captions.csv"
    table.write_text(f"path,caption\nraw/a.mp4,one\n{tmp_path}/raw/b.mp4,two\n")
    assert prompts(find([tmp_path / "raw"], table)) == {"a.mp4": ("one",), "b.mp4": ("two",)}
    table.write_text("path,caption\na.mp4,one\nb.mp4,two\n")
    assert prompts(find([tmp_path / "raw"], table)) == {"a.mp4": ("one",), "b.mp4": ("two",)}


def test_a_row_about_a_missing_file_never_captions_a_file_of_that_name_elsewhere(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4", "walk/b.mp4", "clap/c.mp4", "walk/d.mp4", "clap/d.mp4")
    for folder in ("walk", "clap"):
        rows = [f"{name}.mp4,{folder} {name}" for name in "abcd"]
        (tmp_path / folder / "metadata.csv").write_text("path,text\n" + "\n".join(rows))
    found = find([tmp_path], None)
    assert {str(s.path.relative_to(tmp_path)): s.prompts for s in found.sources} == {
        f"{name}.mp4": (name.replace("/", " "),)
        for name in ("walk/b", "clap/c", "walk/d", "clap/d")
    }
    missing = [f.path for f in found.failures if f.code == "missing"]
    assert missing == [
        str(tmp_path / name) for name in ("clap/a.mp4", "clap/b.mp4", "walk/a.mp4", "walk/c.mp4")
    ]


def test_rows_of_one_video_are_several_captions(tmp_path):
    make(tmp_path, "a.mp4")
    (tmp_path / "metadata.csv").write_text("file,text\na.mp4,one\na.mp4,two\na.mp4,one\n")
    assert prompts(find([tmp_path], None)) == {"a.mp4": ("one", "two")}


def test_rows_about_missing_or_other_files_are_counted(tmp_path):
    make(tmp_path, "in/a.mp4", "out/b.mp4")
    table = tmp_path / "captions.csv"
    table.write_text("path,caption\nin/a.mp4,one\nout/b.mp4,two\nin/gone.mp4,three\n")
    found = find([tmp_path / "in"], table)
    assert [(f.code, f.path) for f in found.failures] == [
        ("missing", str(tmp_path / "in/gone.mp4"))
    ]
    assert found.rows_elsewhere == 1


def test_a_file_whose_name_is_not_utf_8_fails_alone_and_says_rename_it(tmp_path):
    make(tmp_path, "a.mp4", os.fsdecode(b"gr\xfcn.mp4"))
    (tmp_path / "a.txt").write_text("x")
    found = find([tmp_path], None)
    assert prompts(found) == {"a.mp4": ("x",)}
    [failure] = found.failures
    assert (failure.code, failure.path) == ("unreadable", rf"{tmp_path}/gr\xfcn.mp4")
    assert "UTF-8" in failure.message
    with pytest.raises(ManifestError, match=r"gr\\xfcn\.mp4.*rename"):
        find([tmp_path / os.fsdecode(b"gr\xfcn.mp4")], None)


def test_an_explicit_table_is_believed_alone(tmp_path):
    make(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_text("old words")
    (tmp_path / "new.csv").write_text("path,caption\na.mp4,new words\n")
    assert prompts(find([tmp_path], tmp_path / "new.csv")) == {"a.mp4": ("new words",)}


def test_a_single_file_needs_no_folder(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "a.txt").write_text("x")
    assert [s.path.name for s in find([tmp_path / "a.mp4"], None).sources] == ["a.mp4"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no video or image; looked for .*mp4"),
        ({"a.mp4": ""}, "none of 1 source files has a caption"),
        (
            {"a.mp4": "", "a.txt": "x", "metadata.csv": "path,text\na.mp4,y\n"},
            "a.txt and another in a table",
        ),
        ({"a.mp4": "", "metadata.csv": "path,text\na.mp4,y,z\n"}, r"csv:2: more fields"),
        ({"a.mp4": "", "metadata.csv": 'path,text\na.mp4,"y\n'}, "not CSV"),
        ({"a.mp4": "", "metadata.csv": "name,words\na.mp4,y\n"}, r"csv:2: no path; .*name, words"),
        ({"a.mp4": "", "metadata.csv": "path,text,cap\na.mp4,x,y\n"}, "caption|disagree"),
        ({"a.mp4": "", "metadata.jsonl": "{"}, r"metadata\.jsonl:1: not JSON"),
        (
            {"a.mp4": "", "metadata.csv": "path,text,label\na.mp4,x,run\na.mp4,y,walk\n"},
            "activity 'walk' disagrees with 'run'",
        ),
    ],
)
def test_what_cannot_be_understood_is_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ManifestError, match=message):
        find([tmp_path], None)


def test_missing_inputs_are_named(tmp_path):
    make(tmp_path, "a.mp4")
    with pytest.raises(ManifestError, match="nowhere"):
        find([tmp_path / "nowhere"], None)
    with pytest.raises(ManifestError, match=r"none\.csv"):
        find([tmp_path], tmp_path / "none.csv")
    (tmp_path / "words.xlsx").write_text("")
    with pytest.raises(ManifestError, match=r"expected \.jsonl, \.json, \.csv or"):
        find([tmp_path], tmp_path / "words.xlsx")


def weights(found):
    return {source.path.name: source.weight for source in found.sources}


def test_rows_that_repeat_count_as_weight_and_other_captions_do_not(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4", "c.mp4", "d.mp4")
    rows = ["a.mp4,one", "a.mp4,one", "a.mp4,one", "b.mp4,one", "c.mp4,one", "c.mp4,two"]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *rows, "d.mp4,one", ""]))
    assert weights(find([tmp_path], None)) == {"a.mp4": 3, "b.mp4": 1, "c.mp4": 1, "d.mp4": 1}
    assert prompts(find([tmp_path], None))["c.mp4"] == ("one", "two")


def test_a_second_table_with_the_same_rows_is_no_repeat(tmp_path):
    make(tmp_path, "a.mp4")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,one\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "one"}\n')
    assert weights(find([tmp_path], None)) == {"a.mp4": 1}


def test_a_weight_column_is_read_also_beside_a_caption_elsewhere(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "metadata.csv").write_text(
        "file_name,text,num_repeats\na.mp4,one,2.5\nb.mp4,,0.5\nc.mp4,one,\n"
    )
    (tmp_path / "b.txt").write_text("one")
    assert weights(find([tmp_path], None)) == {"a.mp4": 2.5, "b.mp4": 0.5, "c.mp4": 1}


@pytest.mark.parametrize("weight", ["0", "-2", "nan", "much"])
def test_a_weight_out_of_range_is_refused_by_its_row(tmp_path, weight):
    make(tmp_path, "a.mp4")
    (tmp_path / "metadata.csv").write_text(f"file_name,text,weight\na.mp4,one,{weight}\n")
    with pytest.raises(ManifestError, match=r"metadata\.csv:2.*weight.*1000"):
        find([tmp_path], None)


def test_one_bad_row_is_listed_and_the_others_are_used(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4")
    rows = [
        {"path": "a.mp4", "text": "one"}, {"path": "b.mp4", "text": 7}, {"path": "\ud83d.mp4"},
        {"text": "x"}, {"path": "a" * 5000, "text": "x"}, {"path": "b.mp4", "split": "later"},
    ]  # fmt: skip
    lines = [json.dumps(row) for row in rows] + ["{", "[" * 100_000, '{"path": 1e999}', "3"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    found = find([tmp_path], None)
    assert prompts(found) == {"a.mp4": ("one",)}
    bad = [failure.path for failure in found.failures if failure.code == "bad_line"]
    assert sorted(bad) == sorted(f"{tmp_path}/metadata.jsonl:{n}" for n in range(2, 11))
    assert [f.path for f in found.failures if f.code == "no_caption"] == [f"{tmp_path}/b.mp4"]


def test_a_bad_row_of_json_and_of_csv_is_listed_too(tmp_path):
    make(tmp_path, "a.mp4")
    (tmp_path / "list.json").write_text('[{"path": "a.mp4", "cap": "x"}, 3, {"cap": "x"}]')
    found = find([tmp_path], tmp_path / "list.json")
    assert [f.path for f in found.failures] == [f"{tmp_path}/list.json: row {n}" for n in (2, 3)]
    (tmp_path / "list.csv").write_text("path,cap\na.mp4,x\na.mp4,x,y\n")
    found = find([tmp_path], tmp_path / "list.csv")
    assert [f.path for f in found.failures] == [f"{tmp_path}/list.csv:3"]
    assert prompts(found) == {"a.mp4": ("x",)}


def test_a_contradiction_concerns_one_file(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "metadata.csv").write_text("path,text,label\na.mp4,x,run\na.mp4,y,walk\nb.mp4,z,\n")
    found = find([tmp_path], None)
    assert prompts(found) == {"b.mp4": ("z",)}
    assert [f.path for f in found.failures] == [f"{tmp_path}/a.mp4"]


def test_half_an_emoji_is_replaced_and_a_blank_caption_is_none(tmp_path):
    make(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    rows = [{"path": "a.mp4", "text": "clap \ud83d"}, {"path": "b.mp4", "text": "&nbsp;\u200b"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c.txt").write_text("&nbsp;&nbsp;")
    found = find([tmp_path], None)
    assert prompts(found) == {"a.mp4": ("clap \ufffd",)}
    assert [Path(f.path).name for f in found.failures] == ["b.mp4", "c.mp4"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "cp1252"])
@pytest.mark.parametrize("name", ["a.txt", "metadata.csv", "metadata.jsonl", "metadata.json"])
def test_another_encoding_is_refused_with_the_remedy(tmp_path, encoding, name):
    make(tmp_path, "a.mp4")
    (tmp_path / name).write_bytes("path,text\na.mp4,größer\n".encode(encoding))
    with pytest.raises(ManifestError, match="as UTF-8") as refusal:
        find([tmp_path], None)
    likely = {"cp1252": "Windows-1252"}.get(encoding, encoding.upper())
    assert likely in str(refusal.value)


def test_a_loop_of_links_and_a_folder_linked_twice_are_read_once(tmp_path):
    make(tmp_path / "videos", "walk/a.mp4", "b.mp4")
    (tmp_path / "videos/a_first").symlink_to(tmp_path / "videos/walk")
    (tmp_path / "videos/walk/latest").symlink_to(tmp_path / "videos")
    (tmp_path / "videos/walk/again").symlink_to(".")
    (tmp_path / "videos/gone").symlink_to("nowhere")
    (tmp_path / "videos/itself").symlink_to("itself")
    for name in ("walk/a", "b"):
        (tmp_path / f"videos/{name}.txt").write_text(name)
    found = find([tmp_path / "videos"], None)
    assert [s.path for s in found.sources] == [
        tmp_path / "videos/b.mp4", tmp_path / "videos/walk/a.mp4",
    ]  # fmt: skip
    linked = tmp_path / "elsewhere"
    linked.symlink_to(tmp_path / "videos")
    assert find([linked], None).sources[0].path == linked / "b.mp4"
    assert len(find([linked, tmp_path / "videos"], None).sources) == 2


def test_links_to_one_file_are_sources_of_their_own_and_a_broken_one_is_kept(tmp_path):
    make(tmp_path, "walk/a.mp4")
    (tmp_path / "clap").mkdir()
    (tmp_path / "clap/b.mp4").symlink_to("../walk/a.mp4")
    (tmp_path / "clap/c.mp4").symlink_to("nowhere.mp4")
    for name in ("walk/a", "clap/b", "clap/c"):
        (tmp_path / f"{name}.txt").write_text(name)
    found = find([tmp_path], None)  # `prepare` lists the broken one as missing
    assert [s.activity for s in found.sources] == ["clap", "clap", "walk"]


@pytest.mark.parametrize("stem", ["video", "caption", "prompt", "videos"])
def test_the_txt_of_a_video_with_the_name_of_a_list_is_its_caption(tmp_path, stem):
    make(tmp_path, f"{stem}.mp4", "other.mp4")
    for name in (stem, "other"):
        (tmp_path / f"{name}.txt").write_text(f"a video of {name}")
    assert prompts(find([tmp_path], None)) == {
        f"{stem}.mp4": (f"a video of {stem}",), "other.mp4": ("a video of other",),
    }  # fmt: skip


def test_lists_beside_a_video_of_their_name_still_count(tmp_path):
    make(tmp_path, "prompt.mp4", "a.mp4")
    (tmp_path / "prompt.txt").write_text("a prompt")
    (tmp_path / "videos.txt").write_text("a.mp4\n")
    (tmp_path / "captions.txt").write_text("one\n")
    assert prompts(find([tmp_path], None)) == {"prompt.mp4": ("a prompt",), "a.mp4": ("one",)}


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("kind", ["sidecar", "row", "backslashes"])
def test_the_spelling_of_a_name_may_differ(tmp_path, on_disk, kind):
    other = "NFD" if on_disk == "NFC" else "NFC"
    make(tmp_path, unicodedata.normalize(on_disk, "sub/café.mp4"))
    named = unicodedata.normalize(other, "sub/café.mp4")
    if kind == "sidecar":
        folder = next(tmp_path.iterdir())
        (folder / unicodedata.normalize(other, "café.txt")).write_text("x")
    else:
        named = named.replace("/", "\\") if kind == "backslashes" else named
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"path": named, "text": "x"}))
    (source,) = find([tmp_path], None).sources
    assert source.path.exists()
    assert source.prompts == ("x",)


@pytest.mark.parametrize("prefix", ["", "train/", "data/train/", "train\\"])
@pytest.mark.parametrize("place", [".", ".."])
def test_a_table_in_the_folder_or_one_above_is_found_with_any_prefix(tmp_path, prefix, place):
    folder = make(tmp_path / "data" / "train", "a.mp4", "b.mp4")
    rows = [f"{prefix}{name}.mp4,{name}" for name in "ab"]
    (folder / place / "metadata.csv").write_text("path,text\n" + "\n".join(rows))
    found = find([folder], None)
    assert prompts(found) == {"a.mp4": ("a",), "b.mp4": ("b",)}
    assert found.tables == [(folder / place / "metadata.csv").resolve()]


def test_a_table_above_is_not_read_when_there_are_captions(tmp_path):
    folder = make(tmp_path / "train", "a.mp4", "b.mp4")
    (folder / "a.txt").write_text("x")
    (tmp_path / "metadata.csv").write_text("path,text\nb.mp4,y\n")
    found = find([folder], None)
    assert prompts(found) == {"a.mp4": ("x",)}
    assert [f.code for f in found.failures] == ["no_caption"]


def test_rows_that_fit_no_file_are_shown_with_what_was_looked_for(tmp_path):
    make(tmp_path, "train/a.mp4")
    (tmp_path / "train/metadata.csv").write_text("path,text\nvalid/a.mp4,x\nvalid/b.mp4,y\n")
    with pytest.raises(ManifestError) as refusal:
        find([tmp_path / "train"], None)
    for shown in ("2 rows", "metadata.csv:2", "valid/a.mp4", str(tmp_path / "train/a.mp4")):
        assert shown in str(refusal.value)


def test_a_row_that_fits_files_of_two_folders_is_listed(tmp_path):
    make(tmp_path, "one/a.mp4", "two/a.mp4", "two/b.mp4")
    (tmp_path / "list.csv").write_text("path,text\na.mp4,x\nb.mp4,y\n")
    found = find([tmp_path / "one", tmp_path / "two"], tmp_path / "list.csv")
    assert prompts(found) == {"b.mp4": ("y",)}
    assert any("one/a.mp4" in f.message and "two/a.mp4" in f.message for f in found.failures)


def test_a_folder_that_cannot_be_read_is_listed(tmp_path, monkeypatch):
    make(tmp_path, "a.mp4", "closed/b.mp4")
    (tmp_path / "a.txt").write_text("x")
    scan = os.scandir

    def refusing(path):
        if path == tmp_path / "closed":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = find([tmp_path], None)
    assert [(f.code, f.path) for f in found.failures] == [("unreadable", str(tmp_path / "closed"))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", 'path, caption\na.mp4, "one, two"\nb.mp4, three; four\n'),
        ("list.csv", 'path;caption\r\na.mp4;one, two\r\nb.mp4;"three; four"\r\n'),
        ("list.csv", "path\tcaption\na.mp4\tone, two\nb.mp4\tthree; four\n"),
        ("list.tsv", "\ufeffpath\tcaption\na.mp4\tone, two\nb.mp4\tthree; four\n"),
    ],
)
def test_tables_of_spreadsheets_are_read(tmp_path, name, text):
    make(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = find([tmp_path], tmp_path / name)
    assert prompts(found) == {"a.mp4": ("one, two",), "b.mp4": ("three; four",)}
    assert found.failures == []

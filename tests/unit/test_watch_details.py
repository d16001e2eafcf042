"""Metrics that grow are read from where the last page ended; a file that was replaced is not."""

import json

from tests.support.watched import lines, metrics_row, write_preview, write_run
from wanlora.commands.watch.details import Details
from wanlora.commands.watch.run_files import Folder
from wanlora.commands.watch.summary import Summaries
from wanlora.files import write_text
from wanlora.runs import run_folder


def details(tmp_path):
    folder = Folder(tmp_path)
    kept = Details(folder)
    return lambda: kept.of(Summaries(folder).of(("run",))[0])


def curve(data):
    return data.metrics.curve("loss")


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def test_only_new_rows_are_read(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", num_steps=50, status_values={}) / run_folder.METRICS_NAME
    read = details(tmp_path)
    assert len(curve(read())) == 50
    sizes = []
    original = Folder.read

    def spy(self, name, **options):
        data = original(self, name, **options)
        if name.endswith(run_folder.METRICS_NAME):
            sizes.append(len(data))
        return data

    monkeypatch.setattr(Folder, "read", spy)
    row = json.dumps(metrics_row(50, loss=0.123))
    append(path, row[:20])  # being written
    assert len(curve(read())) == 50
    append(path, f"{row[20:]}\ndamaged\n")
    data = read()
    assert curve(data)[-1] == (50, 0.123)
    [note] = data.notes
    assert "1 damaged line of metrics.jsonl" in note
    read()
    assert len(sizes) == 2
    assert max(sizes) < 1500


def test_a_file_that_a_resume_replaced_is_read_from_its_start(tmp_path):
    path = write_run(tmp_path / "run", num_steps=50, status_values={}) / run_folder.METRICS_NAME
    read = details(tmp_path)
    read()
    write_text(path, lines([metrics_row(step, loss=0.5) for step in range(10)]))
    assert curve(read()) == [(step, 0.5) for step in range(10)]
    rows = [metrics_row(step, loss=0.25) for step in range(300)]
    write_text(path, lines(rows))
    assert curve(read()) == [(step, 0.25) for step in range(300)]
    path.unlink()
    assert curve(read()) == []


def test_of_several_previews_of_a_prompt_the_newest_is_shown(tmp_path):
    run = write_run(tmp_path / "run", num_steps=20, status_values={}, prompts=["a dog"])
    write_preview(run / "previews" / "step-000005", 0, "a dog")
    write_preview(run / "previews" / "step-000005.partial", 0, "a cat")
    (run / "previews" / "step-000020" / "01.gif").write_bytes(b"without a prompt")
    pictures = details(tmp_path)().pictures
    assert {prompt: picture.step for prompt, picture in pictures.items()} == {"a dog": 20}

"""Pages hold what they are given and nothing else."""

import base64
import io
import re

import numpy as np
from PIL import Image

from wanlora.report.page import Raw, escape, facts, image, page, section, table


def test_text_is_escaped_wherever_it_stands():
    evil = "<script>alert(1)</script>"
    made = page(
        evil,
        [
            evil,
            section(evil, evil),
            facts({evil: evil}),
            table([evil], [[evil], [Raw("<b>x</b>")]]),
        ],
    )
    assert evil not in made
    assert "<b>x</b>" in made
    assert escape(None) == ""


def test_a_page_loads_nothing_from_anywhere():
    made = page("a", [image(np.zeros((8, 8, 3), np.uint8), alt="b")])
    assert "default-src 'none'" in made
    assert not re.search(r'(src|href)="(?!data:)', made)


def test_an_image_comes_back():
    pixels = np.full((16, 24, 3), (200, 30, 60), np.uint8)
    made = image(pixels)
    data = re.search(r"base64,([^\"]+)", made)
    assert data is not None
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))))
    assert back.shape == pixels.shape
    assert np.abs(back.astype(int) - pixels).max() <= 6


def test_numbers_sort_by_value_not_by_how_they_are_shown():
    made = table(["n"], [[12345], [0.123456], ["x"], [True]])
    assert '<td class="number" data-sort="12345">12,345</td>' in made
    assert 'data-sort="0.123456">0.1235<' in made
    assert "<td>True</td>" in made
    assert "sortable" not in table(["n"], [[1]], sortable=False)

"""Files of a transformer that lack a weight are refused by its name, also before a GPU has it."""

import pytest
from safetensors.torch import load_file, save_file

from tests.support.models import temporary_copy
from wanlora.errors import ModelError
from wanlora.wan.transformer import check_names


def test_a_missing_weight_is_named_from_the_files_alone(micro_folder, tmp_path):
    part = temporary_copy(micro_folder / "transformer", tmp_path / "transformer")
    check_names(part)
    (file,) = part.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["blocks.0.attn1.to_k.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing_keys: blocks\.0\.attn1\.to_k\.weight"):
        check_names(part)

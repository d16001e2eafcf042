"""Cards are found by the names that drivers and people give them."""

import pytest

from wanlora.cost.gpus import GPUS, gpu_named, gpu_of, memory_of, mfu, other_size


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
    ],
)
def test_a_card_is_found_by_the_longest_name_that_fits(name, key):
    assert gpu_of(name) == GPUS[key]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce GTX 1080",
        "",
    ],
)
def test_an_unknown_card_has_no_mfu_rather_than_a_wrong_one(name):
    assert mfu(1e12, 1.0, name) is None


def test_mfu_is_the_share_of_the_peak():
    assert mfu(870.2e12, 1.7, "NVIDIA H100 80GB HBM3") == pytest.approx(0.517, abs=1e-3)


@pytest.mark.parametrize(
    ("written", "key"),
    [("h100", "H100"), ("RTX-4090", "RTX 4090"), ("rtx4090", "RTX 4090"),
     ("a100-40gb", "A100 40GB"), ("NVIDIA GeForce RTX 3090", "RTX 3090"), ("voodoo2", None),
     ("4090", "RTX 4090"), ("rtx 4090", "RTX 4090"), ("RTX4090 24GB", "RTX 4090"),
     ("H100 SXM", "H100"), ("h100 sxm5 80gb", "H100"), ("h100 pcie 80gb", "H100 PCIe"),
     ("a100", "A100"), ("A100-SXM4-80GB", "A100"), ("a100 pcie 40gb", "A100 40GB"),
     ("l40s", "L40S"), ("3090", "RTX 3090"), ("5090", "RTX 5090"), ("4060ti", "RTX 4060 Ti"),
     ("4060 ti 16gb", "RTX 4060 Ti 16GB"), ("4070 Ti Super", "RTX 4070 Ti SUPER"),
     ("a6000", "RTX A6000"), ("6000 ada", "RTX 6000 Ada"), ("a10g", "A10G"), ("4090 laptop", None),
     ("gtx 1080", None), ("", None), ("rtx", None)],
)  # fmt: skip
def test_a_card_is_found_as_people_write_it(written, key):
    assert gpu_named(written) == key


@pytest.mark.parametrize(
    ("written", "size"),
    [("RTX 3060 8GB", 8), ("4090 48gb", 48), ("GH200 144 GB", 144), ("RTX 3060 12GB", None),
     ("H200 141GB", None), ("B200 192GB", None), ("H100 NVL 94GB", None), ("L40S 48GB", None),
     ("A100-SXM4-40GB", None), ("MI300X 192GB", None), ("H100", None)],
)  # fmt: skip
def test_a_size_that_the_card_does_not_have_is_found(written, size):
    assert other_size(written, memory_of(gpu_named(written))) == size

from wanlora.core.fingerprint import difference, fingerprint


def test_order_of_keys_does_not_matter_and_values_do():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_difference_names_the_field_with_both_values():
    found = {"vae": {"sha256": "aa", "dtype": "float32"}, "tiling": False}
    wanted = {"vae": {"sha256": "bb", "dtype": "float32"}, "tiling": False, "new": 1}
    assert difference(found, wanted) == [
        "new: found <absent>, wanted 1",
        "vae.sha256: found aa, wanted bb",
    ]

"""Which parameters `config.generator.freeze` freezes."""

import pytest

from ear_jax.config import read
from ear_jax.errors import ConfigError
from ear_jax.training.freezing import frozen_names, part_of

SIZES = {
    "backbone/blocks/mlp/kernel": 3000,
    "backbone/final_modulation/bias": 20,
    "backbone/encoder_norm/scale": 10,
    "backbone/class_embedding": 100,
    "backbone/inputs/0/project/kernel": 50,
    "heads/0/blocks/0/norm/scale": 7,
}


def test_parts_names_and_beginnings_of_names() -> None:
    trunk = {"backbone/blocks/mlp/kernel", "backbone/final_modulation/bias", "backbone/encoder_norm/scale"}
    assert {name for name in SIZES if part_of(name) == "trunk"} == trunk == frozen_names(SIZES, ["trunk"])
    assert {name for name in SIZES if part_of(name) == "head"} == {"heads/0/blocks/0/norm/scale"}
    assert frozen_names(SIZES, ["trunk", "embeddings"]) == frozen_names(SIZES, ["backbone"])
    assert frozen_names(SIZES, ["backbone/inputs/"]) == {"backbone/inputs/0/project/kernel"}
    assert not frozen_names(SIZES, [])
    copies = {"backbone/prefix_keys": 8, "backbone/prefix_values": 8, "backbone/aggregation/expand/kernel": 4}
    assert {part_of(name) for name in copies} == {"aggregate"}
    with_copies = {**SIZES, **copies}
    assert with_copies.keys() - frozen_names(with_copies, ["trunk", "embeddings", "head"]) == copies.keys()
    assert part_of("backbone/output/kernel") == "head" and part_of("head/logits/bias") == "head"


@pytest.mark.parametrize("item", ["backbone/class", "trunks", "", "/"])
def test_unknown_names_are_refused_with_the_known_ones(item: str) -> None:
    with pytest.raises(ConfigError) as caught:
        frozen_names(SIZES, [item])
    assert f"no parameter is named {item!r}" in str(caught.value)
    assert "trunk (3.03K), embeddings (150), head (7)" in str(caught.value)
    assert "backbone/blocks" in str(caught.value)


def test_something_is_left_to_train_and_something_is_there_to_freeze() -> None:
    with pytest.raises(ConfigError, match=r"leaves nothing to train of 3\.19K"):
        frozen_names(SIZES, ["backbone", "head"])
    with pytest.raises(ConfigError, match="would freeze random weights; give config"):
        read.resolve(dict(generator=dict(freeze=("trunk",)), tokenizer_training=dict(steps=1)))

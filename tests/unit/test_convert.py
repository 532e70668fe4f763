"""Published weights in and out: every family's files round-trip bit by bit, and what does not fit is refused whole."""

import dataclasses
import functools
import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from torch_files import read_tensors, save

from ear_jax import build
from ear_jax.config import read
from ear_jax.config.schema import Config, ConvertConfig
from ear_jax.errors import ConfigError, DataError
from ear_jax.folders import model_folder
from ear_jax.inference import pipeline
from ear_jax.main import main
from ear_jax.nn.functional import functional
from ear_jax.stages.starting import Start
from ear_jax.weights import safetensors_file
from ear_jax.weights.apply import ours_of, theirs_of
from ear_jax.weights.entries import Entry, constant, kernel, linear, matrix, reshaped, same, stacked
from ear_jax.weights.families import registry

CLASSES = 3
FLOAT = np.dtype(np.float32)

_KL = dict(channels=32, multipliers=(1, 1), blocks=1, latent_channels=4)
_VQ = dict(channels=32, multipliers=(1, 1, 1), blocks=1, latent_channels=4, codes=8, scales=(1, 2, 4))
_TRUNK = dict(width=16, depth=2, heads=2)
_KL_VAE, _VQVAE = dict(name="kl_vae", kl_vae=_KL), dict(name="vqvae", vqvae=_VQ)

FAMILIES: dict[str, dict[str, Any]] = {
    "ear": dict(
        tokenizer=_KL_VAE,
        generator=dict(backbone=dict(_TRUNK, class_tokens=2), energy=dict(width=16, depth=2), fine=dict(steps=4)),
    ),
    "mar": dict(
        tokenizer=_KL_VAE,
        generator=dict(
            backbone=dict(_TRUNK, name="mar", encoder_depth=1, class_tokens=2),
            continuous_head="diffusion",
            diffusion=dict(width=16, depth=2, sample_steps=2),
            fine=dict(steps=4),
        ),
    ),
    "var": dict(tokenizer=_VQVAE, generator=dict(backbone=dict(_TRUNK, name="next_scale"))),
    "var_shared": dict(
        tokenizer=_VQVAE,
        generator=dict(backbone=dict(_TRUNK, name="next_scale", use_shared_modulation=True, use_unit_attention=False)),
    ),
    "dit": dict(
        tokenizer=dict(_KL_VAE, kl_vae=dict(_KL, encoder_attention=False, decoder_attention=False)),
        generator=dict(backbone=dict(_TRUNK, name="dit"), patch_size=2, fine=dict(steps=4)),
    ),
    "hart": dict(tokenizer=dict(_VQVAE, name="hart"), generator=dict(backbone=dict(_TRUNK, name="masked"))),
}
GENERATORS = [name for name in FAMILIES if name != "hart"]


def _config(family: str) -> Config:
    return _resolved(FAMILIES[family] | dict(name=family, data=dict(image_px=16)))


def _resolved(values: dict[str, Any]) -> Config:
    return read.resolve(values | dict(tokenizer_training=dict(steps=1), generator_training=dict(steps=1)))


def _shapes(module: nnx.Module) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    _, parameters, rest = functional(module)
    return {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in {**parameters, **rest}.items()}


def _random(shapes: dict[str, tuple[tuple[int, ...], np.dtype]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, (shape, dtype) in shapes.items()}


@dataclasses.dataclass(frozen=True)
class Published:
    """Tables as a family's authors would publish them, by name."""

    tokenizer: dict[str, np.ndarray]
    generator: dict[str, np.ndarray]


@functools.cache
def published(family: str, seed: int = 0) -> Published:
    """Random weights of a tiny model of the family, in the family's names and layouts."""
    config = _config(family)
    tokenizer = build.abstract_tokenizer(config)
    ours = _random(_shapes(tokenizer), seed)
    entries = registry.tokenizer_entries(config)
    for entry in entries:
        if not entry.theirs:  # what the format takes for granted
            ours |= dict(zip(entry.ours, entry.to_ours([]), strict=True))
    theirs = dict(theirs_of(ours, entries))
    if family == "hart":
        return Published(theirs, {})
    generator = build.abstract_generator(config, tokenizer.spec, CLASSES)
    return Published(theirs, _generator_file(config, _random(_shapes(generator), seed + 1)))


def _generator_file(config: Config, ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a generator's file holds of our arrays: not the quantiser, which is in its tokenizer's."""
    own = {name: array for name, array in ours.items() if not name.startswith("quantiser/")}
    return dict(theirs_of(own, registry.generator_entries(config)))


def _write_config(path: Path, family: str) -> str:
    path.write_text(f"def get_config(variant=''):\n    return {read.to_dict(_config(family))!r}\n")
    return str(path)


def _convert(tmp_path: Path, family: str, *flags: str, workdir: str = "out") -> int:
    config = _write_config(tmp_path / "config.py", family)
    arguments = ["--task=convert", f"--config={config}", f"--workdir={tmp_path / workdir}"]
    return main([*arguments, *(f"--config.convert.{flag}" for flag in flags)])


def _same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


# --- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", GENERATORS)
def test_a_family_in_and_back_changes_no_bit(tmp_path, capsys, family):
    weights = published(family)
    save(tmp_path / "model.pth", {"model": published(family, seed=9).generator, "model_ema": weights.generator})
    save(tmp_path / "tokenizer.ckpt", weights.tokenizer)
    files = f"checkpoint={tmp_path / 'model.pth'}", f"tokenizer={tmp_path / 'tokenizer.ckpt'}"
    assert _convert(tmp_path, family, *files) == 0, capsys.readouterr().err
    folder = model_folder.read(tmp_path / "out")
    assert folder.tensors.keys() == {"tokenizer", "generator"} and folder.class_names == ("0", "1", "2")
    card = (tmp_path / "out/generator/model/card.md").read_text()
    digest = hashlib.sha256((tmp_path / "model.pth").read_bytes()).hexdigest()
    assert "model.pth" in card and digest in card and "model_ema" in card
    assert str(tmp_path) not in (tmp_path / "out/generator/model/config.json").read_text()

    back = [
        "--task=convert",
        f"--model={tmp_path / 'out'}",
        f"--workdir={tmp_path / 'back'}",
        "--config.convert.to=torch",
    ]
    assert main(back) == 0, capsys.readouterr().err
    _same(read_tensors(tmp_path / "back/generator.torch.safetensors"), weights.generator)
    _same(read_tensors(tmp_path / "back/tokenizer.torch.safetensors"), weights.tokenizer)


@pytest.mark.parametrize(
    ("family", "generator"),
    [
        ("var", dict(backbone=dict(_TRUNK, name="continuous_next_scale"))),
        ("mar", dict(FAMILIES["mar"]["generator"], continuous_head="energy", energy=dict(width=16, depth=2))),
    ],
)
def test_published_weights_start_a_generator_with_an_energy_head(tmp_path, capsys, family, generator):
    weights = published(family)
    save(tmp_path / "model.pth", weights.generator)
    save(tmp_path / "tokenizer.pth", weights.tokenizer)
    files = f"checkpoint={tmp_path / 'model.pth'}", f"tokenizer={tmp_path / 'tokenizer.pth'}"
    assert _convert(tmp_path, family, *files) == 0, capsys.readouterr().err
    tokenizer = FAMILIES[family]["tokenizer"]
    if family == "var":  # its autoencoder, and the latent before the codes
        tokenizer = dict(tokenizer, vqvae=dict(tokenizer["vqvae"], use_codebook=False))
    config = _resolved(dict(data=dict(image_px=16), tokenizer=tokenizer, generator=generator))
    expected = _shapes(build.abstract_generator(config, build.abstract_tokenizer(config).spec, CLASSES))
    parts = model_folder.read(tmp_path / "out").tensors
    start = Start.read("generator", str(tmp_path / "out"), expected, tokenizer=parts["tokenizer"], config=config)
    converted = parts["generator"]
    trunk = {name for name in expected if name.startswith("backbone/") and "/embed/" not in name}
    assert trunk <= start.taken.keys() and not [name for name in start.taken if name.startswith("heads/")]
    assert all(np.array_equal(start.taken[name], converted[name]) for name in trunk)
    if family == "var":
        rows, theirs = (held["backbone/embed/kernel"] for held in (start.taken, converted))
        assert np.array_equal(rows[:-1], theirs) and not rows[-1].any()
        assert np.array_equal(start.taken["backbone/embed/bias"], converted["backbone/embed/bias"])


@pytest.mark.parametrize("family", ["ear", "hart"])
def test_a_tokenizer_alone_needs_no_generator(tmp_path, capsys, family):
    weights = published(family)
    save(tmp_path / "tokenizer.pth", {"state_dict": weights.tokenizer, "epoch": 1})
    for flag in ("checkpoint", "tokenizer"):
        assert _convert(tmp_path, family, f"{flag}={tmp_path / 'tokenizer.pth'}") == 0, capsys.readouterr().err
        assert model_folder.read(tmp_path / "out").tensors.keys() == {"tokenizer"}
        assert (tmp_path / "out/tokenizer/model/config.json").exists()
    assert "encodes and decodes" in capsys.readouterr().out


def test_the_stable_diffusion_autoencoder_in_all_its_names(tmp_path, capsys):
    reference = published("dit").tokenizer | {"loss.discriminator.main.0.weight": np.ones((2, 2), np.float32)}
    safetensors_file.write(tmp_path / "vae.safetensors", reference)
    assert _convert(tmp_path, "dit", f"tokenizer={tmp_path / 'vae.safetensors'}") == 0, capsys.readouterr().err
    wanted = model_folder.read(tmp_path / "out").tensors["tokenizer"]
    assert np.allclose(wanted["latent_std"], 1 / 0.18215)
    flags = [f"--model={tmp_path / 'out'}", "--config.convert.to=torch", "--config.convert.layout=diffusers"]
    assert main(["--task=convert", f"--workdir={tmp_path / 'back'}", *flags]) == 0
    path = tmp_path / "back/tokenizer.torch.safetensors"
    renamed = read_tensors(path)
    assert "encoder.mid_block.attentions.0.to_q.weight" in renamed
    assert _convert(tmp_path, "dit", f"tokenizer={path}", workdir="again") == 0
    _same(model_folder.read(tmp_path / "again").tensors["tokenizer"], wanted)
    whole = {f"first_stage_model.{name}": array for name, array in reference.items()} | {
        "model.diffusion.x": reference["encoder.conv_in.bias"]
    }
    save(tmp_path / "sd.ckpt", {"state_dict": whole})
    assert (
        _convert(tmp_path, "dit", f"tokenizer={tmp_path / 'sd.ckpt'}", "weights=first_stage_model", workdir="sd") == 0
    )
    _same(model_folder.read(tmp_path / "sd").tensors["tokenizer"], wanted)


def test_a_trainers_checkpoint_holds_both_and_its_wrappers_are_taken_off(tmp_path, capsys):
    weights = published("var")
    wrapped = {f"module.{name}": array for name, array in weights.generator.items()}
    path = save(tmp_path / "ar-ckpt-last.pth", {"trainer": {"var_wo_ddp": wrapped, "vae_local": weights.tokenizer}})
    assert _convert(tmp_path, "var", f"checkpoint={path}", f"tokenizer={path}") == 0, capsys.readouterr().err
    found = model_folder.read(tmp_path / "out").tensors["generator"]
    _same(_generator_file(_config("var"), found), weights.generator)
    assert found["quantiser/codebook"].tobytes() == weights.tokenizer["quantize.embedding.weight"].tobytes()


def test_averaged_weights_of_wrapped_names_are_taken_or_said(tmp_path, capsys):
    """Compiled, sharded, recomputed, by Lightning; averaged ones in a safetensors file's names; a tokenizer's."""
    weights, other = published("var"), published("var", seed=9).generator
    inner = {
        name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): a for name, a in weights.generator.items()
    }
    averaged = {f"ema.model._fsdp_wrapped_module._orig_mod.{name}": array for name, array in inner.items()}
    safetensors_file.write(tmp_path / "both.safetensors", averaged | {f"model.{n}": a for n, a in other.items()})
    safetensors_file.write(
        tmp_path / "part.safetensors", {f"net.{n}": a for n, a in other.items()} | {"x.y": other["pos_1LC"]}
    )
    one = {"model": weights.tokenizer, "ema": {"decay": 0.9, "shadow": weights.tokenizer}}
    save(tmp_path / "vae.pth", one)
    part, both, vae = (tmp_path / name for name in ("part.safetensors", "both.safetensors", "vae.pth"))
    assert _convert(tmp_path, "var", f"checkpoint={part}", f"tokenizer={vae}", "tokenizer_weights=raw") == 65
    assert "config.convert.weights=net" in capsys.readouterr().err
    assert _convert(tmp_path, "var", f"checkpoint={both}", f"tokenizer={vae}") == 65
    assert "config.convert.tokenizer_weights=raw" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert _convert(tmp_path, "var", f"checkpoint={both}", f"tokenizer={vae}", "tokenizer_weights=ema") == 0
    shown = capsys.readouterr().out
    assert (
        "table ema" in shown
        and "without their wrappers" in shown
        and "passed over beside the tensors: decay" not in shown
    )
    found = model_folder.read(tmp_path / "out").tensors["generator"]
    _same(_generator_file(_config("var"), found), weights.generator)


def test_a_converted_model_samples_from_the_command_line_and_from_python(tmp_path, capsys):
    weights = published("ear")
    (tmp_path / "names.txt").write_text("cat\ndog\ncrème\n", "utf-8")
    save(tmp_path / "model.pth", weights.generator)
    save(tmp_path / "kl16.ckpt", {"model": weights.tokenizer})
    assert _convert(tmp_path, "ear", f"tokenizer={tmp_path / 'kl16.ckpt'}", workdir="vae") == 0
    flags = (
        f"checkpoint={tmp_path / 'model.pth'}",
        f"tokenizer={tmp_path / 'vae'}",
        f"class_names={tmp_path / 'names.txt'}",
    )
    assert _convert(tmp_path, "ear", *flags) == 0, capsys.readouterr().err
    sample = [
        "--task=sample",
        f"--workdir={tmp_path / 'out'}",
        "--config.sample.count=3",
        "--config.sample.fine_steps=1",
    ]
    assert main([*sample, "--config.sample.batch_size=4"]) == 0, capsys.readouterr().err
    assert (tmp_path / "out/samples/grid.png").exists()
    loaded = pipeline.load(tmp_path / "out")
    assert loaded.class_names == ("cat", "dog", "crème")
    assert loaded.config.convert == ConvertConfig()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "kind", "not finite"])
def test_weights_that_do_not_fit_are_listed_and_nothing_is_written(tmp_path, capsys, damage):
    weights = published("ear")
    generator = dict(weights.generator)
    first = "decoder_blocks.0.attn.qkv.weight"
    match damage:
        case "missing":
            for name in list(generator)[3:15]:
                del generator[name]
        case "unexpected":
            generator["extra.weight"] = np.zeros((2, 3), np.float16)
        case "shape":
            generator[first] = generator[first].T
        case "kind":
            generator[first] = generator[first].astype(np.int32)
        case "not finite":
            generator[first] = np.full_like(generator[first], np.nan)
    save(tmp_path / "model.pth", generator)
    save(tmp_path / "kl16.ckpt", {"model": weights.tokenizer})
    files = f"checkpoint={tmp_path / 'model.pth'}", f"tokenizer={tmp_path / 'kl16.ckpt'}"
    assert _convert(tmp_path, "ear", *files) == DataError.exit_status
    message = capsys.readouterr().err
    assert not (tmp_path / "out/generator").exists()
    if damage != "not finite":
        assert not (tmp_path / "out").exists()
    expected = {
        "missing": ("12 missing", "and 2 more", "(missing)"),
        "unexpected": ("1 unexpected", "extra.weight: found float16[2,3]"),
        "shape": ("1 of another shape or kind", f"{first}: expected float32[48,16], found float32[16,48]"),
        "kind": ("found int32[48,16]",),
        "not finite": ("not finite",),
    }
    for text in expected[damage]:
        assert text in message, message


def test_what_is_missing_is_said_with_the_name_of_the_file_to_get(tmp_path, capsys):
    weights = published("var")
    save(tmp_path / "var.pth", weights.generator)
    save(tmp_path / "vae.pth", weights.tokenizer)
    cases = {
        (): "There is nothing to convert",
        (f"checkpoint={tmp_path / 'var.pth'}",): "vae_ch160v4096z32.pth",
        (f"checkpoint={tmp_path / 'vae.pth'}", f"tokenizer={tmp_path / 'vae.pth'}"): "holds a tokenizer",
        (f"checkpoint={tmp_path / 'none.pth'}",): "not a file of weights",
        (f"checkpoint={tmp_path / 'var.pth'}", "weights=ema"): "no such table",
        (f"checkpoint={tmp_path / 'var.pth'}", f"tokenizer={tmp_path / 'var.pth'}"): "do not fit",
    }
    for flags, match in cases.items():
        assert _convert(tmp_path, "var", *flags) != 0
        assert match in capsys.readouterr().err, flags
    assert _convert(tmp_path, "ear", f"checkpoint={tmp_path / 'var.pth'}", f"tokenizer={tmp_path}") != 0
    assert not (tmp_path / "out").exists()


def test_class_names_must_be_as_many_as_the_classes(tmp_path, capsys):
    weights = published("var")
    path = save(tmp_path / "both.pth", {"trainer": {"var_wo_ddp": weights.generator, "vae_local": weights.tokenizer}})
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    flags = f"checkpoint={path}", f"tokenizer={path}", f"class_names={tmp_path / 'names.txt'}"
    assert _convert(tmp_path, "var", *flags) == ConfigError.exit_status
    assert "2 lines, but the weights know 3 classes" in capsys.readouterr().err


def test_a_training_run_is_never_replaced(tmp_path, capsys):
    path = save(tmp_path / "vae.pth", published("ear").tokenizer)
    (tmp_path / "out/generator/checkpoints").mkdir(parents=True)
    assert _convert(tmp_path, "ear", f"tokenizer={path}") == ConfigError.exit_status
    assert "holds a training run" in capsys.readouterr().err


def test_our_own_models_have_no_published_format():
    for values in (
        {},
        {"generator": {"backbone": {"name": "masked"}, "continuous_head": "diffusion"}, "tokenizer": _KL_VAE},
    ):
        config = _resolved(values | {"data": {"image_px": 32}})
        with pytest.raises(ConfigError, match="no published system"):
            registry.generator_entries(config)
    with pytest.raises(ConfigError, match="no tokenizer of a published system"):
        registry.tokenizer_entries(_resolved({}))


# --- arrays -----------------------------------------------------------------------------------------------------------


def _fake() -> list[Entry]:
    layers = [linear(f"layer.{index}", "layers") for index in range(3)]
    return [
        *stacked(layers),
        kernel("conv.weight", "conv/kernel"),
        matrix("head.weight", "head/kernel"),
        reshaped("token", "token", (1, 1, 5), (5,)),
        same("steps", "steps"),
        constant("mask", lambda: np.tri(4, dtype=np.float32)),
        constant("order", lambda: np.arange(3), is_optional=False),
        Entry((), ("scale",), lambda _: (np.full(2, 3.0, np.float32),), lambda _: ()),
    ]


_EXPECTED = {
    "layers/kernel": ((3, 4, 5), FLOAT),
    "layers/bias": ((3, 5), FLOAT),
    "conv/kernel": ((3, 3, 2, 7), FLOAT),
    "head/kernel": ((6, 2), FLOAT),
    "token": ((5,), FLOAT),
    "steps": ((), np.dtype(np.int32)),
    "scale": ((2,), FLOAT),
}


def _theirs() -> dict[str, np.ndarray]:
    ours = _random({name: _EXPECTED[name] for name in _EXPECTED if name != "scale"})
    return dict(theirs_of(ours | {"scale": np.full(2, 3.0, np.float32)}, _fake()))


def test_a_round_trip_is_exact_and_constants_are_made_again():
    theirs = _theirs()
    ours = dict(ours_of(theirs, _fake(), _EXPECTED))
    assert {name: (array.shape, array.dtype) for name, array in ours.items()} == _EXPECTED
    assert (ours["layers/kernel"][1] == theirs["layer.1.weight"].T).all()
    assert ours["conv/kernel"][2, 1, 0, 6] == theirs["conv.weight"][6, 0, 2, 1]
    again = dict(theirs_of(ours, _fake()))
    assert again.keys() == theirs.keys() and all(again[name].tobytes() == theirs[name].tobytes() for name in theirs)
    del theirs["mask"]
    assert dict(ours_of(theirs, _fake(), _EXPECTED)).keys() == ours.keys()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(dtype):
    theirs = {name: array.astype(dtype) if array.dtype == FLOAT else array for name, array in _theirs().items()}
    ours = dict(ours_of(theirs, _fake(), _EXPECTED))
    assert ours["layers/kernel"].dtype == FLOAT
    assert (ours["layers/kernel"][2] == theirs["layer.2.weight"].astype(np.float32).T).all()


def test_faults_are_counted_by_kind_and_the_first_ten_listed():
    theirs = {name: array for name, array in _theirs().items() if not name.startswith("layer.")}
    theirs |= {f"more.{index}": np.zeros(1) for index in range(9)} | {"token": np.zeros((1, 5), np.float32)}
    with pytest.raises(DataError) as caught:
        ours_of(theirs, _fake(), _EXPECTED, where="FILE")
    text = str(caught.value)
    assert "FILE" in text and "6 missing, 9 unexpected, 1 of another shape or kind, of 15 arrays" in text
    assert "layer.0.weight: expected float32[5,4] (missing)" in text and "and 6 more" in text
    assert len(text.splitlines()) == 12
    del theirs["order"]
    with pytest.raises(DataError, match=r"7 missing"):
        ours_of(theirs, _fake(), _EXPECTED)


def test_entries_that_do_not_make_the_model_are_a_programming_error():
    with pytest.raises(ValueError, match=r"differ in 1 arrays: more"):
        ours_of(_theirs(), _fake(), _EXPECTED | {"more": ((), FLOAT)})
    with pytest.raises(ValueError, match="the model lacks: scale"):
        theirs_of(
            {name: np.zeros(shape, dtype) for name, (shape, dtype) in _EXPECTED.items() if name != "scale"}, _fake()
        )


def test_what_the_published_format_cannot_say_is_not_written_silently():
    ours = dict(ours_of(_theirs(), _fake(), _EXPECTED))
    with pytest.raises(ConfigError, match="no place for 1 arrays of this model: scale"):
        theirs_of(ours | {"scale": np.full(2, 3.5, np.float32)}, _fake())
    with pytest.raises(ConfigError, match="no place for 1 arrays of this model: more"):
        theirs_of(ours | {"more": np.zeros(1)}, _fake())


def test_one_entry_is_in_memory_at_a_time():
    side, count = 256, 8
    entries = [
        entry
        for index in range(count)
        for entry in stacked([[matrix(f"{index}.{layer}", f"k{index}")] for layer in "ab"])
    ]
    theirs = {f"{index}.{layer}": np.zeros((side, side), np.float32) for index in range(count) for layer in "ab"}
    expected = {f"k{index}": ((2, side, side), FLOAT) for index in range(count)}
    tracemalloc.start()
    moved = ours_of(theirs, entries, expected)
    total = sum(array.nbytes for array in moved.values())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 2 * count * side**2 * 4 and peak < 2.5 * total / count


def test_the_written_safetensors_names_the_same_layout_as_its_header(tmp_path):
    save(tmp_path / "vae.pth", published("ear").tokenizer)
    assert _convert(tmp_path, "ear", f"tokenizer={tmp_path / 'vae.pth'}") == 0
    document = json.loads((tmp_path / "out/tokenizer/model/config.json").read_text())
    assert document["config"]["convert"] == dataclasses.asdict(ConvertConfig())
    assert read.from_dict(document["config"]).tokenizer.name == "kl_vae"

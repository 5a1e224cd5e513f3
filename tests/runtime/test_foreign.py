"""Weights in files as other projects write them: the ones that are meant, or one line."""

import collections
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.errors import UserError
from runtime.foreign import AVERAGES, read_foreign

RAW = {"blocks.0.weight": torch.zeros(3, 2), "head.bias": torch.zeros(2)}
EMA = {name: tensor + 1 for name, tensor in RAW.items()}


def saved(folder: Path, content: Any, name: str = "a.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def value(path: Path, weights: str = "ema") -> float:
    """The number in all weights: 0 is raw, 1 the average."""
    found = read_foreign(path, weights).weights
    assert found.keys() == RAW.keys()
    (number,) = {float(x) for tensor in found.values() for x in tensor.flatten()}
    return number


@pytest.mark.parametrize("average", [*AVERAGES, "model_ema1", "ema_1", "model_ema2"])
@pytest.mark.parametrize("raw", ["model", "state_dict", "net", "module"])
def test_the_average_is_used_under_all_its_names(tmp_path: Path, average: str, raw: str) -> None:
    for content in ({raw: RAW, average: EMA}, {average: EMA, raw: RAW, "optimizer": {"state": {0: {"m": RAW}}}}):
        path = saved(tmp_path, content)
        assert value(path) == 1 and value(path, average) == 1
        assert value(path, "model") == 0
        assert read_foreign(path).entry == average


@pytest.mark.parametrize("average", ["ema_model", "model_ema", "ema", "ema_denoiser", "net_ema"])
@pytest.mark.parametrize("raw", ["model", "online_model", "denoiser"])
@pytest.mark.parametrize("outer", [None, "state_dict"])
def test_averages_by_prefix_in_one_state_dict(tmp_path: Path, average: str, raw: str, outer: str | None) -> None:
    flat = {f"{average}.{name}": tensor for name, tensor in EMA.items()}
    flat |= {f"{raw}.{name}": tensor for name, tensor in RAW.items()}
    flat |= {"initted": torch.tensor(True), "criterion.weight": torch.ones(1)}
    path = saved(tmp_path, flat if outer is None else {outer: flat, "epoch": 7})
    assert value(path) == 1 and value(path, "model") == 0
    assert (outer is None) == ("epoch 7" not in read_foreign(path).notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": RAW, "my_ema_thing": EMA}, "'my_ema_thing' may be an average.*its entries are model, my_ema_thing"),
        ({"model": RAW, "shadow": EMA}, "'shadow' may be an average"),
        ({"model": RAW, "Averaged": EMA}, "'Averaged' may be an average"),
        ({"ema_a": EMA, "model": RAW}, "'ema_a' may be an average"),
        ({"model_ema1": EMA, "model_ema2": EMA}, "several averages; choose one by --weights"),
        ({"generator": RAW, "discriminator": EMA}, "it is not clear which weights are meant"),
        *(({"model": RAW, name: EMA}, f"'{name}' may be an average") for name in ("modelEma", "EMAModel", "ewma")),
        ({"model": RAW, "teacher": EMA}, "'teacher' may be an average"),
        ({f"{p}.{k}": v for p in ("model", "modelEMA") for k, v in RAW.items()}, "'modelEMA' may be an average"),
        ({f"{p}.{k}": v for p in ("model", "polyak") for k, v in RAW.items()}, "'polyak' may be an average"),
    ],
)
def test_what_is_not_understood_is_refused_with_what_is_there(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_foreign(saved(tmp_path, content))
    assert "\n" not in str(error.value) and "--ckpt" in str(error.value)


def test_doubtful_entries_are_chosen_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": RAW, "my_ema_thing": EMA})
    assert value(path, "my_ema_thing") == 1 and value(path, "model") == 0
    with pytest.raises(UserError, match="holds no weights 'ema2'; its entries are model, my_ema_thing"):
        read_foreign(path, "ema2")


LISTED = [*EMA.values()]


@pytest.mark.parametrize(
    ("beside", "place"),
    [
        ({"ema": {"decay": 0.99, "num_updates": 3, "shadow_params": LISTED}}, "ema"),  # score_sde
        ({"ema_model": LISTED}, "ema_model"),
        ({"ema": tuple(LISTED)}, "ema"),
        ({"callbacks": {"EMA{'decay': 0.99}": {"ema_weights": EMA}}}, "callbacks.EMA"),
        ({"callbacks": {"Averager": {"average_model_state": EMA}}}, "callbacks.Averager.average_model_state"),
        ({"optimizer_states": [{"state": {}, "ema": LISTED}]}, "optimizer_states.0.ema"),  # NeMo
    ],
)
def test_averages_that_are_not_weights_by_name_are_not_passed_over(tmp_path: Path, beside: Any, place: str) -> None:
    path = saved(tmp_path, {"state_dict": RAW, **beside})
    with pytest.raises(UserError, match=f"'{place}' may be an average, and is not one of weights by name; --weights"):
        read_foreign(path)
    assert value(path, "model") == 0
    assert value(saved(tmp_path, {"model": RAW, "model_ema": EMA, **beside})) == 1, "one that can be read is there"


def test_what_only_sounds_like_an_average_is_none(tmp_path: Path) -> None:
    """Moments of gradients by parameter, in lists and flat; callbacks that watch an average; entries without one."""
    moments = {"state": {0: {"exp_avg": LISTED[0], "max_exp_avg_sq": LISTED[0]}}, "foreach": {"exp_avg": LISTED}}
    watched = {
        "ModelCheckpoint{'monitor': 'ema_loss'}": {"best": torch.tensor(1.0), "kept": {"ema.ckpt": LISTED[0].sum()}}
    }
    beside = {
        "optimizer": moments,
        "callbacks": watched,
        "ema": None,
        "model_ema": {},
        "optim": {"w": {"square_avg": EMA}},
    }
    assert value(saved(tmp_path, {"model": RAW, **beside})) == 0


def test_weights_and_average_in_each_other_s_place(tmp_path: Path) -> None:
    """As Lightning's callback WeightAveraging saves them."""
    beside = {"averaging_state": {"n_averaged": torch.tensor(3)}, "global_step": 5}
    path = saved(tmp_path, {"state_dict": EMA, "current_model_state": RAW, **beside})
    assert value(path) == 1 and value(path, "model") == 0
    assert [read_foreign(path, weights).group for weights in ("ema", "model")] == ["ema", "model"]
    assert value(saved(tmp_path, {"current_model_state": RAW})) == 0


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("change", [Tensor.to_sparse, lambda tensor: tensor.to("meta")], ids=["sparse", "meta"])
def test_tensors_without_dense_numbers_are_one_line(tmp_path: Path, change: Any, zipped: bool) -> None:
    content = {"ema": {name: change(tensor) for name, tensor in EMA.items()}}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"blocks\.0\.weight is sparse or without numbers; save it as a dense"):
        read_foreign(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_torchscript_archive_is_told(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a TorchScript archive, not weights by name; save its state_dict\(\)$"):
        read_foreign(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.module.", "module._orig_mod.", "module.module.", "_fsdp_wrapped_module._checkpoint_wrapped_module.",
        "_forward_module.module._orig_mod.", "model.", "model._orig_mod.", "module.model.", "net.",
    ],
)  # fmt: skip
def test_prefixes_in_any_order_and_number(tmp_path: Path, prefix: str) -> None:
    assert value(saved(tmp_path, {f"{prefix}{name}": tensor for name, tensor in EMA.items()})) == 1
    inside = {name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._orig_mod."): x for name, x in EMA.items()}
    assert value(saved(tmp_path, {"ema": inside, "model": RAW})) == 1
    save_file({f"{prefix}{name}": tensor for name, tensor in EMA.items()}, tmp_path / "a.safetensors")
    assert value(tmp_path / "a.safetensors") == 1


def test_counters_and_projectors_are_left_out_by_name(tmp_path: Path) -> None:
    averaged = {f"module.{name}": tensor for name, tensor in EMA.items()} | {"n_averaged": torch.tensor(5)}
    assert value(saved(tmp_path, averaged)) == 1
    path = saved(tmp_path, {"ema": EMA | {"projectors.0.0.weight": torch.ones(2)}, "steps": 4, "step": 9})
    assert value(path) == 1 and {"without projectors", "step 9"} <= set(read_foreign(path).notes)


@pytest.mark.parametrize("prefix", ["projectors.", "module.projectors.", "_orig_mod.module.projectors."])
def test_projectors_are_left_out_in_every_kind_of_file(tmp_path: Path, prefix: str) -> None:
    """As of REPA: a pickle with wrappers' names, safetensors, safetensors in shards, one average by prefix."""
    wrapped = prefix.removesuffix("projectors.")
    names = [f"{prefix}{i}.{j}.{kind}" for i in range(2) for j in (0, 2, 4) for kind in ("weight", "bias")]
    weights = {f"{wrapped}{name}": x for name, x in EMA.items()} | {name: torch.ones(2) for name in names}
    files = [saved(tmp_path, {"ema": weights, "model": RAW}), tmp_path / "b.safetensors"]
    save_file(weights, files[1])
    shards = tmp_path / "shards"
    shards.mkdir()
    save_file({name: weights[name] for name in names}, shards / "2.safetensors")
    save_file({name: x for name, x in weights.items() if name not in names}, shards / "1.safetensors")
    index = {name: f"{1 + (name in names)}.safetensors" for name in weights}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    files.append(saved(tmp_path, {f"ema.{name}": x for name, x in weights.items()}, "c.pt"))
    for path in (*files, shards):
        assert value(path) == 1 and "without projectors" in read_foreign(path).notes, path


def test_parts_with_names_like_projectors_are_not_left_out(tmp_path: Path) -> None:
    path = saved(tmp_path, EMA | {"projectors_in.weight": torch.ones(2), "blocks.0.projectors.weight": torch.ones(2)})
    kept = read_foreign(path).weights.keys()
    assert kept == EMA.keys() | {"projectors_in.weight", "blocks.0.projectors.weight"}


@pytest.mark.parametrize(
    "beside",
    [
        {"loss": np.float64(0.5), "n": np.int64(3), "lrs": np.array([1.0])},
        collections.defaultdict(list, {"a": [1]}),
        {"args": __import__("argparse").Namespace(lr=1.0), "path": Path("x")},
        {"seen": {1, 2}, "order": collections.OrderedDict(a=1)},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_classes_beside_the_weights(tmp_path: Path, beside: Any, zipped: bool) -> None:
    content = {"ema": EMA, "model": RAW, "extra": beside}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert value(tmp_path / "a.pt") == 1


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> object:
        return Path.touch, (self.target,)


class Settings:
    """A class of another project."""


@pytest.mark.parametrize("zipped", [True, False])
def test_other_classes_are_refused_by_name_and_do_not_run(tmp_path: Path, zipped: bool) -> None:
    path, target = tmp_path / "a.pt", tmp_path / "exploded"
    torch.save({"ema": EMA, "x": Bomb(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"refused, because .*: it holds a (pathlib|getattr|builtins)"):
        read_foreign(path)
    torch.save({"ema": EMA, "x": Settings()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"holds a tests\.runtime\.test_foreign\.Settings"):
        read_foreign(path)
    path.write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(UserError, match="refused"):
        read_foreign(path)
    assert not target.exists()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.ckpt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html><head></head></html>", "a web page, not a checkpoint"),
        (b"\n  <html lang=en>", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
    ],
)
def test_what_a_download_left_is_told_by_its_first_bytes(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_foreign(tmp_path / name)


def shards(folder: Path) -> Path:
    files = {}
    for number, (name, tensor) in enumerate(EMA.items(), start=1):
        files[name] = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensor}, folder / files[name])
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index


def test_shards_load_from_their_index_or_folder(tmp_path: Path) -> None:
    index = shards(tmp_path)
    assert value(index) == value(tmp_path) == 1
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is missing beside it"):
        read_foreign(index)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="is missing beside it"):
        read_foreign(index)
    for damaged in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(damaged)
        with pytest.raises(UserError, match="not an index of safetensors files"):
            read_foreign(index)


def test_folders_hold_one_file_of_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; give a file in it, such as checkpoints/0050000.safetensors"):
        read_foreign(tmp_path)
    run = tmp_path / "runs" / "000-DiT" / "checkpoints"
    run.mkdir(parents=True)
    save_file(EMA, run / "0000100.safetensors")
    with pytest.raises(UserError, match="such as runs/000-DiT/checkpoints/0000100.safetensors"):
        read_foreign(tmp_path)
    save_file(EMA, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text('{"sample_size": 8}')
    assert value(tmp_path) == 1 and read_foreign(tmp_path).config == {"sample_size": 8}
    save_file(RAW, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="is a folder; give a file in it: a.safetensors, b.safetensors"):
        read_foreign(tmp_path)


def flipped(path: Path, part: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(part)] ^= 1
    path.write_bytes(bytes(content))


def test_zip_files_are_checked_and_others_are_said_not_to_be(tmp_path: Path) -> None:
    numbers: dict[str, Tensor] = {"a.weight": torch.arange(64.0) + 0.123}
    path = saved(tmp_path, numbers)
    assert read_foreign(path).verified
    flipped(path, numbers["a.weight"].numpy().tobytes())
    with pytest.raises(UserError, match="damaged, a/data/0 in it does not match its checksum"):
        read_foreign(path)
    torch.save(numbers, path, _use_new_zipfile_serialization=False)
    save_file(numbers, tmp_path / "a.safetensors")
    assert not read_foreign(path).verified and not read_foreign(tmp_path / "a.safetensors").verified


def test_parts_that_are_not_used_are_not_compared(tmp_path: Path) -> None:
    ema, moments = torch.arange(64.0) + 0.123, torch.arange(64.0) + 0.456
    content = {"optimizer": {"moments": moments}, "ema": {"a.weight": ema, "a.rows": ema[8:16]}, "epoch": 3}
    path = saved(tmp_path, content)
    flipped(path, moments.numpy().tobytes())
    assert torch.equal(read_foreign(path).weights["a.rows"], ema[8:16]) and read_foreign(path).verified
    flipped(path, ema.numpy().tobytes())
    with pytest.raises(UserError, match="damaged, a/data/"):
        read_foreign(path)
    path = saved(tmp_path, content)
    flipped(path, b"epoch")
    with pytest.raises(UserError, match=r"damaged or truncated zip file \(Bad CRC-32 for file 'a/data.pkl'\)"):
        read_foreign(path)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_parts_in_an_order_of_other_programs(tmp_path: Path, is_damaged: bool) -> None:
    numbers = {"a": torch.arange(64.0) + 0.123, "b": torch.arange(64.0) + 0.456}
    path, other = saved(tmp_path, numbers), tmp_path / "other.pt"
    first, second = (b"X\x01\x00\x00\x00" + digit for digit in (b"0", b"1"))  # strings of one character in a pickle
    names = {"a/data/0": "a/data/1", "a/data/1": "a/data/0"}
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(other, "w") as after:
        for name in before.namelist():
            part = before.read(name)
            if name == "a/data.pkl":
                assert first in part and second in part
                part = part.replace(first, b"X2").replace(second, first).replace(b"X2", second)
            after.writestr(names.get(name, name), part)
    if is_damaged:
        flipped(other, numbers["b"].numpy().tobytes())
        with pytest.raises(UserError, match="damaged, a/data/0 in it does not match its checksum"):
            read_foreign(other)
    else:
        found = read_foreign(other)
        assert found.verified and all(torch.equal(found.weights[name], numbers[name]) for name in numbers)


def test_two_parts_of_one_name_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.zeros(4), "b": torch.ones(4)})
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")  # the list of parts; their own headers come before it
    path.write_bytes(content[:start] + content[start:].replace(b"a/data/1", b"a/data/0"))
    with pytest.raises(UserError, match="two parts of one name"):
        read_foreign(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_damaged_config_next_to_the_weights_is_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert read_foreign(saved(tmp_path, EMA)).config is None

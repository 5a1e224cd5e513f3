"""Migration of each kind of document, on those that version 0.1 wrote (tests/golden/format1)."""

import json

import pytest
from safetensors import safe_open

import sample_ddp
import sampling.config
import training.config
from diffusion import PROCESSES
from models import FAMILIES, family_name
from runtime import migrate
from runtime.documents import flatten
from tests import format1

RUNS = list(format1.manifest()["runs"])
RENAMED_GROUPS = {"alignment/": "projector/", "optimizer/alignment.": "optimizer/projector."}


def checkpoint_document(run):
    return json.loads(format1.layout(run).metadata[format1.METADATA])


def read(path):
    return json.loads((format1.FOLDER / path).read_text())


@pytest.mark.parametrize("run", RUNS)
def test_checkpoints(run):
    old = checkpoint_document(run)
    new, renamed = migrate.checkpoint(old)
    average = "ema-0.99" if run == "dit-cosine" else "ema-0.9999"
    assert renamed == {"ema/": f"{average}/", **RENAMED_GROUPS}
    assert new["averages"] == {average: {"decay": float(average.removeprefix("ema-"))}}
    assert (new["format"], new["step"], new["draws"]) == (2, format1.STEP, 1)
    assert new["model"] == migrate.model_fields(old["model"])
    assert new["process"] == migrate.process_fields(old["process"])
    assert new["encoder"] == {"name": old["data"]["vae"]}
    assert new["data"] == {name: old["data"].get(name) for name in ("image_shape", "classes")}
    assert new["train"] == old["train"], "run_config migrates it"
    assert migrate.checkpoint(new) == (new, {})


@pytest.mark.parametrize("run", RUNS)
def test_models_and_processes_are_built_from_migrated_fields(run):
    old = checkpoint_document(run)
    fields = migrate.model_fields(old["model"])
    name, shape = fields.pop("name"), fields["sample_shape"]
    config = FAMILIES[family_name(name)].config(**{**fields, "sample_shape": tuple(shape)})
    assert shape == [old["model"]["in_channels"], old["model"]["input_size"], old["model"]["input_size"]]
    assert (config.hidden_size, config.depth) == (64, old["model"]["depth"])
    fields = migrate.process_fields(old["process"])
    PROCESSES[fields.pop("name")](**fields)


def test_former_names_of_a_process_s_settings():
    assert migrate.process_fields(checkpoint_document("dit-cosine")["process"]) == {
        "name": "gaussian", "noise_schedule": "squaredcos_cap_v2", "prediction": "x_start"
    }  # fmt: skip
    assert migrate.process_fields(checkpoint_document("dit")["process"])["prediction"] == "epsilon"
    assert migrate.process_fields(checkpoint_document("dit-flow")["process"]) == {
        "name": "flow", "times": "uniform", "shift": 2.0, "weight": "ratio_at_most_5", "cosine": 0.5
    }  # fmt: skip
    present = {"name": "flow", "cosine": 0.5, "prediction": "velocity"}
    assert migrate.process_fields(present) == present and migrate.model_fields(present) == present


def train(values):
    return migrate.run_config(values, training.config.TrainSettings, training.config.KINDS, training.config.PROGRAM)


@pytest.mark.parametrize("run", RUNS)
def test_settings_of_runs(run):
    """In config.json and in checkpoints; test_settings.py compares them with those of the same command line today."""
    flat = json.loads(format1.config_path(run).read_text())
    nested = train(flat)
    assert (nested["format"], nested["script"]) == (2, "train.py")
    assert nested["model"]["name"] == flat["model"] and nested["process"]["name"] == flat["process"]
    assert nested["data"]["data_path"] == flat["data_path"], "general settings are kept, null or not"
    owned = flatten({kind.name: nested[kind.name] for kind in training.config.KINDS if kind.name in nested})
    assert None not in owned.values(), "those of owners that the run did not use are dropped"
    in_checkpoint = {name: value for name, value in checkpoint_document(run)["train"].items() if name != "resume"}
    assert train(in_checkpoint) == train({name: flat[name] for name in in_checkpoint})
    assert train(nested) == nested


def test_former_flags_of_a_run():
    runs = ("dit-cosine", "dit-flow", "dydit")
    cosine, flow, dydit = (train(json.loads(format1.config_path(run).read_text())) for run in runs)
    assert cosine["process"] == {"name": "gaussian", "noise_schedule": "squaredcos_cap_v2", "prediction": "x_start"}
    assert cosine["model"]["learn_sigma"] is False and cosine["optimization"]["ema_decay"] == 0.99
    assert flow["process"]["cosine"] == 0.5 and "noise_schedule" not in flow["process"]
    assert dydit["loss"]["flops_target"] == 0.6 and dydit["loss"]["stratified_t"] is True
    assert "router_layout" in dydit["model"] and "encoder_depth" not in dydit["model"]


def test_settings_by_hand():
    assert train({"max_steps": 3, "depth": 5}) == {
        "format": 2, "script": "train.py", "optimization": {"max_steps": 3}, "model": {"depth": 5}
    }  # fmt: skip
    assert train({"predict_xstart": False, "stepz": 1}) == {"format": 2, "script": "train.py", "stepz": 1}
    for model in ("no model", 3, None):
        assert train({"model": model, "hidden_size": 8})["model"] == {"name": model, "hidden_size": 8}
    nested = {"model": {"name": "DiT-S/2"}, "depth": 5}
    assert train(nested) == nested, "the parser reports what is wrong with it"


def job(values):
    return migrate.run_config(values, sample_ddp.SampleDDPSettings, sampling.config.KINDS, sample_ddp.PROGRAM)


def test_settings_of_sampling_jobs():
    nested = job(read("sample_job_finished/a.json")["config"])
    assert (nested["format"], nested["script"]) == (2, "sample_ddp.py")
    assert nested["sampler"] == {"name": "ddpm", "clip_denoised": True}, "not those of other samplers"
    assert nested["model"] == {"name": "DiT-debug/2"} and nested["guidance"]["cfg_scale"] == 2
    assert nested["job"]["num_fid_samples"] == 6 and nested["checkpoint"]["ckpt"] == "0000002.safetensors"
    shared = job(read("shared_job/ddt.json")["config"])
    assert shared["caching"] == {
        "cache_interval": None, "sharing_interval": 2, "sharing": "cheapest", "sharing_dir": "sharing"
    }  # fmt: skip
    assert shared["sampler"]["name"] == "euler"


def test_the_settings_of_a_run_are_recognised_in_sampling():
    assert job(json.loads(format1.config_path("dit").read_text()))["script"] == "train.py"


def test_calibrations():
    (path,) = (format1.FOLDER / "shared_job" / "sharing").glob("*.safetensors")
    with safe_open(path, framework="numpy") as file:
        old = json.loads(file.metadata()[format1.METADATA])
    settings = {"sampler": "euler", "kind": None, "last_step": None, "shift": None}
    process = {"name": "flow", "times": "logit_normal", "shift": 1.0, "weight": "constant", "cosine": 0.0}
    new = migrate.calibration(old, {"sampling": {**settings, "process": {}}})
    assert new["sampling"] == {**settings, "process": process}
    assert new == old | {"format": 2, "sampling": new["sampling"]}
    assert migrate.calibration(new, {"sampling": {}}) == new
    other = {**old["sampling"], "sampler": "adams", "adams_order": 3, "time_shift": 2.0}
    like = {"sampling": {"sampler": "adams", "order": 2, "shift": None, "process": {}}}
    migrated = migrate.calibration({**old, "sampling": other}, like)["sampling"]
    assert (migrated["order"], migrated["shift"], migrated["sampler"]) == (3, 2.0, "adams")
    assert migrate.calibration({}, like) == {}


@pytest.mark.parametrize("name", ["index", "manifest"])
def test_latent_stores(name):
    old = read(f"latent_store/{name}.json")
    new = migrate.latent_index(old)
    assert new["format"] == 2 and new["row_shape"] == old["moments_shape"]
    assert new["encoder"] == {
        "class": "AutoencoderKL", "name": "vae", "sha256": old["encoder_sha256"], "stochastic": True,
        "scaling_factor": 0.25, "shift_factor": 0.0, "latents_mean": [], "latents_std": [],
    }  # fmt: skip
    kept = old.keys() - {"format", "vae", "encoder_sha256", "scale", "moments_shape"}
    assert {key: new[key] for key in kept} == {key: old[key] for key in kept}
    assert new.keys() == kept | {"format", "row_shape", "encoder"}
    assert migrate.latent_index(new) == new

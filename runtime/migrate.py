"""Migration of files of earlier versions: one function per kind, applied where our files are read.

Format 1 is that of version 0.1, format 2 that of this one (docs/checkpoints.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtime.json_file import Json
from runtime.settings import Kind, flag_name, places

_OF_TRAINING = {"results_dir", "max_steps", "global_batch_size"}  # settings of no other script
# Former name of a setting -> present name
_PROCESS = {"direction": "cosine"}
_SAMPLER = {"time_shift": "shift", "sde": "kind", "heun_exact": "exact", "adams_order": "order"}


def checkpoint(meta: Json) -> tuple[Json, dict[str, str]]:
    """Migrate a checkpoint's JSON document.

    Returns:
        The document in format 2, and prefixes of tensor names that have changed, former -> present. Settings
        of the training run stay as they are under "train"; `run_config` migrates them when the run is resumed.
    """
    if meta.get("format") != 1:
        return meta, {}
    decay = meta["train"].get("ema_decay", 0.9999)
    average = f"ema-{decay:g}"
    return {
        "format": 2,
        "step": meta["step"],
        "model": model_fields(meta["model"]),
        "process": process_fields(meta["process"]),
        "encoder": {"name": meta["data"]["vae"]},
        "data": {"image_shape": meta["data"]["image_shape"], "classes": meta["data"].get("classes")},
        "averages": {average: {"decay": decay}},
        "train": meta["train"],
        "draws": 1,
    }, {"ema/": f"{average}/", "alignment/": "projector/", "optimizer/alignment.": "optimizer/projector."}


def model_fields(model: Mapping[str, object]) -> Json:
    """Migrate a model's name and config: one shape in place of channels and side."""
    fields: Json = dict(model)
    if "input_size" in fields:
        side = fields.pop("input_size")
        fields["sample_shape"] = [fields.pop("in_channels"), side, side]
    return fields


def process_fields(process: Mapping[str, object]) -> Json:
    """Migrate a process's name and settings."""
    fields: Json = {_PROCESS.get(name, name): value for name, value in process.items() if name != "learn_sigma"}
    if "predict_xstart" in fields:
        fields["prediction"] = "x_start" if fields.pop("predict_xstart") else "epsilon"
    return fields


def run_config(values: Json, cls: type, kinds: Sequence[Kind], program: str) -> Json:
    """Migrate the flat settings of a run (config.json, or a checkpoint's "train") into sections by owner.

    Args:
        values: The settings; those of format 2 are returned as they are.
        cls: Dataclass of the program's general settings.
        kinds: Owners of further settings.
        program: The script that wrote them.
    """
    if "format" in values or any(isinstance(value, dict) for value in values.values()):
        return values
    known, names = places(cls, kinds), [kind.name for kind in kinds]
    # version 0.1 did not record the script
    script = "train.py" if values.keys() >= _OF_TRAINING else program
    nested: Json = {"format": 2, "script": script}
    for name, value in values.items():
        place = known.get(flag_name(name))
        if place is None:
            nested[name] = value  # the parser reports it
            continue
        unused = value is None and place.kind is not None  # version 0.1 wrote null for settings of other owners
        if unused or (value is False and place.stands_for is not None):
            continue
        *sections, field = [*place.path, "name"] if place.path[0] in names and place.kind is None else place.path
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[field] = value if place.stands_for is None else place.stands_for
    for kind in kinds:
        section = nested.get(kind.name, {})
        owner = _owner(kind, section.get("name"))
        if owner is not None:  # version 0.1 wrote settings of processes and families that the run did not use, too
            fields = {"name", *(flag.field.name for flag in kind.flags(owner).values())}
            nested[kind.name] = {field: value for field, value in section.items() if field in fields}
    return nested


def _owner(kind: Kind, name: object) -> str | None:
    """The owner that a name chooses; None for an unknown name, which the parser reports."""
    try:
        owner = kind.owner_of(name) if isinstance(name, str) else None
    except ValueError:
        return None
    return owner if owner in kind.owners else None


def calibration(old: Json, like: Json) -> Json:
    """Migrate the settings that similarities of states were measured with.

    Args:
        old: Settings in a file of similarities.
        like: Present settings of the same kind; those of the sampler are recognised by their names here.
    """
    if "format" in old or "sampling" not in old:
        return old
    sampling = old["sampling"]
    name, process = sampling["process"]
    renamed = {_SAMPLER.get(key, key): value for key, value in sampling.items() if value is not None}
    own = {key: renamed.get(key, default) for key, default in like["sampling"].items()}
    process = process_fields({"name": name, **process})
    return {**old, "format": 2, "sampling": {**own, "sampler": sampling["sampler"], "process": process}}


def latent_index(old: Json) -> Json:
    """Migrate the index or manifest of a latent store.

    Format 1 knew one kind of encoder, AutoencoderKL, and recorded its scaling factor alone. A document of another
    format is returned as it is.
    """
    if old.get("format") != 1:
        return dict(old)
    names = {"vae": "name", "encoder_sha256": "sha256", "scale": "scaling_factor"}
    encoder = {"class": "AutoencoderKL", "stochastic": True, "shift_factor": 0.0, "latents_mean": [], "latents_std": []}
    encoder |= {new: old[name] for name, new in names.items() if name in old}
    kept = {name: value for name, value in old.items() if name not in (*names, "moments_shape")}
    shape = {"row_shape": old["moments_shape"]} if "moments_shape" in old else {}
    return {**kept, **shape, "format": 2, "encoder": encoder}


LATER_FLAGS = {"--guidance": "cfg", "--guidance-schedule": "constant"}  # with the value of what version 0.1 did

ENCODER = "content of --vae"  # a setting that jobs did not record at first


def sample_job(old: Json, now: Mapping[str, object]) -> Json:
    """Migrate the settings of an unfinished sampling job.

    Args:
        old: Settings in its folder; returned as they are if this version would make other images.
        now: Settings of the present job, by flag.
    """
    old = {ENCODER: now.get(ENCODER), **old}
    if "format" in old or "torch" not in old or old.get("--sampler") == "dpm++":
        return old
    recorded = {**LATER_FLAGS, **old, "format": now.get("format"), "--sharing-interval": old.get("--refresh-rate")}
    # version 0.1 recorded what the checkpoint decides, too, and settings of samplers that the job does not use
    of_checkpoint = {name: old.get(name) for name in ("--image-size", "--num-classes")}
    for flag, default in {**of_checkpoint, "--clip-denoised": old.get("--vae") == "none"}.items():
        if now.get(flag) is None and old.get(flag) == default:
            recorded[flag] = None
    return {flag: recorded.get(flag) for flag in now}

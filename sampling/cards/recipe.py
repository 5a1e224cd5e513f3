"""Recipe and data in a card: what decides the result in a table, the rest folded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runtime.averages import average_warning
from runtime.json_file import Json
from runtime.licences import UNKNOWN
from sampling.cards.text import as_text, at, digest, fields, folded, precision, table

DIGITS = "the training split of scikit-learn's 8 x 8 handwritten digits (`sklearn.datasets.load_digits`)"
SOURCES_OF_DATA = {
    "digits": f"{DIGITS}, grey",
    "moving-digits": f"clips that this code makes of {DIGITS}: a digit moves in one of four directions at two speeds",
    "captioned-digits": f"pictures or clips with sentences that this code makes of {DIGITS}",
    "imagefolder": "a folder of images",
    "videofolder": "a folder of videos",
    "latents": "latents, encoded before the training",
    "idx": "images of idx files, the format of MNIST",
    "huggingface": "a table of images",
    "webdataset": "shards of images",
}
FOLDED = ("model", "process", "loss", "optimizer", "averages", "train", "autoencoder", "text", "preset")


def untrained(document: Json) -> str | None:
    """Warning of an average that still holds the weights of before its training; None without one.

    Args:
        document: Of a checkpoint, or from `sampling.publishing.document_of`, with the name of the weights.
    """
    average = at(document, "averages", document.get("weights", ""))
    optimization, updates = at(document, "train", "optimization"), document.get("updates", document.get("step"))
    decay = at(average, "decay") if average else None
    if decay is None or updates is None:
        return None
    updates = average.get("updates", updates)  # an average every few steps may be behind
    ramp = bool(at(optimization, "ema_ramp"))
    trained_before = at(document, "train", "run", "init_from") is not None
    return average_warning(decay, updates, ramp=ramp, from_weights=trained_before, when=f"after {updates:,} updates")


def show_recipe(document: Json, parameters: int) -> Iterator[str]:
    """Tables of the recipe and of sampling's defaults, and all settings folded."""
    yield table([("network", f"{document['model']['name']}, {parameters:,} parameters"), *_recipe(document)])
    rest = {name: document[name] for name in FOLDED if name in document}
    yield folded("All settings", rest)


def show_data(document: Json) -> Iterator[str]:
    """Table of the training data."""
    data, name = document["data"], at(document, "train", "data", "dataset")
    rows: list[tuple[object, ...]] = [("data set", f"{name}: {SOURCES_OF_DATA.get(name, name)}" if name else UNKNOWN)]
    rows.append(("samples", f"{data['images']:,}" if "images" in data else UNKNOWN))
    rows.append(("shape", f"{' x '.join(map(str, data['image_shape']))} ({_axes(data['image_shape'])})"))
    classes = data.get("classes") or ()
    names = ", ".join(map(str, classes[:10])) + (", ..." if len(classes) > 10 else "")
    rows.append(("classes", f"{len(classes)}: {names}" if classes else document["model"].get("num_classes", "none")))
    if data.get("digest"):
        rows.append(("fingerprint", f"{digest(data['digest'])}, the same wherever the data are the same"))
    yield table(rows)


def _axes(shape: Sequence[int]) -> str:
    return "channels, height, width" if len(shape) == 3 else "frames, channels, height, width"


def _recipe(document: Json) -> Iterator[tuple[object, ...]]:
    """Rows of the recipe that decide the result, also where they are defaults."""
    process, preset, train = document["process"], document["preset"], document.get("train") or {}
    yield "process", fields(process, but=[] if process.get("loss_weight") == "min_snr" else ["min_snr_gamma"])
    encoder = document["encoder"]["name"]
    yield "autoencoder", "none: the network works on pixels" if encoder == "none" else encoder
    if "text" in document:
        yield "text encoder", document["text"].get("name")
    yield "weights", ", ".join(_weights(document))
    if (rounded := document.get("rounded")) is not None:
        yield "rounded", f"linear maps of blocks, to {rounded}; samples of --precision {rounded} do not change by it"
    unused = [] if at(document, "loss", "route_tokens") else ["route_tokens", "route_blocks"]
    yield "loss", fields(document["loss"], but=unused) if "loss" in document else UNKNOWN
    if (dropped := document["model"].get("class_dropout_prob")) is not None:
        yield "labels dropped, for guidance", f"{dropped:.0%}"
    yield "optimizer", fields(document["optimizer"]) if "optimizer" in document else UNKNOWN
    if optimization := train.get("optimization"):
        yield from _optimization(optimization, document.get("step"), document["data"].get("images"))
    if at(train, "alignment", "align") is not None:
        yield "features aligned with", fields(train["alignment"], "align")
    if at(train, "optimization", "train_only") == "lora":
        yield "rank of the low-rank updates (LoRA)", fields(train["lora"], "lora_rank")
    if compute := train.get("compute"):
        yield "precision, device", precision(compute)
    if (start := at(train, "run", "init_from")) is not None:
        yield "started from", start
    shown = {name: value for name, value in preset.items() if name != "vae"}
    yield "sampling by default, of Pipeline and sample_ddp.py", fields(shown, "sampler")


def _weights(document: Json) -> Iterator[str]:
    """Name of the set of weights, the step that they are of, and the average that they are."""
    yield str(document["weights"])
    yield f"step {document['step']:,}" if "step" in document else f"step {UNKNOWN}"
    if (decay := at(document, "averages", document["weights"], "decay")) is not None:
        yield f"an average over steps with decay {decay}"


def _optimization(optimization: Json, step: int | None, images: int | None) -> Iterator[tuple[object, ...]]:
    """Rows about the optimization: learning rate, batch, length, seed, and what is not the default."""
    batch, warm_up = optimization.get("global_batch_size"), optimization.get("lr_warmup_steps")
    yield "learning rate", f"{optimization.get('lr')}, {optimization.get('lr_schedule')}, {warm_up} steps of warm-up"
    seen = step * batch if step and batch else 0
    epochs = f", {seen / images:.3g} epochs" if images else ""
    yield "batch", f"{batch} samples a step" + (f"; {seen:,} samples seen{epochs}" if seen else "")
    for name, title in (
        ("grad_clip", "largest gradient norm"),
        ("skip_updates_above", "updates skipped above the norm"),
        ("train_only", "trained only"),
        ("ema_ramp", "average over few steps at first"),
    ):
        if optimization.get(name):
            yield title, as_text(optimization[name])
    yield "seed", optimization.get("global_seed")

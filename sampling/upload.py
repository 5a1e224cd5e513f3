"""Folders of `sampling.publishing` that go to the hub as they are, with what a person added to them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from runtime.errors import UserError
from runtime.hub import CARD, CARD_DIGEST, PICTURE, Former, card_digest, check_repository, push_folder
from runtime.licences import licence_to_publish, origin_of, origin_to_name
from runtime.pretrained import CONFIG, DOCUMENT, pretrained_folder, read_weights
from sampling.cards.loading import card_of_copy, licence_of_card, renamed_card


def push_saved(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    update: bool = False,
    card: Literal["keep", "new"] | None = None,
    flag: str = "repository",
    folder_flag: str = "folder",
) -> str:
    """Upload a folder of `save_folder` as it is, with its card and all that was added to it, as one commit.

    The name of the repository takes the place of the folder's, in the card's title and in the lines that load it.

    Args:
        folder: The folder.
        repository: "owner/name".
        private: Make a new repository private.
        update: Replace weights of this code that are there already.
        card: As for `push`.
        flag: Name of the repository in messages.
        folder_flag: Name of the folder in messages.

    Returns:
        Address of the repository.

    Raises:
        UserError: As `push`; and for a folder without weights of this code, or without a card.
    """
    where, inside = f"{folder_flag} {folder}", pretrained_folder(folder)
    if not folder.is_dir() or inside is None or inside == folder.parent or not (folder / CARD).is_file():
        raise UserError(f"{where}: no folder that publish.py --output wrote, with config.json and {CARD}")
    text, (_, meta) = (folder / CARD).read_text(), read_weights(inside, where)
    licence = licence_of_card(text, where) or meta.get("licence")
    if licence is None:
        raise UserError(
            f"{where}: no licence in its {CARD}; write one, such as license: apache-2.0, into its first lines"
        )
    origin = origin_of(folder, meta)
    licence_to_publish(licence, origin, f"{where}: {CARD}: license")
    origin = origin_to_name(origin, meta, repository)
    former = check_repository(repository, update=update, card=card, flag=flag)
    text = renamed_card(text, meta["name"], repository)
    if origin is not None and origin.name == meta["name"]:  # another owner's, and its card names an earlier one or none
        text = card_of_copy(text, origin)
    config = json.loads((inside / CONFIG).read_text())
    config[DOCUMENT] |= {"name": repository, "licence": licence, CARD_DIGEST: card_digest(text)}
    config[DOCUMENT]["origin"] = None if origin is None else origin.as_json()
    changed = {CARD: text, (inside / CONFIG).relative_to(folder).as_posix(): json.dumps(config, indent=2) + "\n"}
    left_out = kept_files(card, former, PICTURE.findall(text))
    return push_folder(
        folder, repository, former=former, changed=changed, left_out=left_out, private=private, flag=flag
    )


def kept_files(card: str | None, former: Former, pictures: Iterable[str]) -> set[str]:
    """Files of a new card that are not uploaded, since the former one is kept."""
    return {CARD, *pictures} if card == "keep" and former.card is not None else set()

"""Sample in the browser: a page with every setting, its cost, and the command line that makes the same picture.

    python app.py --ckpt results/000-DiT-digits-2/checkpoints/0003000.safetensors
    python app.py --ckpt DiT-XL-2-256x256 --compare DDT-XL-22en6de-R256 --port 7861

Needs the extra demo: bash scripts/setup.sh base demo, or pip install '.[demo]'.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import runtime  # noqa: F401  # first: it reports other packages named models
from runtime.command_line import parse_config
from runtime.devices import DeviceName
from runtime.errors import UserError, run
from runtime.settings import setting

PROGRAM = "app.py"


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """Settings of app.py."""

    ckpt: Path | None = setting(
        None, "checkpoint: a file, a folder, the name of a released one, or owner/name[@revision] on the hub"
    )
    compare: Path | None = setting(None, "another one, shown beside it with the same settings", shown="none")
    weights: str | None = setting(None, "weights of training checkpoints: ema, model, ...", shown="ema")
    vae: str | None = setting(None, "autoencoder: ema, mse, a local folder, or none", shown="the checkpoint's")
    text_encoder: str | None = setting(None, "text encoder of networks that take text", shown="the checkpoint's")
    device: DeviceName | None = setting(None, "where to compute", shown="cuda if there is one")
    host: str = setting("127.0.0.1", "address to listen at; 0.0.0.0 lets other machines in")
    port: int = setting(7860, "port to listen at")

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.ckpt is None:
            raise ValueError("--ckpt: required; give a checkpoint of train.py, or a released one by its name")
        if not 0 < self.port < 65_536:
            raise ValueError(f"--port {self.port}: must lie in 1..65535")
        if importlib.util.find_spec("gradio") is None:
            raise ValueError("--ckpt: the page needs gradio, which is not installed; bash scripts/setup.sh base demo")

    def flags(self, checkpoint: Path) -> tuple[str, ...]:
        """Flags of sample.py that open a checkpoint as this page does."""
        chosen = {
            "--ckpt": str(checkpoint),
            "--weights": self.weights,
            "--vae": self.vae,
            "--text-encoder": self.text_encoder,
            "--device": self.device,
        }
        return tuple(word for flag, value in chosen.items() if value is not None for word in (flag, value))


def check_port(host: str, port: int) -> None:
    """Check that nothing else listens there.

    Raises:
        UserError: If it does, or the address is none of this machine.
    """
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from error


def main(argv: Sequence[str]) -> None:
    """Parse flags, open the checkpoints, serve the page until it is interrupted."""
    config = parse_config(AppSettings, argv, program=PROGRAM, doc=__doc__)
    check_port(config.host, config.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would ask a server elsewhere
    from demo.opening import open_all
    from demo.page import STYLE, Page

    assert config.ckpt is not None
    checkpoints = [config.ckpt] if config.compare is None else [config.ckpt, config.compare]
    page = Page(open_all(checkpoints, config.flags))
    try:
        blocks = page.build()
        print(f"Serving http://{config.host}:{config.port} (end with Ctrl-C)", flush=True)
        blocks.queue().launch(
            server_name=config.host, server_port=config.port, quiet=True, css=STYLE, theme=theme(), footer_links=[],
            allowed_paths=[str(page.folder)], run_history=False,
        )  # fmt: skip
    finally:
        page.close()


def theme() -> object:
    """A plain theme with the fonts of the machine: the page loads nothing from elsewhere."""
    import gradio as gr

    return gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


if __name__ == "__main__":
    sys.exit(run(main, PROGRAM))

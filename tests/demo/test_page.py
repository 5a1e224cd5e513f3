"""The page in a real browser: every control is moved, and the picture is the one of the command that the page shows.

Needs gradio and Chromium (Debian: apt-get install chromium): pytest -m browser.
"""

from __future__ import annotations

import importlib.util
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Tab, opened
from tests.digits_checkpoints import save_digits_checkpoint
from tests.processes import ROOT, clean_environment

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="no gradio"),
]
STATUS = "document.querySelector('#status').innerText"


@contextmanager
def served(*argv: str) -> Iterator[str]:
    """Address of the page of app.py, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), *argv, "--device", "cpu", "--port", str(port)]
    with subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True) as app:
        try:
            assert app.stdout is not None and "Serving" in (line := app.stdout.readline()), line
            yield f"http://127.0.0.1:{port}"
        finally:
            app.terminate()


def command_of(tab: Tab, number: int = 0) -> str:
    return str(tab.evaluate(f"document.querySelector('#command-{number} textarea').value"))


def moved(tab: Tab, controls: dict[str, str]) -> None:
    """Move controls, as a person would; each must change the command that is shown."""
    tab.wait("document.querySelector('#command-0 textarea')?.value.includes('sample.py')")
    for name, value in controls.items():
        before = command_of(tab)
        if name == "class_labels":
            tab.choose("#class_labels", value)
            tab.key("Escape", 27)
        elif tab.evaluate(f"document.querySelector('#{name} [role=listbox]') !== null") or tab.evaluate(
            f"document.querySelector('#{name} input[role=combobox], #{name} input[role=listbox]') !== null"
        ):
            tab.choose(f"#{name}", value)
        else:
            tab.type(f"#{name} input[type=number], #{name} textarea, #{name} input[type=text]", value)
        tab.wait(f"document.querySelector('#command-0 textarea').value !== {before!r}", timeout=20)


def sampled(tab: Tab, numbers: int = 1) -> list[bytes]:
    """Press the button; returns the files that the page then shows."""
    tab.click("#sample")
    tab.wait(f"{STATUS}.startsWith('done') || document.querySelector('#status .error')")
    assert tab.evaluate(STATUS) == "done", tab.evaluate(STATUS)
    return [tab.bytes_of(tab.wait(f"document.querySelector('#picture-{i} img')?.src")) for i in range(numbers)]


def by_command(line: str, folder: Path) -> bytes:
    """The picture that a command line makes."""
    program, script, *argv = shlex.split(line)
    assert (program, script) == ("python", "sample.py")
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *argv], cwd=folder, env=clean_environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    return (folder / "sample.png").read_bytes()


MOVED = {
    "Skip-DiT-debug/2": {
        "seed": "12", "sampler": "ddim", "steps": "9", "cfg_scale": "2.5", "guidance_interval": "100 900",
        "cache_interval": "3", "cache_forecast": "1", "precision": "fp32", "more": "--columns 2",
    },
    "DDT-debug/2": {
        "seed": "3", "sampler": "adams", "steps": "8", "cfg_scale": "1.7", "guidance_interval": "0 600",
        "sharing_interval": "2", "cache_forecast": "0", "precision": "fp32",
    },
    "DiT-debug/2": {"sampler": "unipc", "steps": "12", "forecast": "2,1", "cfg_scale": "3", "precision": "fp32"},
}  # fmt: skip


@pytest.mark.parametrize("model", MOVED)
def test_the_picture_is_bit_for_bit_that_of_the_command(model: str, tmp_path: Path) -> None:
    process = "flow" if model.startswith("DDT") else "gaussian"
    checkpoint = save_digits_checkpoint(tmp_path / "a.safetensors", model, process, num_classes=10)
    with served("--ckpt", str(checkpoint)) as address, opened(address, tmp_path / "profile") as tab:
        moved(tab, MOVED[model])
        tab.evaluate("document.querySelectorAll('#class_labels .token-remove')[1].click()")
        tab.wait("!document.querySelector('#command-0 textarea').value.includes('--class-labels 0 1 ')")
        (picture,) = sampled(tab)
        command = command_of(tab)
        shown = tab.evaluate("document.querySelector('#cost').innerText")
        tab.screenshot(tmp_path / "page.png")
    for value in MOVED[model].values():
        assert value in command, command
    assert "MACs, executed" in shown and "seconds a sample" in shown
    assert picture == by_command(command, tmp_path)


def test_two_checkpoints_are_sampled_side_by_side_and_mistakes_are_one_line(tmp_path: Path) -> None:
    paths = [
        save_digits_checkpoint(tmp_path / f"{n}.safetensors", "DiT-debug/2", seed=n, num_classes=10) for n in (0, 1)
    ]
    with (
        served("--ckpt", str(paths[0]), "--compare", str(paths[1])) as address,
        opened(address, tmp_path / "profile") as tab,
    ):
        moved(tab, {"sampler": "ddim", "steps": "5"})
        pictures = sampled(tab, 2)
        commands = [command_of(tab, i) for i in range(2)]
        tab.type("#more textarea, #more input", "--cfg-scale 0.5")
        tab.wait("document.querySelector('#cost .error')?.innerText.includes('--cfg-scale 0.5: must be at least 1')")
    for number, command in enumerate(commands):
        (folder := tmp_path / f"by_command_{number}").mkdir()
        assert pictures[number] == by_command(command, folder)
    assert pictures[0] != pictures[1]

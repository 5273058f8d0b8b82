"""The real ComfyUI, started on a free port with this clone in its custom_nodes, and talked to over HTTP.

DMM_COMFYUI is the folder with its main.py, DMM_COMFYUI_PYTHON a Python that has its requirements. Everything that a run
writes goes to a temporary base directory.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("ink", "clay", "neon")


def host_paths() -> tuple[Path, str]:
    """ComfyUI's folder and Python; skips where they are not given."""
    folder, python = os.environ.get("DMM_COMFYUI"), os.environ.get("DMM_COMFYUI_PYTHON")
    if not folder or not python:
        pytest.skip("set DMM_COMFYUI (ComfyUI's folder) and DMM_COMFYUI_PYTHON (a Python with its requirements)")
    return Path(folder), python


def make_dmm(
    path: Path,
    names: tuple[str, ...] = NAMES,
    seed: int = 0,
    thumbnails: Mapping[str, str] | None = None,
    few_step: bool = False,
) -> Path:
    """A DMM file of the mini family's base: untrained, but with style vectors as large as trained ones."""
    from dmm_core.checkpoint import open_checkpoint
    from dmm_core.checkpoint.metadata import FEW_STEP
    from dmm_core.student import Student

    base = open_checkpoint(ROOT / "mini_family" / "weights" / "base.safetensors")
    student = Student.start(base, base.unet(), names, None, seed)
    torch.nn.init.normal_(
        student.codebook.add_embedding.linear_2.weight, std=0.1, generator=torch.Generator().manual_seed(seed)
    )
    info = [{"name": name, "teacher": f"{name}.safetensors", "sha256": "0" * 64} for name in names]
    for entry in info if thumbnails else ():
        entry["thumbnail"] = thumbnails[entry["name"]]
    return student.save(path, base, style_info=info, title="test", extra_metadata={FEW_STEP: "2"} if few_step else None)


class Failed(Exception):
    """A prompt that ended with an error: what the red node says."""


class Server:
    """A running ComfyUI."""

    def __init__(self, base: Path) -> None:
        self.base, (self.folder, self.python) = base, host_paths()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.cached: list[str] = []
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.log = (self.base / "server.log").open("wb")
        command = [self.python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port),
                   "--base-directory", str(self.base), "--disable-auto-launch", "--disable-api-nodes",
                   "--database-url", "sqlite:///:memory:"]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        self.process = subprocess.Popen(
            command, cwd=self.folder, stdout=self.log, stderr=subprocess.STDOUT, env=environment
        )
        end = time.monotonic() + 600  # a busy machine takes minutes
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.text_of_log()[-3000:]}")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)
            self.log.close()

    def text_of_log(self) -> str:
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")

    def resident(self) -> int:
        """Bytes of memory that the server holds."""
        assert self.process is not None
        statm = Path(f"/proc/{self.process.pid}/statm")
        if not statm.exists():
            pytest.skip("memory is read from /proc, which this system has not")
        return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def raw(self, path: str, body: object = None) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def get(self, path: str) -> Any:
        return json.loads(self.raw(path)[1])

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Outputs by node id. Raises Failed with the message that the page would show."""
        status, answer = self.raw("/prompt", {"prompt": graph, "client_id": "tests"})
        told = json.loads(answer)
        if status != 200:
            raise Failed(json.dumps(told))
        end = time.monotonic() + 900
        while time.monotonic() < end:
            entry = self.get(f"/history/{told['prompt_id']}").get(told["prompt_id"])
            if entry and entry["status"]["completed"] is not None and entry["status"]["status_str"]:
                messages = dict(entry["status"]["messages"])
                self.cached = messages.get("execution_cached", {}).get("nodes", [])
                if entry["status"]["status_str"] == "error":
                    raise Failed(messages["execution_error"]["exception_message"].strip())
                return entry["outputs"]
            time.sleep(0.05)
        raise TimeoutError("the prompt did not end")

    def pictures(self, graph: dict[str, Any], node: str = "picture") -> np.ndarray:
        """Pictures uint8 (B, H, W, 3) of a PreviewImage node."""
        from PIL import Image

        made = []
        for image in self.run(graph)[node]["images"]:
            _, data = self.raw("/view?" + urllib.parse.urlencode(image))
            made.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        return np.stack(made)

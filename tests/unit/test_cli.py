"""The command line's manners: exit codes, one-line faults, --json, and progress on stderr."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dmm_core import cli
from dmm_core.checkpoint import open_checkpoint
from dmm_core.checkpoint.reader import Tensors, read_header
from dmm_core.commands import parse_mix
from dmm_core.commands.inspect import lines
from dmm_core.errors import BadInput, StyleError
from dmm_core.export import TIME_BIAS
from dmm_core.progress import Progress, duration
from tests.unit import tiny


@pytest.fixture
def command(monkeypatch):
    """Puts a command ``try`` in the place of the real ones; set its ``run``."""
    module = SimpleNamespace(HELP="a trial", __doc__="A trial.", run=lambda args, report: {})
    module.add_arguments = lambda parser: parser.add_argument("--n", type=int, default=1)
    monkeypatch.setattr(cli, "COMMANDS", ("try", "absent"))
    monkeypatch.setattr(cli, "command_module", lambda name: module if name == "try" else None)
    return module


def raising(error):
    def run(args, report):
        raise error

    return run


def test_no_command_prints_help(command, capsys):
    assert cli.main([]) == 0
    told = capsys.readouterr().out
    assert "try" in told and "a trial" in told and "absent" not in told


def test_json_is_one_object_and_nothing_else(command, capsys):
    def run(args, report):
        print("a library that talks")
        report.out("for people")
        report.note("busy")
        with report.progress(2, "work") as progress:
            progress.update(2)
        return {"path": Path("ü.txt"), "nan": float("nan"), "n": args.n, "tuple": (1, 2.5)}

    command.run = run
    assert cli.main(["try", "--n", "3", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == {"path": "ü.txt", "nan": None, "n": 3, "tuple": [1, 2.5]}
    assert len(told.out.splitlines()) == 1 and "for people" not in told.out + told.err
    assert "busy" in told.err and "a library that talks" in told.err and "work: 2/2" in told.err


def test_without_json_people_are_answered(command, capsys):
    command.run = lambda args, report: report.out("made ü.safetensors") or {}
    assert cli.main(["try"]) == 0
    assert capsys.readouterr().out == "made ü.safetensors\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            BadInput("is broken\nin two", "a.safetensors", "Mend it."),
            2,
            "dmm: a.safetensors: is broken in two. Mend it.",
        ),
        (KeyboardInterrupt(), 130, "dmm: stopped"),
        (
            KeyboardInterrupt("Go on with: dmm distill r.yaml --resume"),
            130,
            "dmm: stopped. Go on with: dmm distill r.yaml",
        ),
        (PermissionError(13, "Permission denied", "/x/out"), 2, "dmm: /x/out: Permission denied"),
        (OSError(28, "No space left on device"), 2, "dmm: the disk is full"),
        *(
            (OSError(number, os.strerror(number), "/x/out"), 2, "dmm: /x/out: " + os.strerror(number))
            for number in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENOENT)
        ),
        (IsADirectoryError(21, "Is a directory", "/x/.a.tmp", None, "/x/a.png"), 2, "dmm: /x/a.png: Is a directory"),
        (ModuleNotFoundError("no", name="PIL.Image"), 2, "pip install pillow"),
    ],
)
def test_what_is_not_our_fault_is_one_line(command, capsys, error, code, line):
    command.run = raising(error)
    assert cli.main(["try"]) == code
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and line in told.err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("boom"),
        ModuleNotFoundError("x", name="dmm_core.gone"),
        OSError(5, "io"),
        FileNotFoundError(2, "No such file or directory", str(Path(cli.__file__).parent / "assets" / "gone.json")),
        BrokenPipeError(32, "Broken pipe"),  # of a pipe that is not our output
    ],
)
def test_our_fault_is_a_traceback(command, capsys, error):
    command.run = raising(error)
    assert cli.main(["try"]) == 1
    told = capsys.readouterr()
    assert told.out == "" and "Traceback" in told.err


def test_wrong_arguments_are_one_line(command, capsys):
    for arguments in (["try", "--n", "many"], ["nonsense"], ["try", "--unknown"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        told = capsys.readouterr()
        assert told.out == "" and len(told.err.splitlines()) == 1 and told.err.startswith("dmm")


def test_numbers_of_libraries_become_json():
    import torch

    found = cli.jsonable({"t": torch.tensor([1.0, float("inf")]), "s": torch.tensor(3), 5: None, "b": True})
    assert json.loads(json.dumps(found)) == {"t": [1.0, None], "s": 3, "5": None, "b": True}


def test_as_a_program(root):
    done = subprocess.run([sys.executable, "-m", "dmm_core", "--version"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and done.stdout.startswith("dmm ")


# ---------------------------------------------------------------- styles


def test_style_arguments():
    assert parse_mix(["ink=0.7", "a=b=0.3", "plain"]) == {"ink": 0.7, "a=b": 0.3, "plain": 1.0}
    assert parse_mix(None) is None
    for wrong in (["ink=much"], ["ink=1", "ink=2"]):
        with pytest.raises(StyleError, match="ink"):
            parse_mix(wrong)


def test_inspect_for_people_cuts_and_leaves_out():
    found = {
        "kind": "dmm",
        "unet": {"parameters": 3200000},
        "styles": [{"name": "ink", "thumbnail": "x" * 999}],
        "vae": None,
    }
    told = list(lines(found))
    assert told[:4] == ["kind: dmm", "unet:", "  parameters: 3,200,000", "styles:"]
    assert len(told) == 5 and len(told[4]) < 200


# ---------------------------------------------------------------- mix, against real files


@pytest.fixture
def dmm_file(tmp_path):
    path = tmp_path / "student.safetensors"
    tiny.write_tiny_dmm(path, ("ink", "neon"))
    return open_checkpoint(path)


def test_mix_writes_the_vector_that_the_file_needs(dmm_file, tmp_path, capsys):
    out = tmp_path / "ink and neon.safetensors"
    assert cli.main(["mix", str(dmm_file.path), "--style", "ink=3", "neon=1", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mix"] == {"ink": 0.75, "neon": 0.25}
    header, metadata = read_header(out)
    vector = Tensors(header)["lora_unet_time_embed_2.diff_b"]
    assert torch.allclose(vector, dmm_file.codebook().style({"ink": 0.75, "neon": 0.25}))
    assert dmm_file.sha256() in metadata.values() and "ink and neon" in metadata.values()


def test_mix_bakes_into_the_bias_and_leaves_dmm_metadata_out(dmm_file, tmp_path):
    out = tmp_path / "b.safetensors"
    assert cli.main(["mix", str(dmm_file.path), "--style", "neon", "--bake", "--out", str(out)]) == 0
    baked = open_checkpoint(out)
    assert baked.metadata["modelspec.title"] == "b" and not any(key.startswith("dmm.") for key in baked.metadata)
    before, after = dmm_file.unet()[TIME_BIAS], baked.unet()[TIME_BIAS]
    assert torch.allclose(after.float(), before.float() + dmm_file.codebook().style({"neon": 1}), atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--style", "oil=1", "--out", "x.safetensors"], "the styles are: ink, neon"),
        (["--style", "ink=0", "--out", "x.safetensors"], "sum to 0"),
        (["--style", "ink=1", "--out", "x.ckpt"], ".safetensors"),
        (["--style", "ink=1", "--out", "student.safetensors"], "would be lost"),
    ],
)
def test_mix_faults(dmm_file, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(dmm_file.path.parent)
    assert cli.main(["mix", "student.safetensors", *arguments]) == 2
    error = capsys.readouterr().err
    assert told.lower() in error.lower() and len(error.splitlines()) == 1
    assert [path.name for path in dmm_file.path.parent.iterdir()] == ["student.safetensors"], "nothing may be written"


def test_mix_overwrites_a_style_file_and_nothing_else(dmm_file, tmp_path, capsys):
    style, baked, text = (tmp_path / name for name in ("s.safetensors", "b.safetensors", "t.safetensors"))
    text.write_text("not ours", encoding="utf-8")

    def mix(out, *more):
        return cli.main(["mix", str(dmm_file.path), "--style", "ink", "--out", str(out), *more])

    assert mix(style) == mix(style) == mix(baked, "--bake") == 0
    kept = {path: path.read_bytes() for path in (style, baked, text)}
    capsys.readouterr()
    for out, more in ((baked, []), (text, []), (baked, ["--bake"]), (style, ["--bake"])):
        assert mix(out, *more) == 2
        assert "is there already. Give --force to overwrite it, or another name with --out." in capsys.readouterr().err
    assert kept == {path: path.read_bytes() for path in kept}
    assert mix(text, "--bake", "--force") == 0 and open_checkpoint(text).dmm is None
    assert mix(dmm_file.path, "--force") == 2 and "would be lost" in capsys.readouterr().err


# ---------------------------------------------------------------- a page


@pytest.mark.parametrize("listen", ["203.0.113.7", "no such host", "x" * 300])
def test_an_address_that_is_not_ours_is_a_line(monkeypatch, capsys, tmp_path, listen):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name == "gradio" or find(name, *more))
    assert cli.main(["ui", "--models", str(tmp_path), "--listen", listen]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"dmm: {listen} cannot be used" in told and "Try another --listen." in told


# ---------------------------------------------------------------- progress


def test_progress_without_a_terminal_is_a_line_now_and_then():
    stream = io.StringIO()
    with Progress(100, "learning", stream, every=3600) as progress:
        for _ in range(100):
            progress.update(loss=0.123456)
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().startswith("learning: 100/100") and "loss 0.1235" in stream.getvalue()
    stream = io.StringIO()
    with Progress(3, "learning", stream, every=0) as progress:
        progress.to(1)
        progress.to(2)
    assert "left" in stream.getvalue()


def test_progress_on_a_terminal_is_a_bar():
    pytest.importorskip("tqdm")
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    with Progress(2, "learning", stream) as progress:
        progress.update(2, loss=0.5)
    assert "100%" in stream.getvalue() and "learning" in stream.getvalue()


def broken_pipe():
    """A stream whose reader went away, as tee does at Ctrl-C."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", encoding="utf-8")


def test_work_goes_on_where_nobody_reads_its_notes():
    stream = broken_pipe()
    with Progress(3, "learning", stream, every=0) as progress:
        for _ in range(3):
            progress.update()
    assert progress.total == 3
    report = cli.Reporter(err=broken_pipe())
    report.note("busy")
    report.note("still busy")
    stream.close()  # which would raise if something were left to write


PROGRAM = """
import sys
from types import SimpleNamespace
from dmm_core import cli

def run(args, report):
    report.note("busy")
    with report.progress(2, "work") as progress:
        progress.to(2)
    report.out("made")
    print("a warning", file=sys.stderr)
    if args.stop:
        raise KeyboardInterrupt
    return {"n": 1}

def add_arguments(parser):
    parser.add_argument("--stop", action="store_true")

module = SimpleNamespace(HELP="a trial", __doc__="A trial.", run=run, add_arguments=add_arguments)
cli.COMMANDS, cli.command_module = ("try",), lambda name: module
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell closes the streams")
@pytest.mark.parametrize(
    ("arguments", "streams", "code", "out"),
    [
        ("try", "2>&-", 0, "made\n"),
        ("try --json", "2>&-", 0, '{"n": 1}\n'),
        ("try --stop", "2>&-", 130, "made\n"),
        ("try --wrong", "2>&-", 2, ""),
        ("try", ">&-", 0, ""),
        ("try --json", ">&-", 0, ""),
        ("try", ">&- 2>&-", 0, ""),
    ],
)
def test_closed_streams_stay_silent(root, arguments, streams, code, out):
    line = ["sh", "-c", f'exec "$0" -c "$1" {arguments} {streams}', sys.executable, PROGRAM]
    done = subprocess.run(line, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout) == (code, out), done.stderr
    assert ("busy" in done.stderr) == ("2>&-" not in streams) and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "broken", "code"),
    [("try", "stdout", 0), ("try --json", "stdout", 0), ("try", "stderr", 0), ("try --stop", "stderr", 130)],
)
def test_exit_code_where_a_reader_went_away(root, arguments, broken, code):
    with broken_pipe() as pipe:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, broken: pipe}
        done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments.split()], text=True, cwd=root, **streams)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in (done.stderr or "")


def test_durations():
    assert [duration(s) for s in (0.4, 89, 91, 5390, 11_100)] == ["0 s", "89 s", "2 min", "1 h 30 min", "3 h 05 min"]

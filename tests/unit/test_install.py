"""install.py: harmless without arguments, and an environment that is made once, repaired, and never half-way."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FILES = ("install.py", "pyproject.toml", "constraints.txt")


@pytest.fixture
def install(root, tmp_path):
    """install.py of a copy of the clone, with the commands it would run written down instead."""
    clone = tmp_path / "my clone ü"
    clone.mkdir()
    for name in FILES:
        shutil.copy(root / name, clone / name)
    spec = importlib.util.spec_from_file_location("install_under_test", clone / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.commands = []
    module.codes = {}

    def run(command, **options):
        module.commands.append([str(part) for part in command])
        if command[1:3] == ["-m", "venv"] and not module.codes.get("venv"):
            python = module.venv_python(Path(command[3]))
            python.parent.mkdir(parents=True)
            python.touch()
        return next((code for word, code in module.codes.items() if word in command), 0)

    module.real_run, module.run = module.run, run
    module.host_packages = lambda: {}
    return module


def pips(install):
    return [command for command in install.commands if "pip" in command]


def test_without_arguments_nothing_happens(root, tmp_path):
    for name in FILES:
        shutil.copy(root / name, tmp_path / name)
    done = subprocess.run([sys.executable, str(tmp_path / "install.py")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)


def test_unknown_option_is_one_line(root):
    done = subprocess.run([sys.executable, str(root / "install.py"), "--tset"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "--tset" in done.stderr and "--test" in done.stderr


def test_demo_installs_once_and_passes_arguments_on(install):
    assert install.main(["--demo", "--out", "my folder"]) == 0
    assert install.commands[-1][1:] == ["-c", install.LAUNCH, "demo", "--out", "my folder"]
    (pip,) = pips(install)
    assert "torch" in pip and "--only-binary=:all:" in pip and not any(part.startswith("pytest") for part in pip)
    assert install.main(["--demo"]) == 0
    assert len(pips(install)) == 1


def test_ui_adds_gradio_to_the_same_environment(install):
    assert install.main(["--demo"]) == 0
    assert install.main(["--ui", "--port", "7000"]) == 0
    assert install.commands[-1][1:] == ["-c", install.LAUNCH, "ui", "--port", "7000"]
    first, second = pips(install)
    assert [any(part.startswith("gradio") for part in pip) for pip in (first, second)] == [False, True]
    assert install.main(["--ui"]) == 0 and install.main(["--demo"]) == 0
    assert len(pips(install)) == 2


@pytest.mark.skipif(os.name == "nt", reason="what Windows gets is a batch file")
def test_dmm_is_a_command_of_the_environment_in_any_folder(install, tmp_path):
    """Also of one that an earlier version made; the folder's name has a space and an umlaut."""
    package = install.ROOT / "dmm_core"
    package.mkdir()
    text = "import json, random, sys\n\n\ndef main():\n    print(json.dumps(sys.argv[1:]))\n"
    (package / "cli.py").write_text(text, encoding="utf-8")
    (tmp_path / "random.py").write_text("raise SystemExit('a file of the folder that people are in')", encoding="utf-8")
    install.main(["--demo"])
    dmm = install.venv_python().with_name("dmm")
    dmm.unlink()
    install.main(["--demo"])
    assert len(pips(install)) == 1
    install.venv_python().unlink()
    install.venv_python().symlink_to(sys.executable)
    words = ["generate", "my file", '"a" & $b']
    done = subprocess.run([str(dmm), *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout) == words, done.stderr


def test_dmm_on_windows_finds_the_clone_from_its_own_place(install, monkeypatch):
    monkeypatch.setattr(install, "os", SimpleNamespace(name="nt", fsencode=os.fsencode))
    install.venv_python().parent.mkdir(parents=True)
    install.write_launcher(install.VENV)
    lines = (install.VENV / "Scripts" / "dmm.cmd").read_bytes().decode("ascii").split("\r\n")
    assert lines[-2] == f'"%~dp0python.exe" -c "{install.LAUNCH}" %*' and lines[-1] == ""
    assert 'set "PYTHONPATH=%~dp0..\\.."' in lines and not set(install.LAUNCH) & set('"%^&|<>')


def test_an_environment_that_may_not_be_written_is_used(install, monkeypatch):
    install.main(["--demo"])

    def refuse(venv):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(install, "write_launcher", refuse)
    assert install.main(["--demo"]) == 0


def test_test_adds_to_the_demos_environment_and_demo_then_needs_nothing(install):
    install.main(["--demo"])
    install.main(["--test", "-k", "x"])
    assert install.commands[-1][1:] == ["-m", "pytest", "-k", "x"]
    assert len(pips(install)) == 2 and any(part.startswith("pytest") for part in pips(install)[1])
    assert sum(command[1:3] == ["-m", "venv"] for command in install.commands) == 1
    install.main(["--demo"])
    install.main(["--test"])
    assert install.commands[-1][2] == "pytest" and "-n" in install.commands[-1], "all tests: several files at a time"
    assert len(pips(install)) == 2


def test_failed_install_is_told_and_made_anew_next_time(install):
    install.codes["pip"] = 1
    with pytest.raises(install.SetupError) as caught:
        install.main(["--demo"])
    assert caught.value.code == 1 and "\n" not in str(caught.value)
    assert not any("dmm_core" in command for command in install.commands)
    left_over = install.VENV / "left-over"
    left_over.touch()
    install.codes.clear()
    assert install.main(["--demo"]) == 0
    assert not left_over.exists() and (install.VENV / install.STAMP).exists()


def test_a_failed_addition_leaves_what_is_there(install):
    """Without a network, say: the demo's environment is still the demo's."""
    install.main(["--demo"])
    kept = install.VENV / "kept"
    kept.touch()
    install.codes["pip"] = 1
    for action in ("--ui", "--test"):
        with pytest.raises(install.SetupError):
            install.main([action])
    assert install.main(["--demo"]) == 0 and kept.exists() and len(pips(install)) == 3


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"torn"])
def test_a_torn_stamp_is_no_stamp(install, text):
    install.main(["--demo"])
    (install.VENV / install.STAMP).write_bytes(text)
    assert install.main(["--demo"]) == 0 and len(pips(install)) == 2


def test_from_inside_the_environment_another_python_goes_on(install, monkeypatch):
    """Activated, ``python`` is the environment's own: to make it anew would take away what runs this."""
    install.main(["--demo"])
    before = len(install.commands)
    monkeypatch.setattr(install.sys, "prefix", str(install.VENV))
    monkeypatch.setattr(install.sys, "_base_executable", "/usr/bin/some-python")
    assert install.main(["--ui", "--port", "7000"]) == 0
    asked = install.commands[before:]
    assert asked == [["/usr/bin/some-python", str(install.ROOT / "install.py"), "--ui", "--port", "7000"]]
    monkeypatch.setattr(install.sys, "_base_executable", None)
    with pytest.raises(install.SetupError, match="Run deactivate"):
        install.main(["--ui"])
    assert install.venv_python().exists()


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent to a group of processes")
@pytest.mark.parametrize(("code", "ends"), [("130", 130), ("2", 130), ("0", 0)])
def test_ctrl_c_waits_for_the_command_that_saves(install, tmp_path, code, ends):
    """The terminal sends it to both. What pip makes of it is a stop too."""
    saved = tmp_path / "saved"
    child = (
        "import sys, time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
        f"    time.sleep(1)\n    open({str(saved)!r}, 'w').close()\n    sys.exit({code})\n"
    )
    driver = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's jobs ignore it
        f"sys.path.insert(0, {str(install.ROOT)!r})\nimport install\n"
        f"try:\n    sys.exit(install.run([sys.executable, '-c', {child!r}]))\n"
        "except KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout and process.stdout.readline().strip() == b"ready"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == ends and saved.exists()


@pytest.mark.slow  # asks the package index
@pytest.mark.parametrize("action", ["--demo", "--ui", "--test"])
def test_what_is_asked_for_goes_together(root, tmp_path, action):
    """As on a fresh Python, without a torch that is there already: pip finds a version of everything."""
    spec = importlib.util.spec_from_file_location("install_as_it_is", root / "install.py")
    assert spec and spec.loader
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    limits = install.write_limits(tmp_path, None)
    wanted = install.requirements(install.EXTRAS[action], None)
    asked = install.pip(Path(sys.executable), limits, "--dry-run", "--ignore-installed", *wanted)
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_changed_constraints_make_it_anew(install):
    install.main(["--demo"])
    with (install.ROOT / "constraints.txt").open("a", encoding="utf-8") as file:
        file.write("extra==1.0\n")
    install.main(["--demo"])
    assert len(pips(install)) == 2


def test_no_venv_module_is_one_line_with_what_to_do(install):
    install.codes["venv"] = 1
    with pytest.raises(install.SetupError, match="python3-venv") as caught:
        install.main(["--demo"])
    assert caught.value.code == 2 and not install.VENV.exists()


def test_old_python_is_refused(install, monkeypatch):
    monkeypatch.setattr(install, "PYTHON", (99, 0))
    with pytest.raises(install.SetupError, match=r"99\.0 or newer"):
        install.main(["--demo"])


def test_a_torch_that_is_there_is_used(install, monkeypatch):
    monkeypatch.setattr(
        install, "host_packages", lambda: {"torch": "2.8.0+cu128", "numpy": "1.26.4", "diffusers": "0.31"}
    )
    monkeypatch.setattr(install, "make_venv", lambda torch, venv: install.venv_python(venv).parent.mkdir(parents=True))
    install.main(["--demo"])
    (pip,) = pips(install)
    assert "torch" not in pip
    limits = (install.VENV / "constraints.txt").read_text(encoding="utf-8")
    assert "torch==" not in limits and "numpy==" not in limits and "diffusers==" in limits


@pytest.mark.parametrize(("version", "used"), [("2.4.0", True), ("2.13.0+cpu", True), ("2.1.2", False), ("", False)])
def test_how_old_a_torch_may_be(install, version, used):
    install.host_packages = lambda: {"torch": version}
    assert bool(install.host_torch()) is used


def test_the_hosts_packages_stand_behind_the_environments_own(install, tmp_path, monkeypatch):
    """A real venv without pip: what the host has, also by its .pth files, can be imported; what it has itself wins."""
    host, editable = tmp_path / "höst" / "site-packages", tmp_path / "editable"
    host.mkdir(parents=True)
    editable.mkdir()
    (editable / "installed_editable.py").write_text("", encoding="utf-8")
    (host / "started.pth").write_text(f"import sys; sys.path.append({str(editable)!a})\n", encoding="ascii")
    (host / "only_in_host.py").write_text("", encoding="utf-8")
    (host / "in_both.py").write_text("where = 'host'", encoding="utf-8")

    def run(command, **options):
        return install.real_run([*command, *(["--without-pip"] if "venv" in command else [])], **options)

    monkeypatch.setattr(install, "run", run)
    monkeypatch.setattr(install, "package_folders", lambda: [str(host)])
    install.make_venv("2.8.0")
    own = next(install.VENV.rglob("zz-host.pth")).parent
    (own / "in_both.py").write_text("where = 'own'", encoding="utf-8")
    code = "import only_in_host, in_both, installed_editable; print(in_both.where)"
    done = subprocess.run([str(install.venv_python()), "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "own", done.stderr


def test_extras_are_read_as_toml_reads_them(install):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((install.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, wanted in project["optional-dependencies"].items():
        assert install.extra(name) == wanted
    assert project["dependencies"] == [], "a host would install them"


def test_every_requirement_has_a_tested_version(install):
    pinned = {
        install.normal(line.partition("==")[0]) for line in install.constraints(None).splitlines() if "==" in line
    }
    wanted = {install.normal(line.split(">")[0]) for line in install.requirements(("train", "dev"), None)}
    assert wanted <= pinned


# ---------------------------------------------------------------- --train


@pytest.fixture
def host(install):
    """A host's Python with a torch."""
    install.host_packages = lambda: {"torch": "2.8.0+cu128", "numpy": "1.26.4"}
    real = install.make_venv

    def make_venv(torch, venv):
        real(None, venv)  # without asking the venv, which is none, for its folders

    install.make_venv = make_venv
    return install


def test_train_has_a_place_of_its_own_and_is_made_once(host):
    assert host.train_environment() is None
    assert host.main(["--train"]) == 0
    (pip,) = pips(host)
    assert pip[0] == str(host.venv_python(host.TRAIN)) and "torch" not in pip and not host.VENV.exists()
    assert not any(part.startswith("pytest") for part in pip)
    assert host.train_environment() == (host.venv_python(host.TRAIN), [])
    assert host.main(["--train"]) == 0 and len(pips(host)) == 1
    host.host_packages = lambda: {"torch": "2.9.0+cu128"}
    assert host.train_environment() is None, "made for another torch"


def test_train_without_a_torch_downloads_none(install):
    with pytest.raises(install.SetupError, match="Run this with the Python of your host") as caught:
        install.main(["--train"])
    assert caught.value.code == 2 and install.commands == []


@pytest.fixture
def old_host(install):
    """A Forge's Python: the webui's torch is too old."""
    install.host_packages = lambda: {"torch": "2.3.1+cu121", "numpy": "1.26.2"}
    return install


def test_train_beside_an_old_torch_says_so_and_what_to_do(old_host):
    with pytest.raises(old_host.SetupError) as caught:
        old_host.main(["--train"])
    told = str(caught.value)
    assert "this Python's torch is 2.3.1+cu121; training needs 2.4 or newer" in told and "\n" not in told
    assert "DMM_TRAIN_PYTHON" in told and "--train --own-torch" in told and "python_embeded" not in told
    assert caught.value.code == 2 and old_host.commands == []


def test_own_torch_is_training_s_alone_and_made_once(old_host):
    assert old_host.main(["--train", "--own-torch"]) == 0
    (pip,) = pips(old_host)
    assert pip[0] == str(old_host.venv_python(old_host.TRAIN)) and "torch" in pip
    limits = (old_host.TRAIN / "constraints.txt").read_text(encoding="utf-8")
    assert "torch==" in limits and "numpy==" in limits, "nothing of the host's"
    assert not list(old_host.TRAIN.rglob("zz-host.pth"))
    assert old_host.train_environment() == (old_host.venv_python(old_host.TRAIN), [])
    assert old_host.main(["--train"]) == 0 and len(pips(old_host)) == 1, "the button of a host finds it"
    old_host.host_packages = lambda: {"torch": "2.8.0"}
    assert old_host.train_environment() is None, "the host has become good enough"


def test_own_torch_beside_a_good_one_downloads_none(host):
    assert host.main(["--train", "--own-torch"]) == 0
    assert "torch" not in pips(host)[0]


def test_own_torch_needs_a_virtual_environment(old_host):
    old_host.codes["venv"] = 1
    with pytest.raises(old_host.SetupError, match="cannot make a virtual environment"):
        old_host.main(["--train", "--own-torch"])
    assert pips(old_host) == []


def test_own_torch_on_windows_is_not_without_cuda(old_host, monkeypatch):
    monkeypatch.setattr(old_host.sys, "platform", "win32")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(old_host.SetupError, match="PIP_EXTRA_INDEX_URL"):
        old_host.main(["--train", "--own-torch"])
    assert old_host.commands == []
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://example.org/whl")
    assert old_host.main(["--train", "--own-torch"]) == 0


def test_train_takes_no_other_argument(old_host):
    with pytest.raises(old_host.SetupError, match="but --own-torch"):
        old_host.main(["--train", "--own"])


def test_packages_are_seen_in_both_of_their_forms(root, tmp_path, monkeypatch):
    """conda's torch lies in an egg-info."""
    spec = importlib.util.spec_from_file_location("install_as_it_is", root / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("torch-2.5.1-py3.11.egg-info", "nvidia_cublas_cu12-12.4.5.8.dist-info", "no_version.egg-info"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(module, "package_folders", lambda: [str(tmp_path)])
    assert module.host_packages() == {"torch": "2.5.1", "nvidia-cublas-cu12": "12.4.5.8"}
    assert module.host_torch() == "2.5.1"


def test_train_without_venv_puts_only_what_is_lacking_into_a_folder(host):
    host.codes["venv"] = 1
    stub = host.run

    def run(command, **options):
        if "--report" in command:
            items = [{"metadata": {"name": "diffusers", "version": "0.39.0"}}]
            Path(command[command.index("--report") + 1]).write_text(json.dumps({"install": items}), encoding="utf-8")
        return stub(command, **options)

    host.run = run
    assert host.main(["--train"]) == 0
    asked, put = pips(host)
    assert "--dry-run" in asked and any(part.startswith("transformers") for part in asked)
    assert put[-3:] == ["--target", str(host.FOLDER), "diffusers==0.39.0"] and "--no-deps" in put
    assert asked[0] == put[0] == sys.executable
    assert host.train_environment() == (Path(sys.executable), [host.FOLDER]) and not host.TRAIN.exists()
    host.codes["pip"] = 1
    host.host_packages = lambda: {"torch": "2.9.0"}
    with pytest.raises(host.SetupError):
        host.main(["--train"])
    assert host.train_environment() is None, "an installation that broke off is none"

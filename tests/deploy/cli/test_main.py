"""The command line, run as users run it: fast, one line for a mistake, and the right exit code."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import yaml

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.deploy.cli import main as cli
from elastic_moe.deploy.cli.serve import news
from elastic_moe.deploy.launch.local_ray import check_gpu
from tests.model.random_checkpoint import make_random_checkpoint
from tests.paths import ROOT
from tests.programs import emoe_forked

HEAVY = ("torch", "ray", "transformers")
"""Packages that take seconds to import: parsing must do without them. A time would depend on the machine."""

PORT = 18000 + os.getpid() % 1000
"""Whatever listens on the default port must not matter here."""


def emoe(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    if args[:1] == ("serve",) and "--port" not in args:
        args = (*args, "--port", str(PORT))
    return subprocess.run(
        [sys.executable, "-m", "elastic_moe.deploy.cli.main", *args],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
    )


def imported(*args: str) -> set[str]:
    """Top-level packages that the command imports before it ends."""
    lines = emoe(*args, PYTHONPROFILEIMPORTTIME="1").stderr.splitlines()
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines if line.startswith("import time:")}


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("emoe: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["serve", "--workers", "many"], "--workers: expected a whole number, got 'many'"),
        (["serve", "--step-timeout", "1m"], "--step-timeout: expected a number, got '1m'"),
        (
            ["serve", "--fork-workers", "no"],
            "--fork-workers: takes no value: write --fork-workers or --no-fork-workers",
        ),
        (["serve", "--no-fork-workers=1"], "--no-fork-workers: takes no value: write"),
        (["scale", "--workers", "2", "--wait=true"], "--wait: takes no value: write --wait alone"),
        (["serve", "--port"], "--port: expected a value"),
        (["serve", "--workers", "0"], "error: argument --workers: expected 1 to 4096, got 0"),
        (["serve", "--wokers", "2"], "unknown flag --wokers (did you mean --workers?); `emoe serve --help` lists all"),
        (["serve", "--max-model-le=4"], "unknown flag --max-model-le (did you mean --max-model-len?)"),
        (["serve", "--model", "x"], "unknown flag --model: give MODEL_DIR without a flag"),
        (["serve", "a", "b"], "unexpected argument: b"),
        (["plan", "x.npz", "--workres", "4"], "unknown flag --workres (did you mean --workers?)"),
        (["trace"], "record|list"),
        (["trace", "record", "README.md", "--model", "nowhere", "--out", "/tmp/t.npz"], "nowhere: no such directory"),
        (["plan", "builtin:bible", "--planner", "ipl", "--out", "/tmp/p.json"], "got 'ipl' (did you mean ilp?)"),
        (["plan", "builtin:bible", "--dealt", "--out", "/tmp/p.json"], "--dealt: it is about the misses of"),
        (
            ["compare", "builtin:bible", "--planners", "greedy,eplp", "--out", "/tmp/c"],
            "got 'eplp' (did you mean eplb?)",
        ),
        (
            ["evaluate", "p.json", "builtin:bible"],
            "expected a placement, got the trace builtin:bible, which comes first",
        ),
        (["scale", "--url", "http://127.0.0.1:1"], "no server answers ([Errno 111] Connection refused)"),
        (["serve", "--host", "999.1.1.1"], "--host: expected an address or a name of this machine, got '999.1.1.1'"),
        (["serve", "--port", "70000"], "argument --port: expected 1 to 65535, got 70000"),
        (["serve", "--device", "tpu"], "--device"),
        (["serve", "--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["serve", "--planner", "best"], "--planner"),
        (["serve", "--expert-memory-bytes", "8GX"], "--expert-memory-bytes: expected bytes, or a size such as 8GB"),
        (["serve", "--step-timeout", "1e30"], "argument --step-timeout: expected 1 to 86400, got 1e+30"),
        (["serve", "--max-model-len", "32q"], "--max-model-len: expected a whole number, or one such as 32k"),
        (["serve", "--calibration", ""], "argument --calibration: expected some text, got an empty one"),
        (["serve", ""], "argument MODEL_DIR: expected some text, got an empty one"),
        (["serve", "--config", ""], "--config: expected a path, got an empty text"),
        (["serve", "--tool-call-parser", "foo"], "argument --tool-call-parser: expected one of deepseek_v3, "),
        (["sevre"], "got 'sevre' (did you mean serve?)"),
    ],
)
def test_mistakes_are_reported_before_anything_starts(args: list[str], says: str) -> None:
    assert says in one_line(emoe(*args))


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray was started first, and the reason was printed twice."""
    (tmp_path / "nvidiactl").touch()
    wanted = ServeConfig(device="cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check_gpu(wanted, str(tmp_path))
    check_gpu(ServeConfig(), str(tmp_path / "none"))
    check_gpu(dataclasses.replace(wanted, address="auto"), str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="device: expected a GPU for cuda, but this machine has no driver of one"):
        check_gpu(wanted, str(tmp_path / "none"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"device: .* but CUDA_VISIBLE_DEVICES hides them"):
        check_gpu(wanted, str(tmp_path))


def test_the_command_alone_shows_its_verbs() -> None:
    result = emoe()
    assert result.returncode == 2
    assert "serve a model over HTTP" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("emoe: error: expected a COMMAND")


def test_help_has_no_words_of_python() -> None:
    for verb in ("serve", "scale", "top", "plan", "compare", "simulate", "evaluate", "calibrate"):
        shown = emoe(verb, "--help").stdout
        assert "usage: emoe" in shown
        assert not re.findall(r"\b(True|False|None|INT|FLOAT|STR|default: )\)|\b(INT|FLOAT|STR)\b", shown), verb


def test_mistakes_and_help_need_no_heavy_import() -> None:
    for args in (["serve", "--workers", "many"], ["serve", "--help"], ["--version"]):
        found = imported(*args)
        assert not found & set(HEAVY)
        assert "argparse" in found


def test_switches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[bool] = []

    def serve(config: ServeConfig, _: object) -> int:
        seen.append(config.enable_prefix_caching)
        return 0

    monkeypatch.setattr("elastic_moe.deploy.cli.serve.serve", serve)
    file = tmp_path / "emoe.yaml"
    file.write_text("enable-prefix-caching: false\n")
    for flags in ([], ["--no-enable-prefix-caching"], ["--config", str(file)],
                  ["--config", str(file), "--enable-prefix-caching"]):  # fmt: skip
        assert cli.main(["serve", *flags]) == 0
    assert seen == [True, False, False, True]
    file.write_text("enable-prefix-caching: 1\n")
    assert cli.main(["serve", "--config", str(file)]) == 2
    file.write_text("workers: true\n")
    assert cli.main(["serve", "--config", str(file)]) == 2


def test_help_and_version() -> None:
    text = emoe("serve", "--help").stdout
    for field in dataclasses.fields(ServeConfig):
        assert field.name == "model" or f"--{field.name.replace('_', '-')}" in text
    assert emoe("--version").stdout.startswith("emoe ")


def test_a_missing_model() -> None:
    assert "/no/such/model" in one_line(emoe("serve", "/no/such/model"))
    assert not imported("serve", "/no/such/model") & set(HEAVY), "it is named at once"


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in one_line(emoe("serve", str(tmp_path)))


@pytest.mark.slow
def test_more_workers_than_experts(tmp_path: Path) -> None:
    model = make_random_checkpoint(tmp_path / "tiny", layers=1, experts=4)

    def refusal(*flags: str) -> str:
        into = Path(tempfile.mkdtemp(dir=tmp_path))
        return one_line(emoe_forked("serve", str(model), "--port", str(PORT), *flags, into=into))

    assert "4 experts" in refusal("--workers", "5")
    little = refusal("--expert-memory-bytes", "1000")
    assert "argument --expert-memory-bytes: expected at least" in little
    assert "room for one expert of each of the" in little
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refusal()


def test_the_example_for_serve_deploy() -> None:
    with warnings.catch_warnings():
        # of Ray's own, about pydantic
        warnings.simplefilter("ignore")
        from ray.serve.schema import ServeDeploySchema
    path = ROOT / "deploy" / "serve.yaml"
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    application = schema.applications[0]
    ServeConfig.from_mapping(application.args, source="args")
    assert application.import_path == "elastic_moe.deploy.launch.serve_app:build_app"


def test_a_calibration_that_is_not_there() -> None:
    result = emoe("serve", "--calibration", "/no/such/file")
    assert result.returncode == 2
    assert result.stderr.splitlines()[1:] == [
        "emoe: error: argument --calibration: /no/such/file: No such file or directory"
    ]


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in one_line(emoe("serve", "--port", str(port)))


def config_of(monkeypatch: pytest.MonkeyPatch, *args: str) -> ServeConfig:
    seen: list[ServeConfig] = []
    from elastic_moe.deploy.cli import serve as cli_serve

    monkeypatch.setattr(cli_serve, "serve", lambda config, _: seen.append(config) or 0)
    assert cli.main(["serve", *args]) == 0
    return seen[0]


def test_flags_win_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "emoe.yaml"
    of_file, of_flag = (str(tmp_path / name) for name in ("file", "flag"))
    for model in (of_file, of_flag):
        Path(model).mkdir()
        Path(model, "config.json").write_text('{"model_type": "mixtral"}')
    path.write_text(f"workers: 3\nmax-num-seqs: 8\nmodel: {of_file}\nhost_expert_memory_bytes: 0.5 GiB\n")
    sized = ("--expert-memory-bytes", "8GB", "--kv-cache-memory-bytes", "12")
    config = config_of(monkeypatch, "--config", str(path), "--workers", "4", *sized)
    assert (config.workers, config.max_num_seqs, config.model) == (4, 8, of_file)
    assert (config.expert_memory_bytes, config.kv_cache_memory_bytes) == (8 * 10**9, 12)
    assert config.host_expert_memory_bytes == 1 << 29
    assert config_of(monkeypatch, of_flag, "--config", str(path)).model == of_flag


def test_wrong_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "emoe.yaml"
    for text in ("wokers: 3", "workers: x", "- a", "a: [", "workers: 2\nworkers_: 3"):
        path.write_text(text)
        assert cli.main(["serve", "--config", str(path)]) == 2
        captured = capsys.readouterr().err
        assert str(path) in captured
        assert captured.count("\n") == 1


def test_a_setting_is_named_where_it_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was "flags:" even for what stands in the file."""
    path = tmp_path / "emoe.yaml"
    path.write_text("workers: 3\n")
    assert cli.main(["serve", "--config", str(path), "--max-workers", "2"]) == 2
    assert capsys.readouterr().err.startswith(f"emoe: error: {path}: workers: expected 1 to 2, the limits of the auto")
    assert cli.main(["serve", "--max-workers", "1"]) == 2
    assert capsys.readouterr().err.startswith("emoe: error: workers: expected 1 to 1, the limits of the autoscaler")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--api-key-file", "/no/such/key"], "argument --api-key-file: /no/such/key"),
        (["--api-key", "a b"], "argument --api-key: expected a key"),
        (["--forwarded-allow-ips", "localhost"], "argument --forwarded-allow-ips: "),
        (["--log-file", "/no/such/log"], "argument --log-file: /no/such/log"),
        (
            ["--min-workers", "4", "--max-workers", "2"],
            "argument --min-workers: expected at most max_workers, which is 2, got 4",
        ),
    ],
)
def test_mistakes_about_keys_addresses_and_logs(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *flags]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("emoe: error: ")
    assert says in printed
    assert printed.count("\n") == 1


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMOE_API_KEY", "sesame")
    config = config_of(monkeypatch, "--log-file", str(tmp_path / "log"))
    assert (config.api_key, config.admin_api_key, config.log_file) == ("sesame", None, str(tmp_path / "log"))


def test_recoveries_and_scaling_are_printed_once() -> None:
    start = {"operation_id": "start-1", "kind": "start", "phase": "completed", "reason": "start", "error": None}
    recover = {"operation_id": "recover-2", "kind": "recover", "phase": "preparing", "reason": "w0 lost", "error": None}
    reported: set[str] = set()
    assert news([recover, start], reported) == []
    ended = recover | {"phase": "completed", "reason": "w0 lost; epoch 2 with 1 worker"}
    scale = {"operation_id": "mine", "kind": "scale", "phase": "failed", "reason": "to 3", "error": "replaced"}
    # newest first, as the server tells them
    assert news([scale, ended, start], reported) == [
        "recover-2 completed: w0 lost; epoch 2 with 1 worker",
        "mine failed: replaced",
    ]
    assert news([scale, ended, start], reported) == []
    for answer in (None, {"error": {"message": "not ready"}}):
        assert news(answer, reported) == []

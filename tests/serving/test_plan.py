"""From a command line or a configuration to engines, and to the settings that the gateway's workers read."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving import plan as planning
from serving.engine import Engine, file_name
from serving.fleet import Fleet
from serving.gateway.settings import Settings, load
from serving.plan import Options, make, plan

DEMO = Path(__file__).parents[2] / "training/checkpoints/medassist-demo"


def write(directory: Path, **content: Any) -> Path:
    path = directory / "gateway.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def workers_settings(directory: Path, options: Options, checkpoints: list[Path]) -> Settings:
    """What the workers would read at the start."""
    fleet = Fleet(make(checkpoints, options), directory, lambda text: None, lambda: None)
    return load(fleet.settings_file)


def test_engines_take_the_place_of_checkpoints(tmp_path: Path, short_path: Path) -> None:
    config = write(
        tmp_path,
        models={
            "ours/demo": {"checkpoint": str(DEMO), "replicas": 2, "limits": {"n": 3}},
            "theirs": {"engines": [{"url": "http://127.0.0.1:9"}]},
        },
        aliases={"default": "ours/demo"},
        port=8081,
        drain=5,
    )
    settings = workers_settings(short_path, Options(config=config, port=0, latency_target=2.5), [])
    ours = settings.models["ours/demo"]
    assert len({engine.url for engine in ours.engines}) == len({engine.status_file for engine in ours.engines}) == 2
    for engine in ours.engines:
        assert engine.url.startswith(f"unix:{short_path}/ours_demo-")
        assert engine.status_file
        assert json.loads(engine.status_file.read_text())["state"] == "starting"
        assert not Path(engine.url.removeprefix("unix:")).exists(), "it is not verified"
    assert (ours.vocab_size, ours.has_tokenizer, ours.fingerprint) == (4096, True, None)
    assert ours.limits.n == 3
    assert settings.models["theirs"].engines[0].url == "http://127.0.0.1:9"
    assert [model.latency_target.total for model in settings.models.values()] == [2.5, 2.5]
    assert (settings.port, settings.drain, settings.aliases) == (0, 5, {"default": "ours/demo"})


def test_replicas_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.os, "sched_getaffinity", lambda pid: set(range(9)))
    engines, notes = plan({"a": DEMO, "b": DEMO}, Options(), {"a": 3, "b": 1})
    assert [engine.threads for engine in engines.values()] == [2, 2]
    assert not notes
    _, notes = plan({"a": DEMO}, Options(), {"a": 10})
    assert notes == ["WARNING: 10 engine ranks share 9 cores; they will wait for each other"]


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        ({"models": {"m": {"checkpoint": "nowhere"}}}, {}, r"models\.m: .*nowhere is not a checkpoint directory"),
        ({"models": {"m": {"checkpoint": str(DEMO), "adapters": ["a"]}}}, {}, "--lora m:a=DIRECTORY"),
        ({"models": {"m": {"engines": [{"url": "http://h:1"}]}}}, {"adapters": ("a=x",)}, "--lora: .*no model with"),
        ({"models": {}}, {}, "models"),
        ({"models": {"m": {"checkpoint": str(DEMO)}}}, {"latency_target": 1.0, "first_token_target": 2.0}, "total"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused(
    tmp_path: Path, content: dict, options: dict, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        make([], Options(config=write(tmp_path, **content), **options))


def test_checkpoints_come_from_the_command_line_or_from_the_configuration(tmp_path: Path) -> None:
    config = write(tmp_path, models={"m": {"checkpoint": str(DEMO)}})
    with pytest.raises(ValueError, match="--config"):
        make([DEMO], Options(config=config))
    with pytest.raises(ValueError, match="--replicas"):
        Options(config=config, replicas=2)


def test_an_engine_is_kept_when_only_its_share_of_the_cores_changes(tmp_path: Path) -> None:
    def launches(**options: Any) -> Any:
        return make([DEMO], Options(**options)).launches

    first = launches(threads=1)[0]
    assert first.serves(launches(threads=2, replicas=2)[0])
    assert not first.serves(launches(replicas=2)[1])
    assert not first.serves(launches(max_model_len=64)[0])


def test_paths_of_sockets_are_short_whatever_the_model_is_called(tmp_path: Path) -> None:
    names = ["m", "a/b", "a_b", "x" * 200, "x" * 201]
    files = [file_name(name, 12) for name in names]
    assert len({*files}) == len(names)
    assert max(map(len, files)) <= 24
    assert not any("/" in name for name in files)


def test_the_public_path_is_there_only_while_an_engine_may_be_asked(tmp_path: Path) -> None:
    launch = make([DEMO], Options()).launches[0]
    engine = Engine("m", launch.checkpoint, launch.options, tmp_path)
    engine.socket.touch()
    there = {}
    for state in ("verifying", "ready", "draining", "restarting", "ready", "refused", "ready", "stopped"):
        engine.become(state, "why")
        there[state] = engine.public.exists()
        told = json.loads(engine.status_file.read_text())
        assert (told["state"], told["reason"]) == (state, "why")
        assert (told["ready_at"] is not None) == (state in ("verifying", "restarting"))
    assert [state for state, exists in there.items() if exists] == ["ready", "draining"]


def test_an_engine_gets_as_many_requests_at_once_as_it_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(cpu: bool = True, config: Path | None = None, **options: Any) -> int:
        monkeypatch.setattr(planning, "on_cpu", lambda: cpu)
        made = make([] if config else [DEMO], Options(config=config, **options))
        return next(iter(made.settings.models.values())).max_concurrency

    assert at_once() == 128
    assert at_once(cpu=False) == 256
    for arguments in ("--max-num-seqs 40", "--max_num_seqs=40", "--seed 1 --max-num-s 40"):
        assert at_once(vllm_args=arguments) == at_once(cpu=False, vllm_args=arguments) == 40
    config = write(tmp_path, models={"m": {"checkpoint": str(DEMO), "max_concurrency": 7}})
    assert at_once(config=config, vllm_args="--max-num-seqs 40") == 7

"""What a settings file may say, and what a person is told who got it wrong."""

import json
import random
import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel

from serving.gateway.metrics import Metrics
from serving.gateway.names import normal_url
from serving.gateway.operations import Admin, Audit, Cors, Log, Redis, Store, Tls, Tracing
from serving.gateway.settings import (
    EngineAt,
    Http,
    LatencyTarget,
    Limits,
    Model,
    Probes,
    Retries,
    Settings,
    Timeouts,
    load,
)  # fmt: skip
from serving.gateway.settings_file import MAX_BYTES

ROOT = Path(__file__).parents[3]
URL = "http://a:1"


def write(tmp_path: Path, content: object, name: str = "gateway.yaml") -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def with_model(**keys: object) -> dict[str, Any]:
    return {"models": {"demo": {"engines": [{"url": URL}]} | keys}}


def with_engine(**keys: object) -> dict[str, Any]:
    return with_model(engines=[{"url": URL} | keys])


def refusal(path: Path) -> list[str]:
    """The lines of the refusal, without the file's name that each begins with."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller compares the whole message
        load(path)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (with_model(max_queue=-3), "models.demo.max_queue must be at least 0, got -3"),
        (with_model(max_queue=True), "models.demo.max_queue must be a whole number, got true"),
        (with_model(max_queue="9"), 'models.demo.max_queue must be a whole number, got "9"'),
        (with_model(queue_timeout=0), "models.demo.queue_timeout must be above 0, got 0"),
        (with_model(max_queu=3), "models.demo.max_queu is not known; did you mean max_queue?"),
        (with_model(limits=None), "models.demo.limits must be a mapping of keys to values, got nothing"),
        (
            with_model(limits={"schema_dept": 3}),
            "models.demo.limits.schema_dept is not known; did you mean schema_depth?",
        ),
        (
            with_model(timeouts={"zzz": 1}),
            "models.demo.timeouts.zzz is not known; known here: connect, first_byte, stall",
        ),
        # A model called like a section does not confuse which keys are known.
        (
            {"models": {"limits": {"engines": [{"url": URL, "wieght": 1}]}}},
            "models.limits.engines[0].wieght is not known; did you mean weight?",
        ),
        (with_model(replicas=2), "models.demo.replicas is for checkpoint: list each server of engines instead"),
        (
            with_model(limits={"allow": ["min_p"], "deny": ["min_p"]}),
            "models.demo.limits.deny holds min_p, and so does allow",
        ),
        (
            with_model(limits={"deny": ["temprature", "seed", "min_p", "use_beam_search", "chat_template"]}),
            "models.demo.limits.deny holds temprature, which no route has; did you mean temperature?",
        ),
        (
            with_model(limits={"allow": ["chat_template", "priority"]}),
            "models.demo.limits.allow may not hold chat_template: that is never passed to an engine",
        ),
        (
            with_model(latency_target={"first_token": 2, "total": 1}),
            "models.demo.latency_target.total must be at least first_token (2), got 1",
        ),
        (with_engine(weight=0), "models.demo.engines[0].weight must be above 0, got 0"),
        (with_engine(draining="off"), 'models.demo.engines[0].draining must be true or false, got "off"'),
        (
            with_model(engines=[{"url": URL}, {"url": "HTTP://A:1/v1/"}]),
            "models.demo.engines[1].url is the same server as engines[0].url",
        ),
        (with_model(engines=[{}]), "models.demo.engines[0].url is missing"),
        (
            with_model(engines=[]),
            "models.demo.engines must name at least one server (or checkpoint a directory, for medassist serve)",
        ),
        (
            with_model(checkpoint="runs/demo"),
            "models.demo.checkpoint needs an engine to be started, which only medassist serve does: "
            "give engines that run",
        ),
        ({"models": {}}, "models must hold at least one model"),
        (with_model() | {"aliases": {"x": "nobody"}}, "aliases.x names nobody, which is not among models"),
        (
            with_model() | {"aliases": {"x": "demo", "y": {"x": 1}}},
            "aliases.y names x, which is an alias: name the models themselves",
        ),
        (with_model() | {"aliases": {"x": {"demo": -1}}}, "aliases.x.demo must be above 0, got -1"),
        (with_model() | {"aliases": {"x": {"demo": float("inf")}}}, "aliases.x.demo must be a finite number, got inf"),
        (with_model() | {"aliases": {"x": ["demo"]}}, "aliases.x must be text, got a list"),
        (with_model() | {"aliases": {"x": {}}}, "aliases.x must name at least one model"),
        (
            with_model() | {"aliases": {"demo": "demo"}},
            "aliases.demo must have a name of its own: demo is a model already",
        ),
        (with_model() | {"drain": float("nan")}, "drain must be a finite number, got nan"),
        (with_model() | {"port": 70_000}, "port must be at most 65535, got 70000"),
        ({"modles": {}} | with_model(), "modles is not known; did you mean models?"),
        (with_model() | {"admin": {"port": 8000}}, "admin.port must be another one than port"),
        (
            with_model() | {"cors": {"origins": ["*"]}},
            "cors.origins[0] must be SCHEME://HOST[:PORT] without a path; * is not allowed",
        ),
        (
            with_model() | {"redis": {"url": "redis://a", "url_env": "B"}},
            "redis.url and url_env exclude each other",
        ),
        ([1], "the file must be a mapping of keys to values, got a list"),
    ],
)
def test_one_line_says_which_key_and_what_it_must_be(content: Any, line: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path, content)) == [line]


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    content = {
        "models": {
            "a": {"engines": [{"url": URL}], "adapters": ["x", "y", "a"], "max_queue": 1},
            "b": {"engines": [{"url": URL}], "adapters": ["y", "b b"]},
            "../c": {"engines": [{"url": URL}]},
        },
        "aliases": {"x": "nobody", "a/b": "y"},
    }
    rule = "must be at most 128 letters, digits, '.', '_', '-' or '/', each part beginning with a letter or digit"
    assert refusal(write(tmp_path, content)) == [
        f"models.../c {rule}",
        "models.a.adapters[2] must have a name of its own: a is a model already",
        "models.b.adapters[0] must have a name of its own: y is an adapter of a already",
        f"models.b.adapters[1] {rule}",
        "aliases.x must have a name of its own: x is an adapter of a already",
        "aliases.x names nobody, which is not among models",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models:\n  demo: [\n", "line 3: "),
        ("models:\n  demo: {}\n  demo: {}\n", "line 3: demo is given twice"),
        ("models: !!python/object:os.system {}\n", "line 1: the tag 'python/object:os.system' has no use here"),
        ("a: &a [*a]\n", "Circular reference"),
        ("? [x]\n: 1\n", "line 1: a key must be text"),
        ("---\na: 1\n---\nb: 1\n", "line 3: "),
        ("", "is empty"),
        ("a: \x01\n", "control characters are not allowed"),
        ("[" * 100_000, ""),
        ("{a: " * 40 + "1" + "}" * 40, "line 1: nested too deeply"),
        # Each line stands for nine times the one before.
        ("\n".join(f"k{i}: &k{i} [{','.join([f'*k{i - 1}'] * 9) if i else 'x'}]" for i in range(12)), "references"),
    ],
)  # fmt: skip
def test_what_is_not_yaml_or_abuses_it_is_refused_with_its_line(text: str, expected: str, tmp_path: Path) -> None:
    (line,) = refusal(write(tmp_path, text))
    assert expected in line


def test_json_files_are_held_to_the_same(tmp_path: Path) -> None:
    good = write(tmp_path, json.dumps(with_model(), indent="\t"), "gateway.json")
    assert load(good) == load(write(tmp_path, with_model()))
    assert refusal(write(tmp_path, '{"models": {},\n "models": {}}', "x.json")) == ["models is given twice"]
    assert refusal(write(tmp_path, '{\n"models": nothing}', "x.json")) == ["line 2: Expecting value"]
    (line,) = refusal(write(tmp_path, '{"host": "\\ud800"}', "x.json"))
    assert "surrogate" in line
    (line,) = refusal(write(tmp_path, "[" * 100_000, "x.json"))
    assert line == "nested too deeply"


def test_files_that_are_no_settings_are_refused_unread(tmp_path: Path) -> None:
    assert refusal(tmp_path) == ["must be a regular file"]
    assert refusal(write(tmp_path, " " * (MAX_BYTES + 1))) == ["must be at most 4 MiB"]
    (tmp_path / "x.yaml").write_bytes(b"models: \xff")
    assert refusal(tmp_path / "x.yaml") == ["must be UTF-8 text; byte 8 is not"]
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.yaml")


def test_numbers_booleans_and_keys_are_read_as_people_mean_them(tmp_path: Path) -> None:
    text = "models: {1: {engines: [{url: 'http://a'}], max_prefill_tokens: 131_072}}\naliases: {on: '1'}\ndrain: 1e1\n"
    settings = load(write(tmp_path, text))
    assert (list(settings.models), settings.aliases, settings.drain) == (["1"], {"on": "1"}, 10)
    assert settings.models["1"].max_prefill_tokens == 131_072


def test_shared_parts_can_be_written_once(tmp_path: Path) -> None:
    text = (
        "models:\n  a: &a {engines: [{url: 'http://a'}], max_queue: 3, limits: {n: 2}}\n"
        "  b: &b {<<: *a, engines: [{url: 'http://b'}], max_queue: 4}\n"
        "  c: {<<: *b, engines: [{url: 'http://c'}]}\n"
    )
    models = load(write(tmp_path, text)).models
    assert [(m.engines[0].url, m.max_queue, m.limits.n) for m in models.values()] == [
        ("http://a", 3, 2),
        ("http://b", 4, 2),
        ("http://c", 4, 2),
    ]


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("http://Engine:8000/v1/", "http://engine:8000"),
        ("https://engine:443/", "https://engine"),
        ("http://engine/team/v1", "http://engine/team"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("unix:/run/e.sock", "unix:/run/e.sock"),
        ("unix:///run/e.sock", "unix:/run/e.sock"),
    ],
)
def test_addresses_have_one_form(url: str, normal: str) -> None:
    assert normal_url(url) == normal
    assert normal_url(normal) == normal


@pytest.mark.parametrize(
    "url",
    ["engine:8000", "ftp://engine", "http://", "http://e:99999", "http://e?key=S3CRET", "http://e#f", "http://[::1",
     "http://u:S3CRET@e", "u:S3CRET@e:80", "http://e\n", "http://e x", "unix:run/e.sock", "unix:/",
     "unix:/" + "e" * 200, r"http://e\@evil", "", "http://a..b:80", "http://xn--:8000", "http://\u00e4..de",
     "http://" + "a" * 70 + ".de", "http://" + "\u00e4" * 64, "http://a\u2100b"],
)  # fmt: skip
def test_other_addresses_are_refused_and_passwords_not_repeated(url: str, tmp_path: Path) -> None:
    (line,) = refusal(write(tmp_path, with_engine(url=url)))
    assert line.startswith("models.demo.engines[0].url ")
    assert "S3CRET" not in line
    with pytest.raises(ValueError, match="--engine") as error:
        Settings.from_engines([f"demo={url}", url])
    assert "S3CRET" not in str(error.value)


def test_keys_are_named_by_their_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, with_engine(api_key_env="ENGINE_KEY"))
    monkeypatch.delenv("ENGINE_KEY", raising=False)
    where = "models.demo.engines[0].api_key_env"
    assert refusal(path) == [f"{where}: the variable ENGINE_KEY is not set"]
    monkeypatch.setenv("ENGINE_KEY", "S3CRET\r\nX: y")
    (line,) = refusal(path)
    assert "without spaces or line ends" in line
    assert "S3CRET" not in line
    monkeypatch.setenv("ENGINE_KEY", "S3CRET")
    assert load(path).models["demo"].engines[0].api_key_env == "ENGINE_KEY"
    (line,) = refusal(write(tmp_path, with_engine(api_key_env="sk-S3CRET")))
    assert line == f"{where} must be the name of an environment variable that holds the key, not the key"


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etc").mkdir()
    path = write(tmp_path / "etc", with_model(fingerprint="../f.json", checkpoint="c"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"models\.demo\.fingerprint: .* cannot be read \(No such file or directory\)"):
        load(Path("etc/gateway.yaml"), local=True)
    (tmp_path / "f.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is not a fingerprint\.json"):
        load(path, local=True)
    (tmp_path / "f.json").write_text("{}")
    model = load(Path("etc/gateway.yaml"), local=True).models["demo"]
    assert model.fingerprint is not None
    assert model.fingerprint.samefile(tmp_path / "f.json")
    assert model.checkpoint == tmp_path / "etc/c"


def test_engines_of_the_command_line() -> None:
    settings = Settings.from_engines(["a=http://x:1/v1", "b=unix:/s", "a=http://y:1"], port=0)
    assert {name: [e.url for e in m.engines] for name, m in settings.models.items()} == {
        "a": ["http://x:1", "http://y:1"],
        "b": ["unix:/s"],
    }
    assert settings.port == 0
    with pytest.raises(ValueError, match=r"^--engine: models\.a\.engines\[1\]\.url is the same server as"):
        Settings.from_engines(["a=http://x", "a=http://x/v1"])


def test_what_is_dumped_loads_as_the_same(tmp_path: Path) -> None:
    text = (ROOT / "deploy/gateway.example.yaml").read_text()
    settings = load(write(tmp_path, text))
    (tmp_path / "elsewhere").mkdir()
    assert load(write(tmp_path / "elsewhere", settings.dump(), "gateway.json")) == settings
    assert load(write(tmp_path / "elsewhere", settings.dump(), "gateway.yaml")) == settings


def test_no_damage_to_a_file_ends_in_anything_but_a_refusal(tmp_path: Path) -> None:
    """The watcher of a running gateway relies on that."""
    whole = (ROOT / "deploy/gateway.example.yaml").read_text()
    whole = "\n".join(line.partition("#")[0].rstrip() for line in whole.splitlines())
    chance = random.Random(0)
    refused = 0
    for _ in range(300):
        start = chance.randrange(len(whole))
        junk = "".join(chance.choices(string.printable, k=chance.randrange(6)))
        path = write(tmp_path, whole[:start] + junk + whole[start + chance.randrange(40) :])
        try:
            load(path)
        except ValueError as e:
            assert str(e).startswith(str(path))  # noqa: PT017 - some damage does no harm
            refused += 1
    assert refused > 200


def test_the_documentation_has_every_key_with_its_default() -> None:
    sections: dict[str, type[BaseModel]] = {
        "The file": Settings,
        "`models.NAME`": Model,
        "`models.NAME.engines[]`": EngineAt,
        "`models.NAME.limits`": Limits,
        "`models.NAME.latency_target`": LatencyTarget,
        "`models.NAME.timeouts`": Timeouts,
        "`http`": Http,
        "`retries`": Retries,
        "`probes`": Probes,
        "`store`": Store,
        "`redis`": Redis,
        "`audit`": Audit,
        "`tracing`": Tracing,
        "`log`": Log,
        "`tls`": Tls,
        "`cors`": Cors,
        "`admin`": Admin,
    }
    text = (ROOT / "docs/gateway.md").read_text() + (ROOT / "docs/operations.md").read_text()
    for title, section in sections.items():
        part = re.split(r"\n##+ ", text.partition(f"\n### {title}\n")[2])[0]
        documented = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", part, re.MULTILINE))
        assert list(documented) == list(section.model_fields), title
        for key, field in section.model_fields.items():
            if isinstance(field.default, bool | int | float | str):
                default = str(field.default).lower() if isinstance(field.default, bool) else f"{field.default}"
                assert documented[key] == default.removesuffix(".0"), f"{title}: {key}"
            elif field.is_required():
                assert documented[key] == "required", f"{title}: {key}"


def test_the_documentation_has_every_metric_with_its_labels() -> None:
    text = (ROOT / "docs/gateway.md").read_text()
    documented = {name: set(filter(None, labels.split(", "))) for name, labels in
                  re.findall(r"^\| `(medassist_\w+)` \| ([\w, ]*?) ?\|", text, re.MULTILINE)}  # fmt: skip
    metrics = [m for m in vars(Metrics()).values() if isinstance(m, MetricWrapperBase)]
    defined = {m._name + "_total" * isinstance(m, Counter): set(m._labelnames) for m in metrics}
    assert documented == defined

"""Two ranks against one: the same losses, gradients and weights by DDP, FSDP2, tensor and expert parallelism.

Ranks are processes of ``tests.training.rank``. What is compared is computed in float64, where all ways must agree to
rounding: in float32 AdamW makes a step of full length from a gradient that is nothing but rounding.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling import registry
from modeling.gpt.config import GPTConfig
from modeling.gpt.model import GPTForCausalLM
from modeling.medassist.config import MedAssistGPTConfig
from modeling.medassist.model import MedAssistGPTForCausalLM
from tests.training.rank import Case, train
from training import parallel

CHANGES: dict[str, dict[str, Any]] = {
    "gatorgpt": {"rope_layout": "flattened"},  # heads rotate differently: each rank needs its own heads' angles
    "medassist_deepseek": {"num_nextn_predict_layers": 1, "router_aux_loss_coef": 0.1},
}
WAYS = {"ddp": {"strategy": "ddp"}, "fsdp": {"strategy": "fsdp"}, "tensor": {"tensor": 2}}
EQUAL, MORE = (
    {
        f"{model}-{optimizer}-{way}": Case(model, optimizer, changes=CHANGES.get(model, {}), **settings)  # type: ignore[arg-type]
        for model in registry.REGISTRY
        for optimizer in ("adamw", "muon")
        for way, settings in WAYS.items()
        if (optimizer == "adamw" or model == "medassist_deepseek") is quick
    }
    for quick in (True, False)
)
FIFTY = {way: Case("medassist_gpt", strategy=way, steps=50, dtype="float32") for way in ("ddp", "fsdp")}
HALF = {way: Case("medassist_deepseek", strategy=way, precision="bfloat16", dtype="float32") for way in ("ddp", "fsdp")}
FOUR = [Case("medassist_gpt", tensor=2), Case("medassist_deepseek", "muon", tensor=2), Case("gpt", "muon", "fsdp")]


def on_ranks(count: int, cases: list[Case], folder: Path) -> dict[str, Any]:
    """What ``count`` ranks found for the cases."""
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    command = [sys.executable, "-m", "tests.training.rank", f"{folder}/found.pt", f"{folder}/cases.json", *ports]
    common = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    logs = [folder / f"{rank}.log" for rank in range(count)]
    processes = []
    for rank, log in enumerate(logs):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=False)
    return found


@pytest.fixture(scope="module")
def two_ranks_more(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(2, list(MORE.values()), tmp_path_factory.mktemp("more"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(2, [*EQUAL.values(), *FIFTY.values(), *HALF.values()], tmp_path_factory.mktemp("two"))


@cache
def _alone(name: str) -> dict[str, Any]:
    found = train(Case(**json.loads(name)), parallel.start())
    assert found is not None
    return found


def alone(case: Case) -> dict[str, Any]:
    """What a single process finds for a case."""
    return _alone(replace(case, strategy="auto", tensor=1).name)


def assert_equal(found: dict[str, Any], want: dict[str, Any]) -> None:
    for name in ("losses", "norms", "held_out", "state"):
        torch.testing.assert_close(found[name], want[name], rtol=1e-10, atol=1e-9)


def assert_as_one(two_ranks: dict[str, Any], case: Case) -> None:
    found, want = two_ranks[case.name], alone(case)
    assert_equal(found, want)
    assert found["strategy"] == ("single" if case.tensor == 2 else case.strategy)
    assert bool(found["shared"]) == (case.strategy != "ddp")
    assert float(want["norms"].min()) > 1  # so that the gradient was clipped


@pytest.mark.parametrize("case", EQUAL.values(), ids=EQUAL)
def test_two_ranks_train_as_one_does(two_ranks: dict[str, Any], case: Case) -> None:
    """The state has the selection biases of experts, too."""
    assert_as_one(two_ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE.values(), ids=MORE)
def test_two_ranks_train_as_one_does_by_muon(two_ranks_more: dict[str, Any], case: Case) -> None:
    assert_as_one(two_ranks_more, case)


@pytest.mark.parametrize("case", FIFTY.values(), ids=FIFTY)
def test_losses_of_fifty_steps_on_two_ranks_are_those_of_one(two_ranks: dict[str, Any], case: Case) -> None:
    found, want = two_ranks[case.name], alone(case)
    torch.testing.assert_close(found["losses"], want["losses"], rtol=0, atol=1e-5)
    assert len(found["losses"]) == 50


@pytest.mark.parametrize("case", HALF.values(), ids=HALF)
def test_strategies_agree_in_bfloat16_on_float32_weights(two_ranks: dict[str, Any], case: Case) -> None:
    found, want = two_ranks[case.name], alone(case)
    torch.testing.assert_close(found["losses"], want["losses"], rtol=0, atol=0.02)
    assert {tensor.dtype for tensor in found["state"].values()} == {torch.float32}
    whole = alone(replace(case, precision="float32"))
    assert not torch.equal(want["losses"], whole["losses"])


@pytest.mark.slow
def test_four_ranks_train_as_one_does(tmp_path: Path) -> None:
    """Two by two with FSDP2 over data ranks, and four data ranks."""
    found = on_ranks(4, FOUR, tmp_path)
    for case in FOUR:
        assert found[case.name]["strategy"] == "fsdp"
        assert_equal(found[case.name], alone(case))


@pytest.mark.parametrize(("world", "tensor"), [(3, 2), (1, 2), (2, 0)])
def test_ranks_that_cannot_be_divided_are_refused(monkeypatch: pytest.MonkeyPatch, world: int, tensor: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=rf"parallel\.tensor \({tensor}\) must divide the number of ranks \({world}\)"):
        parallel.start(tensor)


def test_models_that_ranks_cannot_share_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(model: Any, strategy: str, ranks: parallel.Ranks, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parallel.distribute(model, ranks, strategy, torch.float32)

    cpu = torch.device("cpu")
    three, both = parallel.Ranks(0, 1, True, cpu, tensor=3), parallel.Ranks(0, 2, True, cpu, tensor=2)
    model = MedAssistGPTForCausalLM(MedAssistGPTConfig.tiny(num_attention_heads=6))
    refused(model, "auto", three, r"num_key_value_heads \(2\) cannot be shared by 3 .*ranks")
    refused(model, "ddp", both, r"parallel\.strategy 'ddp' does not go with parallel\.tensor")
    refused(model, "fspd", three, r"parallel\.strategy must be one of .*'fspd'")
    monkeypatch.delattr(GPTForCausalLM, "tensor_plan")
    refused(GPTForCausalLM(GPTConfig.tiny()), "auto", both, "GPTForCausalLM declares no tensor_plan")

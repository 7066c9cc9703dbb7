"""Logits that the authors' programs printed: from a file in their layout, through the import, in module and engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling.reference import Golden
from modeling.registry import Architecture
from tests.golden import import_golden, sizes
from tests.parity.harness import KINDS, run_jobs, selected_architectures

TOLERANCE = 1e-5  # the numbers were printed with six digits

goldens: list[Any] = [
    pytest.param(arch, golden, id=f"{arch.model_type}-{number}")
    for arch in selected_architectures()
    for number, golden in enumerate(arch.reference().golden)
]


def distributions(golden: Golden) -> dict[int, torch.Tensor]:
    return {at: torch.tensor(values).log_softmax(-1) for at, values in golden.logits.items()}


@pytest.mark.parametrize(("arch", "golden"), goldens)
def test_imported_module_computes_the_golden_logits(arch: Architecture, golden: Golden, tmp_path: Path) -> None:
    path = import_golden(arch, golden, tmp_path / "golden", sizes(arch, golden))
    model = AutoModelForCausalLM.from_pretrained(path)
    assert type(model) is arch.model_class()
    with torch.no_grad():
        logits = model(torch.tensor([list(golden.token_ids)])).logits[0]
    for at, want in golden.logits.items():
        torch.testing.assert_close(logits[at], torch.tensor(want), rtol=0, atol=TOLERANCE)


@pytest.mark.engine
def test_engine_computes_the_golden_logits(tmp_path: Path) -> None:
    """All of them in one process. Their heads are 4 wide: they are padded to what the kernel takes."""
    selected = [param.values for param in goldens]
    if not selected:
        pytest.skip("no golden numbers for the selected architecture")
    jobs = []
    for number, (arch, golden) in enumerate(selected):
        path = import_golden(arch, golden, tmp_path / f"golden-{number}", sizes(arch, golden))
        jobs.append(
            {"checkpoint": str(path), "options": KINDS["eager"][0], "prompts": [list(golden.token_ids)],
             "new_tokens": 1, "distributions": True}
        )  # fmt: skip
    for (arch, golden), result in zip(selected, run_jobs(tmp_path / "engines", jobs, "eager"), strict=True):
        assert "error" not in result, result["error"]
        for at, want in distributions(golden).items():
            got = torch.tensor(result["distributions"][0][at])
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE, msg=lambda m, a=arch: f"{a.model_type}: {m}")

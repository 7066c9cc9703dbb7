"""Logits that the authors' programs printed: from a file in their layout, through the import, in module and engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling.fingerprint import probe_ids
from modeling.importing import import_checkpoint
from modeling.reference import Golden
from modeling.registry import Architecture
from tests.golden import import_golden, sizes
from tests.modeling.importing.published import (
    Sizes,
    gpt,
    gpt_logits,
    medassist,
    medassist_logits,
    native,
    prefixed,
    write_folder,
    write_training_dictionary,
)
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


# Sizes and weights that are in no fact sheet; heads of 48, 56 and 45, the published models' own.
MEDASSIST = Sizes(vocab=61, d=128, heads=4, kv=2, ff=72, layers=3, ctx=160)
GATOR_V1 = Sizes(vocab=61, d=192, heads=4, kv=2, ff=384, layers=2, ctx=160)
GATOR_V2 = Sizes(vocab=61, d=224, heads=4, kv=2, ff=448, layers=2, ctx=160)
GPT = Sizes(vocab=61, d=135, heads=3, layers=2, ctx=160)
ENOUGH = 2e-5  # float32 against a float64 program of its own, logits of up to a few units


def write_published(folder: Path) -> dict[str, tuple[Path, dict[str, Any], Callable[[list[int]], torch.Tensor]]]:
    """Files as their authors write them, the import's settings, and what the models compute: (T, V) of logits."""
    med, v1, v2 = (
        medassist(MEDASSIST, seed=1),
        medassist(GATOR_V1, 2, head="unembed"),
        medassist(GATOR_V2, 3, head="unembed"),
    )
    both = gpt(GPT, seed=4)
    folder.mkdir()
    write_training_dictionary(folder / "checkpoint_step_9.pt", prefixed(med), native(MEDASSIST))
    gator_config = {"architectures": ["GatorGPT"], "model_type": "gator-transformer", "hidden_size": GATOR_V1.d,
                    "num_attention_heads": GATOR_V1.heads, "num_hidden_layers": GATOR_V1.layers,
                    "vocab_size": GATOR_V1.vocab, "max_position_embeddings": GATOR_V1.ctx}  # fmt: skip
    write_folder(folder / "gator-v1", prefixed(v1), gator_config)
    # The second upload's configuration names another vocabulary and code that is not the weights'.
    gator_config |= {"architectures": ["GatorModel"], "hidden_size": GATOR_V2.d, "vocab_size": GATOR_V2.vocab - 24,
                     "auto_map": {"AutoModel": "modeling_gator.GatorModel"}}  # fmt: skip
    write_folder(folder / "gator-v2", prefixed(v2), gator_config, "pytorch_model.bin")
    torch.save(both, folder / "GPT2.pth")
    heads = {"n_heads": GPT.heads}
    return {
        "medassist": (folder / "checkpoint_step_9.pt", {}, lambda ids: medassist_logits(med, MEDASSIST, ids)),
        "gator v1": (folder / "gator-v1", {}, lambda ids: medassist_logits(v1, GATOR_V1, ids)),
        "gator v2": (folder / "gator-v2", {}, lambda ids: medassist_logits(v2, GATOR_V2, ids)),
        "gpt": (folder / "GPT2.pth", heads, lambda ids: gpt_logits(both, GPT, ids, causal=False)),
        "causal gpt": (
            folder / "GPT2.pth", heads | {"causal": True}, lambda ids: gpt_logits(both, GPT, ids, causal=True)
        ),
    }  # fmt: skip


@pytest.mark.engine
def test_engine_computes_what_published_files_do(tmp_path: Path) -> None:
    """From file through import to engine, against programs written from the models' description alone."""
    published = write_published(tmp_path / "published")
    prompts = [probe_ids(length, 61) for length in (1, 7, 40, 150)]
    jobs = []
    for number, (source, settings, _) in enumerate(published.values()):
        out = tmp_path / f"imported-{number}"
        import_checkpoint(source, out, tokenizer="none", settings=settings)
        job = {"checkpoint": str(out), "options": KINDS["eager"][0] | {"max_logprobs": 61}, "prompts": prompts}
        jobs.append(job | {"new_tokens": 1, "distributions": True})
    for (name, (*_, logits)), result in zip(
        published.items(), run_jobs(tmp_path / "engines", jobs, "eager"), strict=True
    ):
        assert "error" not in result, result["error"]
        for ids, rows in zip(prompts, result["distributions"], strict=True):
            want = logits(ids).log_softmax(-1).float()
            torch.testing.assert_close(torch.tensor(rows), want, rtol=0, atol=ENOUGH, msg=lambda m, n=name: f"{n}: {m}")

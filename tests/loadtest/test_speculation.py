"""Figures of the speculation benchmark, from turns made up so that every figure is known."""

from pathlib import Path
from typing import Any

import pytest

from loadtest.engine_sizes import choose
from loadtest.latent_cache import Measured, formulas
from loadtest.latent_cache import table as cache_table
from loadtest.speculation import Options, markdown, memory_bound, run, summarise, table
from modeling.deepseek.config import MedAssistDeepseekConfig


def turn(number: int, drafted: int, seconds: float, gained: list[int] | None = None, **more: Any) -> Any:
    made = {"round": number, "drafted": drafted, "seconds": seconds, "cpu": 2 * seconds}
    return made | {"answers": [[1] * 60, [2] * 40], "gained": gained or [1] * 98} | more


def test_figures_are_those_of_their_definitions() -> None:
    turns = [
        turn(0, 0, 1.0), turn(0, 2, 0.5, [3] * 10 + [1] * 30),
        turn(1, 0, 2.0), turn(1, 2, 1.0, [3] * 20 + [2] * 20),
        turn(2, 0, 1.0), turn(2, 2, 0.4, [3] * 10 + [2] * 10 + [1] * 20),
    ]  # fmt: skip
    plain, drafting = summarise(turns)
    assert (plain.drafted, plain.tokens_per_second, plain.tokens_per_step) == (0, 100, 1)
    assert plain.milliseconds_per_step == 10
    assert drafting.tokens_per_second == 200
    assert drafting.cpu_per_token == pytest.approx(10)
    assert drafting.speed_up == pytest.approx([2, 2, 2.5])
    assert drafting.by_place == pytest.approx([70 / 120, 40 / 120])
    assert drafting.tokens_per_step == pytest.approx(1 + 110 / 120)
    assert drafting.accepted == pytest.approx(110 / 240)
    assert drafting.same


def test_another_answer_shows() -> None:
    turns = [turn(0, 0, 1.0), turn(0, 1, 0.5, [2] * 10, answers=[[1] * 60, [3] * 40])]
    rows = summarise(turns)
    assert not rows[1].same
    assert "NO" in table(rows, MedAssistDeepseekConfig.demo())


def test_memory_bound_speed_up() -> None:
    dense = MedAssistDeepseekConfig.tiny(first_k_dense_replace=2, num_nextn_predict_layers=0)
    assert memory_bound(dense, 1.0, 0) == pytest.approx(1)
    # All experts are read in any case: several tokens cost what one does, and the drafts come on top.
    every = MedAssistDeepseekConfig.demo(num_experts_per_tok=16, vocab_size=1)
    few = MedAssistDeepseekConfig.demo(num_experts_per_tok=1, vocab_size=1)
    assert 1 < memory_bound(every, 2.0, 1) < 2
    assert memory_bound(few, 2.0, 1) < memory_bound(every, 2.0, 1)
    deep = MedAssistDeepseekConfig.demo(num_experts_per_tok=16, vocab_size=1, num_hidden_layers=60)
    assert memory_bound(deep, 2.0, 1) == pytest.approx(2, abs=0.1)


def test_report_names_the_best(tmp_path: Path) -> None:
    rows = summarise([turn(0, 0, 1.0), turn(0, 1, 0.5, [2] * 10), turn(0, 2, 0.8, [3] * 5 + [2] * 5)])
    text = markdown(rows, MedAssistDeepseekConfig.demo(), {"date": "today"}, {"rounds": 1})
    assert "1 drafted at a time, 2.00 times" in text
    assert text.count("| today") == 1


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--drafted"):
        Options(tmp_path, drafted=(0,))
    MedAssistDeepseekConfig.tiny(num_nextn_predict_layers=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no layer of multi-token prediction"):
        run(Options(tmp_path))
    with pytest.raises(ValueError, match="medassist_deepseek has experts"):
        choose(["medassist_deepseek"])
    assert "medassist_deepseek" not in dict(choose())


def test_cache_formulas() -> None:
    config = MedAssistDeepseekConfig.tiny()  # 2 layers, latent 64 + 16, 4 heads of 48, which kernels take as 64
    assert formulas(config, 4) == (2 * 80 * 4, 2 * 4 * 2 * 64 * 4)
    rows = [("m", Measured(640 * 128, 128, 640), Measured(4096 * 128, 128, 4096))]
    assert "6.40" in cache_table(rows)

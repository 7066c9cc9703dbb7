"""The benchmark of the training step: its figures from turns made up, and one real run, a small one."""

import pytest
import torch

from loadtest.training import ALL_ROWS, Options, Result, Row, build, choice, run, summarise
from loadtest.training_contenders import MINIMAL, OURS, TRAINER, Minimal, Turn
from loadtest.training_report import markdown, reading, tables


def turns(ours: float, other: float, loss: float = 2.0) -> list[Turn]:
    return [Turn("other", other, 2 * other, [4.0, loss]), Turn("ours", ours, ours, [4.0, 2.0], loading=ours / 100)]


def test_figures_are_those_of_their_definitions() -> None:
    rounds = [turns(9.0, 1.0), turns(1.0, 1.5), turns(2.0, 2.0), turns(1.0, 2.0)]  # the first one warms up
    ours, other = summarise(rounds, {"ours": 100, "other": 100})
    assert (ours.rate, ours.ratios, ours.difference) == (100, [1, 1, 1], 0)
    assert ours.loading == pytest.approx(0.01)
    assert (other.rate, other.passed_rate) == (50, 25)
    assert other.ratios == pytest.approx([1.5, 1, 2])


def test_ratios_are_of_tokens_not_of_turns() -> None:
    rows = summarise([turns(1.0, 1.0), turns(1.0, 1.5)], {"ours": 100, "other": 200})
    assert rows[1].ratios == pytest.approx([0.75])


@pytest.mark.parametrize(("loss", "difference"), [(2.1, 0.05), (float("nan"), float("inf"))])
def test_a_loss_that_differs_shows_in_the_warm_up_too(loss: float, difference: float) -> None:
    rows = summarise([turns(1.0, 1.0, loss), turns(1.0, 1.0)], {"ours": 100, "other": 100})
    assert rows[1].difference == pytest.approx(difference)


def test_contenders_do_the_same_work() -> None:
    options = Options(preset="tiny", window=16, batch_size=2, rounds=2, steps=2, options=("whole_logits+unfused",))
    threads = torch.get_num_threads()
    result = run(options)
    assert torch.get_num_threads() == threads
    assert {row.who for row in result.rows} == {OURS, MINIMAL, TRAINER}
    assert max(row.difference for row in result.rows) < 1e-4
    plain, changed = result.choices
    assert (plain.who, changed.who) == ("plain", "whole_logits+unfused")
    assert changed.difference < 1e-4
    assert 0 < result.rows[0].loading < 1


def test_losses_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # One of them learns at another rate: nothing of the first loss, and something of those after it.
    turn = Minimal.turn

    def faster(self: Minimal, first: int, steps: int) -> Turn:
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2
        return turn(self, first, steps)

    monkeypatch.setattr(Minimal, "turn", faster)
    options = Options(preset="tiny", window=16, batch_size=2, rounds=1, steps=3)
    with pytest.raises(ValueError, match="did not do the same work"):
        run(options)


def test_options_of_our_step() -> None:
    made = choice("bfloat16+compile+loss_chunk=64+batch_size=3")
    assert (made.precision, made.compile, made.loss_chunk, made.batch_size) == (torch.bfloat16, True, 64, 3)
    assert choice("whole_logits").loss_chunk == ALL_ROWS
    for wrong in ("quick", "loss_chunk", "batch_size=0", "compile=1", ""):
        with pytest.raises(ValueError, match=r"--options.*whole_logits"):
            choice(wrong)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="presets tiny, demo"):
        build(Options(preset="huge"))
    with pytest.raises(ValueError, match=r"--window 2048.*512"):
        build(Options(preset="tiny", window=2048))
    with pytest.raises(ValueError, match=r"losses \(.*would not train the same"):
        build(Options(architecture="medassist_deepseek", preset="tiny"))
    with pytest.raises(ValueError, match="--batch-size"):
        Options(batch_size=0)


def test_report() -> None:
    rows = [Row(OURS, 100, 90, [1.0, 1.0], 0, 0.01, 0), Row(TRAINER, 80, 70, [1.2, 1.3], 1e-7, 0, 0)]
    on_cpu = Result(rows, [], {"text": "some"}, 0.015, 2e9, None, False)
    text = markdown(on_cpu, {"cores": "2"}, "definitions")
    assert "100 tokens a CPU-second, 1.25 times Trainer's" in reading(on_cpu)
    assert "takes 1.00% of a step, and would take 1.50%" in text
    assert "MFU" not in text
    chosen = [Row("plain", 100, 100, [1.0], 0, 0, 2**20), Row("compile", 150, 150, [0.5], 0, 0, 3 * 2**20)]
    on_gpu = tables(Result(rows, chosen, {}, 0.015, 2e9, 1e12, True))
    assert "GPU-second" in on_gpu
    assert "20.0%" in on_gpu  # 100 tokens * 2e9 of 1e12
    assert [cell.strip() for cell in on_gpu.splitlines()[-1].split("|")[4:7]] == ["2.00", "2.00 to 2.00", "3"]

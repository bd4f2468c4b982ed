"""A mistake in the objective: one line that names the key, and nothing left behind."""

import json
from pathlib import Path

import pytest

from distill.cli import main
from tests.test_command import fit, here
from tests.test_kinds import bert_args

__all__ = ["here"]

HIDDEN = "--model.losses.hidden=HiddenMSE"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.losses.kd.temperature=0"], "model.losses.kd: temperature must be > 0, got 0.0; use 1.0 for none"),
        (["--model.losses.kd.temperature=-2"], "model.losses.kd: temperature must be > 0, got -2.0"),
        (["--model.losses.js=JensenShannon", "--model.losses.js.beta=1.5"], "model.losses.js: beta must be in [0, 1], got 1.5"),
        (["--model.losses.skew=SkewKL", "--model.losses.skew.alpha=1"], "model.losses.skew: alpha must be in [0, 1), got 1.0"),
        (
            [
                "--model.losses.kd.temperature=BatchAwareTemperature",
                "--model.losses.kd.temperature.reference=4",
                "--model.losses.kd.temperature.reference_batch=8",
            ],
            "model.losses.kd: temperature: BatchAwareTemperature holds only without the factor T²; set t_squared: false",
        ),
        ([HIDDEN, "--model.losses.hidden.layers=[[1,9]]"], "model.losses.hidden.layers: teacher layer 9 is out of range; there are 0 to 2"),
        ([HIDDEN, "--model.losses.hidden.layers=[[5,1]]"], "model.losses.hidden.layers: student layer 5 is out of range; there are 0 to 1"),
        (
            [HIDDEN, '--model.losses.hidden.layers=[["model.layers.0.mlp","model.layers.1.mpl"]]'],
            "model.losses.hidden.layers: model.teacher has no submodule 'model.layers.1.mpl' with weights. Did you mean",
        ),
        ([HIDDEN, "--model.losses.hidden.projector=none"], "model.losses.hidden.projector: the student is 16 wide and the teacher 24"),
        ([HIDDEN, "--model.losses.hidden.projector=lin"], "must be one of auto, none, linear, mlp; got 'lin'"),
        (["--model.losses={ce: CrossEntropy}", "--model.balancer=GradNorm"], "GradNorm balances at least two terms against each other"),
        (["--model.balancer=GradNorm", "--model.balancer.shares={ce: 1}"], "model.balancer.shares: unknown [], missing ['kd']"),
        (["--model.balancer.weights.kl=1"], "balancer: weights for ['kl'], but model.losses has ['ce', 'kd']"),
        (
            ["--model.losses.rkd=RKDAngle", "--data.batch_size=2"],
            "model.losses.rkd: RKDAngle compares the samples of a micro-",
        ),
        (["--model.losses.att=AttentionMaps"], "model.student runs attention as 'sdpa', which gives no attention maps"),
        (
            ["--model.losses.cw=ClassWeighted", "--model.losses.cw.term=ForwardKL", "--model.losses.cw.class_weights=FrequencyPwer"],
            "no class 'FrequencyPwer'. Did you mean 'FrequencyPower'",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_one_line_with_the_key(here: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    assert fit("--name", "a", *args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1
    assert "Traceback" not in error
    assert not (here / "runs").exists()


def test_a_class_that_never_occurs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = bert_args(here, ["x", "y", "z", "w"])
    weighted = {"class_path": "ClassWeighted", "init_args": {"term": "CrossEntropy", "class_weights": "EffectiveNumber"}}
    losses = json.dumps({"ce": weighted, "kd": "ForwardKL"})
    changed = ["--data.labels=[x,y,z,w]", f"--model.losses={losses}", "--model.balancer=FixedWeights"]
    assert main(["--config", "kd_bert.yaml", "--name", "a", *args, *changed]) == 2
    assert "model.losses.ce needs the frequency of every class, but no training row has the label 'w'" in capsys.readouterr().err

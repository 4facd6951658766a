"""`repo-ops doctor`: what it finds on this machine, and that it notices what is wrong."""

import json

import pytest
import torch

from repo_ops import doctor
from repo_ops.cli import main
from repo_ops.doctor import Finding, as_text, backend_of, examine, self_test, version_findings
from repo_ops.head import torch_rows, triton_rows


def test_self_test_of_the_torch_head_passes_and_notices_a_wrong_gradient(monkeypatch) -> None:
    assert self_test("cpu", "torch") < 1e-5
    real = torch_rows.grads_

    def wrong(*arguments, **settings):
        grads = real(*arguments, **settings)
        return grads._replace(**{grads._fields[0]: grads[0] * 1.01})

    monkeypatch.setattr(torch_rows, "grads_", wrong)
    assert self_test("cpu", "torch") > 1e-3


@pytest.mark.skipif(not triton_rows.available(), reason="triton is not installed")
def test_examination_tests_both_backends_in_processes_of_their_own() -> None:
    report = examine()
    assert report.versions["torch"] == torch.__version__
    assert {"python", "repo-ops", "triton"} <= set(report.versions)
    assert report.devices[0].startswith("cpu: ")
    assert report.backends[0].startswith("cpu: torch")
    tested = [finding.text for finding in report.findings if "largest relative error" in finding.text]
    assert tested[0].startswith("torch head on cpu: ")
    assert any(text.startswith("triton head on ") for text in tested)
    assert not report.wrong, as_text(report)


def test_a_self_test_that_fails_is_wrong_and_the_exit_status_1(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: doctor.Report({"python": "3"}, ["cpu: x"], {}, ["cpu: torch"]))
    with pytest.raises(SystemExit) as exit_:
        main(["doctor"])
    assert exit_.value.code == 0
    assert "0 wrong, 0 warnings" in capsys.readouterr().out
    found = doctor._tested("no_such_device", "torch")
    assert found.level == "wrong"
    assert "no_such_device" in found.text
    broken = doctor.Report({"python": "3"}, ["cpu: x"], {}, ["cpu: torch"], [found])
    monkeypatch.setattr(doctor, "examine", lambda: broken)
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--json"])
    assert exit_.value.code == 1
    read = json.loads(capsys.readouterr().out)
    assert read["wrong"] is True
    assert read["findings"] == [{"level": "wrong", "text": found.text}]


def test_versions_outside_the_range_are_warned_of() -> None:
    assert version_findings({"torch": "2.13.0+cpu", "transformers": "5.23.0", "python": "3.11"}) == []
    old, new = version_findings({"torch": "2.5.1", "transformers": "6.0.0.dev0"})
    assert old == Finding("warning", "torch 2.5.1: expected at least 2.6; pip install -U torch")
    assert new.text == "transformers 6.0.0.dev0: nobody has tried 6 or newer; install transformers<6 if it fails"


def test_the_reason_for_a_backend_is_given() -> None:
    chosen, reason = backend_of(torch.device("cpu"))
    assert chosen == "torch"
    assert reason == triton_rows.why_not(torch.empty(0), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_self_test_on_a_gpu(backend: str) -> None:
    assert self_test("cuda", backend) < doctor.TOLERANCE

"""`doctor --self-test` says each step with its time, and the log of one that fails."""

import shlex

from geodiff4d.cli._self_test import STEPS, Step, self_test


def test_a_failing_step_ends_the_report_with_its_log():
    said: list[str] = []
    steps = [Step("good", "--version", ()), Step("bad", "nonsense", ()), Step("never", "--version", ())]
    assert not self_test(steps, said.append)
    text = "\n".join(said)
    assert said[0].startswith("ok") and said[0].endswith("good: geodiff4d --version")
    assert said[1].startswith("failed") and "exit code 2" in text and "unknown command 'nonsense'" in text
    assert "never" not in text


def test_a_step_must_leave_what_it_promised():
    said: list[str] = []
    assert not self_test([Step("empty", "--version", ("avatar.ply",))], said.append)
    assert "did not write avatar.ply" in said[1]


def test_the_steps_are_the_whole_path():
    assert [shlex.split(step.line)[0] for step in STEPS] == ["synth", "track", "synthesize", "fit", "render", "export"]

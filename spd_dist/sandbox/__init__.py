"""A sandbox for model-written programs: `open_sandbox().run(program, tests, setup)`.

A program passes if its functions give the right values. It runs in one sandbox and the tests in another, so that the
verdict is made where the program cannot reach: see `inside/judge.py`.
"""

from spd_dist.sandbox.sandbox import Limits, Sandbox, SandboxError, Verdict
from spd_dist.sandbox.trial import open_sandbox, what_holds

__all__ = ["Limits", "Sandbox", "SandboxError", "Verdict", "open_sandbox", "what_holds"]

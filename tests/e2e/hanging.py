"""The real server with one fault in it: a step with a request of max_tokens 77 never ends."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from vserve import cli
from vserve.engine import runner
from vserve.engine.sequence import Plan


class HangingRunner(runner.Runner):
    """A Runner that hangs on purpose."""

    def launch(self, plan: Plan) -> runner.Pending:
        if any(work.sequence.request.max_tokens == 77 for work in plan.works):
            hang_here()
        return super().launch(plan)


def hang_here() -> None:
    threading.Event().wait()


if __name__ == "__main__":
    runner.Runner = HangingRunner  # type: ignore[misc]  # before assemble takes it
    sys.exit(cli.main())

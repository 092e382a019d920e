"""A process that builds what it is asked to, one JSON line each way.

`HF_ENDPOINT` counts when `huggingface_hub` is first imported, so builds against a loopback hub need a process of
their own; keeping it spares the imports, which take seconds.
"""

import contextlib
import io
import json
import os
import sys


def main() -> None:
    from chimera.cli import UserError
    from tests.convert import builds

    for line in sys.stdin:
        asked = json.loads(line)
        os.environ.pop("HF_TOKEN", None)
        os.environ.update(asked.get("environment", {}))
        said, error = io.StringIO(), None
        with contextlib.redirect_stderr(said):
            try:
                builds.build_here(asked["settings"])
            except UserError as refused:
                error = str(refused)
        print(json.dumps({"said": said.getvalue(), "error": error}), flush=True)


if __name__ == "__main__":
    main()

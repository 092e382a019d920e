"""`make demo`: the whole way on the bundled sample - shards, both phases with a kill -9 and a resume, the report.

Each command is printed before it runs; type it yourself to get the same. Everything is written to ./demo.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
RUN = Path("demo/run")
KILL_AT = 140  # step; the newest checkpoint is then at 125


def main() -> int:
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for so small a model; on a busy machine it is 15 times as fast
    shutil.rmtree("demo", ignore_errors=True)
    began = time.monotonic()
    python, composer = "python", "composer"

    title("1. Tokenizer and shards from the bundled sample")
    call(python, "convert/train_tokenizer.py", "yamls/demo/shards.yaml")
    call(python, "convert/build_shards.py", "yamls/demo/shards.yaml")
    call(python, "convert/verify_shards.py", "demo/shards")

    title("2. What the run will see")
    call(python, "train/plan.py", "yamls/demo/phase2.yaml")

    title(f"3. Phase 1, killed with -9 near step {KILL_AT}")
    killed_at = train_and_kill(composer, "train/main.py", "yamls/demo/phase1.yaml")
    print(f"killed after step {killed_at}; checkpoints: {', '.join(sorted(p.name for p in RUN.glob('ep*.pt')))}")

    title("4. The same command again, now on two ranks: it goes on from the newest checkpoint")
    call(composer, "-n", "2", "train/main.py", "yamls/demo/phase1.yaml")

    title("5. Phase 2, on one rank again")
    call(composer, "train/main.py", "yamls/demo/phase2.yaml")

    title("6. Report")
    call(python, "train/report.py", "demo/run")
    print(f"\nThe demo took {time.monotonic() - began:.0f} seconds.")
    return 0


def title(text: str) -> None:
    print(
        f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else f"\n{text}", flush=True
    )


def command(*words: str) -> list[str]:
    """The command as it is run: with this environment's interpreter."""
    print(f"$ {' '.join(words)}", flush=True)
    return [str(BIN / words[0]), *words[1:]]


def call(*words: str) -> None:
    if code := subprocess.run(command(*words)).returncode:
        raise SystemExit(f"demo: `{' '.join(words)}` ended with {code}")


def train_and_kill(*words: str) -> int:
    """Start a run, kill it and its ranks with SIGKILL once `KILL_AT` steps are logged; returns the last step logged."""
    process = subprocess.Popen(command(*words), start_new_session=True)
    while process.poll() is None:
        if len(steps()) >= KILL_AT:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return steps()[-1]
        time.sleep(0.1)
    raise SystemExit(f"demo: training ended with {process.returncode} before step {KILL_AT}")


def steps() -> list[int]:
    """Steps in steps.jsonl so far; a line still being written is left out."""
    path = RUN / "steps.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


if __name__ == "__main__":
    sys.exit(main())

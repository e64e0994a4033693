"""How a command ends: a user's mistake is one line per problem on stderr and exit status 2, never a traceback."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from tagllm import launched
from tagllm.errors import LostContact, SharedError, UserError

HEARD_S = 2.0
"""A launcher ends all ranks with the first that fails, so one that is silent waits for the one that is to tell."""


def telling(work: Callable[[], None], offline: bool) -> None:
    """Runs a command and turns what the user can mend into lines; of shared errors only rank 0 tells."""
    if offline:  # read by the libraries when they are imported, so before that
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if os.environ.get("DS_ACCELERATOR") == "cpu":  # DeepSpeed's launcher shows its ranks GPUs all the same
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that files are tidied up
    try:
        work()
    except UserError as error:
        if _is_mine_to_tell(error):
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
        elif not _has_joined():
            time.sleep(HEARD_S)
        sys.exit(2)
    except LostContact as lost:
        print(f"error: {lost}", *lost.stack, sep="\n  ", file=sys.stderr)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_mine_to_tell(error: UserError) -> bool:
    """Before the ranks have joined one of each node tells: its files may differ from those of others. After that rank 0
    tells what all ranks find, and each what it alone does."""
    if not _has_joined():
        return int(os.environ.get("LOCAL_RANK", launched.rank())) == 0
    return launched.rank() == 0 or not isinstance(error, SharedError)


def _has_joined() -> bool:
    """Whether this rank has joined the others."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized()


def leave(end: SystemExit) -> None:
    """Ends the process, or raises `end` again where nothing speaks against the interpreter's own end."""
    if isinstance(end.code, int | None) and _has_joined():
        # all is written by now, and gloo's threads abort the interpreter's own end once in a while
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)
    raise end

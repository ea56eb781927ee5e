"""Runs the scripts in processes forked from one that has already imported torch: a start costs 0.1 s instead of 4 s."""
import functools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

os.environ["OMP_NUM_THREADS"] = "1"   # the same bits in every process
REPO = Path(__file__).resolve().parent.parent
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch", "torch._dynamo", "torch.utils.flop_counter", "matplotlib.pyplot",
                                  "torchvision.models.segmentation", "scipy.ndimage", "scipy.optimize", "tqdm",
                                  *(["common", "pretrain"] if Path.cwd() == REPO else [])])   # it imports from there

# `before` of runs whose figures no test looks at, and which would be half of the time: their files are there, empty
NO_FIGURES = """import numpy as np
import matplotlib.pyplot as plt
from unittest.mock import MagicMock
def subplots(rows=1, columns=1, squeeze=True, **_):
    figure, axes = MagicMock(), np.array([None] * rows * columns)
    for k in range(len(axes)):
        axes[k] = MagicMock()
    figure.savefig = lambda path, **_: open(path, "wb").close()
    axes = axes.reshape(rows, columns)
    return figure, axes if not squeeze else axes.squeeze() if len(axes.flat) > 1 else axes.item()
plt.subplots, plt.close = subplots, lambda figure: None
"""


def child(script, args, folder, env, limit, before):
    os.chdir(folder)
    os.environ.update(env)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{name}{env.get('RANK', '')}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if limit:   # no file may grow beyond `limit` bytes, as on a full disk
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    tqdm.set_lock(threading.RLock())   # its usual one is a semaphore that a killed process leaves behind
    sys.argv = [script, *map(str, args)]
    sys.path.insert(0, str(REPO))
    exec(before, {})   # what the test changes in torch or in common.py
    code = 0
    try:
        runpy.run_path(str(REPO / script), run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(script, *args, folder, limit=None, before="", **env):
    """Start `python script args` in `folder`, after the Python code `before`; returns the process."""
    p = processes.Process(target=child, args=(script, args, str(folder), env, limit, before))
    p.start()
    return p


def finish(p, folder, rank=""):
    """Wait for a process; its exit status, stdout and stderr."""
    p.join(300)
    if p.exitcode is None:
        p.kill()
        raise TimeoutError(f"still running after 300 s in {folder}: {Path(folder, f'stderr{rank}').read_text()}")
    return SimpleNamespace(code=p.exitcode, out=Path(folder, f"stdout{rank}").read_text(),
                           err=Path(folder, f"stderr{rank}").read_text())


def run(script, *args, folder, **more):
    return finish(start(script, *args, folder=folder, **more), folder)


def run_ok(*args, **more):
    done = run(*args, **more)
    assert done.code == 0 and not done.err, f"{args}: exit {done.code}\n{done.out}\n{done.err}"
    return done


def run_ranks(script, *args, folder, n=2, folders=None, code=0, **more):
    """The processes of torchrun --nproc-per-node n, in one folder or each in its own; all have to end with `code`."""
    folders = folders or [folder] * n
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ps = [start(script, *args, folder=f, RANK=str(r), LOCAL_RANK=str(r), **env, **more) for r, f in enumerate(folders)]
    done = [finish(p, f, r) for r, (p, f) in enumerate(zip(ps, folders))]
    assert [d.code for d in done] == [code] * n, [(d.out, d.err) for d in done]
    return done[0]


def without_figures(*functions):
    """The same ones, for a file of which no test looks at a figure."""
    return (functools.partial(f, before=NO_FIGURES) for f in functions)


def wait_for(condition, p, seconds=60):
    """Poll until condition() holds; False when the process ended before."""
    end = time.time() + seconds
    while not condition():
        if p.exitcode is not None:
            return False
        assert time.time() < end, "waited too long"
        time.sleep(0.002)
    return True


def lines(path):
    """Whole lines of a file that may be growing, or not be there."""
    return path.read_text().splitlines() if path.exists() else []

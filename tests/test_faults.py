"""Odd surroundings of the four scripts: streams, encodings, signals, left-over variables, links, two runs at once."""
import json
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import with_dropout
from runner import NO_FIGURES, REPO, finish, lines, run, run_ok, start, wait_for

TRAIN = ("pretrain.py", "--epochs", 1, "--batch-size", 2, "--crop", 32, 48)


def one_line(done, *parts, code=1):
    assert done.code == code and done.err.startswith("error: ") and done.err.count("\n") == 1, (done.code, done.err)
    for part in parts:
        assert str(part) in done.err, done.err


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.is_file() and not re.match("std(out|err)", p.name))


@pytest.fixture(scope="module")
def other_labels(tmp_path_factory, small):
    """A function: a copy of the small toy set whose label files of some splits are changed by `change`."""
    def make(splits, change):
        root = tmp_path_factory.mktemp("changed")
        for path in (small / "toy").rglob("*.png"):
            to = root / path.relative_to(small / "toy")
            to.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.array(Image.open(path))
            if "annotations" in path.parts and any(s in str(path.relative_to(small)) for s in splits):
                pixels = change(pixels)
            Image.fromarray(pixels).save(to)
        return root
    return make


# ─────────────────────────────────────────────── files of a run ───────────────────────────────────────────────

def test_every_name_has_its_own_log(small, tmp_path):
    """Suffixes are added, never exchanged; names whose logs would collide are refused."""
    for out in ("ft_alpha0.05", "ft_alpha0.3", "x.png", "plain.pt"):
        run_ok(*TRAIN, "--root", small / "toy", "--out", out, folder=tmp_path, before=NO_FIGURES)
        assert common.load_checkpoint(tmp_path / out)[1]["epoch"] == 1
    wanted = {f"{n}{s}" for n in ("ft_alpha0.05", "ft_alpha0.3", "x.png") for s in ("", ".jsonl", ".png")}
    assert set(names(tmp_path)) == wanted | {"plain.pt", "plain.jsonl", "plain.png"}
    before = (tmp_path / "plain.jsonl").read_bytes()
    one_line(run(*TRAIN, "--root", small / "toy", "--out", "plain", folder=tmp_path),
             "plain.pt is there", "plain.jsonl")
    assert (tmp_path / "plain.jsonl").read_bytes() == before and not (tmp_path / "plain").exists()


def test_a_link_keeps_leading_to_its_target(small, tmp_path):
    (tmp_path / "disk").mkdir()
    for target in ("disk/there.pt", "disk/not_yet.pt"):
        link = tmp_path / os.path.basename(target)
        link.symlink_to(target)
        run_ok(*TRAIN, "--root", small / "toy", "--out", link.name, folder=tmp_path, before=NO_FIGURES)
        assert link.is_symlink() and common.load_checkpoint(tmp_path / target)[1]["epoch"] == 1
    assert not list(tmp_path.rglob(".*"))


def test_two_runs_of_one_output(small, tmp_path):
    """The second is refused while the first works, and changes nothing; the first ends as if alone."""
    command = (*TRAIN, "--root", small / "toy", "--epochs", 12, "--save-every", 0)
    first = start(*command, folder=tmp_path)
    assert wait_for(lambda: (tmp_path / "pretrained.pt").exists(), first)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "link.pt").symlink_to("../pretrained.pt")
    for out in ("../pretrained.pt", "link.pt"):
        one_line(run(*command, "--out", out, "--restart", folder=elsewhere), f"{out}: another run is writing it")
    # Another checkpoint, but a file that the first writes at its end
    one_line(run(*command, "--out", "../pretrained.png", folder=elsewhere),
             "pretrained.png: another run is writing it")
    assert finish(first, tmp_path).code == 0
    steps = [json.loads(line)["step"] for line in lines(tmp_path / "pretrained.jsonl") if "loss" in line]
    assert steps == list(range(1, 37)) and not list(tmp_path.rglob(".*"))


# ─────────────────────────────────────────── labels, loader processes ───────────────────────────────────────────

def test_no_labelled_training_pixel(other_labels, tmp_path):
    root = other_labels(("train",), lambda ids: np.full_like(ids, 4))     # 4: other, ignored
    one_line(run(*TRAIN, "--root", root, folder=tmp_path), "no labelled pixel", "train/images")
    assert not (tmp_path / "pretrained.pt").exists()


def test_no_labelled_validation_pixel(other_labels, tmp_path):
    root = other_labels(("validation",), lambda ids: np.full_like(ids, 4))
    done = run_ok(*TRAIN, "--root", root, "--epochs", 2, folder=tmp_path)
    assert "validation: no labelled pixel" in done.out
    assert common.load_checkpoint(tmp_path / "pretrained.pt")[1]["epoch"] == 2


@pytest.mark.parametrize("workers", (0, 2))
def test_an_error_in_a_loader_process_ends_the_run(other_labels, tmp_path, workers):
    root = other_labels(("train",), lambda ids: np.full_like(ids, 99))
    done = run(*TRAIN, "--root", root, "--workers", workers, folder=tmp_path)
    one_line(done, "id 99", "expected")


def test_a_loader_process_that_is_killed_ends_the_run(small, tmp_path):
    p = start(*TRAIN, "--root", small / "toy", "--epochs", 2000, "--workers", 2, "--val-every", 2000, folder=tmp_path)
    assert wait_for(lambda: len(lines(tmp_path / "pretrained.jsonl")) >= 2, p)
    with open(f"/proc/{p.pid}/task/{p.pid}/children") as file:
        os.kill(int(file.read().split()[0]), signal.SIGKILL)
    one_line(finish(p, tmp_path), "DataLoader worker", "lower --workers")


def test_the_end_of_a_loader_process_behind_another_error(monkeypatch, capsys):
    """It is an exception wherever the main process is: torch.save ends with an error of its own."""
    def main():
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        finally:
            raise RuntimeError("[enforce fail] unexpected pos")
    monkeypatch.setattr(sys, "stdout", sys.stdout)    # cli() changes them
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with pytest.raises(SystemExit):
        common.cli(main)
    err = capsys.readouterr().err
    assert err.startswith("error: DataLoader worker (pid 7)") and err.count("\n") == 1, err


@pytest.mark.parametrize("kind, last", ((FileNotFoundError, "[Errno 2] No such file or directory: 'x.npy'"),
                                        (MemoryError, "Unable to allocate 9 GiB"),
                                        (common.InputError, "x: not the layout of toy.\n    Expected: y")))
def test_an_error_of_a_loader_process_is_what_stands_last(kind, last):
    traceback = "Traceback (most recent call last):\n  File \"a.py\", line 1, in f\n    raise Error: no\n"
    name = "common.InputError" if kind is common.InputError else f"numpy._core.{kind.__name__}"
    told = f"Caught {kind.__name__} in DataLoader worker process 0.\nOriginal {traceback}{name}: {last}\n"
    assert common.last_error(kind(told)) == last == common.last_error(kind(last))
    assert common.last_error(MemoryError()) == ""


# ─────────────────────────────────────────── streams and encodings ───────────────────────────────────────────

def plain(*args, folder, redirect="", **env):
    """The exit status and output of a command of the shell, with `redirect` behind it."""
    command = " ".join(f"'{a}'" for a in (sys.executable, *args))
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {redirect}"], cwd=folder, capture_output=True,
                          timeout=120, env={**os.environ, **env})
    return done.returncode, done.stdout, done.stderr


def narrow(encoding):
    return f"import sys\nfor s in (sys.stdout, sys.stderr): s.reconfigure(encoding='{encoding}', errors='strict')\n"


def test_all_four_scripts_under_ascii_and_with_any_seed(small, tmp_path):
    more = dict(folder=tmp_path, before=NO_FIGURES + narrow("ascii"))
    seed = "--seed", 10**30
    run_ok(*TRAIN, "--root", small / "toy", *seed, **more)
    run_ok("mgu_generate.py", "--ckpt", small / "pretrained.pt", "--per-class", 1, "--max-steps", 2, "--out", "set",
           *seed, **more)
    run_ok("finetune.py", "--ckpt", small / "pretrained.pt", "--aux", "set", "--epochs", 1, "--batch-size", 4, *seed,
           **more)
    run_ok("evaluate.py", "--ckpt", with_dropout(small, tmp_path / "d.pt"), "--score", "dropout", "msp", *seed,
           **more)


@pytest.mark.parametrize("streams", ("2>&1 | head -1", "closed"))
def test_streams_that_nobody_reads(small, tmp_path, streams):
    """A reader that goes away, in a plain process, since Python flushes its streams at its end; and `>&- 2>&-`, where
    Python starts without streams."""
    if streams == "closed":
        run_ok(*TRAIN, "--root", small / "toy", folder=tmp_path,
               before="import os, sys\nos.close(1)\nos.close(2)\nsys.stdout = sys.stderr = None")
    else:
        code, _, err = plain(REPO / TRAIN[0], *TRAIN[1:], "--root", small / "toy", folder=tmp_path, redirect=streams)
        assert code == 0 and not err, err
    assert (common.load_checkpoint(tmp_path / "pretrained.pt")[1]["epoch"] == 1
            and (tmp_path / "pretrained.png").exists())


def test_a_terminal_that_is_gone(small, tmp_path):
    """Its writes fail in another way than those to a closed pipe; the training goes on."""
    terminal, inner = os.openpty()
    name = os.ttyname(inner)
    p = start(*TRAIN, "--root", small / "toy", "--epochs", 12, folder=tmp_path,
              before=f"import os, sys\nfor n in (1, 2): os.dup2(os.open({name!r}, os.O_RDWR | os.O_NOCTTY), n)\n"
                     "sys.stdout, sys.stderr = (open(n, 'w', buffering=1, closefd=False) for n in (1, 2))")
    assert wait_for(lambda: lines(tmp_path / "pretrained.jsonl"), p), os.read(terminal, 9999)
    os.close(inner)
    os.close(terminal)
    assert finish(p, tmp_path).code == 0 and (tmp_path / "pretrained.png").exists()


def test_a_full_disk_behind_a_stream_is_an_error():
    stream = common.Unbroken(open("/dev/full", "w", buffering=1))
    with pytest.raises(OSError, match="No space"):
        stream.write("a line\n")


def test_help_under_ascii(tmp_path):
    """(Plain processes with ASCII output, without the script's folder on the path: test_scripts.py.)"""
    for script in ("pretrain.py", "mgu_generate.py", "finetune.py", "evaluate.py"):
        assert "usage:" in run_ok(script, "--help", folder=tmp_path, before=narrow("ascii")).out


# ───────────────────────────────────────── signals, torchrun, numbers ─────────────────────────────────────────

@pytest.mark.parametrize("name", ("SIGHUP", "SIGUSR1", "SIGINT"))
def test_signals_save_and_leave(small, tmp_path, name):
    command = (*TRAIN, "--root", small / "toy", "--epochs", 200)
    usual = ("import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"     # as they are not below nohup
             "signal.signal(signal.SIGINT, signal.default_int_handler)")
    p = start(*command, folder=tmp_path, before=usual)
    assert wait_for(lambda: len(lines(tmp_path / "pretrained.jsonl")) >= 2, p)
    os.kill(p.pid, getattr(signal, name))
    done = finish(p, tmp_path)
    assert done.code == 128 + getattr(signal, name) and "the same command continues" in done.out and not done.err
    last = [json.loads(line) for line in lines(tmp_path / "pretrained.jsonl")][-1]
    checkpoint = common.load_checkpoint(tmp_path / "pretrained.pt")[1]
    assert 3 * checkpoint["epoch"] + checkpoint["step"] >= last["step"]


@pytest.mark.parametrize("env", (dict(RANK="1"), dict(WORLD_SIZE="2"), dict(RANK=""), dict(RANK="1", WORLD_SIZE="2"),
                                 dict(LOCAL_RANK="x"), dict(RANK="0", WORLD_SIZE="two", LOCAL_RANK="0", MASTER_ADDR="h",
                                                            MASTER_PORT="1"),
                                 dict(RANK="2", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="h", MASTER_PORT="1")))
@pytest.mark.parametrize("script", ("pretrain.py", "evaluate.py"))
def test_variables_left_over_from_torchrun(tmp_path, env, script):
    done = finish(start(script, folder=tmp_path, **env), tmp_path, env.get("RANK", ""))
    one_line(done, next(iter(env)), "unset them, or start with torchrun")
    assert not names(tmp_path)


def test_a_port_that_another_program_has(small, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        env = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                   MASTER_PORT=str(s.getsockname()[1]))
        one_line(finish(start("evaluate.py", folder=tmp_path, **env), tmp_path, "0"), "cannot join", env["MASTER_PORT"])


def test_a_checkpoint_of_an_unknown_data_set(small, tmp_path):
    checkpoint = torch.load(small / "pretrained.pt", weights_only=True)
    torch.save(dict(checkpoint, data="kitti"), tmp_path / "ft.pt")
    for script in ("mgu_generate.py", "evaluate.py"):
        one_line(run(script, "--ckpt", "ft.pt", folder=tmp_path), "ft.pt", "kitti", "expected one of")


def test_a_batch_too_small_names_the_remedy(other_labels, tmp_path):
    root = other_labels((), None)
    for path in list((root / "train").rglob("*.png")):
        if path.name != "0.png":
            path.unlink()
    one_line(run(*TRAIN, "--root", root, folder=tmp_path), "batch of 1 images", "add images")


@pytest.mark.parametrize("split", ("training", "validation"))
def test_a_wrong_id_is_told_before_the_first_step(other_labels, tmp_path, split):
    """Not in the epoch that meets it, which of the validation images is the twentieth of a thousand."""
    changed = []

    def once(pixels):
        changed.append(True)
        return np.where(np.arange(pixels.size).reshape(pixels.shape) == 7, 99, pixels).astype(np.uint8) \
            if len(changed) == 1 else pixels
    root = other_labels([f"annotations/{split}"], once)
    done = run(*TRAIN, "--root", root, "--epochs", 3, folder=tmp_path)
    one_line(done, f"annotations/{split}", "holds id 99")
    assert not names(tmp_path)


def test_a_run_that_is_not_finished_is_told(small, tmp_path):
    checkpoint = torch.load(small / "pretrained.pt", weights_only=True)
    for epoch in (1, 2):
        torch.save(dict(checkpoint, epoch=epoch), tmp_path / f"{epoch}.pt")
        done = run_ok("evaluate.py", "--ckpt", f"{epoch}.pt", folder=tmp_path, before=NO_FIGURES)
        assert ("note: 1.pt stands at epoch 1 of 2: its run is not finished" in done.out) == (epoch == 1)

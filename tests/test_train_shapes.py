"""examples/train_shapes.py in short: its curves, its checkpoints, its processes, its figures."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import python_path

for name in ("matplotlib", "pycocotools", "rich", "torchvision"):
    pytest.importorskip(name)

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
shapes, shapes_report, train_shapes = map(
    importlib.import_module, ("shapes", "shapes_report", "train_shapes")
)
sys.path.remove(str(EXAMPLES))

STEPS = 3
# In float64 a pooler that rounds otherwise changes a loss by some 1e-15 of itself, and a proposal more or
# less by 1e-3 or more; in float32 rounding alone adds and drops proposals after a few steps.
SHORT = f"--steps {STEPS} --image-size 64 --batch-size 2 --test-images 5 --dtype float64".split()
ROUNDING = 1e-12


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The tensors are too small to share out, and torchrun gives its processes one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run of both poolers."""
    out = tmp_path_factory.mktemp("finished")
    assert train_shapes.main([*SHORT, "--out", str(out)]) == 0
    return out


def losses_of(out, pooler):
    """The log without its times."""
    rows = shapes_report.read_log(out / pooler / "log.jsonl")
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    return np.array([[row.loss, *(getattr(row, name) for name in shapes_report.LOSSES)] for row in rows])


def weights_of(out, pooler):
    return torch.load(out / pooler / "checkpoint.pt", weights_only=True)["model"]


def test_an_image_depends_on_its_seed_and_index_alone():
    image, target = shapes.ShapesDataset(range(3, 9), 64, seed=5)[2]
    again, same = shapes.ShapesDataset(range(5, 6), 64, seed=5)[0]
    other, _ = shapes.ShapesDataset(range(5, 6), 64, seed=6)[0]
    assert torch.equal(image, again)
    assert all(torch.equal(target[name], same[name]) for name in target)
    assert not torch.equal(image, other)
    assert int(target["image_id"]) == 5


def test_targets_are_what_is_visible():
    for image, target in shapes.ShapesDataset(range(20), 64):
        assert image.shape == (3, 64, 64)
        assert 0 <= image.min() < image.max() <= 1
        masks = target["masks"]
        assert masks.sum(0).max() == 1  # none lies over another
        for mask, box in zip(masks, target["boxes"].int().tolist(), strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_both_poolers_give_one_curve(finished):
    ours, theirs = (losses_of(finished, pooler) for pooler in train_shapes.POOLERS)
    np.testing.assert_allclose(ours, theirs, rtol=ROUNDING, atol=0)
    assert ours[-1, 0] < ours[0, 0]
    weights = weights_of(finished, "torchvision")
    for name, value in weights_of(finished, "roialign").items():
        torch.testing.assert_close(value, weights[name], rtol=ROUNDING, atol=ROUNDING)


def test_the_pooler_is_the_one_asked_for():
    args = train_shapes.parse_arguments(SHORT)
    for pooler in train_shapes.POOLERS:
        roi_heads = train_shapes.build_model(args, pooler).roi_heads
        for module in (roi_heads.box_roi_pool, roi_heads.mask_roi_pool):
            assert type(module).__module__.split(".")[0] == pooler


def test_report(finished):
    result = json.loads((finished / "result.json").read_text())
    assert result.keys() == {"roialign", "torchvision", "agreement"}
    for pooler in train_shapes.POOLERS:
        assert result[pooler]["ms per step"] > 0
        assert 0 <= result[pooler]["mask AP"] <= result[pooler]["mask AP50"] <= 1
    assert result["agreement"]["steps within 1e-06"] == STEPS
    assert result["agreement"]["times faster per step"] > 0
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")


def test_agreement_counts_steps_until_curves_part():
    ours, theirs = (
        [shapes_report.Row(i + 1, loss, 0, 0, 0, 0, 0, 0) for i, loss in enumerate(losses)]
        for losses in ([2, 2, 2, 2], [2, 2 + 1e-5, 2.5, 2])
    )
    found = shapes_report.agreement(ours, theirs)
    assert found == {"steps within 1e-06": 1, "steps within 0.0001": 2, "steps within 0.01": 2}


def interrupt_after(monkeypatch, step):
    """Press Ctrl-C within a step."""
    train_step = train_shapes.Trainer.train_step

    def interrupted(trainer, *batch):
        if trainer.step == step - 1:
            signal.raise_signal(signal.SIGINT)
        return train_step(trainer, *batch)

    monkeypatch.setattr(train_shapes.Trainer, "train_step", interrupted)


def test_a_resumed_run_is_the_uninterrupted_one(finished, tmp_path, monkeypatch, capsys):
    command = [*SHORT, "--pooler", "roialign", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert train_shapes.main(command) == 130
    assert "the same command with --resume goes on from here" in capsys.readouterr().err
    log = tmp_path / "roialign" / "log.jsonl"
    assert len(log.read_text().splitlines()) == 2
    log.write_text(log.read_text() + '{"step": 3, "lo')  # as if it had died later than its checkpoint
    assert train_shapes.main([*command, "--resume"]) == 0
    assert "going on after step 2" in capsys.readouterr().err
    np.testing.assert_array_equal(losses_of(tmp_path, "roialign"), losses_of(finished, "roialign"))
    expected = weights_of(finished, "roialign")
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(tmp_path, "roialign").items())


def test_a_checkpoint_is_whole_or_not_there(finished, tmp_path, monkeypatch):
    args = train_shapes.parse_arguments(SHORT)
    trainer = train_shapes.Trainer(args, "roialign", train_shapes.World(0, 1, torch.device("cpu")))
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")

    def fill_the_disk(state, file):
        Path(file).write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        trainer.save(path)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume", "--seed", "1"], "--seed must be 0 to resume '{}/roialign/checkpoint.pt', got 1"),
        (["--resume", "--steps", "9"], "--steps must be 3 to resume '{}/roialign/checkpoint.pt', got 9"),
        ([], "--out must hold no run, or --resume be given, got '{}/roialign/checkpoint.pt'"),
        (["--image-size", "100"], "--image-size must be a multiple of 32, got 100"),
        (["--train-images", "1"], "--train-images must be at least --batch-size, 2, got 1"),
        (["--learning-rate", "0"], "--learning-rate must be positive, got 0.0"),
        (["--out", __file__], f"--out must be a folder that can be made, got '{__file__}': "),
    ],
)
def test_bad_arguments(finished, more, message, capsys):
    assert train_shapes.main([*SHORT, "--out", str(finished), *more]) == 2
    assert capsys.readouterr().err.startswith("train_shapes.py: error: " + message.format(finished))


def test_numbers_must_be_whole_and_in_range(capsys):
    for text in ("0", "-1", "1.5", "many"):
        with pytest.raises(SystemExit, match="2"):
            train_shapes.main(["--steps", text])
        error = capsys.readouterr().err
        assert f"argument --steps: must be a whole number, 1 or more, got '{text}'" in error


def test_average_precision():
    dataset = shapes.ShapesDataset(range(10, 30), 64)
    truth = shapes_report.ground_truth(dataset)
    names = ("box AP", "box AP50", "mask AP", "mask AP50")
    perfect = [shape for _, target in dataset for shape in shapes_report.annotate_target(target)]
    circles = [shape for shape in perfect if shape["category_id"] == 1]  # the mean is over three classes
    for found, expected in ((perfect, 1), (circles, 1 / 3), ([], 0)):
        result = shapes_report.average_precision(found, truth)
        assert result == pytest.approx(dict.fromkeys(names, expected))


RANK = """
import os, sys, torch, train_shapes
train = train_shapes.train
def train_and_save(*args):
    model, rows = train(*args)
    torch.save(model.state_dict(), os.path.join(sys.argv[-1], os.environ["RANK"] + ".pt"))
    return model, rows
train_shapes.train = train_and_save
sys.exit(train_shapes.main())
"""


def torchrun(script, *arguments):
    """Two processes, as `torchrun --nproc-per-node 2` starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": python_path(EXAMPLES)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_two_processes_are_the_mean_of_their_shares(tmp_path, capsys):
    """Both end with one set of weights: those of a process that averages the gradients of both shares."""
    arguments = [*SHORT, "--pooler", "roialign", "--steps", "2", "--batch-size", "4", "--out", str(tmp_path)]
    (tmp_path / "rank.py").write_text(RANK)
    printed = torchrun(tmp_path / "rank.py", *arguments)
    assert printed.count("report.png") == 1

    args = train_shapes.parse_arguments(arguments)
    trainer = train_shapes.Trainer(args, "roialign", train_shapes.World(0, 1, torch.device("cpu")))
    trainer.model.train()
    worlds = [train_shapes.World(rank, 2, torch.device("cpu")) for rank in (0, 1)]
    shares = [list(train_shapes.load_batches(args, world, 0)) for world in worlds]
    rows = shapes_report.read_log(tmp_path / "roialign" / "log.jsonl")
    for row, *batches in zip(rows, *shares, strict=True):
        total = 0
        for trainer.world, batch in zip(worlds, batches, strict=True):
            total += sum(trainer.compute_losses(*batch).values()) / 2
        assert row.loss == pytest.approx(total.item(), rel=ROUNDING)
        trainer.descend(total)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=ROUNDING, atol=ROUNDING)

    found = shapes_report.detect(trainer.model, train_shapes.held_out(args), range(args.test_images))
    truth = shapes_report.ground_truth(train_shapes.held_out(args))
    result = json.loads((tmp_path / "result.json").read_text())["roialign"]
    for name, value in shapes_report.average_precision(found, truth).items():
        assert result[name] == pytest.approx(value)

    assert train_shapes.main([*arguments, "--resume"]) == 2
    rule = f"the number of processes must be 2 to resume '{tmp_path}/roialign/checkpoint.pt', got 1"
    assert capsys.readouterr().err == f"train_shapes.py: error: {rule}\n"
